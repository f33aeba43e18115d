"""Denials: their reasons, and ``retry_after``, the time until the denied budget may have room (P6)."""

from __future__ import annotations

import asyncio
import math
from datetime import UTC, datetime, timedelta

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded
from ktrdr_budget.engine.calls import refusals

from ...helpers.keyspace import dump

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
TO_MIDNIGHT_S = 12 * 3600
BUDGETS = [Budget("agent", "1.00"), Budget("other", "5.00"), Budget("jobs", 1, kind="slots")]


@pytest.fixture
async def limiter(clocked_server):
    clocked_server.set(NOON, frozen=True)
    async with AsyncBudgetLimiter(clocked_server.url, BUDGETS, timeout=30) as made:
        yield made


async def denied(call) -> BudgetExceeded:
    with pytest.raises(BudgetExceeded) as error:
        await call
    return error.value


def about(seconds: int) -> set[int]:
    """``seconds``, or one second less, since even a frozen clock advances by some milliseconds."""
    return {seconds - 1, seconds}


async def test_retry_after_is_the_time_to_the_next_deadline_among_the_holds_of_the_denied_budget(
    limiter, clocked_server
):
    await limiter.reserve("other", "0.10", ttl=60)
    await limiter.reserve({"agent": "0.40", "other": "0.10"}, ttl=1200)
    await limiter.reserve("agent", "0.60", ttl=900)
    with clocked_server.client() as client:
        before = dump(client)
        error = await denied(limiter.reserve("agent", "0.50"))
        assert dump(client) == before, "a denial writes nothing"
    assert (error.reason, error.retry_after in about(900)) == ("budget_held", True)


async def test_retry_after_ignores_holds_of_other_windows(limiter, clocked_server):
    await limiter.reserve("agent", "0.60", ttl=86_400)
    clocked_server.advance(TO_MIDNIGHT_S - 60)
    await limiter.reserve("agent", "0.10", ttl=600, id="yesterday")
    clocked_server.advance(120)
    await limiter.reserve("agent", "0.60", ttl=1800)
    error = await denied(limiter.reserve("agent", "0.50"))
    assert (error.reason, error.retry_after in about(1800)) == ("budget_held", True)


async def test_retry_after_of_denied_growth_ignores_the_hold_that_should_grow(limiter):
    hold = await limiter.reserve("agent", "0.60", ttl=60)
    error = await denied(hold.grow("0.41"))
    assert (error.reason, error.retry_after) == ("exceeds_limit", None)
    error = await denied(limiter.grow(hold.id, {"agent": "1.01"}))
    assert (error.reason, error.retry_after) == ("exceeds_limit", None)
    await limiter.reserve("agent", "0.20", ttl=900)
    error = await denied(hold.grow("0.30"))
    assert (error.reason, error.retry_after in about(900)) == ("budget_held", True)


async def test_retry_after_ignores_holds_of_the_denied_budget_if_too_many_other_holds_expire_earlier(
    limiter, monkeypatch
):
    monkeypatch.setattr(refusals, "HOLDS_SEARCHED", 3)
    for _ in range(3):
        await limiter.reserve("other", "0.10", ttl=60)
    await limiter.reserve("agent", "0.60", ttl=900)
    await limiter.reserve("jobs", 1, ttl=900)
    error = await denied(limiter.reserve("agent", "0.50"))
    assert (error.reason, error.retry_after in about(TO_MIDNIGHT_S)) == ("budget_held", True)
    error = await denied(limiter.reserve("jobs", 1))  # its window has no end, but its holds have a deadline
    assert (error.reason, error.retry_after in about(60)) == ("budget_held", True)


async def test_retry_after_is_the_time_to_the_end_of_the_window_if_the_budget_is_exhausted(limiter):
    await limiter.reserve("agent", "0.10", ttl=60)
    await limiter.record("agent", "0.80")
    error = await denied(limiter.reserve("agent", "0.50"))
    assert (error.reason, error.retry_after in about(TO_MIDNIGHT_S)) == ("budget_exhausted", True)
    assert math.isclose(timedelta(seconds=error.retry_after).total_seconds(), TO_MIDNIGHT_S, abs_tol=1)


async def test_a_burst_of_300_denials_causes_at_most_five_reads_and_four_new_connections(server):
    async with AsyncBudgetLimiter(server.url, BUDGETS, timeout=30) as limiter:
        await limiter.reserve("agent", "1.00", ttl=600)
        with server.client() as client:
            client.config_resetstat()
            before = client.info("clients")["connected_clients"]
            outcomes = await asyncio.gather(
                *(limiter.reserve("agent", "0.10") for _ in range(300)), return_exceptions=True
            )
            assert {type(outcome) for outcome in outcomes} == {BudgetExceeded}
            assert all(0 < outcome.retry_after <= 600 for outcome in outcomes)
            assert client.info("commandstats")["cmdstat_mget"]["calls"] <= 5, "once a second"
            assert client.info("clients")["connected_clients"] <= before + 4
