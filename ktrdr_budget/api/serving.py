"""The command ``ktrdr serve``: run the service."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from ktrdr_budget.agent.providers import make_llm
from ktrdr_budget.agent.settings import AgentSettings
from ktrdr_budget.api.app import create_app, make_limiter
from ktrdr_budget.api.auth import is_loopback
from ktrdr_budget.api.settings import Settings, SettingsError, load_settings
from ktrdr_budget.api.startup_report import startup_report
from ktrdr_budget.errors import InvalidArgument

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ktrdr_budget.engine.embedded import EmbeddedServer

__all__ = ["ServeError", "serve", "worker_app"]

KEEP_ALIVE_S = 75
"""Seconds until the service closes an idle connection. Proxies close their idle connections earlier."""
GRACE_S = 10
SILENT_MAX_S = 30
"""Seconds after which the supervisor replaces a silent worker. On a busy machine, a worker needs seconds to start."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(levelname)s: %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}},
    "root": {"level": "WARNING", "handlers": ["stderr"]},
    "loggers": {"ktrdr_budget": {"level": "INFO"}},
}


class ServeError(Exception):
    """The service cannot run; the message is one line. ``exit_code`` is 2 for an invalid setting, else 1."""

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def serve(host: str = "127.0.0.1", port: int = 8000, workers: int = 1, settings: Settings | None = None) -> None:
    """Serve until SIGINT or SIGTERM, then finish the requests in flight and return.

    Args:
        host: the address to listen on. Without keys, only a loopback address is valid, unless ``KTRDR_AUTH=none``.
        port: the TCP port. 0 selects a free port.
        workers: the number of processes that share the port.
        settings: the settings of the service. Default: read from the environment.

    Raises:
        ServeError: a setting is invalid, the port is taken, or the embedded server does not start.
    """
    with _stoppable() as stopper, contextlib.ExitStack() as stack:
        settings = _settings(settings)
        _check_host(host, settings)
        listener = stack.enter_context(_listen(host, port))
        if settings.store_url is None:
            # Also used by this process, so that the embedded server continues when a worker restarts.
            stack.callback(_embedded(settings, stopper).close)
        _report_startup(settings, listener, workers, stopper)
        if workers == 1:
            _Server(_config(settings, workers), stopper).run([listener])
        else:
            stack.enter_context(_metrics_directory())
            _supervise(_config(settings, workers), listener, stopper)


# -- before it serves --------------------------------------------------------------------------------------------------


def _settings(settings: Settings | None) -> Settings:
    try:
        settings = load_settings() if settings is None else settings
        agent = AgentSettings.from_environment()
        make_llm(make_limiter(settings, agent))  # report invalid settings before serving
    except (SettingsError, InvalidArgument) as error:
        raise ServeError(str(error)) from None
    return settings


def _check_host(host: str, settings: Settings) -> None:
    if settings.use_keys or settings.admin_keys or settings.auth == "none":
        return
    if not all(is_loopback(address) for address in _addresses(host)):
        raise ServeError(
            f"without keys the service binds to this machine only, not to {host}:"
            " set KTRDR_API_KEY and KTRDR_ADMIN_KEY, or KTRDR_AUTH=none"
        )


def _addresses(host: str) -> list[str]:
    try:
        if not host:  # getaddrinfo would return every address
            raise OSError
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        raise ServeError(f"not an address of this machine: {host!r}") from None


def _listen(host: str, port: int) -> socket.socket:
    """Listen on the port. Connections wait in a queue until a worker accepts them."""
    family = socket.AF_INET6 if all(":" in address for address in _addresses(host)) else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        hint = "; choose another one with --port" if error.errno == errno.EADDRINUSE else ""
        raise ServeError(f"cannot listen on {host} port {port}: {reason}{hint}", exit_code=1) from None
    listener.set_inheritable(True)
    return listener


def _embedded(settings: Settings, stopper: _Stopper) -> EmbeddedServer:
    from ktrdr_budget.engine import embedded

    try:
        with stopper.interrupting(stopper.check):
            return embedded.start(settings.agent_budget_dir)
    except embedded.EmbeddedServerError as error:
        raise ServeError(str(error), exit_code=1) from None


def _report_startup(settings: Settings, listener: socket.socket, workers: int, stopper: _Stopper) -> None:
    # The report has its own warnings. Without a handler, Python would print the log lines of the limiter, too.
    logging.getLogger("ktrdr_budget").addHandler(logging.NullHandler())

    async def report() -> None:
        limiter = make_limiter(settings, AgentSettings.from_environment())
        task = asyncio.current_task()
        assert task is not None
        with stopper.interrupting(partial(task.get_loop().call_soon_threadsafe, task.cancel)):
            async for line in startup_report(settings, limiter):
                _print(line)
            await limiter.close()

    try:
        asyncio.run(report())
    except asyncio.CancelledError:
        raise _StoppedError from None
    except InvalidArgument as error:  # a URL that the driver refuses
        raise ServeError(f"KTRDR_REDIS_URL: {error}") from None
    if settings.auth == "none":
        _print("warning: KTRDR_AUTH=none: every caller that can reach this address may do everything")
    if settings.on_store_error == "allow" and workers > 1:
        _print("warning: KTRDR_ON_STORE_ERROR=allow: only the worker that admitted a hold unchecked can settle it")
    if settings.on_store_error == "lease" and workers > 1:
        _print("warning: KTRDR_ON_STORE_ERROR=lease: each worker prepays its own chunks; no other worker can use them")
    host, port, *_ = listener.getsockname()
    _print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


# -- while it serves ---------------------------------------------------------------------------------------------------


def _config(settings: Settings, workers: int) -> uvicorn.Config:
    return uvicorn.Config(
        partial(worker_app, settings),
        factory=True,
        workers=workers,
        lifespan="on",
        log_config=LOGGING,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        timeout_worker_healthcheck=SILENT_MAX_S,
        server_header=False,
    )


def worker_app(settings: Settings) -> FastAPI:
    """Create the app of a worker process, and tune garbage collection for the process.

    With the defaults of Python, a busy service spends a fifth of its time on collections: the objects of concurrent
    requests still exist after several collections, and each full collection visits all modules.
    """
    app = create_app(settings)
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
    return app


class _Server(uvicorn.Server):
    """A server that exits normally after a signal."""

    def __init__(self, config: uvicorn.Config, stopper: _Stopper) -> None:
        super().__init__(config)
        self._stopper = stopper

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while serving. Unlike in the base class, a handled signal is not raised again afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        self.should_exit = self.should_exit or self._stopper.stopped
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _supervise(config: uvicorn.Config, listener: socket.socket, stopper: _Stopper) -> None:
    config.configure_logging()
    supervisor = Multiprocess(config, sockets=[listener])
    stopper.check()
    supervisor.run()
    if any(worker.exitcode == STARTUP_FAILURE for worker in supervisor.processes):
        raise ServeError("the workers do not start; their errors are above", exit_code=1)


class _StoppedError(BaseException):
    """A signal arrived before the server handled signals."""


class _Stopper:
    """The signal handler until the server starts: it records the signal, and interrupts the current wait."""

    def __init__(self) -> None:
        self.stopped = False
        self._end: Callable[[], object] | None = None

    def stop(self, number: int, frame: object) -> None:
        """Handle a signal."""
        self.stopped = True
        if self._end is not None:
            self._end()

    def check(self) -> None:
        """Raise if there was a signal. The handler must not raise, because a handler may interrupt any statement."""
        if self.stopped:
            raise _StoppedError

    @contextlib.contextmanager
    def interrupting(self, end: Callable[[], object]) -> Iterator[None]:
        """Call ``end`` if a signal arrives during the block."""
        self._end = end
        try:
            self.check()
            yield
        finally:
            self._end = None
        self.check()


@contextlib.contextmanager
def _stoppable() -> Iterator[_Stopper]:
    """If a signal arrives before the server handles signals, end the block without an error."""
    stopper = _Stopper()
    if threading.current_thread() is not threading.main_thread():
        yield stopper
        return
    before = {number: signal.signal(number, stopper.stop) for number in SIGNALS}
    try:
        with contextlib.suppress(_StoppedError):
            yield stopper
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _metrics_directory() -> Iterator[None]:
    """Set ``PROMETHEUS_MULTIPROC_DIR`` to a new directory, in which the workers share counters.

    prometheus_client reads the variable on import.
    """
    before = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    directory = os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="ktrdr-metrics-")
    try:
        yield
    finally:
        if before is None:
            del os.environ["PROMETHEUS_MULTIPROC_DIR"]
        else:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = before
        shutil.rmtree(directory, ignore_errors=True)
