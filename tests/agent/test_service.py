"""Triggers, cycles and their spend, on one replica and on several."""

from __future__ import annotations

import asyncio
from decimal import Decimal

import pytest
from opentelemetry import trace

from ktrdr_budget import HoldConflict, Settlement, StoreUnavailable
from ktrdr_budget.agent.phases import Backtest, Training
from ktrdr_budget.agent.service import CycleActive, CycleEnded, MoneyDenied, UnknownCycle
from ktrdr_budget.engine.batching.heartbeat import Heartbeat
from ktrdr_budget.limiter import AsyncHold

from ..helpers.waiting import until
from .stage import PHASES

NOTHING = (0, 0, 0, 0)


async def test_a_cycle_runs_all_phases_and_commits_the_real_cost(stage):
    started = await stage.agent.trigger()
    assert started.operation_id.startswith("op_")
    cycle = await stage.ended(started.operation_id)
    assert (cycle.outcome, cycle.reason) == ("completed", None)
    assert list(stage.script.entered) == list(PHASES)
    progress = cycle.progress
    assert (progress["spend"], progress["strategy_name"]) == ("0.04", "momentum")
    assert progress["tokens"] == {"design": 1067, "assessment": 1067}
    assert [(gate["gate"], gate["passed"]) for gate in progress["gates"]] == [("training", True), ("backtest", True)]
    assert progress["results"]["accuracy"] == 0.6
    assert progress["results"]["verdict"] == "promising"
    assert await stage.figures() == (Decimal("0.04"), 0, 0, 0)
    (entry,) = await stage.limiter.ledger("agent")
    assert (entry.hold_id, entry.amount, entry.operation) == (cycle.operation_id, Decimal("0.04"), "agent_research")


async def test_a_cycle_updates_the_metrics(stage):
    await stage.ended((await stage.agent.trigger()).operation_id)
    assert stage.tally.outcomes == {"completed": 1}
    assert stage.tally.phases == dict.fromkeys(PHASES, 1)
    assert stage.tally.gates == {("training", True): 1, ("backtest", True): 1}
    assert stage.tally.token_counts == {"design": 1067, "assessment": 1067}


async def test_a_running_cycle_holds_the_estimate_and_a_slot(stage):
    stage.script.wait_in = "training"
    started = await stage.agent.trigger()
    await stage.reaches("training")
    assert await stage.figures() == (0, Decimal("0.15"), 0, 1)
    cycle = await until(lambda: _in_phase(stage, started.operation_id, "training"))
    assert (cycle.status, cycle.progress["spend"]) == ("running", "0.02")


async def _in_phase(stage, operation_id, phase):
    cycle = await stage.view(operation_id)
    return cycle if cycle.progress["phase"] == phase else None


@pytest.mark.parametrize("phase", PHASES)
async def test_the_spend_so_far_is_committed_if_a_second_replica_cancels_the_cycle(make_stage, phase):
    here, there = await make_stage(), await make_stage()
    here.script.wait_in = phase
    started = await here.agent.trigger()
    await here.reaches(phase)
    assert await there.agent.cancel(started.operation_id) == "cancelled"
    cycle = await there.view(started.operation_id)
    used = Decimal("0.04") if phase == "assessing" else Decimal("0.02")
    assert (cycle.outcome, cycle.reason, cycle.progress["phase"]) == ("cancelled", "cancelled", phase)
    assert cycle.progress["spend"] == str(used)
    assert await there.figures() == (used, 0, 0, 0)
    assert here.tally.outcomes == {"cancelled": 1}
    with pytest.raises(CycleEnded, match="is cancelled"):
        await here.agent.cancel(started.operation_id)


async def test_a_cancelled_cycle_without_spend_charges_nothing(stage):
    stage.script.price = Decimal(0)
    stage.script.wait_in = "designing"
    started = await stage.agent.trigger()
    await stage.agent.cancel(started.operation_id)
    await stage.ended(started.operation_id)
    assert await stage.figures() == NOTHING


async def test_an_unknown_cycle_cannot_be_cancelled(stage):
    with pytest.raises(UnknownCycle):
        await stage.agent.cancel("op_unknown")


@pytest.mark.parametrize("phase", PHASES)
async def test_a_cycle_fails_and_commits_the_spend_so_far_after_an_error_in_a_phase(stage, phase):
    stage.script.fail_in = phase
    cycle = await stage.ended((await stage.agent.trigger()).operation_id)
    assert (cycle.outcome, cycle.reason) == ("failed", "error")
    assert cycle.progress["error"] == f"RuntimeError: {phase} went wrong with redis://***@host"
    used = Decimal("0.04") if phase == "assessing" else Decimal("0.02")
    assert await stage.figures() == (used, 0, 0, 0)
    assert stage.tally.outcomes == {"failed": 1}


GATES = {
    "training": ("training", Training(accuracy=0.05, initial_loss=0.7, final_loss=0.5)),
    "backtest": ("backtest_result", Backtest(win_rate=0.5, max_drawdown=0.9, sharpe_ratio=float("nan"), trades=3)),
}


@pytest.mark.parametrize("gate", GATES)
async def test_a_cycle_ends_and_commits_the_spend_so_far_after_a_failed_gate(stage, gate):
    setattr(stage.script, *GATES[gate])
    cycle = await stage.ended((await stage.agent.trigger()).operation_id)
    assert (cycle.outcome, cycle.reason) == ("failed", "gate_failed")
    assert cycle.progress["gates"][-1]["gate"] == gate
    assert cycle.progress["gates"][-1]["passed"] is False
    assert cycle.progress["error"].startswith(f"{gate} gate: ")
    assert "assessing" not in stage.script.entered
    assert await stage.figures() == (Decimal("0.02"), 0, 0, 0)
    assert stage.tally.gates[gate, False] == 1


async def test_the_reservation_grows_if_a_cycle_costs_more_than_the_estimate(stage):
    stage.script.price = Decimal("0.20")
    cycle = await stage.ended((await stage.agent.trigger()).operation_id)
    assert cycle.outcome == "completed"
    assert await stage.figures() == (Decimal("0.40"), 0, 0, 0)
    assert (await stage.limiter.status("agent")).overruns == 0, "all spend was reserved first"


async def test_a_cycle_stops_and_commits_the_spend_so_far_if_the_reservation_cannot_grow(make_stage):
    stage = await make_stage(limit="0.30")
    stage.script.price = Decimal("0.20")
    cycle = await stage.ended((await stage.agent.trigger()).operation_id)
    assert (cycle.outcome, cycle.reason, cycle.progress["phase"]) == ("failed", "budget_exhausted", "assessing")
    assert await stage.figures() == (Decimal("0.20"), 0, 0, 0)


# -- denials -----------------------------------------------------------------------------------------------------------


async def test_the_denial_of_a_second_cycle_names_the_running_cycle(make_stage):
    here, there = await make_stage(), await make_stage()
    here.script.wait_in = "training"
    started = await here.agent.trigger()
    with pytest.raises(CycleActive) as denied:
        await there.agent.trigger()
    assert denied.value.operation_ids == [started.operation_id]
    assert await here.figures() == (0, Decimal("0.15"), 0, 1), "a denial writes nothing"


DENIALS = {
    "estimate above the daily limit": ("0.01", "0", "exceeds_limit", "$0.01 remaining, need $0.15"),
    "budget spent": ("5.00", "4.99", "budget_exhausted", "$0.01 remaining, need $0.15"),
}


@pytest.mark.parametrize("case", DENIALS)
async def test_the_message_about_an_exhausted_budget_shows_the_remaining_and_the_required_amount(make_stage, case):
    limit, spent, reason, words = DENIALS[case]
    stage = await make_stage(limit=limit)
    await stage.limiter.record("agent", spent)
    with pytest.raises(MoneyDenied) as denied:
        await stage.agent.trigger()
    assert str(denied.value) == f"Daily budget exhausted: budget_exhausted ({words})"
    assert denied.value.denial.reason == reason
    assert 0 < denied.value.retry_after <= 86_400


async def test_the_denial_suggests_a_retry_at_the_first_deadline_if_other_holds_fill_the_budget(make_stage):
    stage = await make_stage(limit="0.20", slots_limit=5)
    stage.script.wait_in = "training"
    await stage.agent.trigger()
    with pytest.raises(MoneyDenied) as denied:
        await stage.agent.trigger()
    assert denied.value.denial.reason == "budget_held"
    assert 0 < denied.value.retry_after <= 30


async def test_a_trigger_is_denied_because_of_the_slot_if_both_the_slot_and_the_budget_are_held(make_stage):
    stage = await make_stage(limit="0.20")
    stage.script.wait_in = "training"
    await stage.agent.trigger()
    with pytest.raises(CycleActive):
        await stage.agent.trigger()


async def test_a_trigger_is_denied_because_of_the_budget_if_the_slot_is_held_and_the_budget_is_spent(make_stage):
    stage = await make_stage(limit="0.20")
    stage.script.wait_in = "training"
    await stage.agent.trigger()
    await stage.limiter.record("agent", "0.10")
    with pytest.raises(MoneyDenied) as denied:
        await stage.agent.trigger()
    denial = denied.value.denial
    assert (denial.reason, denial.spent, denial.held) == ("budget_exhausted", Decimal("0.10"), Decimal("0.15"))


async def test_fifty_triggers_on_three_replicas_start_only_as_many_cycles_as_the_budget_covers(make_stage):
    stages = [await make_stage(limit="0.45", slots_limit=50) for _ in range(3)]
    for stage in stages:
        stage.script.wait_in = "training"
    found = await asyncio.gather(*[stages[i % 3].agent.trigger() for i in range(50)], return_exceptions=True)
    assert len([each for each in found if isinstance(each, MoneyDenied)]) == 47
    assert await stages[0].figures() == (0, Decimal("0.45"), 0, 3)
    page = await stages[1].agent.cycles()
    assert len(page.active) == 3


async def test_fifty_triggers_start_only_as_many_cycles_as_there_are_slots(make_stage):
    stages = [await make_stage(slots_limit=3) for _ in range(3)]
    for stage in stages:
        stage.script.wait_in = "training"
    found = await asyncio.gather(*[stages[i % 3].agent.trigger() for i in range(50)], return_exceptions=True)
    assert len([each for each in found if isinstance(each, CycleActive)]) == 47


# -- retries and shutdown ----------------------------------------------------------------------------------------------


async def test_a_trigger_repeated_with_the_same_id_starts_no_second_cycle(make_stage):
    here, there = await make_stage(slots_limit=5), await make_stage(slots_limit=5)
    here.script.wait_in = "training"
    assert not (await here.agent.trigger("op_1")).replayed
    assert (await there.agent.trigger("op_1")).replayed
    await here.agent.cancel("op_1")
    assert (await there.agent.trigger("op_1")).replayed, "also after its end"
    assert there.script.entered == {}


async def test_concurrent_triggers_with_the_same_id_start_only_one_cycle(make_stage):
    stage = await make_stage(slots_limit=5)
    stage.script.wait_in = "training"
    found = await asyncio.gather(*[stage.agent.trigger("op_1") for _ in range(5)])
    assert {started.operation_id for started in found} == {"op_1"}
    await stage.reaches("training")
    assert stage.script.entered["designing"] == 1
    assert len(stage.agent.running) == 1


@pytest.fixture
def failing_start(stage, monkeypatch):
    """The first write of a cycle's record fails."""
    start, calls = stage.cycle_store.start, []

    async def once(*arguments) -> bool:
        calls.append(arguments)
        if len(calls) == 1:
            raise StoreUnavailable("no answer")
        return await start(*arguments)

    monkeypatch.setattr(stage.cycle_store, "start", once)


async def test_a_retry_with_the_same_id_is_a_conflict_if_the_start_failed_and_the_hold_was_released(
    stage, failing_start
):
    with pytest.raises(StoreUnavailable):
        await stage.agent.trigger("op_1")
    assert await stage.figures() == NOTHING
    with pytest.raises(HoldConflict, match="did not begin"):
        await stage.agent.trigger("op_1")
    assert await stage.cycle_store.get("op_1") is None


async def test_a_retry_with_the_same_id_starts_the_cycle_if_the_start_failed_and_the_hold_is_still_open(
    stage, failing_start, monkeypatch
):
    async def unreachable(_: AsyncHold) -> None:
        raise StoreUnavailable("no answer")

    with monkeypatch.context() as patched:
        patched.setattr(AsyncHold, "release", unreachable)
        with pytest.raises(StoreUnavailable):
            await stage.agent.trigger("op_1")
    assert not (await stage.agent.trigger("op_1")).replayed
    assert (await stage.ended("op_1")).outcome == "completed"


async def test_a_trigger_with_the_id_of_a_past_cycle_is_a_conflict_even_if_the_old_hold_was_deleted(stage, client):
    await stage.ended((await stage.agent.trigger("op_1")).operation_id)
    before = await stage.figures()
    client.delete("ktrdr:{default}:h:op_1")  # as after 24 h: the record of the cycle lives for 35 days
    for _ in range(2):
        with pytest.raises(HoldConflict, match="op_1"):
            await stage.agent.trigger("op_1")
    assert await stage.figures() == before
    assert stage.tally.outcomes == {"completed": 1}


async def test_a_trigger_with_the_id_of_a_recorded_spend_is_a_conflict(stage):
    await stage.limiter.record("agent", "0.01", id="op_1")
    with pytest.raises(HoldConflict):
        await stage.agent.trigger("op_1")


async def test_a_cancelled_trigger_either_starts_the_cycle_or_leaves_no_hold(stage):
    stage.script.wait_in = "training"
    trigger = asyncio.create_task(stage.agent.trigger("op_1"))
    await asyncio.sleep(0)
    trigger.cancel()
    with pytest.raises(asyncio.CancelledError):
        await trigger

    async def decided() -> bool:
        cycle = await stage.cycle_store.get("op_1")
        return (cycle is not None) == ((await stage.figures())[3] == 1)

    await until(decided)


async def test_running_cycles_stop_and_commit_the_spend_so_far_at_the_shutdown_of_a_replica(make_stage):
    here, there = await make_stage(), await make_stage()
    here.script.wait_in = "backtesting"
    started = await here.agent.trigger()
    await here.reaches("backtesting")
    await here.agent.close()
    assert here.script.closed
    cycle = await there.view(started.operation_id)
    assert (cycle.outcome, cycle.reason) == ("cancelled", "shutdown")
    assert await there.figures() == (Decimal("0.02"), 0, 0, 0)


async def test_a_cycle_marked_as_lost_stops_and_commits_the_spend_when_the_worker_resumes(make_stage, monkeypatch):
    here, there = await make_stage(ttl_s=1), await make_stage()
    here.script.wait_in = "training"
    awake = _asleep(here, monkeypatch)
    started = await here.agent.trigger()
    await here.reaches("training")
    cycle = await there.ended(started.operation_id)
    assert (cycle.outcome, cycle.reason) == ("failed", "worker_lost")
    assert await there.figures() == (0, 0, Decimal("0.15"), 0), "its hold expired at the same instant"
    assert there.tally.outcomes == {"failed": 1}, "counted by the replica that marked it"
    awake.set()
    await until(lambda: _spent(there, Decimal("0.02")))
    await until(lambda: not here.agent.running)
    cycle = await there.view(started.operation_id)
    assert (cycle.outcome, cycle.reason, cycle.progress["spend"]) == ("failed", "worker_lost", "0.02")
    assert here.tally.outcomes == {}, "and by no other"


def _asleep(stage, monkeypatch) -> asyncio.Event:
    """Block the heartbeats of the cycle until the returned event is set."""
    awake, beat = asyncio.Event(), stage.cycle_store.beat

    async def late(*arguments) -> str:
        await awake.wait()
        return await beat(*arguments)

    monkeypatch.setattr(stage.cycle_store, "beat", late)
    monkeypatch.setattr(Heartbeat, "send", lambda _: None)
    return awake


async def test_a_cycle_marked_as_lost_by_its_own_replica_is_counted_only_once(make_stage, monkeypatch):
    stage = await make_stage(ttl_s=1)
    stage.script.wait_in = "training"
    awake = _asleep(stage, monkeypatch)
    started = await stage.agent.trigger()
    assert (await stage.ended(started.operation_id)).reason == "worker_lost"
    assert stage.tally.outcomes == {}, "the cycle is alive and counts its own end"
    awake.set()
    await until(lambda: not stage.agent.running)
    assert stage.tally.outcomes == {"failed": 1}


async def test_the_real_result_is_recorded_if_a_cycle_marked_as_lost_commits_late(make_stage, monkeypatch):
    stage = await make_stage(ttl_s=1)
    awake = _asleep(stage, monkeypatch)
    commit = AsyncHold.commit

    async def late(hold: AsyncHold) -> Settlement:
        await awake.wait()
        return await commit(hold)

    monkeypatch.setattr(AsyncHold, "commit", late)
    started = await stage.agent.trigger()
    assert (await stage.ended(started.operation_id)).reason == "worker_lost"
    awake.set()
    await until(lambda: not stage.agent.running)
    cycle = await stage.view(started.operation_id)
    assert (cycle.outcome, cycle.reason, cycle.progress["spend"]) == ("completed", None, "0.04")
    assert stage.tally.outcomes == {"completed": 1}
    assert await stage.figures() == (Decimal("0.04"), 0, 0, 0)


async def test_a_cycle_extends_its_hold_even_if_the_heartbeat_fails(make_stage, monkeypatch):
    stage = await make_stage(ttl_s=10)
    stage.script.wait_in = "training"
    monkeypatch.setattr(Heartbeat, "send", lambda _: None)
    started = await stage.agent.trigger()
    (cycle,) = stage.agent.running
    before = cycle.hold.deadline_ms
    await until(lambda: cycle.hold.deadline_ms > before)
    assert (await stage.view(started.operation_id)).active


async def test_after_a_failed_progress_report_the_next_report_is_still_sent(stage, monkeypatch, caplog):
    stage.script.wait_in = "training"
    beats, beat = [], stage.cycle_store.beat

    async def broken(*arguments) -> str:
        beats.append(arguments)
        if len(beats) == 1:
            raise TypeError("a bug")
        return await beat(*arguments)

    monkeypatch.setattr(stage.cycle_store, "beat", broken)
    started = await stage.agent.trigger()
    await until(lambda: _in_phase(stage, started.operation_id, "training"))
    assert "progress report failed for cycle" in caplog.text


async def _spent(stage, amount: Decimal) -> bool:
    return await stage.figures() == (amount, 0, 0, 0)


async def test_a_cycle_runs_without_tracing(stage):
    assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
    cycle = await stage.ended((await stage.agent.trigger()).operation_id)
    assert cycle.progress["trace_id"] == ""
