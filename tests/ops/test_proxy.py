"""The proxy of the stack: a real Caddy with the stack's file."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from ..conftest import free_port
from ..helpers.tools import need
from ..helpers.waiting import wait_until
from .files import CADDYFILE


class Replica(ThreadingHTTPServer):
    """Replies to all requests with its name; closes the connection on /crash."""

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def end(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, address: Any) -> None:
        """Ignore closed connections."""


class Handler(BaseHTTPRequestHandler):
    server: Replica

    def answer(self) -> None:
        if self.path == "/crash":
            self.server.seen.append(self.command)
            raise ConnectionAbortedError
        status = 503 if self.path == "/readyz" else 200
        body = self.server.name.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_DELETE = answer  # noqa: N815

    def log_message(self, *words: Any) -> None:
        """Nothing is logged."""


@contextmanager
def replicas() -> Iterator[tuple[Replica, Replica]]:
    pair = Replica("one"), Replica("two")
    try:
        yield pair
    finally:
        for replica in pair:
            replica.end()


@contextmanager
def proxy(path: Path, *replicas: Replica) -> Iterator[httpx.Client]:
    """A client of the proxy without keep-alive."""
    port = free_port()
    environment = {
        **os.environ,
        "HOME": str(path),
        "XDG_CONFIG_HOME": str(path),
        "XDG_DATA_HOME": str(path),
        "PROXY_PORT": str(port),
        "BACKENDS": " ".join(replica.address for replica in replicas),
    }
    words = [need("caddy"), "run", "--adapter", "caddyfile", "--config", str(CADDYFILE)]
    with (path / "log").open("wb") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until(lambda: process.poll() is None and listens(client))
            yield client
    finally:
        process.terminate()
        process.wait(20)


def listens(client: httpx.Client) -> bool:
    try:
        return client.get("/livez").status_code == 200
    except httpx.TransportError:
        return False


def test_the_proxy_balances_requests_over_replicas_and_skips_a_dead_replica(tmp_path):
    with replicas() as (one, two), proxy(tmp_path, one, two) as client:
        assert {client.get("/").text for _ in range(8)} == {"one", "two"}
        one.end()
        answers = [client.request(method, "/") for method in ("GET", "POST", "DELETE") for _ in range(4)]
        assert {(answer.status_code, answer.text) for answer in answers} == {(200, "two")}


def test_the_proxy_forwards_the_reply_of_an_unready_replica(tmp_path):
    with replicas() as (one, two), proxy(tmp_path, one, two) as client:
        answer = client.get("/readyz")
        assert (answer.status_code, answer.text in {"one", "two"}) == (503, True)


def test_if_a_replica_crashes_during_a_post_the_proxy_does_not_send_the_request_again(tmp_path):
    with replicas() as (one, two), proxy(tmp_path, one, two) as client:
        assert client.post("/crash").status_code == 502
        assert [*one.seen, *two.seen] == ["POST"]
