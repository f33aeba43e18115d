"""Load for an HTTP server, from a process of its own: connections that each send the next request once the last one is
answered. It does little else, so that it does not limit the server's throughput.

Run as `python -m benchmarks.http_load PORT PATH CONNECTIONS SECONDS [BODY]`; prints requests per second.
"""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import time
from typing import Any

__all__ = ["requests_per_second"]


def requests_per_second(port: int, path: str, connections: int, seconds: float, body: str = "") -> float:
    """Count the POST requests with a 2xx response.

    Raises:
        RuntimeError: a response had another status.
    """
    words = [sys.executable, "-m", "benchmarks.http_load", str(port), path, str(connections), str(seconds), body]
    done = subprocess.run(words, capture_output=True, text=True, timeout=seconds + 30, check=False)
    if done.returncode:
        raise RuntimeError(f"the load on {path} failed: {done.stderr.strip()[-300:]}")
    return float(done.stdout)


class _Client(asyncio.Protocol):
    """One connection, kept alive. Answers have a Content-Length."""

    def __init__(self, request: bytes, failed: asyncio.Future[None]) -> None:
        self._request = request
        self._failed = failed
        self._received = b""
        self._transport: Any = None
        self.answered = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if len(body) < int(length):
            return
        if not head.startswith(b"HTTP/1.1 2"):
            self._fail(f"{head.splitlines()[0]!r} {body[:200]!r}")
            return
        self._received = b""
        self.answered += 1
        self._transport.write(self._request)

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the server has closed the connection: {error}")

    def _fail(self, reason: str) -> None:
        if not self._failed.done():
            self._failed.set_exception(RuntimeError(reason))


async def _load(port: int, path: str, connections: int, seconds: float, body: bytes) -> float:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    if body:
        head += "Content-Type: application/json\r\n"
    request = head.encode() + b"\r\n" + body
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[None] = loop.create_future()
    clients = [_Client(request, failed) for _ in range(connections)]
    waiting = iter(clients)
    for _ in clients:
        await loop.create_connection(lambda: next(waiting), "127.0.0.1", port)
    await asyncio.wait([failed], timeout=seconds / 5)  # warm by now
    before, begun = sum(client.answered for client in clients), time.perf_counter()
    await asyncio.wait([failed], timeout=seconds)
    if failed.done():
        failed.result()
    failed.cancel()
    if not before:
        raise RuntimeError("no answer")
    return (sum(client.answered for client in clients) - before) / (time.perf_counter() - begun)


def _main(port: str, path: str, connections: str, seconds: str, body: str) -> None:
    load = _load(int(port), path, int(connections), float(seconds), body.encode())
    if importlib.util.find_spec("uvloop") is None:
        print(asyncio.run(load))
    else:
        import uvloop

        print(uvloop.run(load))


if __name__ == "__main__":
    _main(*sys.argv[1:])
