"""``make stack`` as a process, on free ports."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from ..helpers.waiting import WITHIN_S, wait_until

ROOT = Path(__file__).parents[2]
FREE_PORTS = ("--port", "0", "--replica-port", "0", "--prometheus-port", "0")


def environment(**variables: Any) -> dict[str, str]:
    """The environment of this process, with ``variables`` in place of all settings of the service."""
    names = ("KTRDR_", "AGENT_", "OTEL_", "PROMETHEUS_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    return {**clean, **{name: str(value) for name, value in variables.items()}}


class Stack:
    """A stack that runs or has run."""

    def __init__(self, *options: str, **variables: Any) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "stack.py"), *options],
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            self.lines.extend(line.rstrip("\n") for line in lines)

    def wait_ready(self) -> None:
        """Wait until all parts have started."""
        wait_until(lambda: self.printed("stack: ready") or self.process.poll() is not None)
        assert self.printed("stack: ready"), self.lines

    def printed(self, beginning: str) -> bool:
        """Whether a line with this beginning has been printed."""
        return any(line.startswith(beginning) for line in list(self.lines))

    def place(self, name: str) -> str:
        """Return the printed location of a part."""
        [line] = [line for line in self.lines if line.startswith(f"stack: {name} ")]
        return line.removeprefix(f"stack: {name}").strip()

    def url(self, name: str) -> str:
        """Return the URL of a part."""
        return self.place(name).partition(" ")[0]

    def pid(self, name: str) -> int:
        """Return the process id of a replica."""
        [pid] = re.findall(r"process (\d+)", self.place(name))
        return int(pid)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, within_s: float = WITHIN_S) -> int:
        """Wait for the end; return the exit code."""
        code = self.process.wait(within_s)
        self._reader.join()
        return code


@contextmanager
def stack(*options: str, **variables: Any) -> Iterator[Stack]:
    """A stack that is ready."""
    running = Stack(*FREE_PORTS, *options, **variables)
    try:
        running.wait_ready()
        yield running
    finally:
        if running.process.poll() is None:
            running.signal(signal.SIGTERM)
        running.end()


def answers(url: str) -> bool:
    """Whether the address has an HTTP server."""
    try:
        httpx.get(url, timeout=30)
    except httpx.HTTPError:
        return False
    return True
