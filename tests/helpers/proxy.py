"""A proxy in front of a real server that delays, holds or drops requests and replies."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any

from .patience import is_away, is_there

Place = Path | tuple[str, int]
"""A unix socket, or a host and a port."""


class _Connection:
    """The state of the current script on one connection."""

    def __init__(self) -> None:
        self.awaits_reply = False
        self.greeting = False
        self.losing = False
        self.is_blackholed = False


class Proxy:
    """Listens on a unix socket or a port, forwards everything to a server, and injects faults.

    ``lose_replies``: this many replies to scripts are read from the server, which has executed them, and dropped
    together with their connection. ``lose_requests``: this many scripts are dropped before they reach the server.
    ``fate``: a function that is called for each script. It returns "request" to lose the script, or "reply" to lose the
    reply to the script.
    ``lose_all("request")``, ``lose_all("reply")``: all scripts, or the replies to all scripts, are lost until
    ``lose_all(None)``.
    ``hold_replies()``: the server executes requests, but its replies are held until ``release_replies()``. Only
    NOSCRIPT errors, and replies to a client's greeting, are passed on.
    ``freeze()``: half-open connections. They stay open and new ones are accepted, but nothing passes in either
    direction until ``thaw()``, which also delivers the data of senders that have disconnected.
    ``blackhole(count)``: the oldest ``count`` connections, or all, behave as behind a NAT that has lost its state. They
    stay open on both sides, but everything sent on them vanishes (``requests_ignored`` counts the scripts). New
    connections work.
    ``cut()``: every connection is closed, and every new one as well, until ``mend()``.
    ``delay_s``, ``bytes_per_s``: the delay of each piece of data, and the bandwidth.

    Args:
        server: the address of the server.
        place: the address to listen on; port 0 is any free port.
    """

    def __init__(self, server: Place, place: Place) -> None:
        self.lose_replies = 0
        self.lose_requests = 0
        self.fate: Callable[[], str | None] = lambda: None
        self.replies_lost = 0
        self.requests_lost = 0
        self.requests_ignored = 0
        self.scripts_run = 0
        self.delay_s = 0.0
        self.bytes_per_s = 0.0
        self._is_cut = False
        self._upstream = server
        self._place = place
        self._replies_released = asyncio.Event()
        self._replies_released.set()
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._connections: set[asyncio.Task[None]] = set()
        self._open_connections: list[_Connection] = []

    @property
    def url(self) -> str:
        if isinstance(self._place, Path):
            return f"unix://{self._place}"
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"redis://{host}:{port}"

    async def __aenter__(self) -> Proxy:
        if isinstance(self._place, Path):
            self._server = await asyncio.start_unix_server(self._serve, self._place)
        else:
            self._server = await asyncio.start_server(self._serve, *self._place)
        self._update_reachability()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_away(self.url)
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await asyncio.sleep(0)  # a closed transport releases its socket in the next iteration of the event loop

    def hold_replies(self) -> None:
        is_away(self.url)
        self._replies_released.clear()

    def release_replies(self) -> None:
        self._replies_released.set()
        self._update_reachability()

    def freeze(self) -> None:
        is_away(self.url)
        self._thawed.clear()

    def thaw(self) -> None:
        self._thawed.set()
        self._update_reachability()

    @property
    def connections(self) -> int:
        """The number of open connections that are not black holes."""
        return sum(not connection.is_blackholed for connection in self._open_connections)

    def blackhole(self, count: int | None = None) -> None:
        for connection in self._open_connections[:count]:
            connection.is_blackholed = True

    def cut(self) -> None:
        is_away(self.url)
        self._is_cut = True
        for task in list(self._connections):
            task.cancel()

    def lose_all(self, fate: str | None) -> None:
        (is_there if fate is None else is_away)(self.url)
        self.fate = lambda: fate

    def mend(self) -> None:
        self._is_cut = False
        self._update_reachability()

    def _update_reachability(self) -> None:
        if self._replies_released.is_set() and self._thawed.is_set() and not self._is_cut:
            is_there(self.url)

    async def _pass(self, writer: asyncio.StreamWriter, chunk: bytes) -> None:
        """Forward data with the configured delay and bandwidth."""
        await self._thawed.wait()
        if pause_s := self.delay_s + (len(chunk) / self.bytes_per_s if self.bytes_per_s else 0):
            await asyncio.sleep(pause_s)
        writer.write(chunk)
        await writer.drain()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        writers, pumps = [writer], []
        connection = None
        try:
            if self._is_cut:
                raise ConnectionResetError
            await self._thawed.wait()
            upstream_reader, upstream_writer = await self._connect()
            writers.append(upstream_writer)
            connection = _Connection()
            self._open_connections.append(connection)
            pumps = [
                asyncio.ensure_future(self._requests(reader, upstream_writer, connection)),
                asyncio.ensure_future(self._replies(upstream_reader, writer, connection)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for pump in pumps:
                pump.cancel()
            for open_writer in writers:
                open_writer.close()
            self._connections.discard(task)
            if connection in self._open_connections:
                self._open_connections.remove(connection)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self._upstream, Path):
            return await asyncio.open_unix_connection(self._upstream)
        return await asyncio.open_connection(*self._upstream)

    async def _requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: _Connection
    ) -> None:
        while chunk := await reader.read(1 << 20):
            if connection.is_blackholed:
                self.requests_ignored += b"\r\nEVAL" in chunk
                continue
            connection.greeting = b"\r\nCLIENT\r\n" in chunk
            if b"\r\nEVAL" in chunk:
                fate = self.fate()
                if fate == "request" or self.lose_requests:
                    self.lose_requests = max(0, self.lose_requests - 1)
                    self.requests_lost += 1
                    return
                connection.awaits_reply = True
                if (fate == "reply" or self.lose_replies) and not connection.losing:
                    self.lose_replies = max(0, self.lose_replies - 1)
                    connection.losing = True
            await self._pass(writer, chunk)

    async def _replies(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: _Connection
    ) -> None:
        while chunk := await reader.read(1 << 20):
            if not chunk.startswith(b"-NOSCRIPT"):
                self.scripts_run += connection.awaits_reply
                connection.awaits_reply = False
                if connection.losing:
                    self.replies_lost += 1
                    return
                if not connection.greeting:
                    await self._replies_released.wait()
            if not connection.is_blackholed:
                await self._pass(writer, chunk)


class ThreadedProxy:
    """A :class:`Proxy` in a thread, for callers without an event loop."""

    def __init__(self, server: Place, place: Place) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self.proxy: Proxy = self._in_thread(_made(server, place))
        """Any thread may read its counters, and set its ``fate``."""

    def _in_thread(self, work: Coroutine[Any, Any, Any]) -> Any:
        if not self._thread.is_alive():
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    @property
    def url(self) -> str:
        return str(self.proxy.url)

    def __enter__(self) -> ThreadedProxy:
        self._in_thread(self.proxy.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._in_thread(self.proxy.__aexit__(kind, error, trace))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def hold_replies(self) -> None:
        self._in_thread(_called(self.proxy.hold_replies))

    def release_replies(self) -> None:
        self._in_thread(_called(self.proxy.release_replies))

    def freeze(self) -> None:
        self._in_thread(_called(self.proxy.freeze))

    def thaw(self) -> None:
        self._in_thread(_called(self.proxy.thaw))

    def blackhole(self) -> None:
        self._in_thread(_called(self.proxy.blackhole))

    def cut(self) -> None:
        self._in_thread(_called(self.proxy.cut))

    def mend(self) -> None:
        self._in_thread(_called(self.proxy.mend))


async def _made(server: Place, place: Place) -> Proxy:
    return Proxy(server, place)


async def _called(act: Callable[[], None]) -> None:
    act()
