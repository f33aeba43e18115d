"""Metering settles holds of sync and async limiters by the same functions."""

from __future__ import annotations

import inspect
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from ktrdr_budget import Budget
from ktrdr_budget.metering import limiter_access
from ktrdr_budget.testing import AsyncMemoryLimiter, MemoryLimiter

BUDGETS = [Budget("agent", "5.00")]


async def result_of(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


@pytest.fixture(params=["sync", "async"])
async def limiter(request):
    if request.param == "sync":
        with MemoryLimiter(BUDGETS) as made:
            yield made
    else:
        async with AsyncMemoryLimiter(BUDGETS) as made:
            yield made


async def spent_and_held(limiter: Any) -> tuple[Decimal, Decimal]:
    status = await result_of(limiter.status("agent"))
    return status.spent, status.held


async def test_a_commit_is_awaitable_only_for_an_async_limiter(limiter):
    hold = await result_of(limiter.reserve("agent", "0.15"))
    settlement = limiter_access.commit(limiter, hold, {"agent": "0.10"})
    assert inspect.isawaitable(settlement) == isinstance(limiter, AsyncMemoryLimiter)
    assert (await result_of(settlement)).amounts == {"agent": Decimal("0.10")}
    assert await spent_and_held(limiter) == (Decimal("0.10"), 0)


async def test_a_released_hold_costs_nothing(limiter):
    hold = await result_of(limiter.reserve("agent", "0.15"))
    assert (await result_of(limiter_access.release(limiter, hold))).state == "released"
    assert await spent_and_held(limiter) == (0, 0)


async def test_recorded_spend_has_a_label_in_the_ledger(limiter):
    await result_of(limiter_access.record(limiter, {"agent": "0.02"}, "chat"))
    assert await spent_and_held(limiter) == (Decimal("0.02"), 0)
    page = await result_of(limiter.ledger("agent"))
    assert [(entry.kind, entry.operation) for entry in page.items] == [("record", "chat")]


@pytest.mark.parametrize(
    ("failed", "on_error", "spent", "held"),
    [(False, "release", "0.15", 0), (True, "release", "0", 0), (True, "charge", "0", Decimal("0.15"))],
)
async def test_when_a_block_ends_the_hold_is_committed_or_released_or_kept(limiter, failed, on_error, spent, held):
    hold = await result_of(limiter.reserve("agent", "0.15"))
    stopped = []
    block_exit = (failed, on_error, lambda: stopped.append(True))
    await result_of(limiter_access.leave_hold(limiter, hold, block_exit))
    assert await spent_and_held(limiter) == (Decimal(spent), held)
    assert stopped == [True]


async def test_the_time_of_the_store_is_a_datetime_with_a_timezone(limiter):
    await result_of(limiter.reserve("agent", "0.15"))
    assert abs(limiter_access.store_time(limiter) - datetime.now(UTC)) < timedelta(minutes=1)
