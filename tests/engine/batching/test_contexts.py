"""A batch is sent in the context of one of its callers, because instrumented drivers read the context."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Any

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.engine.transport.store import Store

from ...conftest import Server, free_port
from ...helpers.waiting import until

caller: ContextVar[str] = ContextVar("caller", default="limiter")
BUDGETS = [Budget("agent", limit="100")]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The caller in the context of each batch, and the arguments; tasks send the batches, as with instrumentation."""
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


async def test_each_batch_is_sent_with_the_context_variables_of_one_of_its_callers(
    server: Server, batches: list[tuple[str, str]]
):
    async with AsyncBudgetLimiter(server.url, BUDGETS, timeout=10.0) as limiter:
        batches.clear()
        await asyncio.gather(*(record_as(limiter, number) for number in range(600)))
    batches = [(name, sent) for name, sent in batches if " id-" in sent]  # batches without a call are the limiter's own
    assert len(batches) >= 5  # a batch takes at most 128 calls, so one lane has sent batches of several callers
    for name, sent in batches:
        assert f" id-{name.removeprefix('caller-')} " in sent


async def test_a_read_is_sent_with_the_context_variables_of_its_caller(server: Server, monkeypatch: pytest.MonkeyPatch):
    reads = []
    run = Store.run

    async def watched(self: Store, command: Any, deadline: float) -> Any:
        reads.append((caller.get(), str(command)))
        return await run(self, command, deadline)

    monkeypatch.setattr(Store, "run", watched)
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        await asyncio.gather(*(record_as(limiter, number) for number in range(40)))
        reads.clear()

        async def read_as(number: int) -> None:
            caller.set(f"caller-{number:03d}")
            await limiter.get(f"id-{number:03d}")

        await asyncio.gather(*map(read_as, range(40)))
    assert len(reads) == 40
    for name, command in reads:
        assert f"id-{name.removeprefix('caller-')}" in command


async def test_a_replay_after_an_outage_is_sent_with_the_context_variables_of_the_limiter(
    start_server: Any, batches: list[tuple[str, str]]
):
    port = free_port()
    url = f"redis://127.0.0.1:{port}"
    async with AsyncBudgetLimiter(url, BUDGETS, timeout=0.05, on_store_error="allow") as limiter:
        caller.set("caller-000")
        await limiter.record("agent", "0.01", id="id-000")
        assert limiter.deferred == 1
        batches.clear()
        await until(lambda: len(batches) >= 2)  # probes
        later = await asyncio.to_thread(start_server, None, "--port", str(port))
        await until(lambda: limiter.deferred == 0)
        assert any("id-000" in sent for _, sent in batches)
        assert {name for name, _ in batches} == {"limiter"}
    later.kill()
