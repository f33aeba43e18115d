"""After a data loss, a limit set at run time is restored by each replica that has set or read the limit."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded

from ...helpers.repairs import replayed
from ...helpers.waiting import until

BUDGETS = [Budget("agent", "5.00"), Budget("tokens", 1000, unit="tokens")]


@pytest.fixture
async def replicas(server) -> AsyncIterator[list[AsyncBudgetLimiter]]:
    """Two replicas with the same budgets; neither detects a loss without a request."""
    async with AsyncExitStack() as stack:
        made = [await stack.enter_async_context(AsyncBudgetLimiter(server.url, BUDGETS)) for _ in range(2)]
        for limiter in made:
            await limiter.record("agent", "0.10")
            limiter.engine.dispatcher.repair.stop()
        yield made


async def repaired_by(*replicas: AsyncBudgetLimiter) -> None:
    """Let the replicas detect the loss and replay their journals, one after another."""
    for limiter in replicas:
        await replayed(limiter, limiter.losses + 1)


async def denied(limiter: AsyncBudgetLimiter, amount: str) -> str:
    with pytest.raises(BudgetExceeded) as refused:
        await limiter.reserve("agent", amount)
    return str(refused.value.denial.limit)


async def test_p1_a_limit_set_at_run_time_applies_again_after_a_loss(replicas, client, caplog):
    limiter, other = replicas
    await limiter.set_limit("agent", "1.00")
    client.flushall()
    assert await denied(limiter, "3.00") == "1.00"
    assert "restored the limits that were set or cleared at run time: agent" in caplog.messages
    assert await denied(other, "3.00") == "1.00"
    status = await limiter.status("agent")
    assert (str(status.limit), status.limit_source, str(status.spent)) == ("1.00", "runtime", "0.20")


async def test_a_replica_that_has_only_read_a_limit_restores_the_limit_after_a_loss(replicas, client):
    limiter, other = replicas
    ends = (await limiter.status("agent")).as_of + timedelta(hours=1)
    await limiter.set_limit("agent", "1.00", until=ends)
    await limiter.set_limit("tokens", None)
    await other.statuses()
    await limiter.close()
    client.flushall()
    assert await denied(other, "3.00") == "1.00"
    agent, tokens = await other.statuses()
    assert (agent.limit_until, tokens.limit, tokens.limit_source) == (ends, None, "runtime")


async def test_an_idle_replica_that_has_only_set_a_limit_restores_the_limit_after_a_loss(server, replicas, client):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as operator:
        await operator.set_limit("agent", "1.00")
        client.flushall()
        await until(lambda: client.hget("ktrdr:{default}:limits", "agent"))
    await repaired_by(*replicas)
    assert await denied(replicas[0], "3.00") == "1.00"


@pytest.mark.parametrize("first", [0, 1])
async def test_after_a_loss_the_most_recent_limit_applies_whichever_replica_replays_first(replicas, client, first):
    limiter, other = replicas
    await limiter.set_limit("agent", "3.00")
    await other.set_limit("agent", "1.00")
    client.flushall()
    await repaired_by(replicas[first], replicas[1 - first])
    assert str((await limiter.status("agent")).limit) == "1.00"


@pytest.mark.parametrize("first", [0, 1])
async def test_a_limit_cleared_by_another_replica_stays_cleared_after_a_loss(replicas, client, first):
    limiter, other = replicas
    await limiter.set_limit("agent", "9.00")
    await other.clear_limit("agent")
    client.flushall()
    await repaired_by(replicas[first], replicas[1 - first])
    assert await denied(limiter, "6.00") == "5.00"
    await limiter.set_limit("agent", "7.00")
    assert await denied(other, "8.00") == "7.00"


async def test_a_replica_does_not_restore_a_limit_after_reading_that_the_limit_is_cleared(replicas, client):
    limiter, other = replicas
    await limiter.set_limit("agent", "9.00")
    await other.clear_limit("agent")
    assert str((await limiter.status("agent")).limit) == "5.00"
    await other.close()
    client.flushall()
    assert await denied(limiter, "6.00") == "5.00"


async def test_a_limit_set_under_another_definition_of_the_budget_is_not_restored(server, replicas, client, caplog):
    limiter, other = replicas
    await limiter.set_limit("agent", "1.00")
    client.flushall()
    caplog.set_level(logging.WARNING, "ktrdr_budget")
    async with AsyncBudgetLimiter(server.url, [Budget("agent", 100, unit="tokens")]) as newer:
        await newer.reserve("agent", 1)
        await repaired_by(limiter, other)
        await newer.reserve("agent", 50)
        assert (await newer.status("agent")).limit == 100
