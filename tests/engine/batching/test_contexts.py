"""Whose context the store is asked in: an instrumentation of the driver must see a caller of the batch, no other."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Any

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.engine.transport.store import Store

from ...conftest import Server, free_port
from ...helpers.waiting import until

caller: ContextVar[str] = ContextVar("caller", default="nobody")
BUDGETS = [Budget("agent", limit="100")]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Per batch, in whose context it was sent, and what; as with an instrumented client, each is sent by a task."""
    found: list[tuple[str, str]] = []
    apply = Store.apply

    async def watched(self: Store, name: str, keys: Any, args: Any, *further: Any) -> Any:
        found.append((caller.get(), " ".join(map(str, args))))
        return await apply(self, name, keys, args, *further)

    monkeypatch.setattr(Store, "apply", watched)
    monkeypatch.setattr(Store, "ready", False)
    return found


async def record_as(limiter: AsyncBudgetLimiter, number: int) -> None:
    caller.set(f"caller-{number:03d}")
    await limiter.record("agent", "0.01", id=f"id-{number:03d}")


async def test_each_batch_is_sent_in_the_context_of_one_of_its_callers(server: Server, asked: list[tuple[str, str]]):
    async with AsyncBudgetLimiter(server.url, BUDGETS, timeout=10.0) as limiter:
        asked.clear()
        await asyncio.gather(*(record_as(limiter, number) for number in range(600)))
    asked = [(name, sent) for name, sent in asked if " id-" in sent]  # others, without a call, are the limiter's own
    assert len(asked) >= 5  # a batch takes 128 at most: the lane that the first caller opened has served others, too
    for name, sent in asked:
        assert f" id-{name.removeprefix('caller-')} " in sent


async def test_a_read_is_sent_in_its_callers_context(server: Server, monkeypatch: pytest.MonkeyPatch):
    asked = []
    run = Store.run

    async def watched(self: Store, command: Any, deadline: float) -> Any:
        asked.append((caller.get(), str(command)))
        return await run(self, command, deadline)

    monkeypatch.setattr(Store, "run", watched)
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        await asyncio.gather(*(record_as(limiter, number) for number in range(40)))
        asked.clear()

        async def read_as(number: int) -> None:
            caller.set(f"caller-{number:03d}")
            await limiter.get(f"id-{number:03d}")

        await asyncio.gather(*map(read_as, range(40)))
    assert len(asked) == 40
    for name, command in asked:
        assert f"id-{name.removeprefix('caller-')}" in command


async def test_what_is_told_after_an_outage_is_on_nobodys_behalf(start_server: Any, asked: list[tuple[str, str]]):
    port = free_port()
    url = f"redis://127.0.0.1:{port}"
    async with AsyncBudgetLimiter(url, BUDGETS, timeout=0.05, on_store_error="allow") as limiter:
        caller.set("caller-000")
        await limiter.record("agent", "0.01", id="id-000")
        assert limiter.deferred == 1
        asked.clear()
        await until(lambda: len(asked) >= 2)  # it asks whether the store is back
        later = await asyncio.to_thread(start_server, None, "--port", str(port))
        await until(lambda: limiter.deferred == 0)
        assert any("id-000" in sent for _, sent in asked)
        assert {name for name, _ in asked} == {"nobody"}
    later.kill()
