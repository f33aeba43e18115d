"""Holds by their ids after the store has lost data: an id is unknown only to a store that lacks nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, StoreUnavailable, UnknownHold
from ktrdr_budget.engine.calls.settle import settle_by_id

from ...helpers.keyspace import sums
from ...helpers.patience import away, hurried
from ...helpers.waiting import until

BUDGETS = [Budget("agent", "5.00")]

Call = Callable[[AsyncBudgetLimiter, str], Awaitable[object]]

CALLS: list[Call] = [
    lambda limiter, hold_id: limiter.commit(hold_id, "0.07"),
    lambda limiter, hold_id: limiter.release(hold_id),
    lambda limiter, hold_id: limiter.release(hold_id, operator=True),
    lambda limiter, hold_id: limiter.extend(hold_id, accrued="0.02"),
    lambda limiter, hold_id: limiter.grow(hold_id, {"agent": "0.20"}),
    lambda limiter, hold_id: limiter.get(hold_id),
]
by_each_call = pytest.mark.parametrize("call", CALLS, ids=["commit", "release", "by hand", "extend", "grow", "get"])


@pytest.fixture
async def limiter(server) -> AsyncIterator[AsyncBudgetLimiter]:
    async with AsyncBudgetLimiter(server.url, BUDGETS) as made:
        yield made


@pytest.fixture
async def silent(server) -> AsyncIterator[AsyncBudgetLimiter]:
    """Another replica, which notices no loss by itself."""
    async with AsyncBudgetLimiter(server.url, BUDGETS) as made:
        made.engine.dispatcher.repair.stop()
        yield made


async def repaired_by(replica: AsyncBudgetLimiter) -> None:
    replica.engine.dispatcher.repair.suspect()
    await until(lambda: replica.losses == 1 and not replica.engine.dispatcher.repair.active)


@by_each_call
async def test_a_replica_settles_what_it_was_granted_though_the_store_has_lost_it(limiter, client, call):
    await limiter.reserve("agent", "0.15", id="op_1")
    client.flushall()
    await call(limiter, "op_1")
    assert limiter.losses == 1
    found = sums(client)
    assert found["spent"] == (70_000_000 if call is CALLS[0] else 0)


@pytest.mark.timely
@by_each_call
async def test_a_hold_that_another_replica_has_yet_to_replay_is_not_unknown(server, limiter, silent, client, call):
    await silent.reserve("agent", "0.15", id="op_1")
    await limiter.record("agent", "0.01")
    client.flushall()
    with away(server.url), hurried(limiter, 0.3), pytest.raises(StoreUnavailable, match="being repaired"):
        await call(limiter, "op_1")
    await repaired_by(silent)
    await call(limiter, "op_1")


@pytest.mark.timely
async def test_a_replica_that_never_contacted_the_store_takes_no_hold_for_unknown_while_it_recovers(
    server, silent, client
):
    await silent.reserve("agent", "0.15", id="op_1")
    async with AsyncBudgetLimiter(server.url, BUDGETS) as witness:
        client.flushall()
        assert (await witness.status("agent")).recovering_until
    async with AsyncBudgetLimiter(server.url, BUDGETS) as new:
        with away(server.url), hurried(new, 0.2), pytest.raises(StoreUnavailable, match="being repaired; try again in"):
            await new.commit("op_1", "0.07")
        await repaired_by(silent)
        assert (await new.commit("op_1", "0.07")).amounts == {"agent": Decimal("0.07")}
        with pytest.raises(UnknownHold):
            await new.commit("op_2", "0.07")


async def test_a_commit_that_has_read_its_hold_before_the_loss_waits_for_its_replay(limiter, silent, client):
    """It is sent with the windows that it has read, and finds the hold gone."""
    await silent.reserve("agent", "0.15", id="op_1")
    flow = settle_by_id(limiter.engine.context, "op_1", "0.07")
    reply = await limiter.engine.dispatcher.background.read(flow.send(None))
    commit = flow.send(reply)
    client.flushall()

    def send_commit():
        reply, _ = yield commit
        return reply

    sent = limiter.engine.dispatcher.submit(send_commit(), "commit")
    await until(lambda: limiter.losses == 1 and limiter.engine.dispatcher.delayed)
    await repaired_by(silent)
    assert (await sent).units == (70_000_000,)


async def test_an_id_that_nobody_knows_is_unknown_once_the_store_has_recovered(limiter, client):
    await limiter.record("agent", "0.01")
    client.flushall()
    with pytest.raises(UnknownHold):
        await limiter.commit("op_1", "0.07")
    assert (await limiter.status("agent")).recovering_until is None
