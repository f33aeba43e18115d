"""Real processes that tests start, talk to by lines of JSON, and kill."""

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
    """One process that runs a script of ``tests/workers``."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rw", encoding="utf-8", newline="\n")
        self._pid: int | None = None

    def begin(self) -> None:
        """Waits for its first two lines: its pid, and that it is ready."""
        self._pid = self.hear()
        assert self.hear() == "ready"

    def tell(self, **words: Any) -> None:
        """One line to its standard input."""
        self._lines.write(json.dumps(words) + "\n")
        self._lines.flush()

    def hear(self) -> Any:
        """The next line from its standard output; ``None`` at its end."""
        try:
            line = self._lines.readline()
        except ConnectionResetError:  # killed before it read what it was told
            line = ""
        return json.loads(line) if line.endswith("\n") else None

    def kill(self) -> None:
        """kill -9; returns when it has ended."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            while self.hear() is not None:
                pass

    def end(self) -> None:
        """Makes sure that it is gone."""
        self.kill()
        with contextlib.suppress(OSError):
            self._lines.close()
        self._connection.close()


@contextmanager
def workers(
    script: str, count: int, options: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Iterator[list[Worker]]:
    """So many processes that run one script with ``options`` and their number as ``worker``, all ready."""
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
    """Does some work in a fork of this process; its exit status, 0 if nothing was raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which is what is tested
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]
