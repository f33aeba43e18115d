"""Release and extension of holds by id, from any replica (P2, P3)."""

from __future__ import annotations

import time
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, HoldConflict

from ...helpers.keyspace import sums
from ...helpers.waiting import until

BUDGETS = [Budget("agent", "5.00")]


async def unconfirmed(limiter: AsyncBudgetLimiter, hold_id: str):
    """The hold object of an unconfirmed hold."""
    hold = await limiter.reserve("agent", "0.15", id=hold_id, ttl=1)

    async def expired() -> bool:
        return (await limiter.get(hold_id)).state == "unconfirmed"

    await until(expired)
    return hold


async def test_a_worker_can_commit_an_unconfirmed_hold_after_another_replica_released_the_hold_by_id(
    limiter, other, client
):
    """P3: after the expiry of a hold and a release by an operator, the cost can still be committed."""
    hold = await unconfirmed(limiter, "op_1")
    for replayed in (False, True):  # a retry does not make it final
        assert (await other.release("op_1")).replayed is replayed
    assert (await limiter.get("op_1")).released_by_operator
    assert sums(client)["unconfirmed"] == 0
    done = await hold.commit("0.07")
    assert (done.late, done.amounts) == (True, {"agent": Decimal("0.07")})
    with pytest.raises(HoldConflict):
        await hold.commit("0.08")


async def test_after_a_worker_has_released_its_unconfirmed_hold_a_commit_is_refused(limiter):
    hold = await unconfirmed(limiter, "op_1")
    await hold.release()
    assert not (await limiter.get("op_1")).released_by_operator
    with pytest.raises(HoldConflict):
        await limiter.commit("op_1", "0.07")


async def test_after_an_open_hold_was_released_by_id_a_commit_is_refused(limiter, other):
    await limiter.reserve("agent", "0.15", id="op_1")
    await other.release("op_1")
    assert (await other.release("op_1")).replayed
    with pytest.raises(HoldConflict) as conflict:
        await limiter.commit("op_1", "0.07")
    assert conflict.value.state == "released"


async def test_after_a_data_loss_a_released_hold_can_be_committed_only_if_the_hold_was_unconfirmed(
    limiter, other, client
):
    await limiter.reserve("agent", "0.15", id="open")
    await unconfirmed(limiter, "late")
    for hold_id in ("open", "late"):
        await other.release(hold_id)
    client.flushall()

    # The replica that granted the holds replays them as open, before or after the replay of the releases.
    names = ["ktrdr:{default}:h:open", "ktrdr:{default}:h:late"]
    await until(lambda: [(record or "-")[0] for record in client.mget(names)] == ["r", "z"])
    assert (await limiter.commit("late", "0.07")).late
    with pytest.raises(HoldConflict):
        await limiter.commit("open", "0.07")


async def test_an_extension_without_a_ttl_never_makes_the_deadline_of_a_hold_earlier(limiter):
    hold = await limiter.reserve("agent", "0.15", id="op_1", ttl=7200)
    view = await limiter.extend("op_1", accrued="0.05")
    assert (view.expires_at, view.accrued) == (hold.expires_at, {"agent": Decimal("0.05")})
    assert (await limiter.extend("op_1", 600)).expires_at < hold.expires_at  # a ttl may shorten it
    before = (await limiter.get("op_1")).expires_at
    assert (await limiter.extend("op_1")).expires_at > before
    assert (await limiter.get("op_1")).expires_at.timestamp() > time.time() + 600
