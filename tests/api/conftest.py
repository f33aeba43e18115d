"""The service in this process, over a real server."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from ktrdr_budget.api import Settings, create_app

from .support import BUDGETS, Running, Start


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Remove all variables that configure the service from the environment."""
    for name in list(os.environ):
        if name.startswith(("KTRDR_", "AGENT_", "PROMETHEUS_", "OTEL_")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
async def start(server) -> AsyncIterator[Start]:
    """Start services. Default: on the shared server with $5.00 a day."""
    async with AsyncExitStack() as stack:

        async def start_one(**settings: Any) -> Running:
            running = Running(create_app(Settings(**{"redis_url": server.url, **settings})))
            await stack.enter_async_context(running.app.router.lifespan_context(running.app))
            await stack.enter_async_context(running.client)
            return running

        yield start_one


@pytest.fixture
def budgets_file(tmp_path: Path) -> Path:
    """Budgets of every kind and unit."""
    path = tmp_path / "budgets.toml"
    path.write_text(BUDGETS)
    return path


@pytest.fixture
async def running(start: Start, budgets_file: Path) -> Running:
    """The service with the agent's budget and the budgets of the file."""
    return await start(budgets_file=budgets_file)


@pytest.fixture
async def client(running: Running) -> httpx.AsyncClient:
    """A client of the service, which has no keys."""
    return running.client
