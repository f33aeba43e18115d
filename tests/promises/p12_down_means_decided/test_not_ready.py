"""Outage policies admit nothing while the store is reachable (P12).

A call that has not been sent yet is sent. If the store cannot execute a call, the call waits until its deadline and is
then denied.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import pytest
import redis

from ktrdr_budget import AsyncBudgetLimiter, Budget, StoreUnavailable
from ktrdr_budget.money import to_units

from ...conftest import free_port
from ...helpers.keyspace import spent_and_held, sums
from ...helpers.patience import in_haste
from ...helpers.repairs import recovery_prolonged
from ...helpers.stores import store_of
from ...helpers.waiting import until, wait_until

BUDGET = Budget("agent", "500.00")
CENT = to_units("0.01")
POLICIES = ["deny", "allow", "lease"]
REPLY_S = 2.0
"""A timeout within which a store replies even on a slow machine."""


@pytest.fixture(params=POLICIES)
async def replica(server, request: pytest.FixtureRequest) -> AsyncIterator[AsyncBudgetLimiter]:
    """A connected limiter, once for each policy; under ``lease`` it already has a prepaid chunk."""
    options = {"lease_slab": "5.00"} if request.param == "lease" else {}
    async with AsyncBudgetLimiter(server.url, [BUDGET], on_store_error=request.param, **options) as made:
        await made.record("agent", "0.01")
        await until(lambda: request.param != "lease" or made.prepaid["agent"])
        yield made


async def denied(call: Callable, *, waits_s: float = 0.0, match: str | None = None) -> None:
    """Check that a call raises ``StoreUnavailable`` with ``reached`` true, after at least ``waits_s`` seconds."""
    began_s = time.monotonic()
    with pytest.raises(StoreUnavailable, match=match) as refused:
        await call()
    assert time.monotonic() - began_s >= waits_s
    assert refused.value.reached


# -- a repair ----------------------------------------------------------------------------------------------------------


async def test_after_a_loss_nothing_is_granted_until_the_store_is_repaired(replica, client):
    """An earlier version made 1,805 grants during a repair of a reachable store."""
    guarded = await replica.reserve("agent", "0.15")
    client.flushall()
    with recovery_prolonged(client):
        with in_haste(replica, REPLY_S):
            tries = [denied(lambda: replica.reserve("agent", "0.01"), waits_s=REPLY_S - 0.1) for _ in range(200)]
            grown = denied(lambda: guarded.grow("0.01"), waits_s=REPLY_S - 0.1, match="being repaired")
            await asyncio.gather(*tries, grown)
        assert (await guarded.commit("0.07")).amounts == {"agent": Decimal("0.07")}, "facts need no admission"
        assert replica.deferred == 0
    assert (await replica.reserve("agent", "0.01")).cap_checked
    await until(lambda: sums(client)["spent"] == to_units("0.08"))


async def test_waiting_calls_are_denied_at_their_deadline_while_their_replica_repairs_the_store(replica, client):
    hold = await replica.reserve("agent", "0.15")
    replica.engine.dispatcher.repair.active = True
    try:
        with in_haste(replica, 0.3):
            await asyncio.gather(
                denied(lambda: replica.reserve("agent", "0.01"), waits_s=0.25, match="being repaired"),
                denied(lambda: hold.grow("0.01"), waits_s=0.25, match="being repaired"),
            )
    finally:
        replica.engine.dispatcher.repair.active = False
        replica.engine.dispatcher.open_lane()
    assert (await replica.reserve("agent", "0.01")).cap_checked


# -- a missing window --------------------------------------------------------------------------------------------------


async def test_nothing_is_granted_while_the_key_of_the_window_is_missing(replica, client):
    [key] = client.keys("ktrdr:{default}:w:agent:*")
    kept = client.dump(key)
    client.delete(key)
    with in_haste(replica, 0.4):
        await denied(lambda: replica.reserve("agent", "0.01"), waits_s=0.3, match="its key is missing")
    client.restore(key, 0, kept)
    assert (await replica.reserve("agent", "0.01")).cap_checked


# -- a store that refuses for a while ----------------------------------------------------------------------------------


@contextmanager
def read_only(client: redis.Redis) -> Iterator[None]:
    client.replicaof("127.0.0.1", free_port())
    try:
        yield
    finally:
        client.replicaof("no", "one")


@contextmanager
def busy(client: redis.Redis) -> Iterator[None]:
    """Block the server with an endless script."""
    client.config_set("lua-time-limit", 1)

    def run() -> None:
        with redis.Redis(unix_socket_path=client.connection_pool.connection_kwargs["path"]) as other:
            with pytest.raises(redis.ResponseError):
                other.eval("while true do end", 0)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_until(lambda: is_busy(client))
        yield
    finally:
        client.script_kill()
        thread.join()
        client.config_set("lua-time-limit", 5000)


def is_busy(client: redis.Redis) -> bool:
    try:
        return not client.ping()
    except redis.ResponseError:
        return True


@contextmanager
def without_replicas(client: redis.Redis) -> Iterator[None]:
    client.config_set("min-replicas-to-write", 1)
    try:
        yield
    finally:
        client.config_set("min-replicas-to-write", 0)


@pytest.mark.parametrize("not_ready", [read_only, busy, without_replicas])
async def test_nothing_is_granted_while_the_store_refuses_writes(replica, client, not_ready):
    """The first call waits until its deadline; the calls after it are not granted either."""
    with not_ready(client), in_haste(replica, REPLY_S):
        await denied(lambda: replica.reserve("agent", "0.01"), waits_s=REPLY_S - 0.1)
        await asyncio.gather(*[denied(lambda: replica.reserve("agent", "0.01")) for _ in range(20)])
    await until(lambda: replica.store_state == "closed")
    assert (await replica.reserve("agent", "0.01")).cap_checked


async def test_spend_is_deferred_while_the_store_refuses_writes(server, client):
    async with AsyncBudgetLimiter(server.url, [BUDGET], on_store_error="allow") as limiter:
        hold = await limiter.reserve("agent", "0.15")
        with read_only(client), in_haste(limiter, 0.2):
            assert (await limiter.record("agent", "0.02")).deferred
            assert (await hold.commit("0.07")).deferred
        await until(lambda: not limiter.deferred)
        assert spent_and_held(client) == (to_units("0.09"), 0)


# -- a stalled event loop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 50, 500])
async def test_calls_queued_before_a_stall_of_the_event_loop_are_sent_after_the_stall(replica, client, count):
    """After a stall of 1.1 s, an earlier version admitted 50 of 50 calls without a check of the cap."""
    with in_haste(replica, 0.5):
        tries = [asyncio.create_task(replica.reserve("agent", "0.01", id=f"op_{n}")) for n in range(count)]
        await asyncio.sleep(0)  # each is queued
        time.sleep(0.6)
    holds = await asyncio.gather(*tries)
    assert all(hold.cap_checked and hold.offline is None for hold in holds)
    assert client.exists(*[f"ktrdr:{{default}}:h:op_{n}" for n in range(count)]) == count


@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("turns", [2, 4, 7])
async def test_calls_sent_before_a_stall_of_the_event_loop_are_granted_after_the_stall(replica, connected, turns):
    """After a stall, neither a missing connection nor an unread reply proves an outage."""
    if not connected:
        replica.engine.dispatcher.repair.stop()
        await until(lambda: not replica.engine.dispatcher.background.tasks)
        store_of(replica).node.connections.discard_idle()
    with in_haste(replica, 0.5):
        tries = [asyncio.create_task(replica.reserve("agent", "0.01")) for _ in range(30)]
        for _ in range(turns):
            await asyncio.sleep(0)
        time.sleep(0.7)
    assert all(hold.cap_checked and hold.offline is None for hold in await asyncio.gather(*tries))
    assert replica.store_state == "closed"


@pytest.mark.parametrize("policy", ["allow", "lease"])
async def test_nothing_is_admitted_while_the_event_loop_stalls_repeatedly(server, policy):
    """The limiter has no time to open a connection, so it does not know whether the store is reachable."""
    options = {"lease_slab": "5.00"} if policy == "lease" else {}
    async with AsyncBudgetLimiter(server.url, [BUDGET], on_store_error=policy, **options) as limiter:
        await until(lambda: policy == "allow" or limiter.prepaid["agent"])
        limiter.engine.dispatcher.repair.stop()
        await until(lambda: not limiter.engine.dispatcher.background.tasks)
        store_of(limiter).node.connections.discard_idle()
        with in_haste(limiter, 0.3):
            tries = [asyncio.create_task(limiter.reserve("agent", "0.01")) for _ in range(30)]
            while not all(task.done() for task in tries):
                await asyncio.sleep(0)
                time.sleep(0.3)
        for task in tries:
            with pytest.raises(StoreUnavailable, match="the event loop was blocked") as refused:
                await task
            assert refused.value.reached
        assert limiter.store_state == "closed"


async def test_a_commit_by_id_is_sent_after_a_stall_of_the_event_loop(replica, client):
    await replica.reserve("agent", "0.15", id="op_1")
    with in_haste(replica, 0.5):
        commit = asyncio.create_task(replica.commit("op_1", "0.07"))
        await asyncio.sleep(0)
        time.sleep(0.6)
    assert not (await commit).deferred


async def test_a_call_delayed_by_a_stall_of_the_event_loop_gets_one_more_deadline(start_server):
    """The store hangs, so the policy decides after the second deadline."""
    own_server = start_server()
    async with AsyncBudgetLimiter(own_server.url, [BUDGET], timeout=0.3, on_store_error="allow") as limiter:
        await limiter.record("agent", "0.01")
        own_server.pause()
        began_s = time.monotonic()
        task = asyncio.create_task(limiter.reserve("agent", "0.01"))
        await asyncio.sleep(0)
        time.sleep(0.4)
        async with asyncio.timeout(10):
            hold = await task
        assert not hold.cap_checked, "the store was unreachable"
        assert time.monotonic() - began_s >= 0.7
        own_server.resume()
    own_server.kill()


# -- holds of an outage ------------------------------------------------------------------------------------------------


async def test_a_hold_admitted_during_an_outage_cannot_grow_after_the_outage(start_server):
    own_server = start_server(None, "--appendonly", "yes", "--appendfsync", "always")
    async with AsyncBudgetLimiter(own_server.url, [BUDGET], timeout=0.3, on_store_error="allow") as limiter:
        own_server.kill()
        hold = await limiter.reserve("agent", "0.15")
        await hold.grow("0.05")
        assert not hold.cap_checked
        own_server.start()
        await until(lambda: limiter.store_state == "closed")
        await hold.extend()
        await denied(lambda: hold.grow("0.05"), match="was granted while the store was unreachable")
        assert hold.amounts == {"agent": Decimal("0.20")}
        await hold.commit("0.30")
        with own_server.client() as client:
            assert spent_and_held(client) == (to_units("0.30"), 0)
    own_server.kill()


async def test_calls_that_wait_when_the_limiter_closes_are_not_admitted(server):
    limiter = AsyncBudgetLimiter(server.url, [BUDGET], on_store_error="allow")
    await limiter.record("agent", "0.01")
    limiter.engine.dispatcher.repair.active = True  # no lane sends waiting calls
    waiting: list[Any] = [asyncio.ensure_future(limiter.reserve("agent", "0.01")) for _ in range(3)]
    await asyncio.sleep(0)
    await limiter.close()
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(outcome, StoreUnavailable) and outcome.reached
