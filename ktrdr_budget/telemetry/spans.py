"""Spans for whoever wants to write one, whether OpenTelemetry is installed or not.

Nothing here imports OpenTelemetry. As long as no tracer provider is configured in this process (by
:func:`~ktrdr_budget.telemetry.tracing.configure_tracing`, or by an application of one's own), everything does nothing,
at the cost of a function call.
"""

from __future__ import annotations

import re
import sys
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
    "active_tracer",
    "current_link",
    "current_trace_id",
    "ending_of",
    "mark_operation",
    "operation_of",
    "operation_scope",
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
    r"|(?P<word>\b(?:bearer|authorization\W+basic)\s+)[\w.~+/=-]{8,}"  # what an Authorization header carries
    r"|\b(?:sk|pk|rk)-[\w-]{8,}",  # keys of model providers
    re.IGNORECASE,
)
_tracer: Tracer | None = None


def active_tracer() -> Tracer | None:
    """The tracer of these spans; ``None`` as long as this process has no tracer provider."""
    global _tracer
    if _tracer is None:
        trace = sys.modules.get("opentelemetry.trace")
        # Asking for the provider takes a microsecond, too long for each call of a limiter; looking takes none.
        if trace is None or getattr(trace, "_TRACER_PROVIDER", None) is None:
            return None
        provider = trace.get_tracer_provider()
        if isinstance(provider, trace.ProxyTracerProvider):
            return None
        _tracer = provider.get_tracer(SCOPE)
    return _tracer


def without_secrets(text: str, length_max: int = _TEXT_MAX) -> str:
    """A text without passwords of URLs and without keys, cut to ``length_max`` characters."""
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
    """A span around a block: ``with span("agent.phase.design", {"phase": "designing"}) as current: …``.

    An exception that leaves the block is recorded, gives the span the status "error" and its words as the attribute
    ``error``; but a cancellation and a denial are outcomes (:func:`ending_of`), not errors.

    Args:
        attributes: those whose value is ``None`` are left out.
        links: what :func:`current_link` told, or other spans; ``None`` is left out.
        root: begins a trace of its own, whatever the current span is.
    """
    tracer = active_tracer()
    if tracer is None or _is_suppressed():
        return _NO_SPAN
    return _LiveSpan(tracer, name, attributes, kind, links, root)


class Span:
    """A span in a ``with`` statement. This one does nothing: there is no tracing."""

    __slots__ = ()

    def __enter__(self) -> Span:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits; empty if there is no trace that is recorded."""
        return ""

    @property
    def context(self) -> SpanContext | None:
        """For links from other spans."""
        return None

    @property
    def recording(self) -> bool:
        """Whether anybody will see what is said here."""
        return False

    def set_attribute(self, name: str, value: AttributeValue | None) -> None:
        """Says something about the span; ``None`` says nothing."""

    def set_attributes(self, attributes: Attributes) -> None:
        """Says several things about the span."""

    def add_event(self, name: str, attributes: Attributes | None = None) -> None:
        """Something that happened now."""

    def record_exception(self, error: BaseException, words: str | None = None) -> None:
        """An exception, as an event; the span's status stays as it is.

        Args:
            words: are told instead of its message, of what caused it and of lines of code, where those may quote what
                is nobody's business; empty for its type and places alone.
        """

    def fail(self, reason: str) -> None:
        """Gives the span the status "error", with the reason as its attribute ``error``."""


_NO_SPAN = Span()


class _LiveSpan(Span):
    """A span of OpenTelemetry, from entering to leaving the block."""

    __slots__ = ("_attributes", "_kind", "_links", "_name", "_root", "_span", "_token", "_tracer")

    def __init__(
        self,
        tracer: Tracer,
        name: str,
        attributes: Attributes | None,
        kind: Kind,
        links: Iterable[SpanContext | Span | None],
        root: bool,
    ) -> None:
        self._tracer = tracer
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
        self._span = self._tracer.start_span(
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
                self.fail(_words(error))
        _detach(self._token)
        self._span.end()

    @property
    def trace_id(self) -> str:
        return _trace_id(self._span.get_span_context())

    @property
    def context(self) -> SpanContext | None:
        return _recorded(self._span.get_span_context())

    @property
    def recording(self) -> bool:
        return bool(self._span.is_recording())

    def set_attribute(self, name: str, value: AttributeValue | None) -> None:
        if value is not None:
            self._span.set_attribute(name, value)

    def set_attributes(self, attributes: Attributes) -> None:
        self._span.set_attributes(_given(attributes))

    def add_event(self, name: str, attributes: Attributes | None = None) -> None:
        self._span.add_event(name, _given(attributes or {}))

    def record_exception(self, error: BaseException, words: str | None = None) -> None:
        if not self._span.is_recording():
            return
        # OpenTelemetry's own method would tell the message as it is.
        module, name = type(error).__module__, type(error).__qualname__
        told = traceback.format_exception(error) if words is None else _places(error)
        described = {
            "exception.type": name if module == "builtins" else f"{module}.{name}",
            "exception.message": without_secrets(str(error) if words is None else words),
            "exception.stacktrace": without_secrets("".join(told), _STACK_MAX),
        }
        self._span.add_event("exception", described)

    def fail(self, reason: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        reason = without_secrets(reason)
        self._span.set_attribute("error", reason)
        self._span.set_status(Status(StatusCode.ERROR, reason))


def _places(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)
    return [f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}\n' for frame in frames]


def ending_of(error: BaseException) -> Attributes:
    """What a span says of a block that was left by a cancellation or a denial; empty for an error.

    A generator that is closed, because its consumer wants no more of it, is cancelled.
    """
    if isinstance(error, (CancelledError, GeneratorExit)):
        return {"outcome": "cancelled"}
    if isinstance(error, BudgetExceeded):
        return {"outcome": "denied", "reason": error.reason}
    return {}


def _given(attributes: Attributes) -> dict[str, AttributeValue]:
    return {name: value for name, value in attributes.items() if value is not None}


def _words(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _detach(token: Token[Context]) -> None:
    """End what ``opentelemetry.context.attach`` began.

    A generator may be closed in another context than it was begun in: there is nothing to restore there, and
    OpenTelemetry's own ``detach`` would log that as an error (opentelemetry-python #2606).
    """
    with suppress(ValueError):
        token.var.reset(token)


# -- the current span --------------------------------------------------------------------------------------------------


def current_trace_id() -> str:
    """The current trace, 32 hexadecimal digits; empty if there is none, or none that is recorded."""
    link = current_link()
    return "" if link is None else f"{link.trace_id:032x}"


def current_link() -> SpanContext | None:
    """The current span, for ``links`` of another; ``None`` if there is none, or none that is recorded."""
    if active_tracer() is None:
        return None
    return _recorded(sys.modules["opentelemetry.trace"].get_current_span().get_span_context())


def _recorded(context: SpanContext) -> SpanContext | None:
    return context if context.is_valid and context.trace_flags.sampled else None


def _trace_id(context: SpanContext) -> str:
    return f"{context.trace_id:032x}" if _recorded(context) is not None else ""


# -- operations --------------------------------------------------------------------------------------------------------


@contextmanager
def operation_scope(operation_id: str, operation_type: str) -> Iterator[None]:
    """Every span that is started within carries ``operation.id`` and ``operation.type``, whoever starts it.

    Those of instrumentations (Redis, HTTP clients) do so by a span processor of
    :func:`~ktrdr_budget.telemetry.tracing.configure_tracing`.
    """
    if active_tracer() is None:
        yield
        return
    from opentelemetry import context

    token = context.attach(context.set_value(_OPERATION_KEY, (operation_id, operation_type)))
    try:
        yield
    finally:
        _detach(token)


def mark_operation(operation_id: str, operation_type: str) -> None:
    """Set ``operation.id`` and ``operation.type`` on the current span, which began before its operation was known.

    The server span of a request is one: its id is in the body, or is generated by the handler.
    """
    if active_tracer() is None:
        return
    current = sys.modules["opentelemetry.trace"].get_current_span()
    if current.is_recording():
        current.set_attributes({OPERATION_ID: operation_id, OPERATION_TYPE: operation_type})


def operation_of(context: Context | None) -> dict[str, str]:
    """The attributes of the operation that a context belongs to, the current one by default; empty if there is none."""
    from opentelemetry.context import get_value

    operation = get_value(_OPERATION_KEY, context)
    return dict(zip((OPERATION_ID, OPERATION_TYPE), operation, strict=True)) if isinstance(operation, tuple) else {}


@contextmanager
def suppressed() -> Iterator[None]:
    """No spans within, by whatever instrumentation: for work in the background that nobody asked for."""
    if active_tracer() is None:
        yield
        return
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
