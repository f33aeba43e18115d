"""Real processes that tests start, control by lines of JSON, and kill."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).parents[1] / "workers"


class Worker:
    """A process that runs a script of ``tests/workers``."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rw", encoding="utf-8", newline="\n")
        self._pid: int | None = None

    def begin(self) -> None:
        """Read its first two lines: its process id, and ``ready``."""
        self._pid = self.receive()
        assert self.receive() == "ready"

    def send(self, **words: Any) -> None:
        """Write a line to its standard input."""
        self._lines.write(json.dumps(words) + "\n")
        self._lines.flush()

    def receive(self) -> Any:
        """Read the next line of its standard output; ``None`` at the end."""
        try:
            line = self._lines.readline()
        except ConnectionResetError:  # killed before it read its input
            line = ""
        return json.loads(line) if line.endswith("\n") else None

    def kill(self) -> None:
        """Send SIGKILL; return when the process has ended."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            while self.receive() is not None:
                pass

    def pause(self) -> None:
        """Stop the process, until :meth:`resume`."""
        assert self._pid is not None
        os.kill(self._pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process continue."""
        assert self._pid is not None
        os.kill(self._pid, signal.SIGCONT)

    def end(self) -> None:
        """Kill the process and close the connection to it."""
        self.kill()
        with contextlib.suppress(OSError):
            self._lines.close()
        self._connection.close()


@contextmanager
def workers(
    script: str, count: int, options: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Iterator[list[Worker]]:
    """Start ``count`` processes that run the script; yield them when all are ready.

    Each process receives the ``options`` and, as ``worker``, its own number.
    """
    pairs = [socket.socketpair() for _ in range(count)]
    fds = [theirs.fileno() for _, theirs in pairs]
    nursery = subprocess.Popen(
        [sys.executable, str(WORKERS / "nursery.py"), json.dumps({"script": script, "options": options, "fds": fds})],
        stdin=subprocess.PIPE,
        pass_fds=fds,
        env={**os.environ, **(environment or {})},
    )
    started = [Worker(ours) for ours, _ in pairs]
    for _, theirs in pairs:
        theirs.close()
    try:
        for worker in started:
            worker.begin()
        yield started
    finally:
        for worker in started:
            worker.end()
        nursery.communicate()


def in_child(work: Callable[[], Any]) -> int:
    """Run ``work()`` in a fork of this process; return the exit status, 0 if it raised nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about a fork beside threads, the subject of the test
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]
