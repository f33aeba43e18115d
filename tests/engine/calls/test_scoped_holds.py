"""Holds that were reserved by scope, on a real server: amounts go by unit, and the ledger has the scope."""

from __future__ import annotations

from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, HoldConflict, InvalidArgument
from ktrdr_budget.engine.calls.reserve import reserve_units
from ktrdr_budget.engine.protocol.operations import Labels
from ktrdr_budget.hold import AsyncHold

from ...helpers.waiting import until

BUDGETS = [
    Budget("user:alice", "1.00"),
    Budget("team:quant", "5.00"),
    Budget("user:alice/tokens", 10_000, unit="tokens"),
    Budget("user:alice/jobs", 2, kind="slots"),
]
CENT = 10_000_000
RESERVED = {"user:alice": 15 * CENT, "team:quant": 15 * CENT, "user:alice/tokens": 4000, "user:alice/jobs": 1}
SCOPE = {"team": "quant", "user": "alice"}


@pytest.fixture
async def limiter(server) -> AsyncIterator[AsyncBudgetLimiter]:
    async with AsyncBudgetLimiter(server.url, BUDGETS) as made:
        yield made


async def scoped(limiter: AsyncBudgetLimiter, hold_id: str = "op_1", policy: str = "c", request: str = "") -> AsyncHold:
    labels = Labels(operation="research", scope="team=quant,user=alice;usd,usd,tokens,slots")
    flow = reserve_units(limiter.engine.context, [*RESERVED.items()], hold_id, 60_000, policy, labels, request)
    hold: AsyncHold = await limiter.engine.runner.run(flow, "reserve")
    return hold


async def spent(limiter: AsyncBudgetLimiter) -> list[Any]:
    return [status.spent for status in await limiter.statuses()]


async def test_a_hold_shows_its_scope_in_the_process_of_the_worker_and_in_every_other(limiter):
    hold = await scoped(limiter)
    assert hold.scope == (await limiter.get("op_1")).scope == SCOPE
    [listed] = await limiter.holds("team:quant")
    assert listed.scope == SCOPE
    assert (await limiter.reserve("team:quant", "0.01")).scope == {}


async def test_a_commit_spends_the_amount_of_each_unit_in_every_budget_of_that_unit(limiter):
    hold = await scoped(limiter)
    settlement = await hold.commit("0.07", tokens=1800)
    dollars = Decimal("0.07")
    amounts = {"user:alice": dollars, "team:quant": dollars, "user:alice/tokens": 1800, "user:alice/jobs": 0}
    assert settlement.amounts == amounts
    assert await spent(limiter) == [*amounts.values()]
    [entry] = await limiter.ledger("user:alice/tokens")
    assert (entry.kind, entry.operation, entry.scope) == ("commit", "research", SCOPE)


async def test_a_commit_takes_the_accrued_or_the_reserved_amount_in_a_unit_that_it_leaves_out(limiter):
    hold = await scoped(limiter)
    hold.accrue(tokens=30)
    hold.accrue({"tokens": 10})
    await hold.commit()
    assert await spent(limiter) == [Decimal("0.15"), Decimal("0.15"), 40, 0]


@pytest.mark.parametrize("failed", [False, True])
async def test_nothing_is_released_at_the_end_of_a_block_in_which_any_unit_was_accrued(limiter, failed):
    hold = await scoped(limiter)
    with pytest.raises(RuntimeError):
        async with limiter.keep(hold):
            hold.accrue("0.02") if failed else None
            raise RuntimeError
    expected = [Decimal("0.02"), Decimal("0.02"), 4000, 0] if failed else [0, 0, 0, 0]
    assert await spent(limiter) == expected


async def test_a_scoped_hold_grows_and_reports_by_unit(limiter):
    hold = await scoped(limiter)
    await hold.grow("0.05", tokens=1000)
    assert [*hold.amounts.values()] == [Decimal("0.20"), Decimal("0.20"), 5000, 1]
    view = await limiter.grow("op_1", {"tokens": 6000})
    assert [*view.amounts.values()] == [Decimal("0.20"), Decimal("0.20"), 6000, 1]
    view = await limiter.extend("op_1", accrued={"usd": "0.03", "tokens": 7})
    assert [*view.accrued.values()] == [Decimal("0.03"), Decimal("0.03"), 7, 0]


async def test_a_commit_by_id_goes_by_the_units_in_the_record_of_the_hold(limiter):
    await scoped(limiter)
    await limiter.extend("op_1", accrued={"tokens": 7})
    with pytest.raises(InvalidArgument, match=r"go by unit \(usd, tokens, slots\), not by budget \(team:quant\)"):
        await limiter.commit("op_1", {"team:quant": "0.07"})
    await limiter.commit("op_1", {"usd": "0.07"})
    assert await spent(limiter) == [Decimal("0.07"), Decimal("0.07"), 7, 0]


async def test_a_hold_that_names_its_budgets_takes_no_amounts_by_unit(limiter):
    hold = await limiter.reserve("user:alice", "0.15")
    for refused in (hold.commit, hold.grow):
        with pytest.raises(InvalidArgument, match="tokens: only the amounts of a hold that was reserved by scope"):
            await refused("0.07", tokens=1800)
    with pytest.raises(InvalidArgument, match="reserved by scope"):
        hold.accrue(tokens=1)
    await hold.commit("0.07")


async def test_a_replayed_hold_has_the_units_of_the_first_request_and_other_contents_are_a_conflict(limiter):
    await scoped(limiter, request="one.0123-1")
    again = await scoped(limiter, request="one.0123-2")
    assert (again.replayed, again.scope) == (True, SCOPE)
    with pytest.raises(HoldConflict, match="cannot be used again with other contents"):
        await scoped(limiter, request="two.0123-3")
    await again.commit(tokens=5)
    assert await spent(limiter) == [Decimal("0.15"), Decimal("0.15"), 5, 0]


async def test_the_charge_of_an_expired_scoped_hold_has_its_scope_in_the_ledger(limiter, client):
    hold = await scoped(limiter, policy="a")
    hold.accrue(tokens=9)
    await hold.extend(1)

    async def expired() -> bool:
        return (await limiter.status("user:alice/tokens")).unconfirmed == 9

    await until(expired)
    [entry] = await limiter.ledger("user:alice/tokens")
    assert (entry.kind, entry.amount, entry.scope) == ("expiry", 9, SCOPE)
