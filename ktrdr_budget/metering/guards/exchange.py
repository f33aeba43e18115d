"""One call of an SDK's method: the attempts that the SDK makes for it, and the meter's calls that pay for them.

::

    request(...) of the client            one Exchange
      └─ send(...) of its HTTP client     one attempt: reserve -> send -> settle, or hand over to the stream
           rejected (4xx, 5xx, never sent)      the reservation serves the next attempt, and is released at the end
           unknown (timeout, cut off)           it serves the next attempt, too; if none is answered, it is kept: the
                                                provider may have worked
           answered                             the reported usage is committed
"""

from __future__ import annotations

import json
from contextvars import ContextVar
from typing import Any

from ktrdr_budget.errors import UnknownPrice, UnmeteredCall
from ktrdr_budget.metering.dual_flow import DualFlow
from ktrdr_budget.metering.guards.bounds import Bound, GuardOptions, text_size
from ktrdr_budget.metering.guards.dialect import Dialect, Listener
from ktrdr_budget.metering.metered_call import MeteredCall

__all__ = ["ErrorEvent", "Exchange", "Refused", "current_exchange", "judge_error", "judge_status"]

_NEVER_SENT = {"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol"}

current_exchange: ContextVar[Exchange | None] = ContextVar("ktrdr_budget_exchange", default=None)


class Refused(BaseException):
    """Carries an error through the SDK to the caller: no ``except Exception`` on the way may retry or rename it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class ErrorEvent(Exception):
    """What a provider told within a stream, by its kind alone: an answer that began well, and failed."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.error_type = kind


def judge_status(status: int, provider: str) -> str:
    """What an answer's status says: ``answered``, ``rejected`` (nothing is billed) or ``unknown``."""
    if 200 <= status < 300:
        return "answered"
    # What a content filter of Azure stops was processed, and is billed:
    # learn.microsoft.com/azure/ai-foundry/openai/how-to/manage-costs
    return "unknown" if status == 400 and provider == "azure" else "rejected"


def judge_error(error: BaseException) -> str:
    """What a failure to get an answer says: ``rejected`` if the request never left, else ``unknown``."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "rejected" if kinds & _NEVER_SENT else "unknown"


class Exchange:
    """See the module. Does no I/O: the taps do, sync and async."""

    def __init__(self, dialect: Dialect, options: GuardOptions) -> None:
        self.dialect = dialect
        self.options = options
        self.call: MeteredCall | None = None
        """An open reservation that waits for the next attempt, or for the end."""
        self.unsure = False
        """The provider may have worked for an attempt that was not answered."""
        self._bound: Bound | None = None
        self._route = ""

    def prepare(self, request: Any, *, stream: bool) -> tuple[Any, Bound | None]:
        """The request as it is to be sent, and its bound; ``None`` if it is free, or let through unmetered.

        Raises:
            Refused: it may not be sent.
        """
        path = request.url.path
        route = self.dialect.route(request.method, path)
        if route == "free":
            return request, None
        if route == "refused":
            if self.options.allow_unmetered:
                return request, None
            raise Refused(
                UnmeteredCall(f"{path} is not metered: guard(allow_unmetered=True) lets it through unmetered")
            )
        try:
            content = request.content
            body = json.loads(content)
            if not isinstance(body, dict):
                raise TypeError
        except (ValueError, TypeError, RuntimeError):  # RecursionError is one, too
            raise Refused(UnmeteredCall(f"the body of a request to {path} is no JSON object")) from None
        try:
            model = self.dialect.model(path, body)
            bound = self.dialect.bound(route, model, body, text_size(content, body), self.options)
        except (UnmeteredCall, UnknownPrice) as error:
            raise Refused(error) from None
        except (AttributeError, TypeError, ValueError, KeyError):
            raise Refused(UnmeteredCall(f"a request to {path} has an unknown shape")) from None
        self._route = route
        if bound.changes:
            request = _with_body(request, _changed(content, body, bound.changes))
        if stream:
            # What arrives is read as it passes by, so it must not be compressed.
            request.headers["accept-encoding"] = "identity"
        return request, bound

    def reserve(self, bound: Bound) -> DualFlow[MeteredCall]:
        """The reservation for an attempt: the one that waits, if it was for the same, or a new one.

        Raises:
            BudgetExceeded, UnknownPrice, StoreUnavailable: as for :class:`MeteredCall`.
        """
        if self._bound is not None and not self._bound.covers(bound):
            yield from self.leave(None)
        if self.call is None:
            self.unsure = False
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

    def leave(self, error: BaseException | None) -> DualFlow[None]:
        """No attempt was answered, and there is no other: what was reserved is released, if the provider accepted none
        of them; it is kept, and charged when it comes due, if nobody knows.

        Args:
            error: what the caller is told.
        """
        call, self.call = self.call, None
        if call is not None:
            if self.unsure:
                call.unknown()
            else:
                call.rejected()
            yield from call.leave_flow(error)

    def listener(self, bound: Bound, response: Any) -> Listener:
        """What listens to an answer."""
        events = response.headers.get("content-type", "").startswith("text/event-stream")
        ear = self.dialect.ear(self._route, bound)
        return Listener(ear, events=events, unseen_output_tokens=self.options.unseen_output_tokens)


def _changed(content: bytes, body: dict[str, Any], changes: dict[str, Any]) -> bytes:
    """The serialised body with these changes; a change to ``None`` leaves the field out."""
    if not body or changes.keys() & body.keys() or not content.startswith(b"{"):
        changed = {**body, **changes}
        kept = {name: value for name, value in changed.items() if value is not None or name not in changes}
        return json.dumps(kept, ensure_ascii=False, separators=(",", ":")).encode()
    # What is new goes before all else; the rest, which may be large, is not written again.
    return json.dumps(changes, separators=(",", ":")).encode()[:-1] + b"," + content[1:]


def _with_body(request: Any, content: bytes) -> Any:
    """The same request with another body; of httpx or httpx2, as the client sends."""
    headers = request.headers.copy()
    for name in ("content-length", "transfer-encoding"):
        headers.pop(name, None)
    return type(request)(request.method, request.url, headers=headers, content=content, extensions=request.extensions)
