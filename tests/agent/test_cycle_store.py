"""Records of cycles in the store, shared by all replicas."""

from __future__ import annotations

import json
from decimal import Decimal
from functools import partial

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, InvalidArgument
from ktrdr_budget.agent import cycle_store as module
from ktrdr_budget.agent.cycle_store import CycleStore, Progress

from ..helpers.waiting import until

BUDGETS = [Budget("agent", 5)]
TTL_MS = 60_000


@pytest.fixture
def store(limiter) -> CycleStore:
    return CycleStore(limiter)


async def test_a_second_cycle_with_a_used_id_is_not_started(store):
    assert await store.start("op_1", "a", TTL_MS, Progress(estimate="0.15"))
    assert await store.start("op_1", "a", TTL_MS, Progress()), "the same again, after a lost reply"
    assert not await store.start("op_1", "b", TTL_MS, Progress())
    await store.end("op_1", "a", "completed", None, Progress())
    assert not await store.start("op_1", "a", TTL_MS, Progress()), "an id is used once"


async def test_the_progress_of_a_cycle_can_be_read_on_every_replica(server, store):
    await store.start("op_1", "a", TTL_MS, Progress())
    assert await store.beat("op_1", "a", Progress(phase="training", spend="0.02")) == "running"
    async with AsyncBudgetLimiter(server.url, []) as another:
        cycle = await CycleStore(another).get("op_1")
    assert (cycle.status, cycle.active, cycle.outcome, cycle.ended_at) == ("running", True, None, None)
    assert (cycle.progress["phase"], cycle.progress["spend"]) == ("training", "0.02")
    assert 0 <= cycle.elapsed_s < 5


async def test_a_progress_report_of_a_different_owner_does_not_change_the_cycle(store):
    await store.start("op_1", "a", TTL_MS, Progress())
    assert await store.beat("op_1", "b", Progress(phase="training")) == ""
    assert await store.beat("op_2", "a", Progress()) == ""
    assert (await store.get("op_1")).progress["phase"] == "designing"


async def test_the_result_of_an_ended_cycle_cannot_be_changed(store):
    await store.start("op_1", "a", TTL_MS, Progress())
    await store.end("op_1", "a", "failed", "gate_failed", Progress(spend="0.03"))
    await store.end("op_1", "a", "completed", None, Progress(spend="0.04"))
    cycle = await store.get("op_1")
    assert (cycle.status, cycle.reason, cycle.outcome, cycle.progress["spend"]) == (
        "failed", "gate_failed", "failed", "0.03",
    )  # fmt: skip
    assert await store.beat("op_1", "a", Progress()) == ""


async def test_the_first_progress_report_after_a_cancellation_request_returns_the_status_cancelling(store):
    assert await store.cancel("op_1") == ""
    await store.start("op_1", "a", TTL_MS, Progress())
    assert await store.cancel("op_1") == "cancelling"
    assert await store.cancel("op_1") == "cancelling"
    assert await store.beat("op_1", "a", Progress()) == "cancelling"
    await store.end("op_1", "a", "cancelled", "cancelled", Progress())
    assert await store.cancel("op_1") == "cancelled"


async def test_a_cycle_without_progress_reports_is_marked_as_lost_after_the_ttl(store):
    await store.start("op_1", "a", 1, Progress())
    cycle = await until(lambda: _ended(store, "op_1"))
    assert (cycle.status, cycle.reason) == ("failed", "worker_lost")
    assert await store.beat("op_1", "a", Progress()) == "", "the worker's next report returns no status"


async def test_a_cycle_marked_as_lost_gets_the_real_result_if_the_worker_reports_late(store):
    await store.start("op_1", "a", 1, Progress())
    await until(lambda: _ended(store, "op_1"))
    assert not await store.end("op_1", "b", "cancelled", "cancelled", Progress()), "not its worker"
    assert await store.end("op_1", "a", "completed", None, Progress(spend="0.04")), "it had been marked as lost"
    cycle = await store.get("op_1")
    assert (cycle.status, cycle.reason, cycle.progress["spend"]) == ("completed", None, "0.04")
    assert not await store.end("op_1", "a", "failed", "error", Progress())
    assert (await store.get("op_1")).status == "completed"


async def test_the_on_lost_callback_is_called_exactly_once_for_each_lost_cycle(server, store):
    async with AsyncBudgetLimiter(server.url, []) as another:
        others, found = CycleStore(another), []
        store.on_lost = lambda *lost: found.append(("here", *lost))
        others.on_lost = lambda *lost: found.append(("there", *lost))
        for number in range(3):
            await store.start(f"op_{number}", "a", TTL_MS if number == 2 else 1, Progress())
        await until(lambda: _ended(others, "op_0"))
        await until(lambda: _ended(others, "op_1"))
        await store.list()
    assert {operation_id for _, operation_id, _ in found} == {"op_0", "op_1"}
    assert len(found) == 2
    assert all(0 <= elapsed_s < 60 for *_, elapsed_s in found)


async def test_a_cycle_is_marked_as_lost_only_after_the_deadline_of_its_hold(limiter, store):
    await (await limiter.reserve("agent", "0.20", id="op_0", ttl=60)).extend()
    hold = await limiter.reserve("agent", "0.15", id="op_1", ttl=1)
    for number in range(2):
        await store.start(f"op_{number}", "a", 1, Progress())
    cycle = await until(lambda: _ended(store, "op_1"))
    assert cycle.reason == "worker_lost"
    assert cycle.ended_at >= hold.expires_at
    assert (await store.get("op_0")).active, "its hold is open"
    figures = await limiter.status("agent")
    assert (figures.held, figures.unconfirmed) == (Decimal("0.20"), Decimal("0.15"))


async def test_a_progress_report_still_finds_the_cycle_running_after_the_hold_was_committed(limiter, store):
    hold = await limiter.reserve("agent", "0.15", id="op_1", ttl=60)
    await store.start("op_1", "a", 1, Progress())
    assert await store.beat("op_1", "a", Progress()) == "running"
    await hold.commit("0.02")
    assert await store.beat("op_1", "a", Progress()) == "running", (
        "its hold is settled, and its result is still to come"
    )


async def test_the_last_cycle_is_the_most_recently_ended_cycle(store):
    for number in (1, 2):
        await store.start(f"op_{number}", "a", TTL_MS, Progress())
    assert (await store.list()).last is None
    for number in (2, 1):
        await store.end(f"op_{number}", "a", "completed", None, Progress())
        assert (await store.list()).last.operation_id == f"op_{number}"


def test_values_without_a_json_type_are_written_as_text():
    document = json.loads(Progress(results={"accuracy": Decimal("0.5")}, error="\ud800").document())
    assert (document["results"], document["error"]) == ({"accuracy": "0.5"}, "\ud800")


async def _ended(store: CycleStore, operation_id: str):
    cycle = await store.get(operation_id)
    return None if cycle.active else cycle


async def test_active_cycles_are_listed_oldest_first_and_ended_cycles_are_listed_in_pages(store):
    for number in range(5):
        await store.start(f"op_{number}", "a", TTL_MS, Progress())
        if number < 4:
            await store.end(f"op_{number}", "a", "completed", None, Progress())
    await store.start("op_5", "a", TTL_MS, Progress())
    page = await store.list(2)
    assert [cycle.operation_id for cycle in page.active] == ["op_4", "op_5"]
    shown = [cycle.operation_id for cycle in page.ended]
    while page.ended:
        page = await store.list(2, page.ended[-1].operation_id)
        shown += [cycle.operation_id for cycle in page.ended]
    assert sorted(shown) == ["op_0", "op_1", "op_2", "op_3"]
    for cursor in ("op_unknown", "op_5"):
        with pytest.raises(InvalidArgument, match="invalid cursor"):
            await store.list(2, cursor)
    assert (await store.list(0)).ended == []


def _is_past(client, instant) -> bool:
    return client.time() > instant


async def test_only_the_newest_ended_cycles_are_kept_and_only_for_a_limited_time(store, client, monkeypatch):
    monkeypatch.setattr(module, "KEPT_MAX", 3)
    for number in range(5):
        await store.start(f"op_{number}", "a", TTL_MS, Progress())
        await until(partial(_is_past, client, client.time()))  # distinct start times
        await store.end(f"op_{number}", "a", "completed", None, Progress())
    assert len((await store.list(10)).ended) == 3
    assert await store.get("op_0") is None
    keys = client.keys("ktrdr:{default}:cycles:*")
    assert len(keys) == 2
    assert all(0 < client.pttl(key) <= module.KEPT_MS for key in keys)
