"""Servers that are not Redis, or that do not match the URL's scheme: the error names the cause, not just a timeout."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import socket
import threading
from collections.abc import Iterator

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter, StoreUnavailable
from ktrdr_budget.audit import verify
from ktrdr_budget.engine.transport import resp
from ktrdr_budget.errors import StoreError

from ..conftest import free_port
from ..helpers.waiting import until

BUDGETS = [Budget("agent", "5.00")]


@pytest.fixture
def plain(start_server) -> Iterator[int]:
    """The port of a Redis server without TLS."""
    port = free_port()
    own = start_server(None, "--port", str(port))
    yield port
    own.kill()


class Page(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *words: object) -> None:
        """Log nothing."""


class QuietServer(http.server.ThreadingHTTPServer):
    def handle_error(self, request: object, address: object) -> None:
        """Print nothing: a client that has its reply may reset the connection."""


@contextlib.contextmanager
def served(server: http.server.HTTPServer) -> Iterator[int]:
    """Run an HTTP server in a thread; yield its port."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(params=["http.server", "waits for the end of the headers"])
def web(request) -> Iterator[int]:
    """The port of an HTTP server."""
    if request.param == "http.server":
        with served(QuietServer(("127.0.0.1", 0), Page)) as port:
            yield port
        return
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=_patient, args=(listener,), daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def _patient(listener: socket.socket) -> None:
    """An HTTP server that replies after the blank line at the end of the headers."""

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            received = b""
            while b"\r\n\r\n" not in received:
                chunk = connection.recv(4096)
                if not chunk:
                    return
                received += chunk
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


async def refusal(url: str) -> str:
    limiter = AsyncBudgetLimiter(url, BUDGETS, timeout=20.0)
    for call in (limiter.start, lambda: limiter.reserve("agent", "0.15"), lambda: limiter.status("agent")):
        with pytest.raises(StoreError) as refused:
            await call()
    checks = await limiter.check()
    assert (checks["store"], checks["scripts"]) == (str(refused.value), "unknown: it is not a store")
    await limiter.close()
    return str(refused.value)


@pytest.mark.parametrize("way", ["connections", "client"])
@pytest.mark.parametrize("form", ["rediss://127.0.0.1:{}", "rediss://127.0.0.1:{}?ssl_cert_reqs=none"])
async def test_the_error_says_that_the_server_does_not_speak_tls(plain, form, way, monkeypatch):
    if way == "client":
        monkeypatch.setattr(resp, "Reader", None)
    assert f"the server at 127.0.0.1:{plain} does not speak TLS" in await refusal(form.format(plain))


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
async def test_the_error_says_that_the_server_speaks_http(web, scheme):
    words = await refusal(f"{scheme}://127.0.0.1:{web}")
    assert f"the server at 127.0.0.1:{web} is not a Redis server: it speaks HTTP" in words


@pytest.mark.parametrize("way", ["connections", "client"])
async def test_if_an_http_server_replaces_the_store_the_error_says_that_the_server_speaks_http(
    start_server, way, monkeypatch
):
    if way == "client":
        monkeypatch.setattr(resp, "Reader", None)
    port = free_port()
    own = start_server(None, "--port", str(port))
    limiter = AsyncBudgetLimiter(f"redis://127.0.0.1:{port}", BUDGETS, timeout=20.0)
    await limiter.reserve("agent", "0.15")
    own.kill()
    with served(QuietServer(("127.0.0.1", port), Page)):
        with pytest.raises(StoreError, match="it is not a Redis server: it speaks HTTP"):
            await limiter.reserve("agent", "0.15")
        assert "it speaks HTTP" in str((await limiter.check())["store"])
    await limiter.close()


@pytest.mark.parametrize("form", ["redis+sentinel://127.0.0.1:{}/main", "redis+cluster://127.0.0.1:{}"])
async def test_the_error_for_a_sentinel_or_cluster_url_says_that_the_server_speaks_http(web, form):
    assert "it speaks HTTP" in await refusal(form.format(web))


def test_the_sync_limiter_and_the_audit_raise_an_error_if_the_server_does_not_speak_tls(plain):
    url = f"rediss://127.0.0.1:{plain}"
    with pytest.raises(StoreError, match="does not speak TLS"), BudgetLimiter(url, BUDGETS, timeout=20.0):
        pass
    with pytest.raises(StoreError, match="does not speak TLS"):
        verify(url, timeout=1.0)


async def test_a_call_raises_store_unavailable_if_the_server_accepts_connections_but_never_replies():
    connections = 0

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read()  # until the client gives up; everything is read, nothing is sent
        writer.close()
        await writer.wait_closed()
        connections -= 1

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    limiter = AsyncBudgetLimiter(f"redis://127.0.0.1:{port}", BUDGETS, timeout=0.5)
    with pytest.raises(StoreUnavailable, match="sent no reply within 0.5 s") as refused:
        await limiter.reserve("agent", "0.15")
    assert not isinstance(refused.value, StoreError)
    await limiter.close()
    server.close()
    await until(lambda: connections == 0)


async def test_the_error_is_connection_refused_if_no_server_listens():
    url = f"redis://127.0.0.1:{free_port()}"
    limiter = AsyncBudgetLimiter(url, BUDGETS, timeout=0.2)
    with pytest.raises(StoreUnavailable) as refused:
        await limiter.reserve("agent", "0.15")
    assert str(refused.value) == f"cannot connect to {url} (connection refused); gave up after 0.2 s"
    with pytest.raises(
        StoreUnavailable,
        match=rf"^cannot connect to {url} \(connection refused\) for \d\.\d s; failing fast until it replies$",
    ):
        await limiter.reserve("agent", "0.15")
    await limiter.close()
