"""One call of an SDK's method. The SDK may make several attempts for one call. Metered calls pay for the attempts.

::

    request(...) of the client            one SDKCall
      └─ send(...) of its HTTP client     one attempt: reserve -> send -> settle (a stream settles at its end)
           rejected (4xx, 5xx, never sent)      the next attempt uses the reservation; after the last, it is released
           unknown (timeout, lost connection)   the next attempt uses the reservation; after the last, it is kept,
                                                because the provider may bill the attempt
           answered                             the reported usage is committed
"""

from __future__ import annotations

import json
from contextvars import ContextVar
from typing import Any, Literal

from ktrdr_budget.errors import UnknownPrice, UnmeteredCall
from ktrdr_budget.metering.dual_flow import DualFlow
from ktrdr_budget.metering.guards.bounds import Bound, GuardOptions, text_size
from ktrdr_budget.metering.guards.dialect import Dialect
from ktrdr_budget.metering.guards.response_parser import ResponseParser
from ktrdr_budget.metering.metered_call import MeteredCall

__all__ = ["CallAborted", "SDKCall", "current_sdk_call", "error_outcome", "status_outcome"]

AttemptOutcome = Literal["answered", "rejected", "unknown"]
"""``answered``: the usage is billed; ``rejected``: nothing is billed; ``unknown``: it may have been billed."""

_NEVER_SENT = {"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol"}

current_sdk_call: ContextVar[SDKCall | None] = ContextVar("ktrdr_budget_sdk_call", default=None)


class CallAborted(BaseException):
    """Carries an error through the SDK to the caller.

    It is a ``BaseException``, so that the SDK neither retries nor wraps it.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def status_outcome(status: int, provider: str) -> AttemptOutcome:
    """The outcome of an attempt that received an HTTP response."""
    if 200 <= status < 300:
        return "answered"
    # Azure bills requests that its content filter stops:
    # learn.microsoft.com/azure/ai-foundry/openai/how-to/manage-costs
    return "unknown" if status == 400 and provider == "azure" else "rejected"


def error_outcome(error: BaseException) -> AttemptOutcome:
    """The outcome of an attempt that failed without an HTTP response."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "rejected" if names & _NEVER_SENT else "unknown"


class SDKCall:
    """The state of one call across its attempts. This class does no I/O; the transports do it."""

    def __init__(self, dialect: Dialect, options: GuardOptions) -> None:
        self.dialect = dialect
        self.options = options
        self.call: MeteredCall | None = None
        """The metered call with the open reservation. The next attempt uses it, or :meth:`end` settles it."""
        self.may_be_billed = False
        """Whether the provider may bill an attempt that was not answered."""
        self._bound: Bound | None = None
        self._route = ""

    def prepare(self, request: Any, *, stream: bool) -> tuple[Any, Bound | None]:
        """Return the request to send, and the bound on its usage.

        The bound is ``None`` if the request is free or is sent unmetered.

        Raises:
            CallAborted: the request must not be sent.
        """
        path = request.url.path
        route = self.dialect.route(request.method, path)
        if route == "free" or (route == "refused" and self.options.allow_unmetered):
            return request, None
        if route == "refused":
            raise CallAborted(
                UnmeteredCall(f"{path} is not metered: guard(allow_unmetered=True) lets it through unmetered")
            )
        body = _json_body(request, path)
        bound = self._bound_of(path, route, request.content, body)
        self._route = route
        if bound.changes:
            request = _with_body(request, _apply(bound.changes, request.content, body))
        if stream:
            # The parser reads the stream while it passes through, so it must not be compressed.
            request.headers["accept-encoding"] = "identity"
        return request, bound

    def _bound_of(self, path: str, route: str, content: bytes, body: dict[str, Any]) -> Bound:
        try:
            model = self.dialect.model(path, body)
            return self.dialect.bound(route, model, body, text_size(content, body), self.options)
        except (UnmeteredCall, UnknownPrice) as error:
            raise CallAborted(error) from None
        except (AttributeError, TypeError, ValueError, KeyError):
            raise CallAborted(UnmeteredCall(f"a request to {path} has an unknown format")) from None

    def reserve(self, bound: Bound) -> DualFlow[MeteredCall]:
        """Return the metered call that pays for the attempt.

        If the open reservation covers the attempt, its call is returned. Otherwise a new call reserves.

        Raises:
            BudgetExceeded, UnknownPrice, StoreUnavailable: as for :class:`MeteredCall`.
        """
        if self._bound is not None and not self._bound.covers(bound):
            yield from self.end(None)
        if self.call is None:
            self.may_be_billed = False
            self._bound = bound
            call = self.options.meter.call(
                provider=self.options.provider,
                model=bound.model,
                input_tokens_max=bound.input_tokens_max,
                output_tokens_max=bound.output_tokens_max,
                operation=bound.operation,
                service_tier=bound.service_tier,
                current=False,
            )
            call.output_hint = bound.output_hint
            yield from call.enter_flow()
            self.call = call
        return self.call

    def end(self, error: BaseException | None) -> DualFlow[None]:
        """Settle an unanswered call: release the reservation, or keep it if the provider may bill an attempt.

        Args:
            error: the error that the caller receives; ``None`` if there is no error.
        """
        call, self.call = self.call, None
        if call is not None:
            if self.may_be_billed:
                call.unknown()
            else:
                call.rejected()
            yield from call.leave_flow(error)

    def response_parser(self, bound: Bound, response: Any) -> ResponseParser:
        """A parser for the response of an attempt."""
        events = response.headers.get("content-type", "").startswith("text/event-stream")
        parser = self.dialect.usage_parser(self._route, bound)
        return ResponseParser(parser, events=events, unseen_output_tokens=self.options.unseen_output_tokens)


def _json_body(request: Any, path: str) -> dict[str, Any]:
    try:
        body = json.loads(request.content)
    except (ValueError, TypeError, RuntimeError):  # includes RecursionError
        body = None
    if not isinstance(body, dict):
        raise CallAborted(UnmeteredCall(f"the body of a request to {path} is not a JSON object"))
    return body


def _apply(changes: dict[str, Any], content: bytes, body: dict[str, Any]) -> bytes:
    """Return the serialised body with the changes applied. A field that is changed to ``None`` is removed."""
    if not body or changes.keys() & body.keys() or not content.startswith(b"{"):
        changed = {**body, **changes}
        kept = {name: value for name, value in changed.items() if value is not None or name not in changes}
        return json.dumps(kept, ensure_ascii=False, separators=(",", ":")).encode()
    # Prepend new fields; the rest, which may be large, is not serialised again.
    return json.dumps(changes, separators=(",", ":")).encode()[:-1] + b"," + content[1:]


def _with_body(request: Any, content: bytes) -> Any:
    """Copy a request with another body; works for httpx and httpx2."""
    headers = request.headers.copy()
    for name in ("content-length", "transfer-encoding"):
        headers.pop(name, None)
    return type(request)(request.method, request.url, headers=headers, content=content, extensions=request.extensions)
