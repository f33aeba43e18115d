"""Stand between an SDK and its HTTP client, where every request passes, whatever method of the SDK made it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from typing import Any

from ktrdr_budget.errors import UnmeteredCall
from ktrdr_budget.metering.dual_flow import DualFlow, drive, drive_sync
from ktrdr_budget.metering.guards.bounds import GuardOptions
from ktrdr_budget.metering.guards.dialect import Dialect, Listener
from ktrdr_budget.metering.guards.exchange import (
    ErrorEvent,
    Exchange,
    Refused,
    current_exchange,
    judge_error,
    judge_status,
)
from ktrdr_budget.metering.guards.wires import AsyncWire, Drain, SyncWire, Wire
from ktrdr_budget.metering.metered_call import MeteredCall

__all__ = ["AsyncTap", "SyncTap", "Tap"]

DRAIN_TIMEOUT_S = 1.0
"""How long a stream that is closed at its last word is read on for the usage that follows."""
PATIENCE_S = 0.08
"""How long a caller who was cancelled is kept until his stream is settled; then it is settled without him."""
_READABLE_ENCODINGS = ("", "identity")
_VERBS = ("request", "get", "post", "put", "patch", "delete", "options", "head", "stream")
"""What an HTTP client sends by; the SDKs build a request, and call ``send``."""


class Tap:
    """Looks like the HTTP client to the SDK, also to ``isinstance``."""

    _stream_class: Callable[[Any], Any]
    _wire_class: type[Wire]

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
                f"{name!r} of the HTTP client would go past the guard: use the SDK's own methods, or client.post(...)"
            )
        return getattr(self.inner, name)

    def _requesting(self, request: Callable[[], Any]) -> DualFlow[Any]:
        """One call of an SDK's method, with all of its attempts."""
        exchange = Exchange(self._dialect, self._options)
        token = current_exchange.set(exchange)
        failure: BaseException | None = None
        try:
            return (yield request)
        except Refused as refused:
            failure = refused.error
            raise refused.error from None
        except BaseException as error:
            failure = error
            raise
        finally:
            current_exchange.reset(token)
            yield from exchange.leave(failure)

    def _sending(self, exchange: Exchange, request: Any, stream: bool, options: dict[str, Any]) -> DualFlow[Any]:
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
            exchange.unsure |= judge_error(error) == "unknown"
            raise
        said = judge_status(response.status_code, self._options.provider)
        exchange.unsure |= said == "unknown"
        if said == "answered":
            exchange.call = None
            settlement = Settlement(call, exchange.listener(bound, response))
            whole = _read_already(response)
            if whole is None:
                settlement.wire = self._wire_class.tap(response)
                settlement.listener.deaf = response.headers.get("content-encoding", "") not in _READABLE_ENCODINGS
                # httpx2 or httpx, whichever made the response.
                library = sys.modules[type(response).__module__.partition(".")[0]]
                response.stream = self._stream_class(library)(response.stream, settlement)
            else:
                settlement.listener.hear(whole)
                settlement.listener.end()
                yield from settlement.settle(None, True)
        return response


def _read_already(response: Any) -> bytes | None:
    """All of an answer, if it is here: always, unless a stream was asked for."""
    try:
        return bytes(response.content)
    except RuntimeError:  # httpx: ResponseNotRead
        return None


class AsyncTap(Tap):
    """Of an ``AsyncClient``."""

    _wire_class = AsyncWire

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

    _wire_class = SyncWire

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

    def __init__(self, call: MeteredCall, listener: Listener) -> None:
        self.call: MeteredCall | None = call
        self.listener = listener
        self.wire: Any = None
        """Where it arrives, if that can be listened to."""

    def hear(self, data: bytes) -> bytes:
        """Takes what arrived, and accrues what it tells; returns what the caller is to see."""
        listener = self.listener
        if self.wire is not None:
            self.wire.heard(data)
        told = listener.told
        shown = listener.hear(data)
        if listener.told != told and self.call is not None and not listener.final and listener.usage is not None:
            self.call.report(listener.usage)
        return shown

    def settle(self, error: BaseException | None, all_heard: bool) -> DualFlow[None]:
        """Commits the last word, or an estimate. Once.

        Args:
            error: what ended it.
            all_heard: all that had arrived was heard.
        """
        call = self.take(all_heard)
        if call is not None:
            failure = self.listener.failure
            yield from call.leave_flow(ErrorEvent(failure) if failure and error is None else error)

    def take(self, all_heard: bool) -> MeteredCall | None:
        """The call, told how it ended; ``None`` if somebody else settles it."""
        call, self.call = self.call, None
        if call is not None:
            usage = self.listener.usage
            if self.listener.final and usage is not None:
                call.finish(usage)
            elif self.listener.ended:
                call.unreported()
            else:
                call.report(self.listener.estimate(all_heard))
        return call

    @property
    def all_heard(self) -> bool:
        """Whether all that has arrived was heard; false also if that cannot be told."""
        return self.wire is not None and bool(self.wire.all_heard)

    def ended_by(self, error: BaseException) -> bool:
        """Whether the stream has ended by itself, and not by what came together with some last data."""
        return self.wire is None or self.wire.interrupted is not error

    @property
    def broke_off(self) -> bool:
        """Whether, of a stream that has ended by itself, all was heard."""
        return self.wire is None or not self.wire.lost

    @property
    def waits(self) -> bool:
        """The model has finished, and the usage is about to be told."""
        return self.call is not None and self.listener.ending

    @contextmanager
    def reading_on(self) -> Iterator[Drain]:
        """The bounds of what is read on inside, before it is settled."""
        drain = Drain(DRAIN_TIMEOUT_S, DRAIN_TIMEOUT_S) if self.waits else Drain()
        if self.wire is not None:
            self.wire.patient, self.wire.drain = self.waits, drain
        try:
            yield drain
        finally:
            if self.wire is not None:
                self.wire.drain = None

    def goes_on(self, drain: Drain) -> bool:
        """Whether more is to be read."""
        listener = self.listener
        return self.call is not None and not listener.final and not listener.ended and not drain.over

    def let_go(self) -> None:
        """Listens no more."""
        if self.wire is not None:
            self.wire.let_go()


@lru_cache
def _async_stream_class(base: Any) -> Any:
    class GuardedAsyncStream(base):  # type: ignore[misc]
        """The body of an answer; settled at its last word, at its end, or when it is closed early."""

        def __init__(self, inner: Any, settlement: Settlement) -> None:
            self._inner = inner
            self._settlement = settlement
            self._chunks = inner.__aiter__()
            self._loop = asyncio.get_running_loop()
            self._ending: asyncio.Task[None] | None = None

        async def __aiter__(self) -> Any:
            settlement = self._settlement
            listener, wire = settlement.listener, settlement.wire
            try:
                async for chunk in self._chunks:
                    shown = settlement.hear(chunk)
                    if listener.ended and settlement.call is not None:
                        await drive(settlement.settle(None, True))
                    if wire is not None and wire.interrupted is not None:
                        raise wire.interrupted
                    if shown:
                        yield shown
            except GeneratorExit:  # whoever drops it closes it
                raise
            except BaseException as error:
                if settlement.ended_by(error):
                    await drive(settlement.settle(error, settlement.broke_off))
                else:
                    await self._end(error)
                raise
            rest = settlement.listener.end()
            await drive(settlement.settle(None, True))
            if rest:
                yield rest

        async def aclose(self) -> None:
            await self._end(None)

        async def _end(self, error: BaseException | None) -> None:
            settlement = self._settlement
            if self._ending is None:
                if settlement.call is None or (settlement.all_heard and not settlement.waits):
                    await _wound_up(self._inner, settlement, error, True)
                    return
                work = _read_on(self._inner, self._chunks, settlement, error)
                self._ending = _in_background(self._loop, work)
            task = asyncio.current_task()
            cancelled = error is not None or (task is not None and task.cancelling())
            # It goes on by itself if it is not awaited any more.
            try:
                await asyncio.wait([self._ending], timeout=PATIENCE_S if cancelled else None)
            except asyncio.CancelledError:
                self._ending.cancel()  # nothing more is read; what is known is settled
                await asyncio.wait([self._ending], timeout=PATIENCE_S)
                raise
            if self._ending.done():
                self._ending.result()

        def __del__(self) -> None:
            settlement = self._settlement if hasattr(self, "_ending") and self._ending is None else None
            call = settlement.take(settlement.all_heard) if settlement is not None else None
            if call is not None:
                with suppress(RuntimeError):  # the loop has ended: the reservation stays, and is charged
                    self._loop.call_soon_threadsafe(_leave_soon, self._loop, call)

    return GuardedAsyncStream


async def _read_on(inner: Any, chunks: Any, settlement: Settlement, error: BaseException | None) -> None:
    """Hears what has arrived of a stream that is left early, within bounds, and settles it."""
    all_heard = settlement.waits  # the model has told all that it had to tell
    with settlement.reading_on() as drain:
        try:
            while settlement.goes_on(drain):
                # Without a wire silence is seen here; that of a wire is shorter.
                async with asyncio.timeout(drain.left_s() if settlement.wire else drain.wait_s(None)):
                    settlement.hear(await anext(chunks))
        except StopAsyncIteration:
            settlement.listener.end()
            all_heard = True
        except TimeoutError:
            all_heard |= settlement.wire is None and not drain.over
        except Exception:  # what cannot be read is estimated
            all_heard |= drain.caught_up
        except asyncio.CancelledError:
            pass
    await _wound_up(inner, settlement, error, all_heard)


async def _wound_up(inner: Any, settlement: Settlement, error: BaseException | None, all_heard: bool) -> None:
    try:
        await drive(settlement.settle(error, all_heard))
    finally:
        settlement.let_go()
        await inner.aclose()


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
                    if settlement.listener.ended and settlement.call is not None:
                        drive_sync(settlement.settle(None, True))
                    if shown:
                        yield shown
            except GeneratorExit:
                raise
            except BaseException as error:
                drive_sync(settlement.settle(error, settlement.broke_off))
                raise
            rest = settlement.listener.end()
            drive_sync(settlement.settle(None, True))
            if rest:
                yield rest

        def close(self) -> None:
            settlement = self._settlement
            try:
                all_heard = True
                if settlement.call is not None and (settlement.waits or not settlement.all_heard):
                    all_heard = self._read_on()
                drive_sync(settlement.settle(None, all_heard))
            finally:
                settlement.let_go()
                self._inner.close()

        def _read_on(self) -> bool:
            settlement = self._settlement
            all_heard = settlement.waits
            with settlement.reading_on() as drain:
                if settlement.wire is not None:
                    return self._heard_on(drain) or all_heard
                # In a thread, for nothing else can end a read before its own timeout of minutes.
                ended: list[bool] = []
                reader = threading.Thread(target=lambda: ended.append(self._heard_on(drain)), daemon=True)
                reader.start()
                reader.join(drain.left_s())
                return any(ended) or all_heard

        def _heard_on(self, drain: Drain) -> bool:
            settlement = self._settlement
            try:
                while settlement.goes_on(drain):
                    settlement.hear(next(self._chunks))
            except StopIteration:
                settlement.listener.end()
                return True
            except Exception:
                return drain.caught_up
            return settlement.listener.final

        def __del__(self) -> None:
            call = self._settlement.take(self._settlement.all_heard) if hasattr(self, "_chunks") else None
            if call is not None:
                # A garbage collection may happen in any thread, also in the one that would have to do this.
                with suppress(RuntimeError):  # the interpreter ends
                    threading.Thread(target=call.__exit__, args=(None, None, None), daemon=True).start()

    return GuardedSyncStream


_background: set[asyncio.Task[None]] = set()


def _in_background(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = loop.create_task(work)
    _background.add(task)
    task.add_done_callback(_background.discard)
    return task


def _leave_soon(loop: asyncio.AbstractEventLoop, call: MeteredCall) -> None:
    _in_background(loop, call.__aexit__(None, None, None))
