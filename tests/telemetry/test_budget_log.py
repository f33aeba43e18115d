"""Log records of spend on the agent's budget, and of the first denial in each window."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from types import SimpleNamespace

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded
from ktrdr_budget.engine.batching.pending import Observation, Observer
from ktrdr_budget.telemetry import budget_log
from ktrdr_budget.telemetry.budget_log import BudgetLog
from ktrdr_budget.telemetry.outcomes import combined

from ..helpers.patience import away, hurried

pytestmark = pytest.mark.usefixtures("info_log")

BUDGETS = [Budget("agent", "5.00"), Budget("team", "1.00"), Budget("jobs", 1, kind="slots")]


@asynccontextmanager
async def logging_limiter(url: str, *observers: Observer) -> AsyncIterator[tuple[AsyncBudgetLimiter, BudgetLog]]:
    log = BudgetLog()
    calls: list[str] = []
    observer = combined(*observers, log.observe, lambda observation: calls.append(observation.operation))
    async with AsyncBudgetLimiter(url, BUDGETS, observer=observer) as limiter:
        log.watch(limiter)
        limiter.calls = calls
        yield limiter, log


@pytest.fixture
async def logged(server) -> AsyncIterator[tuple[AsyncBudgetLimiter, BudgetLog]]:
    async with logging_limiter(server.url) as made:
        yield made


def records(caplog: pytest.LogCaptureFixture, event: str) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.message.startswith(event)]


async def test_spend_on_the_agent_budget_is_logged_once(logged, caplog):
    limiter, log = logged
    hold = await limiter.reserve({"agent": "0.15", "team": "0.15"}, id="op_1")
    await hold.commit("0.07")
    await limiter.commit("op_1", "0.07")  # a replay
    await log.drain()
    await limiter.record("agent", "0.02", id="r-1")
    await limiter.record("team", "0.02")
    await (await limiter.reserve("agent", "0.15")).release()
    await log.drain()
    found = records(caplog, "Budget spend recorded: ")
    assert [(record.levelname, record.amount, record.operation_id) for record in found] == [
        ("INFO", 0.07, "op_1"),
        ("INFO", 0.02, "r-1"),
    ]
    assert [(record.total_spend, record.remaining) for record in found] == [(0.07, 4.93), (0.09, 4.91)]
    assert found[0].message.endswith("$0.07 for op_1 (total: $0.07, remaining: $4.93)")


async def test_logging_concurrent_spend_reads_the_status_only_a_few_times(logged, caplog):
    limiter, log = logged
    await asyncio.gather(*(limiter.record("agent", "0.01", id=f"r-{number}") for number in range(100)))
    await log.drain()
    found = records(caplog, "Budget spend recorded: ")
    assert {record.operation_id for record in found} == {f"r-{number}" for number in range(100)}
    assert found[-1].total_spend == 1.0
    assert limiter.calls.count("status") < 20


async def test_the_logged_total_is_unknown_if_the_status_cannot_be_read(start_server, caplog):
    own, log = start_server(), BudgetLog()

    def kill_before_the_status_is_read(observation: Observation) -> None:
        if observation.operation == "record":
            own.kill()

    observer = combined(kill_before_the_status_is_read, log.observe)
    async with AsyncBudgetLimiter(own.url, BUDGETS, observer=observer, timeout=0.1) as limiter:
        log.watch(limiter)
        await limiter.record("agent", "0.02", id="r-1")
        await log.drain()
    [record] = records(caplog, "Budget spend recorded: ")
    assert (record.amount, record.total_spend, record.remaining) == (0.02, None, None)
    assert record.message == "Budget spend recorded: $0.02 for r-1 (total: unknown, remaining: unknown)"


async def test_after_a_data_loss_the_logged_total_is_unknown_while_replicas_may_still_replay_spend(
    clocked_server, caplog
):
    url, hurry = clocked_server.url, ExitStack()

    def hurry_status(observation: Observation) -> None:
        if lost and observation.operation == "record":
            hurry.enter_context(away(url))
            hurry.enter_context(hurried(limiter, 0.3))

    lost = False
    async with logging_limiter(url, hurry_status) as (limiter, log), AsyncBudgetLimiter(url, BUDGETS) as other:
        other.engine.dispatcher.repair.stop()  # prevents the detection of the loss
        await other.record("agent", "1.00")
        await limiter.record("agent", "0.02", id="r-1")
        await log.drain()
        clocked_server.set(clocked_server.now(), frozen=True)  # the store waits for replays until its clock runs again
        with clocked_server.client() as client:
            client.flushall()
        await limiter.status("agent")
        lost = True
        with hurry:
            await limiter.record("agent", "0.03", id="r-2")
            await log.drain()
    first, second = records(caplog, "Budget spend recorded: ")
    assert (first.operation_id, first.total_spend) == ("r-1", 1.02)
    assert (second.operation_id, second.total_spend, second.remaining) == ("r-2", None, None)


async def test_denials_are_logged_once_per_window_and_budget(logged, caplog):
    limiter, _ = logged
    await limiter.reserve("jobs", 1)
    for _ in range(3):
        for name, amount in (("agent", "6.00"), ("team", "2.00"), ("jobs", 1)):
            with pytest.raises(BudgetExceeded):
                await limiter.reserve(name, amount)
    found = records(caplog, "Reservation denied: ")
    assert [(record.levelname, record.budget, record.reason) for record in found] == [
        ("WARNING", "agent", "exceeds_limit"),
        ("WARNING", "team", "exceeds_limit"),
        ("WARNING", "jobs", "budget_held"),
    ]
    window = (await limiter.status("agent")).window
    assert [record.window for record in found] == [window, window, "ever"]
    assert (found[0].remaining, found[0].requested) == (5.0, 6.0)


async def test_the_first_denial_in_each_window_is_logged(logged, caplog, monkeypatch):
    limiter, _ = logged
    for days in range(2):
        now_ns = time.time_ns() + days * 86_400_000_000_000
        monkeypatch.setattr(budget_log, "time", SimpleNamespace(time_ns=lambda now_ns=now_ns: now_ns))
        with pytest.raises(BudgetExceeded):
            await limiter.reserve("team", "2.00")
    assert len(records(caplog, "Reservation denied: ")) == 2
