"""Log records of the agent: start and end of a cycle, failed gates, and triggers denied by the budget."""

from __future__ import annotations

import logging

import pytest

from ktrdr_budget.agent.phases import Training
from ktrdr_budget.agent.service import CycleActive, MoneyDenied

pytestmark = pytest.mark.usefixtures("info_log")


def records(caplog: pytest.LogCaptureFixture, event: str) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.message.startswith(f"{event}: ")]


async def test_the_log_of_a_cycle_shows_the_start_and_the_end_but_not_the_brief(stage, caplog):
    operation_id = (await stage.agent.trigger("op_1", brief="my secret brief")).operation_id
    await stage.ended(operation_id)
    [started], [ended] = records(caplog, "Cycle started"), records(caplog, "Cycle ended")
    assert started.message == "Cycle started: op_1 (estimate $0.15, model test-1)"
    assert (started.levelname, started.operation_id, started.estimate) == ("INFO", "op_1", 0.15)
    assert ended.message.startswith("Cycle ended: op_1 completed after ")
    assert (ended.levelname, ended.outcome, ended.reason, ended.spend, ended.tokens) == (
        "INFO", "completed", None, 0.04, 2134,
    )  # fmt: skip
    assert "secret" not in caplog.text


async def test_a_failed_gate_is_logged(stage, caplog):
    stage.script.training = Training(accuracy=0.05, initial_loss=0.7, final_loss=0.5)
    await stage.ended((await stage.agent.trigger("op_1")).operation_id)
    [failed], [ended] = records(caplog, "Gate failed"), records(caplog, "Cycle ended")
    assert failed.message == "Gate failed: training gate of op_1: accuracy 0.05 < 0.1"
    assert (failed.levelname, failed.operation_id, failed.gate) == ("WARNING", "op_1", "training")
    assert (ended.outcome, ended.reason) == ("failed", "gate_failed")


async def test_every_trigger_denied_by_the_budget_is_logged(make_stage, caplog):
    stage = await make_stage(limit="0.01")
    for number in range(3):
        with pytest.raises(MoneyDenied):
            await stage.agent.trigger(f"op_{number}")
    found = records(caplog, "Budget exhausted")
    assert [record.operation_id for record in found] == ["op_0", "op_1", "op_2"]
    assert {(record.levelname, record.reason, record.denial_reason) for record in found} == {
        ("WARNING", "budget_exhausted", "exceeds_limit")
    }
    assert found[0].message == "Budget exhausted: budget_exhausted ($0.01 remaining, need $0.15)"
    assert (found[0].remaining, found[0].requested) == (0.01, 0.15)


async def test_a_trigger_denied_because_all_slots_are_full_is_not_logged_as_budget_exhausted(stage, caplog):
    stage.script.wait_in = "training"
    await stage.agent.trigger()
    with pytest.raises(CycleActive):
        await stage.agent.trigger()
    assert not records(caplog, "Budget exhausted")


async def test_the_replica_that_marks_a_cycle_as_lost_logs_the_end_of_the_cycle(make_stage, caplog):
    stage = await make_stage()
    stage.cycle_store.on_lost("op_elsewhere", 12.5)
    [ended] = records(caplog, "Cycle ended")
    assert ended.message == "Cycle ended: op_elsewhere failed (worker_lost) after 12.5 s"
    assert (ended.levelname, ended.reason) == ("WARNING", "worker_lost")
