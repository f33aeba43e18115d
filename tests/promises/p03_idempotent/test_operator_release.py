"""An operator releases a hold whose worker is alive: the hold stays released, and the cost is recorded (P3)."""

from __future__ import annotations

from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, HoldConflict

from ...helpers.keyspace import ledger_sum, sums
from ...helpers.waiting import until

BUDGETS = [Budget("agent", "5.00")]


async def test_heartbeats_do_not_reopen_a_hold_that_an_operator_has_released(limiter, other, client, caplog):
    async with limiter.hold("agent", "0.15", id="op_1", ttl=1) as hold:
        await other.release("op_1", operator=True)
        await until(lambda: "heartbeats of hold op_1 stopped: hold 'op_1' was released by an operator" in caplog.text)
        assert hold.released_by_operator
        assert (sums(client)["held"], hold.state, hold.settled) == (0, "released", False)
        hold.accrue("0.05")
    assert sums(client) == {"spent": 50_000_000, "held": 0, "unconfirmed": 0, "events": 1}
    assert ledger_sum(client) == 50_000_000


@pytest.mark.parametrize("expired", [False, True])
async def test_a_hold_that_an_operator_released_cannot_be_extended_or_grown(limiter, other, client, expired):
    hold = await limiter.reserve("agent", "0.15", id="op_1", ttl=1 if expired else 60)
    if expired:
        await until(lambda: _is_unconfirmed(other))
    await other.release("op_1", operator=True)
    for call in (
        lambda: hold.extend(),
        lambda: hold.grow("0.10"),
        lambda: limiter.extend("op_1", accrued="0.05"),
        lambda: other.grow("op_1", {"agent": "0.20"}),
    ):
        with pytest.raises(HoldConflict, match="released by an operator") as conflict:
            await call()
        assert (conflict.value.state, conflict.value.released_by_operator) == ("released", True)
    assert sums(client)["held"] == 0
    assert (await hold.commit("0.07")).late
    assert (await limiter.status("agent")).spent == Decimal("0.07")


async def _is_unconfirmed(limiter: AsyncBudgetLimiter) -> bool:
    return (await limiter.status("agent")).unconfirmed > 0


async def test_if_the_operator_and_the_worker_have_both_released_a_hold_a_commit_is_refused(limiter, other):
    hold = await limiter.reserve("agent", "0.15", id="op_1")
    await other.release("op_1", operator=True)
    await hold.release()
    with pytest.raises(HoldConflict):
        await other.commit("op_1", "0.07")
