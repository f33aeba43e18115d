"""Each growth of a hold is applied once, whether calls are concurrent, retried or cancelled (P1, P3)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, HoldConflict, InvalidAmount, StoreUnavailable
from ktrdr_budget.engine.calls.extend import extend
from ktrdr_budget.engine.protocol.batch import BatchHead
from ktrdr_budget.engine.protocol.replies import Extended
from ktrdr_budget.money import to_units

from ...helpers.keyspace import dump, sums
from ...helpers.patience import away
from ...helpers.proxy import Proxy
from ...helpers.waiting import until

BUDGETS = [Budget("agent", "5.00"), Budget("calls", 100, unit="requests")]


@pytest.fixture
async def far(proxy: Proxy) -> AsyncIterator[AsyncBudgetLimiter]:
    """A limiter behind the proxy; the server has already loaded the scripts of the limiter."""
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=0.5) as made:

        async def scripts_loaded() -> bool:
            with suppress(StoreUnavailable):
                hold = await made.reserve("agent", "0.01", id="first")
                await hold.grow("0.01")
                await hold.commit(0)
                return True
            return False

        await until(scripts_loaded)
        yield made


async def reserved(limiter: AsyncBudgetLimiter, hold_id: str) -> Decimal:
    return Decimal((await limiter.get(hold_id)).amounts["agent"])


async def test_concurrent_growth_through_one_hold_object_adds_up(limiter, client):
    hold = await limiter.reserve({"agent": "0.15", "calls": 1}, id="op_1")
    await asyncio.gather(*(hold.grow({"agent": "0.10", "calls": 2}) for _ in range(5)), hold.extend())
    assert hold.amounts == {"agent": Decimal("0.65"), "calls": 11}
    assert (await limiter.get("op_1")).amounts == hold.amounts
    assert sums(client)["held"] == to_units("0.65")


def test_concurrent_growth_by_threads_adds_up(sync_limiter, client):
    hold = sync_limiter.reserve("agent", "0.10")
    threads = [threading.Thread(target=hold.grow, args=("0.10",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hold.amounts == {"agent": Decimal("0.90")}
    assert sums(client)["held"] == to_units("0.90")


async def test_growth_by_one_replica_is_added_to_earlier_growth_by_another_replica(limiter, other):
    hold = await limiter.reserve("agent", "0.15", id="op_1")
    await other.grow("op_1", {"agent": "0.50"})
    await hold.grow("0.10")
    assert hold.amounts == {"agent": Decimal("0.60")}
    theirs = await other.reserve("agent", "0.15", id="op_1")
    assert theirs.amounts == {"agent": Decimal("0.60")}
    await hold.grow("0.10")
    await theirs.grow("0.10")  # the same amount from the same totals, but no retry of the other call
    assert theirs.amounts == {"agent": Decimal("0.80")}


async def test_concurrent_growth_by_two_replicas_adds_up(limiter, other):
    holds = [await one.reserve("agent", "0.15", id="op_1") for one in (limiter, other)]
    await asyncio.gather(*(hold.grow("0.10") for hold in holds for _ in range(4)))
    assert await reserved(limiter, "op_1") == Decimal("0.95")


async def test_denied_growth_changes_nothing(limiter, client):
    hold = await limiter.reserve("agent", "4.00", id="op_1")
    outcomes = await asyncio.gather(*(hold.grow("0.40") for _ in range(4)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes].count(BudgetExceeded) == 2
    assert hold.amounts == {"agent": Decimal("4.80")}
    before = dump(client)
    with pytest.raises(BudgetExceeded):
        await hold.grow({"agent": "0.21"})
    with pytest.raises(InvalidAmount):
        await hold.grow("9007199")
    assert dump(client) == before
    await hold.commit("0.07")
    with pytest.raises(HoldConflict):
        await hold.grow("0.10")


async def test_cancelled_growth_does_not_affect_other_growth(limiter):
    hold = await limiter.reserve("agent", "0.15", id="op_1")
    tasks = [asyncio.create_task(hold.grow("0.10")) for _ in range(4)]
    await asyncio.sleep(0)
    for task in tasks[:2]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    before = await reserved(limiter, "op_1")
    await hold.grow("0.10")
    assert await reserved(limiter, "op_1") == before + Decimal("0.10") == hold.amounts["agent"]
    assert before >= Decimal("0.35")


async def test_growth_is_applied_once_if_the_reply_is_lost(far, proxy, client):
    hold = await far.reserve("agent", "0.15", id="op_1")
    proxy.lose_replies = 1
    await asyncio.gather(hold.grow("0.10"), hold.grow("0.10"))
    assert proxy.replies_lost >= 1
    assert hold.amounts == {"agent": Decimal("0.35")}
    assert sums(client)["held"] == to_units("0.35")


@pytest.mark.parametrize("fate", ["reply", "request"])
@pytest.mark.parametrize("heartbeat", [False, True])
async def test_if_growth_with_unknown_outcome_is_retried_the_hold_grows_once(far, proxy, client, fate, heartbeat):
    hold = await far.reserve("agent", "0.15", id="op_1")
    proxy.fate = lambda: fate
    with away(proxy.url), pytest.raises(StoreUnavailable) as unavailable:
        await hold.grow("0.10")
    assert unavailable.value.ambiguous
    proxy.fate = lambda: None

    async def retried() -> bool:
        with suppress(StoreUnavailable):
            if heartbeat:  # its reply resolves the first call, but the caller does not see that
                await hold.extend()
            await hold.grow("0.10")
            return True
        return False

    await until(retried)
    assert hold.amounts == {"agent": Decimal("0.25")}
    await hold.grow("0.10")
    assert hold.amounts == {"agent": Decimal("0.35")}
    assert sums(client)["held"] == to_units("0.35")


async def test_concurrent_growth_of_a_hold_admitted_during_an_outage_adds_up(tmp_path):
    url = f"unix://{tmp_path}/missing"
    async with AsyncBudgetLimiter(url, BUDGETS, timeout=0.1, on_store_error="allow") as limiter:
        hold = await limiter.reserve("agent", "0.15")
        await asyncio.gather(hold.grow("0.10"), hold.grow("0.10"))
        await hold.extend()
        await hold.grow("0.10")
        assert hold.amounts == {"agent": Decimal("0.45")}


async def test_growth_during_an_outage_and_equal_growth_after_the_outage_are_both_applied(proxy, client):
    """Under policy `allow` the caller received a success for growth during the outage, so it will not retry."""
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=0.5, on_store_error="allow") as limiter:
        hold = await limiter.reserve("agent", "0.15", id="op_1")
        proxy.fate = lambda: "reply"
        with away(proxy.url):
            await hold.grow("0.10")
        proxy.fate = lambda: None
        await until(lambda: limiter.store_state == "closed")

        async def replayed() -> bool:
            await hold.grow("0.10")
            return sums(client)["held"] == to_units(hold.amounts["agent"])

        await until(replayed)
        assert hold.amounts["agent"] >= Decimal("0.35")


async def test_growth_is_kept_if_an_older_reply_to_a_heartbeat_arrives_after_the_growth(limiter, client):
    """A limiter may use two connections, so replies may arrive in a different order than the store sent them."""
    hold = await limiter.reserve("agent", "0.15", id="op_1")
    older = client.get("ktrdr:{default}:h:op_1")
    await hold.grow("0.10")
    heartbeat = extend(limiter.engine.context, hold, None)
    next(heartbeat)
    with pytest.raises(StopIteration):
        reply = Extended(older)
        heartbeat.send((reply, BatchHead(0, False, 0, None, ())))
    assert hold.amounts == {"agent": Decimal("0.25")}
