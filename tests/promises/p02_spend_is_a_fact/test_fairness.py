"""No kind of call starves another: each is decided in time, and heartbeats keep holds open (P2, P5, P12)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.limiter import AsyncHold

from ...helpers.keyspace import ledger_entries, ledger_key, sums
from ...helpers.patience import in_haste

BUDGET = Budget("agent", "500.00")
CALLERS = 100
DEADLINE_S = 5.0
"""The timeout of a call: a thousand times the usual duration."""


@asynccontextmanager
async def crowd(call: Callable) -> AsyncIterator[None]:
    """Run the call in a loop by ``CALLERS`` tasks during the block."""

    async def repeat() -> None:
        while not over:
            await call()

    over = False
    async with asyncio.TaskGroup() as group:
        for _ in range(CALLERS):
            group.create_task(repeat())
        try:
            yield
        finally:
            over = True


def expiries(client) -> int:
    return sum(entry.kind == "expiry" for entry in ledger_entries(client, ledger_key(client)))


async def use(limiter: AsyncBudgetLimiter, hold: AsyncHold) -> None:
    """Grow a hold for 2.5 times its ttl, with another reservation each time."""
    ends = asyncio.get_running_loop().time() + 2.5 * hold.ttl
    while asyncio.get_running_loop().time() < ends:
        await hold.grow("0.01")
        other = await limiter.reserve("agent", "0.01")
        assert hold.cap_checked and other.cap_checked
        await other.commit("0.01")


@pytest.mark.timely
@pytest.mark.parametrize("policy", ["deny", "allow"])
async def test_callers_that_record_in_a_loop_starve_no_reservation_growth_or_heartbeat(server, client, policy):
    async with AsyncBudgetLimiter(server.url, [BUDGET], on_store_error=policy) as limiter:
        with in_haste(limiter, DEADLINE_S):
            async with crowd(lambda: limiter.record("agent", "0.0001")), limiter.hold("agent", "1.00", ttl=2) as hold:
                await use(limiter, hold)
                assert (hold.state, limiter.deferred, limiter.unresolved) == ("open", 0, 0)
        assert expiries(client) == 0


async def test_callers_that_reserve_and_release_in_a_loop_starve_no_record(server, client):
    async def reserve_and_release() -> None:
        await (await limiter.reserve("agent", "0.01")).release()

    async with AsyncBudgetLimiter(server.url, [BUDGET]) as limiter:
        with in_haste(limiter, DEADLINE_S):
            async with crowd(reserve_and_release):
                for _ in range(50):
                    await limiter.record("agent", "0.01")
        assert sums(client)["held"] == 0


async def test_callers_that_extend_in_a_loop_starve_neither_reservations_nor_commits(server, client):
    async with AsyncBudgetLimiter(server.url, [BUDGET]) as limiter:
        shared = await limiter.reserve("agent", "1.00")
        with in_haste(limiter, DEADLINE_S):
            async with crowd(shared.extend):
                for _ in range(50):
                    await (await limiter.reserve("agent", "0.01")).commit("0.01")
