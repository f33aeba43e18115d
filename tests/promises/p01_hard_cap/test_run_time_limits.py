"""The limit in force is the limit set at run time, or else the configured limit of the last started replica (P1)."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, BudgetTracker
from ktrdr_budget.money import to_units

from ...helpers.keyspace import counted, dump
from ...helpers.waiting import until


def limiter_of(server, limit: str) -> AsyncBudgetLimiter:
    return AsyncBudgetLimiter(server.url, [Budget("agent", limit)])


async def test_a_limiter_restarted_with_another_limit_shows_the_new_limit_and_writes_nothing(server, client):
    async with limiter_of(server, "5.00") as before:
        await (await before.reserve("agent", "1.00")).commit("1.00")
    stored = dump(client)
    async with limiter_of(server, "10.00") as after:
        for status in (await after.status("agent"), *(await after.statuses())):
            assert (status.limit, status.remaining, status.limit_source) == (10, Decimal("9.00"), "configured")
    assert dump(client) == stored
    async with limiter_of(server, "0.50") as lower:
        assert (await lower.status("agent")).remaining == 0
        with pytest.raises(BudgetExceeded):
            await lower.reserve("agent", "0.01")


async def test_the_configured_limit_of_the_replica_that_started_last_applies_to_all_replicas(server):
    async with limiter_of(server, "5.00") as first, limiter_of(server, "10.00") as last:
        await first.reserve("agent", "1.00")
        assert ((await first.status("agent")).limit, (await last.status("agent")).limit) == (5, 10)
        await last.reserve("agent", "1.00")
        assert ((await first.status("agent")).limit, (await last.status("agent")).limit) == (10, 10)


async def test_a_limit_set_at_run_time_overrides_the_configured_limit_of_a_replica_started_later(server):
    async with limiter_of(server, "5.00") as first:
        await first.reserve("agent", "1.00")
        await first.set_limit("agent", "7.00")
        async with limiter_of(server, "10.00") as last:
            assert (await last.status("agent")).limit == 7
            await last.clear_limit("agent")
            assert ((await first.status("agent")).limit, (await last.status("agent")).limit) == (5, 10)


async def test_a_service_restarted_with_another_limit_shows_the_new_limit_in_all_responses(server):
    import httpx

    from ktrdr_budget.api import Settings, create_app

    async with limiter_of(server, "5.00") as before:
        await before.reserve("agent", "1.00")
    app = create_app(Settings(redis_url=server.url, agent_daily_budget="10.00"))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            assert (await client.get("/api/v1/agent/budget")).json()["daily_limit"] == 10
            assert (await client.get("/api/v1/budgets/agent")).json()["remaining"] == "9.00"

            async def scraped() -> bool:
                return "agent_budget_remaining_dollars 9.0" in (await client.get("/metrics")).text

            await until(scraped)


def test_the_limit_of_the_tracker_that_started_last_applies_to_all_trackers(server):
    with BudgetTracker(1.0, url=server.url) as first:
        assert first.get_today_spend() == 0.0
        with BudgetTracker(0.5, url=server.url) as last:  # it starts after the first reply to the other tracker
            assert last.get_remaining() == 0.5
            last.reserve(0.1)
            assert first.get_remaining() == last.get_remaining() == 0.4
            assert first.can_spend(0.45) == (False, "budget_exhausted ($0.40 remaining, need $0.45)")
            assert first.get_status()["daily_limit"] == 0.5
            first.limiter.set_limit("agent", "2.00")
            assert last.can_spend(1.90) == (True, "ok")


@pytest.mark.parametrize("wrong_by_s", [7200, -7200])
async def test_the_limit_of_the_last_started_replica_applies_even_if_an_earlier_replica_has_a_wrong_clock(
    server, client, monkeypatch, wrong_by_s
):
    """The replica that starts last sends a reservation before it has read the store's clock."""
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda now=time.time: now() + wrong_by_s)
        patched.setattr(time, "time_ns", lambda now=time.time_ns: now() + wrong_by_s * 10**9)
        wrong = limiter_of(server, "5.00")
        await wrong.reserve("agent", "0.20")
    later = limiter_of(server, "0.50")
    try:
        await later.reserve("agent", "0.20")
        for limiter in (wrong, later):
            assert (await limiter.status("agent")).limit == Decimal("0.50")
            with pytest.raises(BudgetExceeded, match="exceeds_limit|budget_held"):
                await limiter.reserve("agent", "0.20")
        assert counted(client) == to_units("0.40")
    finally:
        await wrong.close()
        await later.close()


async def test_a_limit_set_until_the_year_2300_is_applied(server):
    """In milliseconds, the year 2300 has 14 digits and today has 13: comparisons of instants must still be right."""
    async with limiter_of(server, "5.00") as limiter:
        await (await limiter.reserve("agent", "0.01")).commit("0.01")
        status = await limiter.set_limit("agent", "0", until=datetime(2300, 1, 1, tzinfo=UTC))
        assert (status.limit, status.remaining, status.limit_source) == (0, 0, "runtime")
        for _ in range(40):
            with pytest.raises(BudgetExceeded):
                await limiter.reserve("agent", "0.01")


async def test_a_call_of_set_limit_deletes_limits_that_have_expired(clocked_server):
    budgets = [Budget(f"agent/{number}", "5.00") for number in range(4)]
    async with AsyncBudgetLimiter(clocked_server.url, budgets, timeout=30) as limiter:
        for budget in budgets:
            await limiter.set_limit(budget.name, "1.00", until="window")
        clocked_server.advance(86_400)
        await limiter.set_limit("agent/0", "2.00")
        with clocked_server.client() as client:
            assert list(client.hgetall(limiter.keys.limits)) == ["agent/0"]
