"""A server process on its own TCP port: the building block of clusters and sentinel groups."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import redis

from .waiting import WITHIN_S


class Node:
    """A server that a test starts, pauses, kills and restarts; it keeps its port and its directory."""

    def __init__(self, binary: str, directory: Path, words: list[str], environment: Mapping[str, str] | None = None):
        directory.mkdir(parents=True, exist_ok=True)
        self.binary = binary
        self.directory = directory
        self.port = 0
        """Set by the code that creates the node."""
        self.login: dict[str, Any] = {}
        """User and password of :attr:`client`."""
        self.process: subprocess.Popen[bytes] | None = None
        self._words = words
        self._environment = {**os.environ, **(environment or {})}
        self._client: redis.Redis | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.port}>"

    @property
    def client(self) -> redis.Redis:
        """A synchronous client that decodes replies; it raises after 20 s without a reply."""
        if self._client is None:
            self._client = redis.Redis(port=self.port, decode_responses=True, socket_timeout=20, **self.login)
        return self._client

    def command(self, *words: Any) -> Any:
        """Send a command to this node."""
        return self.client.execute_command(*words)

    def raw(self, *words: Any) -> Any:
        """Send a command; return the reply as redis-py's parser reads it, without conversion."""
        connection = self.client.connection_pool.get_connection()
        try:
            connection.send_command(*words)
            return connection.read_response()
        finally:
            self.client.connection_pool.release(connection)

    def start(self) -> None:
        """Start the process; do not wait until it is ready."""
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.binary, *self._words], stdout=log, stderr=log, env=self._environment, cwd=self.directory
            )

    def wait_ready(self, within_s: float = WITHIN_S) -> None:
        """Wait until the server replies."""
        ends = time.monotonic() + within_s
        while not self.replies():
            assert self.process is not None
            assert self.process.poll() is None, self.log()[-2000:]
            assert time.monotonic() < ends, f"{self} did not start"
            time.sleep(0.01)

    def replies(self) -> bool:
        """Whether the server replies to PING; false while it is loading."""
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False

    def log(self) -> str:
        """The output of the process."""
        return (self.directory / "log").read_text(errors="replace")

    def kill(self) -> None:
        """Send SIGKILL; return when the process has ended."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()

    def restart(self) -> None:
        """Kill and start the process; return when it replies. Data that was not on disk is lost."""
        self.kill()
        self.start()
        self.wait_ready()

    def pause(self) -> None:
        """Stop the process: its connections stay open without replies, until :meth:`resume`."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue the process."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Kill the process in any state, and close the client."""
        self.kill()
        if self._client is not None:
            self._client.close()


def free_ports(count: int) -> list[int]:
    """Free ports below the ephemeral range, whose cluster bus ports (10000 above) are free as well."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(14000, 22000)
        if port not in found and _is_free(port) and _is_free(port + 10000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
