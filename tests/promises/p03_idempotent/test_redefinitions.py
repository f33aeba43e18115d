"""A retry after the definition of its budget was replaced is a replay (P3)."""

from __future__ import annotations

from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, HoldConflict

from ...helpers.keyspace import sums


@pytest.fixture
async def redefined(server):
    """A limiter that counts tokens in the budget in which the other limiter counts dollars."""
    async with AsyncBudgetLimiter(server.url, [Budget("agent", 5, unit="tokens")]) as made:
        yield made


@pytest.fixture
async def limiter(server):
    async with AsyncBudgetLimiter(server.url, [Budget("agent", "5.00")]) as made:
        yield made


async def test_a_retry_of_a_reservation_in_a_redefined_budget_returns_the_hold(limiter, redefined):
    await limiter.reserve("agent", 2, id="op_1")
    await redefined.migrate("agent")
    hold = await redefined.reserve("agent", 2, id="op_1")
    assert (hold.replayed, hold.amounts) == (True, {"agent": Decimal("2.00")})
    with pytest.raises(HoldConflict, match="cannot be used again with other contents"):
        await redefined.reserve("agent", 3, id="op_1")
    await hold.commit("1.50")
    assert (await redefined.status("agent")).spent == 0, "the window that admitted the hold pays"


async def test_a_retry_of_recorded_spend_in_a_redefined_budget_changes_nothing(limiter, redefined):
    await limiter.record("agent", 2, id="op_1")
    await redefined.migrate("agent")
    assert (await redefined.record("agent", 2, id="op_1")).replayed
    with pytest.raises(HoldConflict, match="was recorded at"):
        await redefined.record("agent", 3, id="op_1")
    assert (await redefined.status("agent")).spent == 0


async def test_an_id_that_has_reserved_an_amount_cannot_record_the_same_amount(limiter, client):
    await limiter.reserve("agent", 2, id="op_1")
    with pytest.raises(HoldConflict, match="was reserved at"):
        await limiter.record("agent", 2, id="op_1")
    assert sums(client)["spent"] == 0


async def test_a_reservation_with_a_generated_id_is_compared_by_the_amounts_of_the_hold(limiter):
    hold = await limiter.reserve("agent", 2)
    assert (await limiter.reserve("agent", 2, id=hold.id)).replayed
    with pytest.raises(HoldConflict):
        await limiter.reserve("agent", 3, id=hold.id)
