"""Holds that are released and extended by their ids alone, by whoever knows those."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, HoldConflict

from ...helpers.keyspace import sums
from ...helpers.waiting import until

BUDGETS = [Budget("agent", "5.00")]


@pytest.fixture
async def other(server) -> AsyncIterator[AsyncBudgetLimiter]:
    async with AsyncBudgetLimiter(server.url, BUDGETS) as made:
        yield made


async def unconfirmed(limiter: AsyncBudgetLimiter, hold_id: str):
    """A hold that has expired, in the hands of its worker."""
    hold = await limiter.reserve("agent", "0.15", id=hold_id, ttl=1)

    async def expired() -> bool:
        return (await limiter.get(hold_id)).state == "unconfirmed"

    await until(expired)
    return hold


async def test_an_unconfirmed_hold_that_was_released_by_its_id_is_still_committed_by_its_worker(limiter, other, client):
    """P3: expiry and a release by hand do not resolve a hold."""
    hold = await unconfirmed(limiter, "op_1")
    for replayed in (False, True):  # a retry of it makes it no more final
        assert (await other.release("op_1")).replayed is replayed
    assert (await limiter.get("op_1")).released_by_operator
    assert sums(client)["unconfirmed"] == 0
    done = await hold.commit("0.07")
    assert (done.late, done.amounts) == (True, {"agent": Decimal("0.07")})
    with pytest.raises(HoldConflict):
        await hold.commit("0.08")


async def test_an_unconfirmed_hold_that_its_worker_released_is_settled(limiter):
    hold = await unconfirmed(limiter, "op_1")
    await hold.release()
    assert not (await limiter.get("op_1")).released_by_operator
    with pytest.raises(HoldConflict):
        await limiter.commit("op_1", "0.07")


async def test_an_open_hold_that_was_released_by_its_id_is_settled(limiter, other):
    await limiter.reserve("agent", "0.15", id="op_1")
    await other.release("op_1")
    assert (await other.release("op_1")).replayed
    with pytest.raises(HoldConflict) as conflict:
        await limiter.commit("op_1", "0.07")
    assert conflict.value.state == "released"


async def test_a_store_that_lost_a_release_by_id_is_told_whether_it_was_for_good(limiter, other, client):
    await limiter.reserve("agent", "0.15", id="open")
    await unconfirmed(limiter, "late")
    for hold_id in ("open", "late"):
        await other.release(hold_id)
    client.flushall()

    # Its worker knows it as open: whichever of the two replicas is heard first.
    names = ["ktrdr:{default}:h:open", "ktrdr:{default}:h:late"]
    await until(lambda: [(record or "-")[0] for record in client.mget(names)] == ["r", "z"])
    assert (await limiter.commit("late", "0.07")).late
    with pytest.raises(HoldConflict):
        await limiter.commit("open", "0.07")


async def test_an_extension_without_a_ttl_cuts_no_hold_short(limiter):
    hold = await limiter.reserve("agent", "0.15", id="op_1", ttl=7200)
    view = await limiter.extend("op_1", accrued="0.05")
    assert (view.expires_at, view.accrued) == (hold.expires_at, {"agent": Decimal("0.05")})
    assert (await limiter.extend("op_1", 600)).expires_at < hold.expires_at  # as it was asked for
    before = (await limiter.get("op_1")).expires_at
    assert (await limiter.extend("op_1")).expires_at > before
    assert (await limiter.get("op_1")).expires_at.timestamp() > time.time() + 600
