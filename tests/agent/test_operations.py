"""Records of cycles in the store: the same for all replicas, whoever dies."""

from __future__ import annotations

from functools import partial

import pytest

from ktrdr_budget import AsyncBudgetLimiter
from ktrdr_budget.agent import operations as module
from ktrdr_budget.agent.operations import Operations, Progress

from ..helpers.waiting import until

TTL_MS = 60_000


@pytest.fixture
async def limiter(server):
    async with AsyncBudgetLimiter(server.url, []) as limiter:
        yield limiter


@pytest.fixture
def operations(limiter) -> Operations:
    return Operations(limiter)


async def test_a_cycle_is_begun_once(operations):
    assert await operations.start("op_1", "a", TTL_MS, Progress(estimate="0.15"))
    assert await operations.start("op_1", "a", TTL_MS, Progress()), "the same again, after a lost reply"
    assert not await operations.start("op_1", "b", TTL_MS, Progress())
    await operations.end("op_1", "a", "completed", None, Progress())
    assert not await operations.start("op_1", "a", TTL_MS, Progress()), "an id is used once"


async def test_whoever_asks_sees_how_far_a_cycle_is(server, operations):
    await operations.start("op_1", "a", TTL_MS, Progress())
    assert await operations.beat("op_1", "a", TTL_MS, Progress(phase="training", spend="0.02")) == "running"
    async with AsyncBudgetLimiter(server.url, []) as another:
        cycle = await Operations(another).get("op_1")
    assert (cycle.status, cycle.active, cycle.outcome, cycle.ended_at) == ("running", True, None, None)
    assert (cycle.progress["phase"], cycle.progress["spend"]) == ("training", "0.02")
    assert 0 <= cycle.elapsed_s < 5


async def test_a_beat_of_another_owner_changes_nothing(operations):
    await operations.start("op_1", "a", TTL_MS, Progress())
    assert await operations.beat("op_1", "b", TTL_MS, Progress(phase="training")) == ""
    assert await operations.beat("op_2", "a", TTL_MS, Progress()) == ""
    assert (await operations.get("op_1")).progress["phase"] == "designing"


async def test_a_cycle_that_ended_stays_as_it_ended(operations):
    await operations.start("op_1", "a", TTL_MS, Progress())
    await operations.end("op_1", "a", "failed", "gate_failed", Progress(spend="0.03"))
    await operations.end("op_1", "a", "completed", None, Progress(spend="0.04"))
    cycle = await operations.get("op_1")
    assert (cycle.status, cycle.reason, cycle.outcome, cycle.progress["spend"]) == (
        "failed", "gate_failed", "failed", "0.03",
    )  # fmt: skip
    assert await operations.beat("op_1", "a", TTL_MS, Progress()) == ""


async def test_cancelling_is_heard_by_the_next_beat(operations):
    assert await operations.cancel("op_1") == ""
    await operations.start("op_1", "a", TTL_MS, Progress())
    assert await operations.cancel("op_1") == "cancelling"
    assert await operations.cancel("op_1") == "cancelling"
    assert await operations.beat("op_1", "a", TTL_MS, Progress()) == "cancelling"
    await operations.end("op_1", "a", "cancelled", "cancelled", Progress())
    assert await operations.cancel("op_1") == "cancelled"


async def test_a_silent_worker_loses_its_cycle_by_the_clock_of_the_store(operations):
    await operations.start("op_1", "a", 1, Progress())
    cycle = await until(lambda: _ended(operations, "op_1"))
    assert (cycle.status, cycle.reason) == ("failed", "worker_lost")
    assert await operations.beat("op_1", "a", TTL_MS, Progress()) == "", "it is told so, should it come back"
    await operations.end("op_1", "a", "completed", None, Progress(spend="0.04"))
    cycle = await operations.get("op_1")
    assert (cycle.status, cycle.reason, cycle.progress["spend"]) == ("failed", "worker_lost", "0.04")


async def _ended(operations: Operations, operation_id: str):
    cycle = await operations.get(operation_id)
    return None if cycle.active else cycle


async def test_active_ones_are_listed_oldest_first_and_ended_ones_newest_first_by_pages(operations):
    for number in range(5):
        await operations.start(f"op_{number}", "a", TTL_MS, Progress())
        if number < 4:
            await operations.end(f"op_{number}", "a", "completed", None, Progress())
    await operations.start("op_5", "a", TTL_MS, Progress())
    page = await operations.list(2)
    assert [cycle.operation_id for cycle in page.active] == ["op_4", "op_5"]
    shown = [cycle.operation_id for cycle in page.ended]
    while page.ended:
        page = await operations.list(2, page.ended[-1].operation_id)
        shown += [cycle.operation_id for cycle in page.ended]
    assert sorted(shown) == ["op_0", "op_1", "op_2", "op_3"]
    assert (await operations.list(2, "op_unknown")).ended == []
    assert (await operations.list(0)).ended == []


def _is_past(client, instant) -> bool:
    return client.time() > instant


async def test_only_so_many_ended_cycles_are_kept_and_none_for_ever(operations, client, monkeypatch):
    monkeypatch.setattr(module, "KEPT_MAX", 3)
    for number in range(5):
        await operations.start(f"op_{number}", "a", TTL_MS, Progress())
        await until(partial(_is_past, client, client.time()))  # one is begun after the other
        await operations.end(f"op_{number}", "a", "completed", None, Progress())
    assert len((await operations.list(10)).ended) == 3
    assert await operations.get("op_0") is None
    keys = client.keys("ktrdr:{default}:cycles:*")
    assert len(keys) == 2
    assert all(0 < client.pttl(key) <= module.KEPT_MS for key in keys)
