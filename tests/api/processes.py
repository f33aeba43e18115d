"""The service in its own processes, as `ktrdr serve` runs it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from ..conftest import free_port
from ..helpers.waiting import WITHIN_S

MAIN = """
import sys
from ktrdr_budget.api.serving import ServeError, serve

if __name__ == "__main__":
    try:
        serve(host=sys.argv[1], port=int(sys.argv[2]), workers=int(sys.argv[3]))
    except ServeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
"""


PATIENT = {"KTRDR_TIMEOUT": "20"}
"""A long deadline for calls of the store, because other tests may keep the machine busy."""


class ServiceProcess:
    """A service, running or ended."""

    def __init__(self, host: str, port: int, workers: int, environment: dict[str, Any], cwd: Any) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.output: list[str] = []
        clean = {n: v for n, v in os.environ.items() if not n.startswith(("KTRDR_", "AGENT_", "PROMETHEUS_", "OTEL_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, host, str(self.port), str(workers)],
            env={**clean, **PATIENT, **{name: str(value) for name, value in environment.items()}},
            cwd=cwd,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            self.output.extend(line.rstrip("\n") for line in lines)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return httpx.request(method, self.url + path, timeout=60, **options)

    def wait_listening(self, within_s: float = WITHIN_S) -> None:
        """Wait until the port accepts connections. They are served by any worker that has started."""
        ends = time.monotonic() + within_s
        while not self.is_listening():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < ends, self.output
            time.sleep(0.01)

    def is_listening(self) -> bool:
        """Whether connections are accepted."""
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=10).close()
        except OSError:
            return False
        return True

    def wait_for_line(self, beginning: str = "listening on", within_s: float = WITHIN_S) -> None:
        """Wait for a line of the output."""
        ends = time.monotonic() + within_s
        while not any(line.startswith(beginning) for line in self.output):
            assert self.process.poll() is None, self.output
            assert time.monotonic() < ends, self.output
            time.sleep(0.01)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, within_s: float = WITHIN_S) -> int:
        """Wait for the end of the process; return its exit code."""
        code = self.process.wait(within_s)
        self._reader.join()
        return code

    def stop(self) -> int:
        """Stop the process with SIGTERM, as a service manager does; return its exit code."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            return self.end()
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join()


@contextmanager
def serving(
    *, host: str = "127.0.0.1", port: int = 0, workers: int = 1, cwd: Any = None, **environment: Any
) -> Iterator[ServiceProcess]:
    """A service that accepts connections."""
    service = ServiceProcess(host, port, workers, environment, cwd)
    try:
        service.wait_listening()
        service.wait_for_line()
        yield service
    finally:
        service.stop()
