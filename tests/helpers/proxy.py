"""A proxy before a real server, that keeps or loses what passes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any


class _Connection:
    """What is known of the script that is under way on one connection."""

    def __init__(self) -> None:
        self.asked = False
        self.greeting = False
        self.losing = False


class Proxy:
    """Listens on a unix socket, forwards everything to another, and fails on demand.

    ``lose_replies``: so many replies to scripts are read from the server, which has thus run them, and are then dropped
    together with their connection. ``lose_requests``: so many scripts are dropped before the server sees them.
    ``fate`` is asked about each script, and may answer "reply" or "request" to lose it.
    ``hold_replies()``: the server runs what it is sent, but its answers wait for ``let_go()``. What a client says when
    it connects is answered, and that the server does not know a script yet is no answer in this sense.
    """

    def __init__(self, server_path: Path, path: Path) -> None:
        self.lose_replies = 0
        self.lose_requests = 0
        self.fate: Callable[[], str | None] = lambda: None
        self.replies_lost = 0
        self.scripts_run = 0
        self._server_path = server_path
        self._path = path
        self._open = asyncio.Event()
        self._open.set()
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"unix://{self._path}"

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await asyncio.sleep(0)  # a closed transport lets go of its socket in the next round of the loop

    def hold_replies(self) -> None:
        self._open.clear()

    def let_go(self) -> None:
        self._open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        writers, pumps = [writer], []
        try:
            upstream_reader, upstream_writer = await asyncio.open_unix_connection(self._server_path)
            writers.append(upstream_writer)
            connection = _Connection()
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

    async def _requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: _Connection
    ) -> None:
        while chunk := await reader.read(1 << 20):
            connection.greeting = b"\r\nCLIENT\r\n" in chunk
            if b"\r\nEVAL" in chunk:
                fate = self.fate()
                if fate == "request" or self.lose_requests:
                    self.lose_requests = max(0, self.lose_requests - 1)
                    return
                connection.asked = True
                if (fate == "reply" or self.lose_replies) and not connection.losing:
                    self.lose_replies = max(0, self.lose_replies - 1)
                    connection.losing = True
            writer.write(chunk)
            await writer.drain()

    async def _replies(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: _Connection
    ) -> None:
        while chunk := await reader.read(1 << 20):
            if not chunk.startswith(b"-NOSCRIPT"):
                self.scripts_run += connection.asked
                connection.asked = False
                if connection.losing:
                    self.replies_lost += 1
                    return
                if not connection.greeting:
                    await self._open.wait()
            writer.write(chunk)
            await writer.drain()


class ThreadedProxy:
    """The same in a thread of its own, for callers without an event loop."""

    def __init__(self, server_path: Path, path: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._proxy = self._in_thread(_made(server_path, path))

    def _in_thread(self, work: Coroutine[Any, Any, Any]) -> Any:
        if not self._thread.is_alive():
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    @property
    def url(self) -> str:
        return str(self._proxy.url)

    def __enter__(self) -> ThreadedProxy:
        self._in_thread(self._proxy.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._in_thread(self._proxy.__aexit__(kind, error, trace))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def hold_replies(self) -> None:
        self._loop.call_soon_threadsafe(self._proxy.hold_replies)

    def let_go(self) -> None:
        self._loop.call_soon_threadsafe(self._proxy.let_go)


async def _made(server_path: Path, path: Path) -> Proxy:
    return Proxy(server_path, path)
