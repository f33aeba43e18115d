"""In each turn of the event loop, either the caller or the limiter is responsible for completing a call (P14)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from decimal import Decimal
from typing import Any

import anyio
import pytest
import redis

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, BudgetLimiter, HoldConflict, StoreUnavailable
from ktrdr_budget.engine.protocol.operations import Labels, Reserve
from ktrdr_budget.engine.protocol.replies import Replayed
from ktrdr_budget.limiter import AsyncHold
from ktrdr_budget.money import to_units

from ...helpers.breakers import open_breaker
from ...helpers.keyspace import ledger_sum, spent_and_held, sums
from ...helpers.patience import hurried
from ...helpers.proxy import Proxy
from ...helpers.repairs import replayed
from ...helpers.waiting import until, wait_until

BUDGETS = [Budget("agent", "500.00")]
CENT = to_units("0.01")
TURNS_MAX = 2000


async def load_scripts(limiter: AsyncBudgetLimiter) -> None:
    """Load the scripts into the server without writing a key."""
    with pytest.raises(BudgetExceeded):
        await limiter.reserve("agent", "501.00")


# -- each turn ---------------------------------------------------------------------------------------------------------


async def cancelled_after(turns: int, work: Coroutine[Any, Any, Any]) -> Any:
    """The outcome of a call that is cancelled after some turns: a result, an error, or the cancellation."""
    task = asyncio.create_task(work)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    [outcome] = await asyncio.gather(task, return_exceptions=True)
    return outcome


async def work_in_block(limiter: AsyncBudgetLimiter, hold: AsyncHold, on_error: str) -> None:
    async with limiter.keep(hold, on_error=on_error):
        hold.accrue("0.01")
        raise ZeroDivisionError


CALLS = {
    "commit": lambda limiter, hold: hold.commit("0.01"),
    "commit by id": lambda limiter, hold: limiter.commit(hold.id, "0.01"),
    "record": lambda limiter, hold: limiter.record("agent", "0.01", id=f"record:{hold.id}"),
    "report by id": lambda limiter, hold: limiter.extend(hold.id, accrued="0.01"),
    "block": lambda limiter, hold: work_in_block(limiter, hold, "release"),
    "block that reports": lambda limiter, hold: work_in_block(limiter, hold, "charge"),
}
"""Each call commits, records or reports one cent; each hold has two cents."""


async def reserved(limiter: AsyncBudgetLimiter, number: int) -> AsyncHold:
    return await limiter.reserve("agent", "0.02", id=f"hold:{number}", ttl=3600, on_expiry="accrued")


async def stored_amount(limiter: AsyncBudgetLimiter, call: str, number: int) -> Decimal:
    """The amount that the call has written to the store."""
    view = await limiter.get(f"record:hold:{number}" if call == "record" else f"hold:{number}")
    return (view.accrued if "report" in call else view.charged)["agent"]


async def judge(client, limiter: AsyncBudgetLimiter, call: str, outcomes: list[Any]) -> None:
    """Check that each call was executed once, even if its caller was cancelled."""
    begun = range(1, len(outcomes))  # a task cancelled before its first turn has made no call
    await until(lambda: not limiter.unresolved)
    if "report" not in call:
        await until(lambda: sums(client)["spent"] >= len(begun) * CENT)
        held = len(outcomes) if call == "record" else 1
        assert spent_and_held(client) == (len(begun) * CENT, held * 2 * CENT)
    for number in begun:
        assert await stored_amount(limiter, call, number) == Decimal("0.01"), (number, outcomes[number])


@pytest.mark.parametrize("call", CALLS)
async def test_a_settlement_cancelled_in_any_turn_of_the_event_loop_is_not_lost(server, client, call):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        outcomes: list[Any] = []
        while sum(not isinstance(outcome, asyncio.CancelledError) for outcome in outcomes) < 3:
            assert len(outcomes) < TURNS_MAX
            hold = await reserved(limiter, len(outcomes))
            outcomes.append(await cancelled_after(len(outcomes), CALLS[call](limiter, hold)))
        await judge(client, limiter, call, outcomes)


@pytest.mark.parametrize("call", CALLS)
async def test_a_settlement_cancelled_in_any_turn_of_the_event_loop_is_not_lost_while_the_breaker_is_open(
    own_server, call
):
    """The request is never sent; its failure may arrive in the same turn as the cancellation of its caller."""
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=0.3) as limiter:
        holds = [await reserved(limiter, number) for number in range(100)]
        own_server.kill()
        await open_breaker(limiter, lambda: limiter.status("agent"))
        outcomes: list[Any] = []
        while sum(not isinstance(outcome, asyncio.CancelledError) for outcome in outcomes) < 3:
            hold = holds[len(outcomes)]
            outcomes.append(await cancelled_after(len(outcomes), CALLS[call](limiter, hold)))
        own_server.start()
        await until(lambda: limiter.store_state == "closed")
        for hold, outcome in zip(holds, outcomes, strict=False):
            if isinstance(outcome, StoreUnavailable):  # the caller retries
                await CALLS[call](limiter, hold)
        for hold in holds[len(outcomes) :]:
            await hold.release()
        with own_server.client() as client:
            await judge(client, limiter, call, outcomes)


@pytest.mark.parametrize("named", [True, False])
async def test_a_reservation_cancelled_in_any_turn_of_the_event_loop_leaves_no_hold(server, client, named):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        received: list[AsyncHold] = []
        turns = 0
        while len(received) < 3:
            assert turns < TURNS_MAX
            request = limiter.reserve("agent", "0.01", id=f"hold:{turns}" if named else None)
            outcome = await cancelled_after(turns, request)
            turns += 1
            if not isinstance(outcome, asyncio.CancelledError):
                received.append(outcome)
        await until(lambda: spent_and_held(client) == (0, 3 * CENT))


@pytest.mark.parametrize("policy", ["deny", "allow"])
async def test_a_reservation_with_unknown_outcome_is_released_if_its_caller_is_cancelled_at_the_deadline(
    client, proxy, policy
):
    """The caller receives the cancellation instead of the ambiguous error, and will not retry."""
    tasks: list[asyncio.Task] = []

    def cancel_now(observation) -> None:
        if observation.operation == "reserve" and tasks:
            tasks[0].cancel()

    async with AsyncBudgetLimiter(proxy.url, BUDGETS, observer=cancel_now, on_store_error=policy) as limiter:
        await load_scripts(limiter)
        with hurried(limiter, 0.2):
            proxy.hold_replies()
            tasks.append(asyncio.create_task(limiter.reserve("agent", "0.15", id="op_1")))
            with pytest.raises(asyncio.CancelledError):
                await tasks[0]
            assert sums(client)["held"] == to_units("0.15")
        proxy.release_replies()
        await until(lambda: spent_and_held(client) == (0, 0))


# -- owners of grants --------------------------------------------------------------------------------------------------


@pytest.fixture
async def limiter(proxy: Proxy) -> AsyncIterator[AsyncBudgetLimiter]:
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=20.0) as made:
        await load_scripts(made)
        yield made


async def cancelled_in_flight(call: Coroutine[Any, Any, Any], sent: Callable[[], Any]) -> None:
    task = asyncio.create_task(call)
    await until(sent)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancelled_reservation_does_not_release_the_hold_of_another_replica_with_the_same_id(
    client, proxy, limiter, other
):
    """The cancelled request arrives after the request of the other replica, so its reply is a replay."""
    proxy.freeze()
    seen = proxy.scripts_run
    call = limiter.reserve("agent", "0.15", id="op_1")
    await cancelled_in_flight(call, lambda: asyncio.sleep(0.02, True))
    hold = await other.reserve("agent", "0.15", id="op_1")
    assert not hold.replayed
    proxy.thaw()
    await until(lambda: proxy.scripts_run > seen)
    await limiter.record("agent", 0)
    assert (await limiter.get("op_1")).state == "open"
    assert not (await hold.commit("0.07")).late
    assert spent_and_held(client) == (to_units("0.07"), 0)


async def released_for_its_caller(
    client: redis.Redis, proxy: Proxy, limiter: AsyncBudgetLimiter, other: AsyncBudgetLimiter, amount: str
) -> AsyncHold:
    """Reserve ``op_1``, cancel the caller, replay ``op_1`` on ``other``, await the release, and return the replay."""
    proxy.hold_replies()
    call = limiter.reserve("agent", amount, id="op_1")
    await cancelled_in_flight(call, lambda: sums(client)["held"] == to_units(amount))
    hold = await other.reserve("agent", amount, id="op_1")
    assert (hold.replayed, hold.state) == (True, "open")
    proxy.release_replies()
    await until(lambda: sums(client)["held"] == 0)
    return hold


async def test_a_hold_released_because_a_caller_was_cancelled_can_still_be_committed_by_another_replica(
    client, proxy, limiter, other
):
    hold = await released_for_its_caller(client, proxy, limiter, other, "0.15")
    view = await other.get("op_1")
    assert (view.state, view.released_by_operator) == ("released", False)
    assert (await hold.commit("0.07")).amounts == {"agent": Decimal("0.07")}
    assert spent_and_held(client) == (to_units("0.07"), 0)
    assert (await hold.commit("0.07")).replayed


async def test_extending_a_hold_that_was_released_because_a_caller_was_cancelled_reserves_the_amount_again(
    client, proxy, limiter, other
):
    """The worker's heartbeat needs room for the amount again, as for an expired hold."""
    hold = await released_for_its_caller(client, proxy, limiter, other, "400.00")
    await hold.extend()
    assert (hold.state, sums(client)["held"]) == ("open", to_units("400.00"))
    with pytest.raises(BudgetExceeded):
        await other.reserve("agent", "200.00")
    assert not (await hold.commit("300.00")).late
    assert spent_and_held(client) == (to_units("300.00"), 0)


@pytest.mark.parametrize("amount", ["0.15", "0.20"])
async def test_an_id_released_because_its_caller_was_cancelled_can_be_reserved_again_with_the_same_amount(
    client, proxy, limiter, other, amount
):
    proxy.hold_replies()
    call = limiter.reserve("agent", "0.15", id="op_1")
    await cancelled_in_flight(call, lambda: sums(client)["held"] == to_units("0.15"))
    proxy.release_replies()
    await until(lambda: sums(client)["held"] == 0)
    if amount == "0.20":
        with pytest.raises(HoldConflict):  # an id has one amount
            await other.reserve("agent", amount, id="op_1")
        return
    hold = await other.reserve("agent", amount, id="op_1")
    assert not hold.replayed
    assert sums(client)["held"] == to_units(amount)
    assert not (await hold.commit("0.07")).late


async def test_a_worker_can_commit_a_released_hold_although_a_new_reservation_of_the_same_id_was_denied(
    client, proxy, limiter, other
):
    """Only a grant replaces the record of a released hold, so that the worker can still commit it."""
    hold = await released_for_its_caller(client, proxy, limiter, other, "400.00")
    await other.record("agent", "200.00")
    with pytest.raises(BudgetExceeded):
        await other.reserve("agent", "400.00", id="op_1")
    assert (await hold.commit("0.07")).amounts == {"agent": Decimal("0.07")}
    assert spent_and_held(client) == (to_units("200.07"), 0)


async def test_a_repair_does_not_reopen_a_hold_that_was_released_because_a_caller_was_cancelled(
    client, proxy, limiter, other
):
    """The first replica replays the release; after that, the other replica replays the hold as open."""
    other.engine.dispatcher.repair.stop()
    hold = await released_for_its_caller(client, proxy, limiter, other, "0.15")
    client.flushall()
    for replica in (limiter, other):
        await replayed(replica)
    assert sums(client)["held"] == 0
    assert (await limiter.get("op_1")).state == "released"
    assert (await hold.commit("0.07")).amounts == {"agent": Decimal("0.07")}
    assert spent_and_held(client) == (to_units("0.07"), 0)


async def test_a_late_copy_of_a_request_is_not_granted_if_the_hold_was_released(client, proxy, limiter):
    proxy.hold_replies()
    call = limiter.reserve("agent", "0.15", id="op_1")
    await cancelled_in_flight(call, lambda: sums(client)["held"] == to_units("0.15"))
    request = client.get(limiter.keys.hold("op_1")).partition("|")[0].split(" ")[5].strip("-!")
    proxy.release_replies()
    await until(lambda: sums(client)["held"] == 0)
    state = limiter.engine.state
    parts = [(state.current_window("agent"), to_units("0.15"))]
    terms = {"ttl_ms": 900_000, "policy": "c", "labels": Labels(), "now_ms": state.now_ms(), "request": request}
    copy = Reserve("op_1", limiter.keys.hold("op_1"), parts, **terms)
    _, [reply] = await limiter.engine.dispatcher.background.send([copy])
    assert isinstance(reply, Replayed) and reply.record.unreceived
    assert sums(client)["held"] == 0


async def test_a_resent_request_is_not_marked_as_replayed_but_a_second_request_with_the_same_id_is(
    client, proxy, limiter, other
):
    proxy.lose_replies = 1
    hold = await limiter.reserve("agent", "0.15", id="op_1")
    assert not hold.replayed, "the first attempt of this request was granted"
    assert (await limiter.reserve("agent", "0.15", id="op_1")).replayed
    assert (await other.reserve("agent", "0.15", id="op_1")).replayed


async def test_a_repair_restores_the_owner_and_the_request_id_of_a_hold(server, client, other):
    hold = await other.reserve("agent", "0.15", id="op_1", owner="worker")
    key = other.keys.hold("op_1")
    owner = f"worker!{hold.request}"
    assert client.get(key).partition("|")[0].split(" ")[5] == owner
    client.flushall()
    await until(lambda: client.exists(key))
    assert client.get(key).partition("|")[0].split(" ")[5] == owner
    assert (await other.get("op_1")).owner == "worker"


# -- scopes that cancel at each await ----------------------------------------------------------------------------------


def accrued(client, hold_id: str) -> int:
    return int(client.get(f"ktrdr:{{default}}:h:{hold_id}").partition("|")[2].split(",")[4] or 0)


async def test_accrued_spend_is_reported_although_a_cancel_scope_cancels_the_caller_at_each_await(server, client):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        with anyio.CancelScope() as scope:
            options = {"id": "op_1", "on_error": "charge", "on_expiry": "accrued"}
            async with limiter.hold("agent", "10.00", **options) as hold:
                hold.accrue("5.00")
                scope.cancel()
                await anyio.sleep_forever()
        await until(lambda: accrued(client, "op_1") == to_units("5.00"))


async def test_accrued_spend_is_reported_although_the_caller_is_cancelled_twice(client, proxy):
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=20.0) as limiter:
        await load_scripts(limiter)
        entered = asyncio.Event()

        async def work() -> None:
            async with limiter.hold("agent", "10.00", id="op_1", on_error="charge", on_expiry="accrued") as hold:
                hold.accrue("5.00")
                entered.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await entered.wait()
        proxy.hold_replies()
        earlier = asyncio.create_task(limiter.reserve("agent", "1.00"))
        await until(lambda: sums(client)["held"] == to_units("11.00"))
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        proxy.release_replies()
        await earlier
        await until(lambda: accrued(client, "op_1") == to_units("5.00"))


async def test_spend_reported_after_the_deadline_is_charged_according_to_the_expiry_policy_of_the_hold(own_server):
    """The report is a fact, but does not reopen the hold."""
    policies = ("charge", "accrued", "release")
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=0.3) as limiter:
        deadlines: list[float] = []

        async def work(policy: str) -> None:
            async with limiter.hold("agent", "1.00", id=policy, ttl=1, on_error="charge", on_expiry=policy) as hold:
                hold.accrue("5.00")
                deadlines.append(hold.expires_at.timestamp())
                await asyncio.Event().wait()

        tasks = [asyncio.create_task(work(policy)) for policy in policies]
        await until(lambda: len(deadlines) == 3)
        own_server.kill()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert limiter.unresolved == 3
        own_server.start()
        with own_server.client() as client:
            await until(lambda: client.time()[0] > max(deadlines))
            await until(lambda: not limiter.unresolved)
            views = {name: await limiter.get(name) for name in policies}
            charged = {name: view.charged["agent"] for name, view in views.items()}
            assert charged == {"charge": Decimal("5.00"), "accrued": Decimal("5.00"), "release": 0}
            assert {view.state for view in views.values()} == {"unconfirmed"}
            found = sums(client)
            assert found["held"] == found["spent"] == 0
            assert found["unconfirmed"] == ledger_sum(client) == to_units("10.00")


@pytest.mark.parametrize("waits", [False, True])
async def test_a_limiter_closed_in_a_cancelled_scope_completes_its_calls(client, proxy, waits):
    with anyio.CancelScope() as scope:
        async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=20.0) as limiter:
            await load_scripts(limiter)
            async with limiter.hold("agent", "0.15") as hold:
                hold.accrue("0.07")
                proxy.hold_replies()
                asyncio.get_running_loop().call_later(0.05, proxy.release_replies)
                scope.cancel()
                if waits:
                    await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert spent_and_held(client) == (to_units("0.07"), 0)


def test_the_accrued_spend_of_a_block_ended_by_ctrl_c_during_an_outage_is_committed_afterwards(own_server):
    with BudgetLimiter(own_server.url, BUDGETS, timeout=0.3) as limiter:
        with pytest.raises(KeyboardInterrupt), limiter.hold("agent", "0.15") as hold:
            hold.accrue("0.07")
            own_server.kill()
            raise KeyboardInterrupt
        own_server.start()
        wait_until(lambda: not limiter.unresolved)
        with own_server.client() as client:
            assert spent_and_held(client) == (to_units("0.07"), 0)


async def test_a_lease_closed_in_a_cancelled_scope_commits_its_spend(server, client):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        with anyio.CancelScope() as scope:
            async with limiter.lease("agent", slab="1.00") as lease:
                lease.spend("0.30")
                scope.cancel()
                await anyio.sleep_forever()
        await until(lambda: spent_and_held(client) == (to_units("0.30"), 0))
