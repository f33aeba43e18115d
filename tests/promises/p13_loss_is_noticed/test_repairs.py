"""After a data loss, the replicas replay their journals: the store has the true spend again (P13)."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from collections.abc import Callable
from decimal import Decimal

import pytest

from ktrdr_budget import (
    AsyncBudgetLimiter,
    Budget,
    BudgetError,
    BudgetExceeded,
    BudgetLimiter,
    HoldConflict,
    StoreUnavailable,
    UnknownBudget,
)
from ktrdr_budget.audit import verify
from ktrdr_budget.engine.replica import journal as memory

from ...helpers.keyspace import window_key
from ...helpers.patience import away, hurried
from ...helpers.proxy import Proxy
from ...helpers.repairs import recovery_prolonged, refused_during_repair, replayed
from ...helpers.stores import store_of
from ...helpers.waiting import until, wait_until

BUDGETS = [Budget("agent", "5.00"), Budget("calls", 100, unit="requests"), Budget("jobs", 3, kind="slots")]


async def figures(limiter: AsyncBudgetLimiter, budget: str = "agent") -> tuple[Decimal, Decimal, Decimal]:
    status = await limiter.status(budget)
    return status.spent, status.held, status.unconfirmed


async def repaired(limiter: AsyncBudgetLimiter, expected: tuple[str, str, str]) -> None:
    """Wait until the figures are as expected, then check that the audit finds no error."""
    wanted = tuple(map(Decimal, expected))

    async def as_expected() -> bool:
        return await figures(limiter) == wanted

    await until(as_expected)
    reports = await asyncio.to_thread(verify, limiter.store_address, limiter.tenant)
    assert all(report.adds_up for report in reports), reports


async def test_an_idle_replica_restores_its_spend_and_its_holds_after_a_loss(limiter, client):
    await limiter.record("agent", "1.00", id="op_r")
    done = await limiter.reserve("agent", "0.50", id="op_c")
    await done.commit("0.25")
    open_one = await limiter.reserve({"agent": "0.15", "jobs": 1}, id="op_o", operation="research")
    open_one.accrue("0.20")
    await open_one.extend()
    await (await limiter.reserve("agent", "0.30", id="op_l")).release()
    before = await limiter.get("op_o")
    client.flushall()
    await repaired(limiter, ("1.25", "0.20", "0"))
    assert limiter.losses == 1
    after = await limiter.get("op_o")
    assert (after.amounts, after.accrued, after.expires_at, after.operation) == (
        before.amounts, before.accrued, before.expires_at, before.operation,
    )  # fmt: skip
    assert (await limiter.status("jobs")).held == 1
    assert (await limiter.record("agent", "1.00", id="op_r")).replayed
    with pytest.raises(HoldConflict):
        await limiter.commit("op_c", "0.30")
    await open_one.commit("0.10")
    assert await figures(limiter) == (Decimal("1.35"), 0, 0)


async def test_during_a_repair_nothing_is_granted_and_the_status_includes_recovering_until(server, limiter, client):
    hold = await limiter.reserve("agent", "0.15")
    client.flushall()
    with recovery_prolonged(client):
        with away(server.url), hurried(limiter, 0.5):  # a deadline before the end of the repair
            refused = await refused_during_repair(lambda: limiter.reserve("agent", "0.01"))
            assert not refused.ambiguous
            await refused_during_repair(lambda: hold.grow("0.10"))
        status = await limiter.status("agent")
        assert 0 < (status.recovering_until - status.as_of).total_seconds() <= 3
    await hold.commit("0.07")  # facts need no admission
    assert (await figures(limiter))[0] == Decimal("0.07")


async def test_a_call_with_a_long_deadline_waits_for_the_end_of_the_repair(server):
    async with AsyncBudgetLimiter(server.url, BUDGETS, timeout=10) as limiter:
        await limiter.record("agent", "1.00")
        with server.client() as client:
            client.flushall()
        await limiter.reserve("agent", "0.15")
        status = await limiter.status("agent")
        assert (status.spent, status.held, status.recovering_until) == (Decimal("1.00"), Decimal("0.15"), None)


@pytest.mark.parametrize("remembered", [20_000, 2, 0])
async def test_a_store_restored_from_an_old_snapshot_is_repaired(start_server: Callable, monkeypatch, remembered):
    monkeypatch.setattr(memory, "SETTLEMENTS_MAX", remembered)
    server = start_server()
    async with AsyncBudgetLimiter(server.url, BUDGETS, timeout=5) as limiter:
        await limiter.record("agent", "0.50")
        kept = await limiter.reserve("agent", "0.15", id="op_kept")
        settled = [await limiter.reserve("agent", "0.10") for _ in range(3)]
        with server.client() as client:
            client.save()
        for hold in settled[:2]:
            await hold.commit("0.04")
        await settled[2].release()
        for _ in range(5):
            await limiter.record("agent", "0.01")
        await kept.grow("0.05")
        await limiter.reserve("agent", "0.30", id="op_new")
        server.kill()
        server.start()

        # Settlements beyond the journal are in the total only; their holds stay open, which is on the safe side.
        async def spent() -> bool:
            return (await figures(limiter))[0] == Decimal("0.63")

        await until(spent)
        if remembered == 20_000:
            await repaired(limiter, ("0.63", "0.50", "0"))
            assert (await limiter.get("op_kept")).amounts["agent"] == Decimal("0.20")
    server.kill()


@pytest.mark.parametrize("first", ["granter", "settler"])
async def test_a_settled_hold_stays_settled_after_a_loss_whichever_replica_replays_first(limiter, other, client, first):
    hold = await limiter.reserve("agent", "0.15", id="op_1")
    await other.commit("op_1", "0.07")
    order = (limiter, other) if first == "granter" else (other, limiter)
    client.flushall()
    for replica in order:
        await replayed(replica)
    await repaired(limiter, ("0.07", "0", "0"))
    with pytest.raises(HoldConflict):
        await hold.commit("0.08")


async def test_a_repair_restores_the_charge_of_an_expired_hold(limiter, client):
    await limiter.reserve("agent", "0.15", ttl=1)
    await until(lambda: _is_unconfirmed(limiter))
    client.flushall()
    await repaired(limiter, ("0", "0", "0.15"))


async def _is_unconfirmed(limiter) -> bool:
    return (await limiter.status("agent")).unconfirmed > 0


async def test_after_a_loss_the_spend_replayed_by_two_replicas_adds_up(limiter, other, client):
    await asyncio.gather(*[replica.record("agent", "0.01") for replica in (limiter, other) for _ in range(50)])
    client.flushall()
    await repaired(limiter, ("1.00", "0", "0"))
    assert (limiter.losses, other.losses) == (1, 1)


async def test_a_repair_restores_spend_that_was_deferred_during_an_earlier_outage(start_server: Callable):
    server = start_server(None, "--appendonly", "yes", "--appendfsync", "no")
    async with AsyncBudgetLimiter(server.url, BUDGETS, timeout=0.2, on_store_error="allow") as limiter:
        await limiter.record("agent", "0.01")
        server.kill()
        await limiter.record("agent", "0.02")
        server.start()
        await until(lambda: limiter.deferred == 0)
        with server.client() as client:
            client.flushall()
        await repaired(limiter, ("0.03", "0", "0"))
    server.kill()


def test_a_sync_limiter_repairs_a_data_loss(server, client):
    with BudgetLimiter(server.url, BUDGETS) as limiter:
        limiter.record("agent", "1.00")
        client.flushall()
        wait_until(lambda: limiter.status("agent").spent == Decimal("1.00"))


async def test_two_data_losses_in_a_row_are_repaired(limiter, client):
    await limiter.record("agent", "1.00")
    for losses in (1, 2):
        client.flushall()
        await repaired(limiter, ("1.00", "0", "0"))
        assert limiter.losses == losses


async def test_a_new_replica_can_reserve_before_an_older_replica_detects_the_loss(server, limiter, client):
    """The new replica cannot detect the loss: a known limit. The older replica's next request corrects the spend."""
    await limiter.record("agent", "4.00")
    client.flushall()
    async with AsyncBudgetLimiter(server.url, BUDGETS) as new:
        await new.reserve("agent", "2.00")
        await repaired(new, ("4.00", "2.00", "0"))
        with away(server.url), pytest.raises(BudgetError):
            await new.reserve("agent", "0.01")


def subtotals(limiter: AsyncBudgetLimiter, client) -> dict[str, Decimal]:
    """The spend of the budget ``agent`` in the store, by replica."""
    [window] = client.keys(limiter.keys.window("agent", "*"))
    stored = client.hgetall(window).items()
    return {name[2:]: Decimal(units) / 10**9 for name, units in stored if name.startswith("r:") and units != "0"}


@pytest.mark.parametrize("absent", ["the first to settle", "the second to settle"])
@pytest.mark.parametrize("call", ["record", "commit"])
async def test_a_settlement_in_the_journals_of_two_replicas_counts_once(server, client, tmp_path_factory, absent, call):
    """The settlement counts for the replica that settled first, whichever replica replays first."""
    async with (
        Proxy(server.socket_path, tmp_path_factory.mktemp("p") / "s") as line,
        AsyncBudgetLimiter(line.url, BUDGETS) as remote,
        AsyncBudgetLimiter(server.url, BUDGETS) as near,
    ):
        maker, other = (remote, near) if absent == "the first to settle" else (near, remote)
        await other.record("agent", "0.10")
        if call == "record":
            await maker.record("agent", "1.00", id="op_1")
            assert (await other.record("agent", "1.00", id="op_1")).replayed
        else:
            await (await maker.reserve("agent", "1.00", id="op_1")).commit("1.00")
            assert (await other.commit("op_1", "1.00")).replayed
        expected = {maker.replica_id: Decimal("1.00"), other.replica_id: Decimal("0.10")}
        for losses in (1, 2):
            line.cut()
            client.flushall()
            await replayed(near, losses)
            await repaired(near, ("1.10" if absent == "the first to settle" else "1.00", "0", "0"))
            line.mend()
            await replayed(remote, losses)
            assert subtotals(near, client) == expected
            await repaired(near, ("1.10", "0", "0"))


async def test_if_a_second_replica_repeats_a_lost_settlement_the_spend_counts_for_the_second_replica(
    server, client, tmp_path_factory
):
    async with (
        Proxy(server.socket_path, tmp_path_factory.mktemp("p") / "s") as line,
        AsyncBudgetLimiter(line.url, BUDGETS) as remote,
        AsyncBudgetLimiter(server.url, BUDGETS) as near,
    ):
        await remote.record("agent", "1.00", id="op_1")
        line.cut()
        client.flushall()
        assert not (await near.record("agent", "1.00", id="op_1")).replayed, (
            "the store has lost it, and its replica is cut off"
        )
        line.mend()
        await replayed(remote)
        await repaired(near, ("1.00", "0", "0"))
        client.flushall()
        await replayed(remote, 2)
        await replayed(near)
        assert subtotals(near, client) == {near.replica_id: Decimal("1.00")}


async def test_a_settlement_dropped_from_one_of_two_journals_counts_once_after_a_loss(server, client, monkeypatch):
    """The subtotal that the first replica replays includes settlements that its journal no longer lists."""
    monkeypatch.setattr(memory, "SETTLEMENTS_MAX", 4)
    async with AsyncBudgetLimiter(server.url, BUDGETS) as busy, AsyncBudgetLimiter(server.url, BUDGETS) as other:
        await busy.record("agent", "1.00", id="op_1")
        assert (await other.record("agent", "1.00", id="op_1")).replayed
        for _ in range(8):
            await busy.record("agent", "0.01")
        client.flushall()
        await replayed(busy)
        await replayed(other)
        await repaired(busy, ("1.08", "0", "0"))


async def test_a_settlement_of_a_closed_replica_is_replayed_by_a_replica_that_repeated_the_settlement(
    other, server, client
):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as dying:
        await dying.record("agent", "1.00", id="op_1")
    assert (await other.record("agent", "1.00", id="op_1")).replayed
    for losses in (1, 2):
        client.flushall()
        await replayed(other, losses)
        await repaired(other, ("1.00", "0", "0"))
        assert subtotals(other, client) == {dying.replica_id: Decimal("1.00")}


async def test_after_a_data_loss_a_commit_with_a_lost_reply_is_replayed_before_the_next_grant(
    server, client, tmp_path_factory
):
    """The reply to the first attempt was lost; the reply to the second attempt was a replay."""
    async with (
        Proxy(server.socket_path, tmp_path_factory.mktemp("p") / "s") as line,
        AsyncBudgetLimiter(line.url, BUDGETS, timeout=10) as limiter,
    ):
        hold = await limiter.reserve("agent", "4.90")
        line.lose_replies = 1
        assert (await hold.commit("4.90")).replayed
        client.flushall()
        await replayed(limiter)
        assert await figures(limiter) == (Decimal("4.90"), 0, 0)
        assert (await limiter.status("agent")).recovering_until, "nothing was granted yet"


async def test_a_lost_commit_is_restored_even_if_its_reply_is_read_only_after_the_repair(limiter, client):
    """The store acknowledged the commit, but the replica had not read the reply and replayed the hold as open."""
    hold = await limiter.reserve("agent", "0.15")
    await limiter.record("agent", "0.01")
    dispatcher, late = limiter.engine.dispatcher, []
    deliver, dispatcher.deliver = dispatcher.deliver, lambda *arguments: late.append(arguments)
    commit = asyncio.create_task(hold.commit("0.15"))
    await until(lambda: late)
    dispatcher.deliver = deliver
    client.flushall()
    await replayed(limiter)
    assert await figures(limiter) == (Decimal("0.01"), Decimal("0.15"), 0)
    for arguments in late:
        deliver(*arguments)
    assert (await commit).state == "committed"
    await repaired(limiter, ("0.16", "0", "0"))
    assert limiter.losses == 1


async def test_a_record_repeated_after_a_loss_counts_once_even_if_both_replies_arrive(limiter, client):
    """The reply to the first attempt is read only after the second attempt has succeeded."""
    await limiter.record("agent", "0.01")
    dispatcher, late = limiter.engine.dispatcher, []
    deliver, dispatcher.deliver = dispatcher.deliver, lambda *arguments: late.append(arguments)
    first = asyncio.create_task(limiter.record("agent", "0.07", id="op_1"))
    await until(lambda: late)
    dispatcher.deliver = deliver
    client.flushall()
    await replayed(limiter)
    assert not (await limiter.record("agent", "0.07", id="op_1")).replayed
    for arguments in late:
        deliver(*arguments)
    await first
    await repaired(limiter, ("0.08", "0", "0"))
    await replayed(limiter)
    assert await figures(limiter) == (Decimal("0.08"), 0, 0)


async def test_each_batch_of_a_repair_prolongs_the_recovery(limiter, client, monkeypatch):
    """This includes the batches that replay settlements."""
    await asyncio.gather(*(limiter.record("agent", "0.001") for _ in range(300)))
    send, prolonged_ms = limiter.engine.dispatcher.background.send, []

    async def observe(ops, within_s=None, **options):
        client.hset(limiter.keys.meta, "recovering_until", 1)
        head, replies = await send(ops, within_s, **options)
        if ops and not head.data_loss:
            prolonged_ms.append(int(client.hget(limiter.keys.meta, "recovering_until")) - head.now_us // 1000)
        return head, replies

    monkeypatch.setattr(limiter.engine.dispatcher.background, "send", observe)
    client.flushall()
    await replayed(limiter)
    assert len(prolonged_ms) >= 4 and min(prolonged_ms) >= 1000


async def test_a_replica_removes_a_hold_from_its_journal_after_another_replica_has_settled_the_hold(
    server, client, monkeypatch
):
    """Otherwise a loss would reopen the hold after the other replica's journal has dropped the settlement."""
    async with AsyncBudgetLimiter(server.url, BUDGETS) as granter, AsyncBudgetLimiter(server.url, BUDGETS) as settler:
        for hold_id in ("spent", "released", "open"):
            await granter.reserve("agent", "0.15", id=hold_id)
        await settler.commit("spent", "0.10")
        await settler.release("released")
        await until(lambda: [op.hold_id for op in granter.engine.state.journal.holds(granter.keys)] == ["open"])
        settler.engine.state.journal.clear()
        client.flushall()
        await replayed(granter)
        assert await figures(granter) == (0, Decimal("0.15"), 0)


@pytest.mark.parametrize("operator", [False, True])
async def test_a_hold_released_by_one_replica_stays_released_after_another_replica_replays_the_hold(
    limiter, other, client, operator
):
    hold = await limiter.reserve("agent", "0.15", id="op_1")
    await other.release("op_1", operator=operator)
    client.flushall()
    for replica in (other, limiter):
        await replayed(replica)
    await repaired(limiter, ("0", "0", "0"))
    assert (await limiter.get("op_1")).state == "released"
    if operator:  # the worker is still alive
        await hold.commit("0.07")
        await repaired(limiter, ("0.07", "0", "0"))
    else:
        with pytest.raises(HoldConflict):
            await hold.commit("0.07")


async def test_a_commit_is_executed_once_if_another_replica_restores_the_hold_at_the_same_time(
    limiter, client, monkeypatch
):
    """The commit finds no hold; before its reply is read, another replica has restored the hold."""
    hold = await limiter.reserve("agent", "0.15", id="op_1")
    hold.granted_in = "2.lost"
    record = client.get(limiter.keys.hold("op_1"))
    seen = []

    def restore_first(batch, header, reply, deliver=limiter.engine.dispatcher.deliver):
        if b"\nu" in reply and not seen:
            seen.append(reply)
            client.set(limiter.keys.hold("op_1"), record)
        deliver(batch, header, reply)

    monkeypatch.setattr(limiter.engine.dispatcher, "deliver", restore_first)
    client.delete(limiter.keys.hold("op_1"))
    assert (await hold.commit("0.07")).state == "committed"
    assert seen
    assert await figures(limiter) == (Decimal("0.07"), 0, 0)


async def test_a_repair_restarts_if_another_data_loss_occurs_during_the_repair(limiter, client, monkeypatch):
    for _ in range(300):
        await limiter.record("agent", "0.01")
    send, batches = limiter.engine.dispatcher.background.send, []

    async def lose_again(ops, within_s=None, **options):
        batches.append(len(ops))
        if len(batches) == 3:
            client.flushall()
        return await send(ops, within_s, **options)

    monkeypatch.setattr(limiter.engine.dispatcher.background, "send", lose_again)
    client.flushall()
    await repaired(limiter, ("3.00", "0", "0"))
    assert limiter.losses == 2
    await replayed(limiter, 2)
    assert limiter.repaired.settlements == 300


async def test_a_repair_interrupted_by_an_outage_is_completed_after_the_outage(start_server: Callable, monkeypatch):
    server = start_server(None, "--appendonly", "yes")
    async with AsyncBudgetLimiter(server.url, BUDGETS, timeout=0.2) as limiter:
        for _ in range(300):
            await limiter.record("agent", "0.01")
        send, batches = limiter.engine.dispatcher.background.send, []

        async def kill_server(ops, within_s=None, **options):
            batches.append(len(ops))
            if len(batches) == 3:
                server.kill()
            return await send(ops, within_s, **options)

        monkeypatch.setattr(limiter.engine.dispatcher.background, "send", kill_server)
        with server.client() as client:
            client.flushall()
        # The call waits for the repair until its deadline.
        with away(server.url), pytest.raises(StoreUnavailable):
            await limiter.reserve("agent", "0.01")
        await until(lambda: limiter.store_state == "open" or server.process is None)
        server.start()
        await repaired(limiter, ("3.00", "0", "0"))
        assert limiter.store_state == "closed"
    server.kill()


async def test_a_repair_counts_and_logs_operations_that_the_journal_has_dropped(server, client, monkeypatch, caplog):
    monkeypatch.setattr(memory, "SETTLEMENTS_MAX", 4)
    monkeypatch.setattr(memory, "HOLDS_MAX", 2)
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        for number in range(5):
            await limiter.record("agent", "0.10", id=f"op_{number}")
            await limiter.reserve("agent", "0.01", id=f"hold_{number}")
        client.flushall()
        await repaired(limiter, ("0.50", "0.02", "0"))
        done = limiter.repaired
        assert (done.settlements, done.holds, done.windows) == (3, 2, 1)
        assert (done.forgotten_settlements, done.forgotten_holds) == (2, 3)
        assert "dropped 3 holds, and the ids of 2 settlements" in caplog.text


async def test_if_the_store_refuses_one_replayed_operation_the_other_operations_are_still_replayed(
    limiter, client, caplog
):
    await asyncio.gather(*[limiter.record({"agent": "0.01", "calls": 1}, id=f"op_{n}") for n in range(5)])
    await asyncio.gather(*[limiter.record("agent", "0.01", id=f"agent_{n}") for n in range(5)])
    window = window_key(client, "calls")
    client.flushall()
    client.set(window, "no window")
    await until(lambda: limiter.losses == 1 and not limiter.engine.dispatcher.repair.active)
    assert limiter.repaired.settlements == 5
    assert "replay of op_3 failed: WRONGTYPE" in caplog.text
    client.delete(window)
    assert (await limiter.record("agent", "0.01")).state == "recorded"


async def test_a_replica_with_an_empty_journal_ends_its_repair_at_once(server, limiter, client):
    async with AsyncBudgetLimiter(server.url, BUDGETS, timeout=5) as reader:
        with pytest.raises(BudgetError):
            await reader.reserve("agent", "6.00")
        client.flushall()
        await limiter.reserve("agent", "0.01")  # its journal is empty, too
        with pytest.raises(BudgetError):
            await reader.reserve("agent", "6.00")
        assert (await reader.status("agent")).recovering_until is None


async def test_a_limiter_that_was_not_closed_can_be_garbage_collected(server):
    limiter = AsyncBudgetLimiter(server.url, BUDGETS)
    limiter.engine.state.policy_checked = True  # otherwise a read of it is in flight
    await limiter.record("agent", "0.01")
    limiter.engine.dispatcher.deadlines.stop()  # its timer keeps a reference until the deadline of the call
    forgotten = weakref.ref(limiter.engine.dispatcher.repair)
    connections = store_of(limiter).node.connections  # closed here, before the collector does it
    await connections.close()
    del limiter
    await until(lambda: gc.collect() >= 0 and forgotten() is None)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_after_data_losses_under_load_all_acknowledged_spend_is_restored(server, client, seed):
    """Three replicas spend while the store is flushed twice; the final spend is the sum of all acknowledged commits."""
    choice = random.Random(seed)
    acknowledged = Decimal(0)
    budgets = [Budget("agent", "500.00")]
    replicas = [AsyncBudgetLimiter(server.url, budgets, timeout=5) for _ in range(3)]

    async def spend(replica: AsyncBudgetLimiter, rounds: int) -> None:
        nonlocal acknowledged
        for _ in range(rounds):
            try:
                hold = await replica.reserve("agent", "0.05")
                amount = Decimal(choice.randrange(1, 80)) / 1000
                await hold.commit(amount)
                acknowledged += amount
            except StoreUnavailable:
                continue

    async def is_restored() -> bool:
        return await figures(replicas[0]) == (acknowledged, 0, 0)

    work = [asyncio.create_task(spend(replica, 40)) for replica in replicas for _ in range(20)]
    try:
        for _ in range(2):
            await until(lambda at=acknowledged: acknowledged > at or all(task.done() for task in work))
            client.flushall()
            await until(lambda: all(not r.engine.dispatcher.repair.active and r.losses for r in replicas))
        await asyncio.gather(*work)
        await until(is_restored)
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        for replica in replicas:
            await replica.close()


async def test_a_replica_replays_commits_of_a_budget_that_only_another_replica_has_configured(server, limiter, client):
    """The window receives its definition from the first replica that has the budget."""
    async with AsyncBudgetLimiter(server.url, [Budget("else", "1.00")]) as other:
        for number in range(2):
            await limiter.reserve("agent", "0.15", id=f"op_{number}")
            await other.commit(f"op_{number}", "0.07")
        client.flushall()
        await replayed(other)
        await repaired(limiter, ("0.14", "0", "0"))
        await limiter.record("agent", "0.10")
        await repaired(limiter, ("0.24", "0", "0"))
        assert client.hget(window_key(client), "def") == BUDGETS[0].definition


# -- limits of repaired windows ----------------------------------------------------------------------------------------


async def test_p1_after_a_repair_the_stored_limit_applies_to_growth_by_a_replica_without_the_budget(
    server, limiter, client
):
    """That replica has no configured limit for the budget, so the limit in the window decides."""
    hold = await limiter.reserve("agent", "1.00", id="op_1")
    client.flushall()
    await until(lambda: limiter.losses == 1 and not limiter.engine.dispatcher.repair.active)
    async with AsyncBudgetLimiter(server.url, [Budget("other", "1.00")], timeout=10) as stranger:
        with pytest.raises(BudgetExceeded) as denied:
            await stranger.grow("op_1", {"agent": "5.01"})
        assert denied.value.limit == 5
        assert (await stranger.grow("op_1", {"agent": "5.00"})).amounts == {"agent": 5}
    await hold.commit("1.00")
    await repaired(limiter, ("1.00", "0", "0"))


async def test_p1_growth_is_refused_if_neither_the_replica_nor_the_store_has_the_limit(server, limiter, client):
    hold = await limiter.reserve("agent", "1.00", id="op_1")
    client.hdel(window_key(client, "agent"), "limit", "asserted")
    async with AsyncBudgetLimiter(server.url, [Budget("other", "1.00")], timeout=10) as stranger:
        with pytest.raises(UnknownBudget, match="budget 'agent' has no limit in this replica or in the store"):
            await stranger.grow("op_1", {"agent": "2.00"})
        assert (await stranger.commit("op_1", "0.25")).amounts == {"agent": Decimal("0.25")}
    assert (await figures(limiter))[0] == Decimal("0.25")
    await limiter.reserve("agent", "1.00")
    assert hold.amounts == {"agent": 1}
