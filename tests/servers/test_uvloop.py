"""The limiter on uvloop, the event loop of the service. The timers and turns of uvloop differ from those of asyncio."""

from __future__ import annotations

import asyncio
import time

import pytest
import uvloop

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.money import to_units

from ..helpers.keyspace import sums
from ..helpers.patience import in_haste
from ..helpers.waiting import until

pytestmark = pytest.mark.event_loops("uvloop")

BUDGETS = [Budget("agent", "5.00")]
REPLY_S = 2.0
"""A timeout within which a store replies even on a slow machine."""


@pytest.fixture
async def limiter(server):
    async with AsyncBudgetLimiter(server.url, BUDGETS, on_store_error="allow") as made:
        assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
        await made.record("agent", "0.01")
        yield made


async def test_a_hold_left_open_by_an_error_expires_at_its_deadline(limiter, client):
    with pytest.raises(ZeroDivisionError):
        async with limiter.hold("agent", "0.15", id="op_1", ttl=1, on_expiry="accrued", on_error="charge") as hold:
            hold.accrue("0.05")
            _ = 1 / 0

    async def is_unconfirmed() -> bool:
        return (await limiter.get("op_1")).state == "unconfirmed"

    await until(is_unconfirmed)
    assert sums(client)["unconfirmed"] == to_units("0.05")


@pytest.mark.parametrize("turns", [1, 4, 7])
async def test_after_a_stall_of_the_event_loop_each_call_is_granted_by_the_store(limiter, turns):
    with in_haste(limiter, REPLY_S):
        tries = [asyncio.create_task(limiter.reserve("agent", "0.01")) for _ in range(30)]
        for _ in range(turns):
            await asyncio.sleep(0)
        time.sleep(1.2 * REPLY_S)
        assert all(hold.cap_checked and hold.offline is None for hold in await asyncio.gather(*tries))
    assert limiter.store_state == "closed"
