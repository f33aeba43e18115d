"""A data loss is detected by each replica with acknowledged writes, and there are no false alarms (P13)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, HoldConflict, StoreUnavailable, UnknownHold
from ktrdr_budget.money import to_units

from ...helpers.keyspace import sums
from ...helpers.patience import away
from ...helpers.waiting import until

BUDGETS = [Budget("agent", "5.00")]


def alarms(caplog: pytest.LogCaptureFixture) -> int:
    errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    return sum(message.startswith("data loss detected") for message in errors)


async def denied(limiter: AsyncBudgetLimiter) -> None:
    # During a repair, a short deadline ends as StoreUnavailable.
    with away(limiter.store_url), pytest.raises((BudgetExceeded, StoreUnavailable)):
        await limiter.reserve("agent", "6.00")


async def unknown(limiter: AsyncBudgetLimiter) -> None:
    with pytest.raises(UnknownHold):
        await limiter.release("unknown")


async def spends(limiter: AsyncBudgetLimiter) -> None:
    await limiter.record("agent", "0.01")


async def reserves(limiter: AsyncBudgetLimiter) -> None:
    with away(limiter.store_url), contextlib.suppress(StoreUnavailable):
        await limiter.reserve("agent", "0.01")


# -- detection ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "afterwards",
    [(spends,), (denied, denied, spends), (reserves, denied), (denied,) * 3],
    ids=lambda calls: "-".join(call.__name__ for call in calls),
)
async def test_flushall_is_detected_and_logged_once(server, limiter, caplog, afterwards):
    await limiter.record("agent", "1.00")
    with server.client() as client:
        client.flushall()
    for call in (*afterwards, denied, unknown, spends, spends):
        await call(limiter)
    assert limiter.losses == 1
    assert alarms(caplog) == 1
    with server.client() as client:
        client.flushall()
    await spends(limiter)
    await spends(limiter)
    assert limiter.losses == 2


async def test_every_replica_with_acknowledged_writes_detects_the_loss(server, limiter, other):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as silent:
        await spends(limiter)
        await other.reserve("agent", "0.15")
        with server.client() as client:
            client.flushall()
        for replica in (other, silent, limiter, other, silent, limiter):
            await spends(replica)
        assert (limiter.losses, other.losses, silent.losses) == (1, 1, 0)


async def test_flushall_under_load_is_detected_once(server, limiter):
    await asyncio.gather(*(spends(limiter) for _ in range(300)))
    tasks = [asyncio.create_task(spends(limiter)) for _ in range(600)]
    await asyncio.sleep(0.005)
    with server.client() as client:
        client.flushall()
    await asyncio.gather(*tasks)
    await asyncio.gather(*(spends(limiter) for _ in range(300)))
    assert limiter.losses == 1


async def test_a_restored_snapshot_with_fewer_writes_is_detected_as_a_data_loss(start_server: Callable, caplog):
    """The epoch of the store is unchanged, as after a failover to a lagging replica."""
    server = start_server()
    async with (
        AsyncBudgetLimiter(server.url, BUDGETS, timeout=5.0) as limiter,
        AsyncBudgetLimiter(server.url, BUDGETS, timeout=5.0) as idle,
    ):
        await spends(limiter)
        await spends(idle)
        with server.client() as client:
            client.save()
        await limiter.record("agent", "1.00")
        server.kill()
        server.start()
        with server.client() as client:
            assert sums(client)["spent"] == to_units("0.02")
        await spends(limiter)
        await spends(idle)
        await spends(limiter)
        assert (limiter.losses, idle.losses) == (1, 1), "a replica that lost nothing detects the new epoch"
        assert alarms(caplog) == 2
    server.kill()


async def test_after_a_loss_the_commit_of_a_lost_hold_counts_once(server, limiter):
    hold = await limiter.reserve("agent", "0.15", id="op_1")
    with server.client() as client:
        client.flushall()
        settlement = await hold.commit("0.07")
        assert (settlement.state, settlement.replayed) == ("committed", False)
        assert sums(client) == {"spent": to_units("0.07"), "held": 0, "unconfirmed": 0, "events": 1}
        assert (await hold.commit("0.07")).replayed
        with pytest.raises(HoldConflict):
            await hold.commit("0.08")
        assert sums(client)["spent"] == to_units("0.07")
    assert limiter.losses == 1


async def test_a_restored_snapshot_with_the_same_number_of_writes_is_detected_as_a_data_loss(start_server: Callable):
    """The epoch differs, because the first write into an empty store sets a new epoch."""
    server = start_server()
    async with AsyncBudgetLimiter(server.url, BUDGETS, timeout=5.0) as limiter:
        for _ in range(5):
            await spends(limiter)
        with server.client() as client:
            client.save()
        await limiter.record("agent", "1.00")  # lost by the flush, and again by the restart
        with server.client() as client:
            client.flushall()
        await spends(limiter)
        assert limiter.losses == 1
        server.kill()
        server.start()
        with server.client() as client:
            assert sums(client)["spent"] == to_units("0.05")
            await spends(limiter)
            assert limiter.losses == 2
            await until(lambda: sums(client)["spent"] == to_units("1.07"))
    server.kill()


# -- no false alarms ---------------------------------------------------------------------------------------------------


async def test_concurrent_calls_of_two_replicas_are_not_taken_for_a_data_loss(server, limiter, other):
    async def busy(replica: AsyncBudgetLimiter) -> None:
        hold = await replica.reserve("agent", "0.001")
        await hold.extend()
        await hold.commit("0.0001")

    for _ in range(5):
        await asyncio.gather(*(busy(replica) for _ in range(150) for replica in (limiter, other)))
    assert (limiter.losses, other.losses) == (0, 0)


async def test_script_flush_and_denials_are_not_taken_for_a_data_loss(server, limiter):
    for _ in range(3):
        await spends(limiter)
        with server.client() as client:
            client.script_flush()
        await denied(limiter)
        await unknown(limiter)
        await limiter.status("agent")
    assert limiter.losses == 0


async def test_a_restart_without_lost_writes_is_not_taken_for_a_data_loss(start_server: Callable):
    server = start_server(None, "--appendonly", "yes", "--appendfsync", "no")
    async with AsyncBudgetLimiter(server.url, BUDGETS, timeout=5.0) as limiter:
        for kept in range(1, 4):
            await asyncio.gather(*(spends(limiter) for _ in range(20)))
            server.kill()
            server.start()
            await spends(limiter)
            with server.client() as client:
                assert sums(client)["spent"] == kept * to_units("0.21")
        assert limiter.losses == 0
    server.kill()


async def test_the_first_write_into_an_empty_store_is_not_taken_for_a_data_loss(server, limiter, other):
    await asyncio.gather(*(spends(replica) for _ in range(50) for replica in (limiter, other)))
    assert (limiter.losses, other.losses) == (0, 0)
    with server.client() as client:
        meta = client.hgetall("ktrdr:{default}:meta")
    assert len([field for field in meta if field == "epoch"]) == 1


async def test_deleting_the_keys_of_another_tenant_is_not_taken_for_a_data_loss(server, limiter):
    await spends(limiter)
    async with AsyncBudgetLimiter(server.url, BUDGETS, tenant="other") as other:
        await spends(other)
        with server.client() as client:
            client.delete(*client.scan_iter("ktrdr:{other}:*"))
        await spends(other)
        await spends(limiter)
        assert (other.losses, limiter.losses) == (1, 0)


async def test_a_read_detects_that_the_store_has_lost_its_data(server, limiter):
    await limiter.reserve("agent", "0.10")
    with server.client() as client:
        client.flushall()
    assert (await limiter.status("agent")).held == Decimal("0.10")
    await reserves(limiter)
    await limiter.status("agent")
    assert limiter.losses == 1


async def test_a_replica_with_an_empty_journal_is_granted_nothing_during_a_recovery(server, limiter, other):
    """The only call of this replica was denied. Another replica, which has the spend, has not replayed yet."""
    await limiter.record("agent", "4.90")
    with pytest.raises(BudgetExceeded):
        await other.reserve("agent", "1.00")
    with server.client() as client:
        client.flushall()
    with pytest.raises((StoreUnavailable, BudgetExceeded)):
        await other.reserve("agent", "1.00")
    await until(lambda: limiter.losses)
    assert other.losses == 1


async def test_a_second_loss_is_detected_although_the_clock_of_the_store_was_set_back_after_the_first_loss(
    clocked_server,
):
    clocked_server.reset_clock()
    async with AsyncBudgetLimiter(clocked_server.url, [Budget("agent", "5.00", period="ever")], timeout=10) as limiter:
        await spends(limiter)
        with clocked_server.client() as client:
            client.flushall()
            await until(lambda: limiter.losses == 1 and not limiter.engine.dispatcher.repair.active)
            clocked_server.advance(-120)
            for _ in range(3):
                await spends(limiter)
            counted = client.hget(limiter.keys.meta, f"r:{limiter.replica_id}")
            assert limiter.engine.state.header.acknowledged == int(counted)
            client.hincrby(
                limiter.keys.meta, f"r:{limiter.replica_id}", -2
            )  # like a snapshot without the last two writes
            await until(lambda: limiter.losses == 2)


async def test_grants_resume_within_seconds_if_the_clock_of_the_store_is_set_back_after_a_repair(clocked_server):
    clocked_server.reset_clock()
    async with AsyncBudgetLimiter(clocked_server.url, [Budget("agent", "5.00", period="ever")], timeout=15) as limiter:
        await spends(limiter)
        with clocked_server.client() as client:
            client.flushall()
        await limiter.reserve("agent", "0.01")
        clocked_server.advance(-3600)
        status = await limiter.status("agent")
        assert (status.recovering_until - status.as_of).total_seconds() <= 3
        await limiter.reserve("agent", "0.01")


async def test_a_replica_that_only_sends_probes_refreshes_its_entry_in_the_store_each_hour(server, limiter):
    """The store may drop the entry of a replica after two days, which would look like a data loss."""
    await spends(limiter)
    with server.client() as client:
        me = limiter.replica_id
        now = int(client.zscore(limiter.keys.replicas, me))
        for age_s, refreshed in ((3500, False), (3700, True)):
            client.zadd(limiter.keys.replicas, {me: now - age_s})
            replied_s = limiter.engine.state.last_reply_s
            await until(lambda replied_s=replied_s: limiter.engine.state.last_reply_s > replied_s)
            assert (int(client.zscore(limiter.keys.replicas, me)) >= now) is refreshed
        assert limiter.losses == 0
