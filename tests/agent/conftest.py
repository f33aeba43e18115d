"""An agent in this process on a real server, with controlled phases."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.agent.service import slots

from .stage import Stage


@pytest.fixture
async def make_stage(server) -> AsyncIterator[Callable[..., object]]:
    """Create replicas, each with its own limiter and agent."""
    async with AsyncExitStack() as stack:

        async def make(limit: str | None = "5.00", slots_limit: int = 1, **options) -> Stage:
            budgets = [Budget("agent", limit), slots(slots_limit)]
            limiter = await stack.enter_async_context(AsyncBudgetLimiter(server.url, budgets))
            stage = Stage(limiter, **options)
            stack.push_async_callback(stage.agent.close)
            return stage

        yield make


@pytest.fixture
async def stage(make_stage) -> Stage:
    return await make_stage()
