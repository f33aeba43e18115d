"""Calls by id after a data loss: ``UnknownHold`` is raised only after the recovery of the store has ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, UnknownHold
from ktrdr_budget.engine.calls.settle import settle_by_id

from ...helpers.keyspace import sums
from ...helpers.patience import away, hurried
from ...helpers.repairs import recovery_prolonged, refused_during_repair, replayed
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
by_each_call = pytest.mark.parametrize(
    "call", CALLS, ids=["commit", "release", "by the operator", "extend", "grow", "get"]
)


@pytest.fixture
async def silent(server) -> AsyncIterator[AsyncBudgetLimiter]:
    """Another replica, which does not detect a loss without a request."""
    async with AsyncBudgetLimiter(server.url, BUDGETS) as made:
        made.engine.dispatcher.repair.stop()
        yield made


@by_each_call
async def test_after_a_loss_each_call_by_id_succeeds_on_the_replica_that_reserved_the_hold(limiter, client, call):
    await limiter.reserve("agent", "0.15", id="op_1")
    client.flushall()
    await call(limiter, "op_1")
    assert limiter.losses == 1
    found = sums(client)
    assert found["spent"] == (70_000_000 if call is CALLS[0] else 0)


@by_each_call
async def test_calls_by_id_are_refused_until_the_lost_hold_has_been_replayed(server, limiter, silent, client, call):
    await silent.reserve("agent", "0.15", id="op_1")
    await limiter.record("agent", "0.01")
    client.flushall()
    with recovery_prolonged(client), away(server.url), hurried(limiter, 0.3):
        await refused_during_repair(lambda: call(limiter, "op_1"))
    await replayed(silent)
    await call(limiter, "op_1")


async def test_a_commit_by_a_new_replica_is_refused_until_the_lost_hold_has_been_replayed(server, silent, client):
    await silent.reserve("agent", "0.15", id="op_1")
    with ExitStack() as prolonged:
        prolonged.enter_context(recovery_prolonged(client))
        async with AsyncBudgetLimiter(server.url, BUDGETS) as witness:
            client.flushall()
            assert (await witness.status("agent")).recovering_until
        async with AsyncBudgetLimiter(server.url, BUDGETS) as new:
            with away(server.url), hurried(new, 0.2):
                refused = await refused_during_repair(lambda: new.commit("op_1", "0.07"))
            assert "being repaired; try again in" in str(refused)
            prolonged.close()
            await replayed(silent)
            assert (await new.commit("op_1", "0.07")).amounts == {"agent": Decimal("0.07")}
            with pytest.raises(UnknownHold):
                await new.commit("op_2", "0.07")


async def test_a_commit_by_id_waits_for_the_replay_if_the_hold_is_lost_after_it_was_read(limiter, silent, client):
    """The commit by id first reads the hold; when the commit itself arrives, the store no longer has the hold."""
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
    await replayed(silent)
    assert (await sent).units == (70_000_000,)


async def test_a_commit_of_an_id_without_a_hold_raises_unknown_hold_after_the_recovery(limiter, client):
    await limiter.record("agent", "0.01")
    client.flushall()
    with pytest.raises(UnknownHold):
        await limiter.commit("op_1", "0.07")
    assert (await limiter.status("agent")).recovering_until is None
