"""The report at the start: the store, one line for each budget, and a warning for everything unusual."""

from __future__ import annotations

from typing import Any

import pytest

from ktrdr_budget import Budget
from ktrdr_budget.api import Settings
from ktrdr_budget.api.startup_report import budget_line, startup_report
from ktrdr_budget.environment import ZERO_BUDGET
from ktrdr_budget.testing import AsyncMemoryLimiter, memory_server

AGENT = Budget("agent", "5.00")
SETTINGS = Settings(redis_url="redis://worker:secret@store")
STORE = "store: redis://worker:***@store"


async def report(limiter: Any, settings: Settings = SETTINGS) -> list[str]:
    return [line async for line in startup_report(settings, limiter)]


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        (AGENT, "budget agent: $5.00 a day (UTC)"),
        (Budget("b", "1", period="week", timezone="Europe/Rome"), "budget b: $1.00 a week (Europe/Rome)"),
        (Budget("b", 0, unit="calls", period="hour"), "budget b: 0 calls an hour: denies all"),
        (Budget("b", 2, kind="slots"), "budget b: 2 at a time"),
        (Budget("b", None, period="ever"), "budget b: unlimited in all"),
    ],
)
def test_the_report_line_of_a_budget_shows_the_limit_and_the_period_in_words(budget, line):
    assert budget_line(budget) == line


async def test_the_report_lists_only_the_store_and_the_budgets_if_nothing_is_unusual():
    async with AsyncMemoryLimiter([AGENT]) as limiter:
        assert await report(limiter) == [STORE, "budget agent: $5.00 a day (UTC)"]


async def test_a_daily_budget_of_zero_causes_a_warning():
    async with AsyncMemoryLimiter([Budget("agent", 0)]) as limiter:
        settings = Settings(redis_url="redis://store", agent_daily_budget=0)
        assert (await report(limiter, settings))[-1] == f"warning: {ZERO_BUDGET}"


async def test_a_stored_limit_different_from_the_configured_limit_causes_a_warning():
    async with AsyncMemoryLimiter([AGENT]) as limiter:
        await limiter.set_limit("agent", "5.00")
        assert len(await report(limiter)) == 2, "the same limit is no surprise"
        await limiter.set_limit("agent", "9.00")
        assert (await report(limiter))[-1] == (
            "warning: budget agent: run-time limit $9.00 is in force;"
            " configured $5.00 is not (ktrdr budget clear-limit agent)"
        )


async def test_a_budget_registered_with_a_different_definition_causes_a_warning():
    server = memory_server()
    async with AsyncMemoryLimiter([Budget("agent", "5.00", period="week")], server=server) as other:
        await other.record("agent", "0.10")
        async with AsyncMemoryLimiter([AGENT], server=server) as limiter:
            assert (await report(limiter))[-1].startswith("warning: budget agent: ")


async def test_the_report_ends_with_one_warning_if_the_store_is_unreachable():
    server = memory_server()
    async with AsyncMemoryLimiter([AGENT], server=server, timeout=0.05) as limiter:
        server.connected = False
        lines = await report(limiter)
        server.connected = True
    assert lines[:2] == [STORE, "budget agent: $5.00 a day (UTC)"]
    assert len(lines) == 3 and lines[2].startswith("warning: ")
