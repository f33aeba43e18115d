"""Spans of this package, on the API of OpenTelemetry.

Without a tracer provider, the API uses its no-op tracer: spans cost little and have no effect. A provider is set by
:func:`~ktrdr_budget.telemetry.tracing.configure_tracing`, or by the application. OpenTelemetry is imported by the first
span, so that importing this package stays fast.
"""

from __future__ import annotations

import re
import traceback
from asyncio import CancelledError
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import Token
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from ktrdr_budget.errors import BudgetExceeded

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import SpanContext, Tracer

__all__ = [
    "Kind",
    "Span",
    "current_link",
    "current_trace_id",
    "ending_of",
    "mark_operation",
    "operation_of",
    "operation_scope",
    "own_tracer",
    "span",
    "suppressed",
    "without_secrets",
]

Kind = Literal["internal", "client", "server", "producer", "consumer"]
AttributeValue = str | bool | int | float | list[str] | list[bool] | list[int] | list[float]
Attributes = Mapping[str, AttributeValue | None]

SCOPE = "ktrdr_budget"
"""The instrumentation scope of these spans."""
OPERATION_ID = "operation.id"
OPERATION_TYPE = "operation.type"
_OPERATION_KEY = "ktrdr_budget.operation"
_TEXT_MAX = 1000
_STACK_MAX = 8000
_SECRETS = re.compile(
    r"(?P<url>\b[a-z][a-z0-9+.-]*://)[^@\s/]+@"  # user and password of a URL
    r"|(?P<word>\b(?:bearer|authorization\W+basic)\s+)[\w.~+/=-]{8,}"  # value of an Authorization header
    r"|\b(?:sk|pk|rk)-[\w-]{8,}",  # keys of model providers
    re.IGNORECASE,
)
_tracer: Tracer | None = None


def own_tracer() -> Tracer:
    """Return the tracer of this package's spans. It has no effect until the process sets a tracer provider."""
    global _tracer
    if _tracer is None:
        from opentelemetry import trace

        _tracer = trace.get_tracer(SCOPE)  # a proxy, which follows a provider that is set later
    return _tracer


def without_secrets(text: str, length_max: int = _TEXT_MAX) -> str:
    """Mask passwords in URLs and API keys; cut the text to ``length_max`` characters."""
    masked = _SECRETS.sub(lambda found: f"{found['url'] or found['word'] or ''}***{'@' if found['url'] else ''}", text)
    return masked if len(masked) <= length_max else masked[: length_max - 1] + "…"


# -- spans -------------------------------------------------------------------------------------------------------------


def span(
    name: str,
    attributes: Attributes | None = None,
    *,
    kind: Kind = "internal",
    links: Iterable[SpanContext | Span | None] = (),
    root: bool = False,
) -> Span:
    """Create a span for a block: ``with span("agent.phase.design", {"phase": "designing"}) as current: …``.

    If an exception leaves the block, the span records it and gets the status "error" and the attribute ``error``.
    Cancellations and denials are outcomes, not errors: they set the attributes of :func:`ending_of` instead.

    Args:
        attributes: values of ``None`` are left out.
        links: results of :func:`current_link`, or other spans; ``None`` is left out.
        root: whether to start a new trace; if not, the span is a child of the current span.
    """
    return Span(name, attributes, kind, links, root)


class Span:
    """A span of OpenTelemetry, from entering to leaving a ``with`` block."""

    __slots__ = ("_attributes", "_kind", "_links", "_name", "_root", "_span", "_token")

    def __init__(
        self,
        name: str,
        attributes: Attributes | None,
        kind: Kind,
        links: Iterable[SpanContext | Span | None],
        root: bool,
    ) -> None:
        self._name = name
        self._attributes = attributes
        self._kind = kind
        self._links = links
        self._root = root
        self._span: Any = None
        self._token: Any = None

    def __enter__(self) -> Span:
        from opentelemetry import context, trace

        parent = trace.set_span_in_context(trace.INVALID_SPAN) if self._root else context.get_current()
        contexts = [link.context if isinstance(link, Span) else link for link in self._links]
        tracer = trace.NoOpTracer() if _is_suppressed() else own_tracer()
        self._span = tracer.start_span(
            self._name,
            parent,
            trace.SpanKind[self._kind.upper()],
            {**_given(self._attributes or {}), **operation_of(parent)},
            [trace.Link(linked) for linked in contexts if linked is not None],
        )
        self._token = context.attach(trace.set_span_in_context(self._span, parent))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            if ending := ending_of(error):
                self.set_attributes(ending)
            else:
                self.record_exception(error)
                self.fail(_text_of(error))
        _detach(self._token)
        self._span.end()

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits; empty if the trace is not recorded."""
        context = self.context
        return "" if context is None else f"{context.trace_id:032x}"

    @property
    def context(self) -> SpanContext | None:
        """The span's context, for links from other spans; ``None`` if the trace is not recorded."""
        return _recorded(self._span.get_span_context())

    @property
    def recording(self) -> bool:
        """Whether the span records attributes and events."""
        return bool(self._span.is_recording())

    def set_attribute(self, name: str, value: AttributeValue | None) -> None:
        """Set an attribute; ``None`` has no effect."""
        if value is not None:
            self._span.set_attribute(name, value)

    def set_attributes(self, attributes: Attributes) -> None:
        """Set attributes; values of ``None`` are left out."""
        self._span.set_attributes(_given(attributes))

    def add_event(self, name: str, attributes: Attributes | None = None) -> None:
        """Add an event with the current time."""
        self._span.add_event(name, _given(attributes or {}))

    def record_exception(self, error: BaseException, words: str | None = None) -> None:
        """Record an exception as an event, without changing the span's status.

        Args:
            words: a text that replaces the exception's message, causes and lines of code, because these may quote
                confidential text. If the text is empty, only the type and the places in the code are recorded. If
                ``words`` is ``None``, everything is recorded, with secrets masked.
        """
        if not self._span.is_recording():
            return
        # OpenTelemetry's own method would record the message unmasked.
        module, name = type(error).__module__, type(error).__qualname__
        stack = traceback.format_exception(error) if words is None else _places(error)
        described = {
            "exception.type": name if module == "builtins" else f"{module}.{name}",
            "exception.message": without_secrets(str(error) if words is None else words),
            "exception.stacktrace": without_secrets("".join(stack), _STACK_MAX),
        }
        self._span.add_event("exception", described)

    def fail(self, reason: str) -> None:
        """Set the status "error" and the attribute ``error``."""
        from opentelemetry.trace import Status, StatusCode

        reason = without_secrets(reason)
        self._span.set_attribute("error", reason)
        self._span.set_status(Status(StatusCode.ERROR, reason))


def _places(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)
    return [f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}\n' for frame in frames]


def ending_of(error: BaseException) -> Attributes:
    """Return the attributes of a block that ended by a cancellation or a denial; empty for any other exception.

    A generator counts as cancelled if its consumer closes the generator.
    """
    if isinstance(error, (CancelledError, GeneratorExit)):
        return {"outcome": "cancelled"}
    if isinstance(error, BudgetExceeded):
        return {"outcome": "denied", "reason": error.reason}
    return {}


def _given(attributes: Attributes) -> dict[str, AttributeValue]:
    return {name: value for name, value in attributes.items() if value is not None}


def _text_of(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _detach(token: Token[Context]) -> None:
    """Restore the context that was current before ``opentelemetry.context.attach``.

    A generator may be closed in another context than it was started in. Then nothing can be restored, and
    OpenTelemetry's own ``detach`` would log an error (opentelemetry-python #2606).
    """
    with suppress(ValueError):
        token.var.reset(token)


# -- the current span --------------------------------------------------------------------------------------------------


def current_trace_id() -> str:
    """Return the id of the current trace, 32 hexadecimal digits; empty if no trace is being recorded."""
    link = current_link()
    return "" if link is None else f"{link.trace_id:032x}"


def current_link() -> SpanContext | None:
    """Return the current span's context, for ``links``; ``None`` if no span is being recorded."""
    from opentelemetry import trace

    return _recorded(trace.get_current_span().get_span_context())


def _recorded(context: SpanContext) -> SpanContext | None:
    return context if context.is_valid and context.trace_flags.sampled else None


# -- operations --------------------------------------------------------------------------------------------------------


@contextmanager
def operation_scope(operation_id: str, operation_type: str) -> Iterator[None]:
    """Add ``operation.id`` and ``operation.type`` to every span that starts within the block.

    Spans of instrumentations (Redis, HTTP clients) get them from a span processor:
    :func:`~ktrdr_budget.telemetry.tracing.operation_processor`.
    """
    from opentelemetry import context

    token = context.attach(context.set_value(_OPERATION_KEY, (operation_id, operation_type)))
    try:
        yield
    finally:
        _detach(token)


def mark_operation(operation_id: str, operation_type: str) -> None:
    """Set ``operation.id`` and ``operation.type`` on the current span.

    Use this function if the span began before its operation was known. An example is the server span of a request: the
    id of the operation is in the request's body, or the handler generates the id.
    """
    from opentelemetry import trace

    current = trace.get_current_span()
    if current.is_recording():
        current.set_attributes({OPERATION_ID: operation_id, OPERATION_TYPE: operation_type})


def operation_of(context: Context | None) -> dict[str, str]:
    """Return the attributes of a context's operation; empty if the context has none.

    If ``context`` is ``None``, the current context is used.
    """
    from opentelemetry.context import get_value

    operation = get_value(_OPERATION_KEY, context)
    return dict(zip((OPERATION_ID, OPERATION_TYPE), operation, strict=True)) if isinstance(operation, tuple) else {}


@contextmanager
def suppressed() -> Iterator[None]:
    """Suppress all spans within the block, also those of instrumentations. Use it for periodic background work."""
    from opentelemetry import context, trace
    from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY

    silent = context.set_value(_SUPPRESS_INSTRUMENTATION_KEY, True, trace.set_span_in_context(trace.INVALID_SPAN))
    token = context.attach(silent)
    try:
        yield
    finally:
        _detach(token)


def _is_suppressed() -> bool:
    from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, get_value

    return bool(get_value(_SUPPRESS_INSTRUMENTATION_KEY))
