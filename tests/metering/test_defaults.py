"""Default limiters: set by the program, or created from the environment for each event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.errors import InvalidArgument
from ktrdr_budget.metering.defaults import (
    default_async_limiter,
    default_limiter,
    loop_limiters,
    set_default_limiter,
)
from ktrdr_budget.testing import MemoryLimiter

BUDGETS = [Budget("agent", "5.00")]


@pytest.fixture(autouse=True)
def no_default(monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("KTRDR_REDIS_URL", "redis://store")
    set_default_limiter(None)
    yield
    set_default_limiter(None)


def test_the_default_limiters_of_sync_and_async_code_are_separate():
    limiter, sync_limiter = AsyncBudgetLimiter("redis://store", BUDGETS), MemoryLimiter(BUDGETS)
    set_default_limiter(limiter)
    set_default_limiter(sync_limiter)
    assert default_async_limiter() is limiter
    assert default_limiter() is sync_limiter


def test_a_default_limiter_of_the_wrong_type_is_rejected():
    with pytest.raises(InvalidArgument, match="limiter must be an AsyncBudgetLimiter or a BudgetLimiter"):
        set_default_limiter("redis://store")


def test_each_event_loop_has_a_separate_default_limiter_until_the_loop_ends():
    async def main() -> AsyncBudgetLimiter:
        limiter = default_async_limiter()
        assert default_async_limiter() is limiter
        return limiter

    with asyncio.Runner() as one, asyncio.Runner() as other:
        assert one.run(main()) is not other.run(main())
        assert len(loop_limiters) == 2
    assert not loop_limiters


def test_the_default_limiter_of_an_event_loop_has_the_settings_of_the_environment(monkeypatch):
    monkeypatch.setenv("AGENT_DAILY_BUDGET", "0.20")
    monkeypatch.setenv("KTRDR_TENANT", "acme")

    async def main() -> AsyncBudgetLimiter:
        return default_async_limiter()

    limiter = asyncio.run(main())
    assert limiter.store_url == "redis://store"
    assert limiter.tenant == "acme"
    assert limiter.budgets["agent"].limit == Decimal("0.20")


async def test_a_default_limiter_set_by_the_program_takes_precedence_over_the_environment():
    made = default_async_limiter()
    limiter = AsyncBudgetLimiter("redis://other", BUDGETS)
    set_default_limiter(limiter)
    assert default_async_limiter() is limiter
    set_default_limiter(None)
    assert default_async_limiter() is made
