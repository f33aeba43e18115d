"""Transports between an SDK and its HTTP client: every request of an SDK passes through one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from ktrdr_budget.errors import UnmeteredCall
from ktrdr_budget.metering.dual_flow import DualFlow, drive, drive_sync
from ktrdr_budget.metering.guards.bounds import GuardOptions
from ktrdr_budget.metering.guards.dialect import Dialect
from ktrdr_budget.metering.guards.metered_response import MeteredResponse
from ktrdr_budget.metering.guards.metered_streams import AsyncMeteredStream, SyncMeteredStream, stream_class
from ktrdr_budget.metering.guards.network_tap import AsyncNetworkTap, NetworkTap, SyncNetworkTap
from ktrdr_budget.metering.guards.sdk_call import (
    CallAborted,
    SDKCall,
    current_sdk_call,
    error_outcome,
    status_outcome,
)

__all__ = ["AsyncMeteredTransport", "MeteredTransport", "SyncMeteredTransport"]

_READABLE_ENCODINGS = ("", "identity")
_VERBS = ("request", "get", "post", "put", "patch", "delete", "options", "head", "stream")
"""Methods by which an HTTP client sends a request. The SDKs use ``build_request`` and ``send`` instead."""


class MeteredTransport:
    """A wrapper that replaces an HTTP client in an SDK. The wrapper passes ``isinstance`` checks for that client."""

    _tap_class: type[NetworkTap]
    _stream_class: type[AsyncMeteredStream] | type[SyncMeteredStream]
    _stream_base: str
    """The name of the library's base class of streams."""

    def __init__(self, inner: Any, dialect: Dialect, options: GuardOptions) -> None:
        self.inner = inner
        self._dialect = dialect
        self._options = options

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name in _VERBS and not self._options.allow_unmetered:
            raise UnmeteredCall(
                f"{name!r} of the HTTP client would bypass the guard: use the SDK's own methods, or client.post(...)"
            )
        return getattr(self.inner, name)

    def _call_flow(self, request: Callable[[], Any]) -> DualFlow[Any]:
        """Run one call of an SDK method, with all attempts of the call."""
        sdk_call = SDKCall(self._dialect, self._options)
        token = current_sdk_call.set(sdk_call)
        failure: BaseException | None = None
        try:
            return (yield request)
        except CallAborted as aborted:
            failure = aborted.error
            raise aborted.error from None
        except BaseException as error:
            failure = error
            raise
        finally:
            current_sdk_call.reset(token)
            yield from sdk_call.end(failure)

    def _attempt_flow(self, sdk_call: SDKCall, request: Any, stream: bool, options: dict[str, Any]) -> DualFlow[Any]:
        """Run one attempt: reserve, send the request, and meter the response."""
        request, bound = sdk_call.prepare(request, stream=stream)
        send = partial(self.inner.send, request, stream=stream, **options)
        if bound is None:
            return (yield send)
        try:
            call = yield from sdk_call.reserve(bound)
        except Exception as error:  # the SDK would retry after this error
            raise CallAborted(error) from None
        try:
            response = yield send
        except BaseException as error:
            sdk_call.may_be_billed |= error_outcome(error) == "unknown"
            raise
        outcome = status_outcome(response.status_code, self._options.provider)
        sdk_call.may_be_billed |= outcome == "unknown"
        if outcome == "answered":
            sdk_call.call = None
            yield from self._meter(response, MeteredResponse(call, sdk_call.response_parser(bound, response)))
        return response

    def _meter(self, response: Any, metered: MeteredResponse) -> DualFlow[None]:
        """Settle a complete response, or wrap the body of a stream."""
        content = _content_if_read(response)
        if content is not None:
            metered.feed(content)
            metered.parser.end()
            yield from metered.settle(None, True)
            return
        metered.tap = self._tap_class.attach(response)
        metered.parser.unreadable = response.headers.get("content-encoding", "") not in _READABLE_ENCODINGS
        library = sys.modules[type(response).__module__.partition(".")[0]]  # httpx or httpx2
        base = getattr(library, self._stream_base)
        wrap = stream_class(self._stream_class, base)  # type: ignore[arg-type]  # mypy: classes are not Hashable
        response.stream = wrap(response.stream, metered)


def _content_if_read(response: Any) -> bytes | None:
    """The content of a response, if the HTTP client has read it; ``None`` for a stream."""
    try:
        return bytes(response.content)
    except RuntimeError:  # httpx: ResponseNotRead
        return None


class AsyncMeteredTransport(MeteredTransport):
    """Wraps an ``AsyncClient``."""

    _tap_class = AsyncNetworkTap
    _stream_class = AsyncMeteredStream
    _stream_base = "AsyncByteStream"

    async def call(self, request: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Run the SDK's method ``request`` as one metered call."""
        return await drive(self._call_flow(partial(request, *arguments, **named)))

    async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """Make one attempt. This method replaces ``send`` of the HTTP client."""
        sdk_call = current_sdk_call.get()
        if sdk_call is None:  # the request was not sent by the SDK's `request`
            return await self.call(self.send, request, stream=stream, **options)
        return await drive(self._attempt_flow(sdk_call, request, stream, options))


class SyncMeteredTransport(MeteredTransport):
    """Wraps a ``Client``."""

    _tap_class = SyncNetworkTap
    _stream_class = SyncMeteredStream
    _stream_base = "SyncByteStream"

    def call(self, request: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Run the SDK's method ``request`` as one metered call."""
        return drive_sync(self._call_flow(partial(request, *arguments, **named)))

    def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """Make one attempt. This method replaces ``send`` of the HTTP client."""
        sdk_call = current_sdk_call.get()
        if sdk_call is None:
            return self.call(self.send, request, stream=stream, **options)
        return drive_sync(self._attempt_flow(sdk_call, request, stream, options))
