"""Fixtures that run the command in this process, as a process, or on a terminal, with an emulated service."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ktrdr_budget.cli import main

from .support import STATUS, FakeService, QuietServer, Terminal, command, handler


@pytest.fixture
def service() -> Iterator[FakeService]:
    """An emulated service that replies as configured by the test; /agent/budget has a reply from the start."""
    fake = FakeService()
    server = QuietServer(("127.0.0.1", 0), handler(fake))
    fake.port = server.server_address[1]
    fake.answer("GET /api/v1/agent/budget", STATUS)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    fake.stop.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def environment(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Environment variables of the command: the URL of the emulated service, and no setting of a developer."""
    for name in list(os.environ):
        if name.startswith(("KTRDR_", "AGENT_", "_KTRDR")) or name in ("NO_COLOR", "PYTHONIOENCODING"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("KTRDR_API_URL", service.url)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    return monkeypatch


Run = Callable[..., Result]


@pytest.fixture
def ktrdr(environment: pytest.MonkeyPatch) -> Run:
    """Run the command in this process: ``ktrdr("agent", "budget").stdout``."""

    def run(*words: str) -> Result:
        return CliRunner().invoke(main, words, prog_name="ktrdr")

    return run


@pytest.fixture
def process(environment: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command as a separate process."""

    def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(*words), **{"capture_output": True, "text": True, "timeout": 60, **options})

    return run


@pytest.fixture
def terminal(environment: pytest.MonkeyPatch) -> Iterator[Callable[..., Terminal]]:
    """Run the command on a terminal."""
    opened: list[Terminal] = []

    def run(*words: str, **size: int) -> Terminal:
        opened.append(Terminal(*words, **size))
        return opened[-1]

    yield run
    for one in opened:
        one.close()
