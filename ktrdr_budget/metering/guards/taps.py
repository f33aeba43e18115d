"""Stand between an SDK and its HTTP client, where every request passes, whatever method of the SDK made it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

from ktrdr_budget.metering.calls import Call
from ktrdr_budget.metering.guards.bounds import GuardOptions
from ktrdr_budget.metering.guards.dialect import Dialect, Listener
from ktrdr_budget.metering.guards.exchange import Exchange, Refused, current_exchange, judge_error, judge_status
from ktrdr_budget.metering.steps import Steps, drive, drive_sync

__all__ = ["AsyncTap", "SyncTap", "Tap"]

DRAIN_TIMEOUT_S = 1.0
"""How long a stream that is closed at its last word is read on for the usage that follows."""
_READABLE_ENCODINGS = ("", "identity")


class Tap:
    """Looks like the HTTP client to the SDK, also to ``isinstance``."""

    _stream_class: Callable[[Any], Any]

    def __init__(self, inner: Any, dialect: Dialect, options: GuardOptions) -> None:
        self.inner = inner
        self._dialect = dialect
        self._options = options

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _requesting(self, request: Callable[[], Any]) -> Steps[Any]:
        """One call of an SDK's method, with all of its attempts."""
        exchange = Exchange(self._dialect, self._options)
        token = current_exchange.set(exchange)
        try:
            return (yield request)
        except Refused as refused:
            raise refused.error from None
        finally:
            current_exchange.reset(token)
            yield from exchange.give_back()

    def _sending(self, exchange: Exchange, request: Any, stream: bool, options: dict[str, Any]) -> Steps[Any]:
        """One attempt."""
        request, bound = exchange.prepare(request, stream=stream)
        if bound is None:
            return (yield partial(self.inner.send, request, stream=stream, **options))
        try:
            call = yield from exchange.reserve(bound)
        except Exception as error:  # an SDK would try again
            raise Refused(error) from None
        try:
            response = yield partial(self.inner.send, request, stream=stream, **options)
        except BaseException as error:
            if judge_error(error) == "unknown":
                yield from exchange.keep(error)
            raise
        said = judge_status(response.status_code, self._options.provider)
        if said == "unknown":
            yield from exchange.keep(None)
        elif said == "answered":
            exchange.call = None
            settlement = Settlement(call, exchange.listener(bound, response))
            whole = _read_already(response)
            if whole is None:
                settlement.listener.deaf = response.headers.get("content-encoding", "") not in _READABLE_ENCODINGS
                # httpx2 or httpx, whichever made the response.
                library = sys.modules[type(response).__module__.partition(".")[0]]
                response.stream = self._stream_class(library)(response.stream, settlement)
            else:
                settlement.listener.hear(whole)
                settlement.listener.end()
                yield from settlement.settle(None)
        return response


def _read_already(response: Any) -> bytes | None:
    """All of an answer, if it is here: always, unless a stream was asked for."""
    try:
        return bytes(response.content)
    except RuntimeError:  # httpx: ResponseNotRead
        return None


class AsyncTap(Tap):
    """Of an ``AsyncClient``."""

    async def calling(self, request: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Makes one call of the SDK's method ``request``."""
        return await drive(self._requesting(partial(request, *arguments, **named)))

    async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """Makes one attempt, in place of the HTTP client's method."""
        exchange = current_exchange.get()
        if exchange is None:  # from outside of the SDK's own way
            return await self.calling(self.send, request, stream=stream, **options)
        return await drive(self._sending(exchange, request, stream, options))

    def _stream_class(self, library: Any) -> Any:
        return _async_stream_class(library.AsyncByteStream)


class SyncTap(Tap):
    """Of a ``Client``."""

    def calling(self, request: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Makes one call of the SDK's method ``request``."""
        return drive_sync(self._requesting(partial(request, *arguments, **named)))

    def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """Makes one attempt, in place of the HTTP client's method."""
        exchange = current_exchange.get()
        if exchange is None:
            return self.calling(self.send, request, stream=stream, **options)
        return drive_sync(self._sending(exchange, request, stream, options))

    def _stream_class(self, library: Any) -> Any:
        return _sync_stream_class(library.SyncByteStream)


# -- answers -----------------------------------------------------------------------------------------------------------


class Settlement:
    """What an answer comes to: heard, accrued as it is told, settled once."""

    def __init__(self, call: Call, listener: Listener) -> None:
        self.call: Call | None = call
        self.listener = listener

    def hear(self, data: bytes) -> bytes:
        """Takes what arrived, and accrues what it tells; returns what the caller is to see."""
        listener = self.listener
        before = listener.usage
        shown = listener.hear(data)
        if listener.usage is not None and listener.usage is not before and not listener.final and self.call is not None:
            self.call.report(listener.usage)
        return shown

    def settle(self, error: BaseException | None) -> Steps[None]:
        """Commits the last word, or an estimate. Once."""
        call = self.take()
        if call is not None:
            yield from call.leave_steps(error)

    def take(self) -> Call | None:
        """The call, told how it ended; ``None`` if somebody else settles it."""
        call, self.call = self.call, None
        if call is not None:
            usage = self.listener.usage
            if self.listener.final and usage is not None:
                call.finish(usage)
            else:
                call.report(self.listener.estimate())
        return call

    @property
    def waits(self) -> bool:
        """The model has finished, and the usage is about to be told."""
        return self.call is not None and self.listener.ending


@lru_cache
def _async_stream_class(base: Any) -> Any:
    class GuardedAsyncStream(base):  # type: ignore[misc]
        """The body of an answer; settled at its last word, at its end, or when it is closed early."""

        def __init__(self, inner: Any, settlement: Settlement) -> None:
            self._inner = inner
            self._settlement = settlement
            self._chunks = inner.__aiter__()
            self._loop = asyncio.get_running_loop()

        async def __aiter__(self) -> Any:
            settlement = self._settlement
            try:
                async for chunk in self._chunks:
                    shown = settlement.hear(chunk)
                    if settlement.listener.final and settlement.call is not None:
                        await drive(settlement.settle(None))
                    if shown:
                        yield shown
            except GeneratorExit:  # whoever drops it closes it
                raise
            except BaseException as error:
                await drive(settlement.settle(error))
                raise
            rest = settlement.listener.end()
            await drive(settlement.settle(None))
            if rest:
                yield rest

        async def aclose(self) -> None:
            try:
                try:
                    if self._settlement.waits:
                        with suppress(Exception):  # what cannot be read is estimated
                            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                                while self._settlement.waits:
                                    self._settlement.listener.hear(await anext(self._chunks))
                finally:
                    await drive(self._settlement.settle(None))
            finally:
                await self._inner.aclose()

        def __del__(self) -> None:
            call = self._settlement.take() if hasattr(self, "_loop") else None
            if call is not None:
                with suppress(RuntimeError):  # the loop has ended: the reservation stays, and is charged
                    self._loop.call_soon_threadsafe(_leave_soon, self._loop, call)

    return GuardedAsyncStream


@lru_cache
def _sync_stream_class(base: Any) -> Any:
    class GuardedSyncStream(base):  # type: ignore[misc]
        """The same without ``await``."""

        def __init__(self, inner: Any, settlement: Settlement) -> None:
            self._inner = inner
            self._settlement = settlement
            self._chunks = iter(inner)

        def __iter__(self) -> Any:
            settlement = self._settlement
            try:
                for chunk in self._chunks:
                    shown = settlement.hear(chunk)
                    if settlement.listener.final and settlement.call is not None:
                        drive_sync(settlement.settle(None))
                    if shown:
                        yield shown
            except GeneratorExit:
                raise
            except BaseException as error:
                drive_sync(settlement.settle(error))
                raise
            rest = settlement.listener.end()
            drive_sync(settlement.settle(None))
            if rest:
                yield rest

        def close(self) -> None:
            try:
                if self._settlement.waits:
                    # In a thread, for nothing else can end a read before its own timeout of minutes.
                    reader = threading.Thread(target=self._read_on, daemon=True)
                    reader.start()
                    reader.join(DRAIN_TIMEOUT_S)
                drive_sync(self._settlement.settle(None))
            finally:
                self._inner.close()

        def _read_on(self) -> None:
            with suppress(Exception):
                while self._settlement.waits:
                    self._settlement.listener.hear(next(self._chunks))

        def __del__(self) -> None:
            call = self._settlement.take() if hasattr(self, "_chunks") else None
            if call is not None:
                # A garbage collection may happen in any thread, also in the one that would have to do this.
                with suppress(RuntimeError):  # the interpreter ends
                    threading.Thread(target=call.__exit__, args=(None, None, None), daemon=True).start()

    return GuardedSyncStream


_leaving: set[asyncio.Task[None]] = set()


def _leave_soon(loop: asyncio.AbstractEventLoop, call: Call) -> None:
    task = loop.create_task(call.__aexit__(None, None, None))
    _leaving.add(task)
    task.add_done_callback(_leaving.discard)
