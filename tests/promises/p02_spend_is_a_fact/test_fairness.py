"""No kind of call starves another: each is decided in time, and heartbeats keep holds open (P2, P5, P12)."""

from __future__ import annotations

import asyncio
from datetime import datetime

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.limiter import AsyncHold

from ...helpers.crowd import crowd
from ...helpers.keyspace import ledger_entries, ledger_key, sums
from ...helpers.waiting import until

BUDGET = Budget("agent", "500.00")
CALLERS = 100
TTL_S = 2


def expiries(client) -> int:
    return sum(entry.kind == "expiry" for entry in ledger_entries(client, ledger_key(client)))


async def use(limiter: AsyncBudgetLimiter, hold: AsyncHold) -> None:
    """Grow the hold; then reserve and commit another hold."""
    await hold.grow("0.01")
    other = await limiter.reserve("agent", "0.01")
    assert hold.cap_checked and other.cap_checked
    await other.commit("0.01")


async def is_extended(limiter: AsyncBudgetLimiter, hold: AsyncHold, deadline: datetime) -> bool:
    view = await limiter.get(hold.id)
    assert view.state == "open"
    return view.expires_at > deadline


@pytest.mark.parametrize("policy", ["deny", "allow"])
async def test_reservations_growth_and_heartbeats_succeed_while_other_callers_record_in_a_loop(clocked_server, policy):
    """The store's clock stands still while the test waits, so that no hold expires on a slow machine."""
    clocked_server.set(clocked_server.now(), frozen=True)
    async with AsyncBudgetLimiter(clocked_server.url, [BUDGET], on_store_error=policy) as limiter:
        async with (
            crowd(lambda: limiter.record("agent", "0.0001"), CALLERS),
            limiter.hold("agent", "1.00", ttl=TTL_S) as hold,
            limiter.hold("agent", "1.00", ttl=TTL_S) as kept,
        ):
            for _ in range(5):
                await use(limiter, hold)
                deadline = (await limiter.get(kept.id)).expires_at
                await asyncio.to_thread(clocked_server.advance, TTL_S / 2)
                await until(lambda deadline=deadline: is_extended(limiter, kept, deadline))
            assert (hold.state, limiter.deferred, limiter.unresolved) == ("open", 0, 0)
    with clocked_server.client() as client:
        assert expiries(client) == 0


async def test_records_succeed_while_other_callers_reserve_and_release_in_a_loop(server, client):
    async def reserve_and_release() -> None:
        await (await limiter.reserve("agent", "0.01")).release()

    async with AsyncBudgetLimiter(server.url, [BUDGET]) as limiter:
        async with crowd(reserve_and_release, CALLERS):
            for _ in range(50):
                await limiter.record("agent", "0.01")
        assert sums(client)["held"] == 0


async def test_reservations_and_commits_succeed_while_other_callers_extend_a_hold_in_a_loop(server, client):
    async with AsyncBudgetLimiter(server.url, [BUDGET]) as limiter:
        shared = await limiter.reserve("agent", "1.00")
        async with crowd(shared.extend, CALLERS):
            for _ in range(50):
                await (await limiter.reserve("agent", "0.01")).commit("0.01")
