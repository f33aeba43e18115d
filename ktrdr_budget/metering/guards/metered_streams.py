"""Bodies of streamed responses. A call is settled when its stream ends, or when the caller stops reading.

If the caller stops reading early, the stream is drained before the settlement: data that has already arrived is parsed,
within limits.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from functools import lru_cache
from typing import Any

from ktrdr_budget.metering.dual_flow import drive, drive_sync
from ktrdr_budget.metering.guards.metered_response import MeteredResponse
from ktrdr_budget.metering.guards.network_tap import Drain
from ktrdr_budget.metering.metered_call import MeteredCall

__all__ = ["DRAIN_TASK", "AsyncMeteredStream", "SyncMeteredStream", "stream_class"]

CANCELLED_WAIT_S = 0.08
"""How long a cancelled caller waits for the settlement of its stream. After that, the settlement continues in the
background."""
DRAIN_TASK = "ktrdr-budget drain"
"""The name of background tasks that drain and settle a stream."""


@lru_cache
def stream_class(stream: type[Any], base: type[Any]) -> type[Any]:
    """Combine a stream class with the base class that the responses of the HTTP library require."""
    return type(stream.__name__, (stream, base), {})


class AsyncMeteredStream:
    """Body of a response that an ``AsyncClient`` receives."""

    def __init__(self, inner: Any, response: MeteredResponse) -> None:
        self._inner = inner
        self._response = response
        self._chunks = inner.__aiter__()
        self._loop = asyncio.get_running_loop()
        self._drain: asyncio.Task[None] | None = None

    async def __aiter__(self) -> Any:
        response = self._response
        parser, tap = response.parser, response.tap
        try:
            async for chunk in self._chunks:
                passed_on = response.feed(chunk)
                if parser.ended and response.call is not None:
                    await drive(response.settle(None, True))
                if tap is not None and tap.deferred_error is not None:
                    raise tap.deferred_error
                if passed_on:
                    yield passed_on
        except GeneratorExit:  # `aclose` follows
            raise
        except BaseException as error:
            if response.is_deferred(error):
                await self._close(error)
            else:
                await drive(response.settle(error, response.lost_no_data))
            raise
        rest = parser.end()
        await drive(response.settle(None, True))
        if rest:
            yield rest

    async def aclose(self) -> None:
        """Drain and settle the stream, and close the connection."""
        await self._close(None)

    async def _close(self, error: BaseException | None) -> None:
        response = self._response
        if self._drain is None:
            if response.call is None or (response.all_parsed and not response.awaits_usage):
                await self._settle_and_close(error, True)
                return
            self._drain = _start_background(self._loop, self._drain_and_settle(error), name=DRAIN_TASK)
        await self._wait_for_drain(self._drain, error)

    async def _wait_for_drain(self, drain: asyncio.Task[None], error: BaseException | None) -> None:
        """Wait until the drain ends. If this task is cancelled, wait only briefly; the drain then continues."""
        task = asyncio.current_task()
        cancelled = error is not None or (task is not None and task.cancelling())
        try:
            await asyncio.wait([drain], timeout=CANCELLED_WAIT_S if cancelled else None)
        except asyncio.CancelledError:
            drain.cancel()  # stops reading, and settles
            await asyncio.wait([drain], timeout=CANCELLED_WAIT_S)
            raise
        if drain.done():
            drain.result()

    async def _drain_and_settle(self, error: BaseException | None) -> None:
        response = self._response
        all_parsed = response.awaits_usage  # all output has arrived
        with response.draining() as drain:
            try:
                while response.needs_more(drain):
                    # Without a tap, the time without data is measured here; a tap has a shorter timeout of its own.
                    async with asyncio.timeout(drain.left_s() if response.tap else drain.wait_s(None)):
                        response.feed(await anext(self._chunks))
            except StopAsyncIteration:
                response.parser.end()
                all_parsed = True
            except TimeoutError:
                all_parsed |= response.tap is None and not drain.exhausted
            except Exception:  # unreadable data is estimated
                all_parsed |= drain.caught_up
            except asyncio.CancelledError:
                pass
        await self._settle_and_close(error, all_parsed)

    async def _settle_and_close(self, error: BaseException | None, all_parsed: bool) -> None:
        try:
            await drive(self._response.settle(error, all_parsed))
        finally:
            self._response.detach()
            await self._inner.aclose()

    def __del__(self) -> None:
        response = self._response if hasattr(self, "_drain") and self._drain is None else None
        call = response.take_call(response.all_parsed) if response is not None else None
        if call is not None:
            with suppress(RuntimeError):  # the loop is closed: the reservation stays, and is charged
                self._loop.call_soon_threadsafe(_leave_in_background, self._loop, call)


class SyncMeteredStream:
    """Body of a response that a ``Client`` receives."""

    def __init__(self, inner: Any, response: MeteredResponse) -> None:
        self._inner = inner
        self._response = response
        self._chunks = iter(inner)

    def __iter__(self) -> Any:
        response = self._response
        parser = response.parser
        try:
            for chunk in self._chunks:
                passed_on = response.feed(chunk)
                if parser.ended and response.call is not None:
                    drive_sync(response.settle(None, True))
                if passed_on:
                    yield passed_on
        except GeneratorExit:  # `close` follows
            raise
        except BaseException as error:
            drive_sync(response.settle(error, response.lost_no_data))
            raise
        rest = parser.end()
        drive_sync(response.settle(None, True))
        if rest:
            yield rest

    def close(self) -> None:
        """Drain and settle the stream, and close the connection."""
        response = self._response
        try:
            all_parsed = True
            if response.call is not None and (response.awaits_usage or not response.all_parsed):
                all_parsed = self._drain()
            drive_sync(response.settle(None, all_parsed))
        finally:
            response.detach()
            self._inner.close()

    def _drain(self) -> bool:
        """Parse the data that has arrived; return whether all of it was parsed."""
        response = self._response
        all_output_arrived = response.awaits_usage
        with response.draining() as drain:
            if response.tap is not None:
                return self._read_all(drain) or all_output_arrived
            # Without a tap a read can last until the HTTP client's timeout of minutes, but a thread can be abandoned.
            results: list[bool] = []
            reader = threading.Thread(target=lambda: results.append(self._read_all(drain)), daemon=True)
            reader.start()
            reader.join(drain.left_s())
            return any(results) or all_output_arrived

    def _read_all(self, drain: Drain) -> bool:
        response = self._response
        try:
            while response.needs_more(drain):
                response.feed(next(self._chunks))
        except StopIteration:
            response.parser.end()
            return True
        except Exception:  # unreadable data is estimated
            return drain.caught_up
        return response.parser.final

    def __del__(self) -> None:
        call = self._response.take_call(self._response.all_parsed) if hasattr(self, "_chunks") else None
        if call is not None:
            # The garbage collector may run in the limiter's own thread, where a settlement would block.
            with suppress(RuntimeError):  # the interpreter is shutting down
                threading.Thread(target=call.__exit__, args=(None, None, None), daemon=True).start()


_background: set[asyncio.Task[None]] = set()
"""Keeps tasks alive: an event loop only has weak references to them."""


def _start_background(
    loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None], *, name: str | None = None
) -> asyncio.Task[None]:
    task = loop.create_task(work, name=name)
    _background.add(task)
    task.add_done_callback(_background.discard)
    return task


def _leave_in_background(loop: asyncio.AbstractEventLoop, call: MeteredCall) -> None:
    _start_background(loop, call.__aexit__(None, None, None))
