"""After a repair or an outage, a repeated reservation or commit is still a replay (P3, P13)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, AsyncHold, Budget, HoldConflict
from ktrdr_budget.audit import verify

from ...helpers.waiting import until

BUDGETS = [Budget("agent", "5.00"), Budget("calls", 100, unit="requests"), Budget("jobs", 3, kind="slots")]
REQUESTED = {"agent": "0.15", "calls": 2, "jobs": 1}

Change = Callable[[AsyncBudgetLimiter, AsyncHold], Awaitable[object]]


async def grow_and_report(other: AsyncBudgetLimiter, hold: AsyncHold) -> None:
    hold.accrue("0.30")
    await hold.extend()
    await hold.grow({"agent": "0.05", "calls": 3})


async def grow_and_commit(other: AsyncBudgetLimiter, hold: AsyncHold) -> None:
    await hold.grow({"agent": "0.05"})
    hold.note("claude, 300 tokens")
    await hold.commit("0.40")


async def expire(other: AsyncBudgetLimiter, hold: AsyncHold) -> None:
    await hold.extend(1)

    async def expired() -> bool:
        return (await other.get(hold.id)).state == "unconfirmed"

    await until(expired)


async def expire_and_release(other: AsyncBudgetLimiter, hold: AsyncHold) -> None:
    await expire(other, hold)
    await other.release(hold.id)


CHANGES: dict[str, Change] = {
    "nothing": lambda other, hold: other.status("agent"),
    "grown": grow_and_report,
    "grown by id": lambda other, hold: other.grow(hold.id, {"agent": "0.20"}),
    "committed for less": lambda other, hold: hold.commit("0.07"),
    "committed for nothing": lambda other, hold: hold.commit(0),
    "committed for more": grow_and_commit,
    "committed by id": lambda other, hold: other.commit(hold.id, "0.07"),
    "released": lambda other, hold: hold.release(),
    "released by id": lambda other, hold: other.release(hold.id),
    "released by hand": lambda other, hold: other.release(hold.id, operator=True),
    "expired": expire,
    "expired and released": expire_and_release,
}


@pytest.mark.parametrize("policy", ["charge", "accrued", "release"])
@pytest.mark.parametrize("change", CHANGES)
async def test_after_a_repair_a_reservation_repeated_with_the_same_contents_is_a_replay(
    limiter, other, client, change, policy
):
    options = {"id": "op_1", "on_expiry": policy, "operation": "research", "owner": "me"}
    hold = await limiter.reserve(REQUESTED, **options)
    await CHANGES[change](other, hold)
    before, statuses = await other.get("op_1"), await other.statuses()
    for loss in (1, 2):
        client.flushall()
        for replica in (other, limiter):
            await replica.status("agent")
            assert replica.losses == loss
        assert await other.get("op_1") == before
        again = await other.reserve(REQUESTED, **options)
        assert (again.replayed, again.state, again.amounts) == (True, before.state, before.amounts)
        for contents in ({**REQUESTED, "agent": "0.16"}, {"agent": "0.15"}):
            with pytest.raises(HoldConflict):
                await limiter.reserve(contents, **options)
        with pytest.raises(HoldConflict):
            await limiter.reserve(REQUESTED, id="op_1", on_expiry="accrued" if policy != "accrued" else "charge")
        for was, now in zip(statuses, await other.statuses(), strict=True):
            figures = ("spent", "held", "unconfirmed", "overruns")
            assert [getattr(was, name) for name in figures] == [getattr(now, name) for name in figures]
    assert all(report.adds_up for report in verify(limiter.store_address))


async def test_after_a_repair_a_commit_repeated_with_the_same_amount_is_a_replay(limiter, other, client):
    hold = await limiter.reserve("agent", "0.15", id="op_1")
    await hold.grow("0.05")
    await hold.commit("0.07")
    client.flushall()
    assert (await hold.commit("0.07")).replayed
    assert (await other.commit("op_1", "0.07")).replayed
    with pytest.raises(HoldConflict):
        await other.commit("op_1", "0.08")
    assert (await limiter.status("agent")).spent == Decimal("0.07")


async def test_after_an_outage_another_replica_can_replay_a_hold_admitted_by_policy_allow(proxy, other):
    """Policy `lease` differs: a hold granted during an outage exists only in the process that granted the hold."""
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=0.3, on_store_error="allow") as limiter:
        await limiter.status("agent")
        proxy.cut()
        hold = await limiter.reserve("agent", "0.15", id="op_1", on_expiry="accrued", operation="research")
        await hold.grow("0.05")
        hold.note("gpt, 20 tokens")
        assert (await hold.commit("0.07")).deferred
        proxy.mend()
        await until(lambda: limiter.deferred == 0)
        view = await other.get("op_1")
        assert (view.state, view.amounts, view.charged, view.operation) == (
            "committed", {"agent": Decimal("0.20")}, {"agent": Decimal("0.07")}, "research gpt, 20 tokens",
        )  # fmt: skip
        again = await other.reserve("agent", "0.15", id="op_1", on_expiry="accrued")
        assert (again.replayed, again.state) == (True, "committed")
        with pytest.raises(HoldConflict):
            await other.reserve("agent", "0.07", id="op_1", on_expiry="accrued")
