"""What a store has lost, its replicas tell it again (P13): in the end, spend is what it really was."""

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
from ...helpers.stores import store_of
from ...helpers.waiting import until, wait_until

BUDGETS = [Budget("agent", "5.00"), Budget("calls", 100, unit="requests"), Budget("jobs", 3, kind="slots")]


@pytest.fixture
async def limiter(server):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as made:
        yield made


@pytest.fixture
async def other(server):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as made:
        yield made


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


async def figures(limiter: AsyncBudgetLimiter, budget: str = "agent") -> tuple[Decimal, Decimal, Decimal]:
    status = await limiter.status(budget)
    return status.spent, status.held, status.unconfirmed


async def repaired(limiter: AsyncBudgetLimiter, expected: tuple[str, str, str]) -> None:
    """Until the figures are these, as they were before the loss; and the books add up."""
    wanted = tuple(map(Decimal, expected))

    async def look() -> bool:
        return await figures(limiter) == wanted

    await until(look)
    reports = await asyncio.to_thread(verify, limiter.store_address, limiter.tenant)
    assert all(report.adds_up for report in reports), reports


async def test_an_idle_replica_tells_an_empty_store_its_spend_its_holds_and_its_ids(limiter, client):
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


@pytest.mark.timely
async def test_while_it_is_repaired_the_store_grants_nothing_and_says_so(server, limiter, client):
    hold = await limiter.reserve("agent", "0.15")
    client.flushall()
    with away(server.url), hurried(limiter, 0.5):  # as far as deadlines go, which come before the end of the repair
        with pytest.raises(StoreUnavailable, match="being repaired") as refused:
            await limiter.reserve("agent", "0.01")
        assert not refused.value.ambiguous
        with pytest.raises(StoreUnavailable, match="being repaired"):
            await hold.grow("0.10")
    status = await limiter.status("agent")
    assert 0 < (status.recovering_until - status.as_of).total_seconds() <= 3
    await hold.commit("0.07")  # facts need no admission
    assert (await figures(limiter))[0] == Decimal("0.07")


async def test_a_caller_with_time_waits_until_the_store_grants_again(server):
    async with AsyncBudgetLimiter(server.url, BUDGETS, timeout=10) as limiter:
        await limiter.record("agent", "1.00")
        with server.client() as client:
            client.flushall()
        await limiter.reserve("agent", "0.15")
        status = await limiter.status("agent")
        assert (status.spent, status.held, status.recovering_until) == (Decimal("1.00"), Decimal("0.15"), None)


@pytest.mark.parametrize("remembered", [20_000, 2, 0])
async def test_an_old_snapshot_is_brought_up_to_date(start_server: Callable, monkeypatch, remembered):
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

        # What is no longer remembered one by one is in the total; its holds stay open, which errs on the safe side.
        async def spent() -> bool:
            return (await figures(limiter))[0] == Decimal("0.63")

        await until(spent)
        if remembered == 20_000:
            await repaired(limiter, ("0.63", "0.50", "0"))
            assert (await limiter.get("op_kept")).amounts["agent"] == Decimal("0.20")
    server.kill()


@pytest.mark.parametrize("first", ["who granted", "who settled"])
async def test_a_settlement_wins_over_an_open_hold_whoever_is_first(limiter, other, client, first):
    hold = await limiter.reserve("agent", "0.15", id="op_1")
    await other.commit("op_1", "0.07")
    order = (limiter, other) if first == "who granted" else (other, limiter)
    client.flushall()
    for replica in order:
        replica.engine.dispatcher.repair.suspect()
        await until(lambda replica=replica: replica.losses == 1 and not replica.engine.dispatcher.repair.active)
    await repaired(limiter, ("0.07", "0", "0"))
    with pytest.raises(HoldConflict):
        await hold.commit("0.08")


async def test_a_hold_that_came_due_is_charged_again(limiter, client):
    await limiter.reserve("agent", "0.15", ttl=1)
    await until(lambda: _is_unconfirmed(limiter))
    client.flushall()
    await repaired(limiter, ("0", "0", "0.15"))


async def _is_unconfirmed(limiter) -> bool:
    return (await limiter.status("agent")).unconfirmed > 0


async def test_shares_of_several_replicas_add_up(limiter, other, client):
    await asyncio.gather(*[replica.record("agent", "0.01") for replica in (limiter, other) for _ in range(50)])
    client.flushall()
    await repaired(limiter, ("1.00", "0", "0"))
    assert (limiter.losses, other.losses) == (1, 1)


async def test_spend_that_was_deferred_is_remembered_as_well(start_server: Callable):
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


def test_a_sync_limiter_repairs_as_well(server, client):
    with BudgetLimiter(server.url, BUDGETS) as limiter:
        limiter.record("agent", "1.00")
        client.flushall()
        wait_until(lambda: limiter.status("agent").spent == Decimal("1.00"))


async def test_what_happens_twice_is_repaired_twice(limiter, client):
    await limiter.record("agent", "1.00")
    for losses in (1, 2):
        client.flushall()
        await repaired(limiter, ("1.00", "0", "0"))
        assert limiter.losses == losses


async def test_a_new_replica_may_be_granted_money_before_an_old_one_has_spoken(server, limiter, client):
    """The honest limit: it cannot know. What was spent is put right as soon as the old one speaks."""
    await limiter.record("agent", "4.00")
    client.flushall()
    async with AsyncBudgetLimiter(server.url, BUDGETS) as new:
        await new.reserve("agent", "2.00")
        await repaired(new, ("4.00", "2.00", "0"))
        with away(server.url), pytest.raises(BudgetError):
            await new.reserve("agent", "0.01")


async def told(limiter: AsyncBudgetLimiter, losses: int = 1) -> None:
    """Until a replica has noticed so many losses, and told all that it knows."""
    recovery = limiter.engine.dispatcher.repair
    recovery.suspect()
    await until(lambda: limiter.losses == losses and not recovery.active)


def shares(limiter: AsyncBudgetLimiter, client) -> dict[str, Decimal]:
    """What each replica has spent of budget agent, as the store has it."""
    [window] = client.keys(limiter.keys.window("agent", "*"))
    stored = client.hgetall(window).items()
    return {name[2:]: Decimal(units) / 10**9 for name, units in stored if name.startswith("r:") and units != "0"}


@pytest.mark.parametrize("away", ["who made it", "who replayed it"])
@pytest.mark.parametrize("call", ["record", "commit"])
async def test_a_settlement_that_two_replicas_know_counts_once(server, client, tmp_path_factory, away, call):
    """It is in the share of the one that made it, whoever tells of it first, and however late the other is back."""
    async with (
        Proxy(server.socket_path, tmp_path_factory.mktemp("p") / "s") as line,
        AsyncBudgetLimiter(line.url, BUDGETS) as remote,
        AsyncBudgetLimiter(server.url, BUDGETS) as near,
    ):
        maker, other = (remote, near) if away == "who made it" else (near, remote)
        await other.record("agent", "0.10")
        if call == "record":
            await maker.record("agent", "1.00", id="op_1")
            assert (await other.record("agent", "1.00", id="op_1")).replayed
        else:
            await (await maker.reserve("agent", "1.00", id="op_1")).commit("1.00")
            assert (await other.commit("op_1", "1.00")).replayed
        right = {maker.replica_id: Decimal("1.00"), other.replica_id: Decimal("0.10")}
        for losses in (1, 2):
            line.cut()
            client.flushall()
            await told(near, losses)
            await repaired(near, ("1.10" if away == "who made it" else "1.00", "0", "0"))
            line.mend()
            await told(remote, losses)
            assert shares(near, client) == right
            await repaired(near, ("1.10", "0", "0"))


async def test_what_was_told_anew_while_its_maker_was_away_is_in_the_share_of_the_new_one(
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
        assert not (await near.record("agent", "1.00", id="op_1")).replayed, "nobody knows of it"
        line.mend()
        await told(remote)
        await repaired(near, ("1.00", "0", "0"))
        client.flushall()
        await told(remote, 2)
        await told(near)
        assert shares(near, client) == {near.replica_id: Decimal("1.00")}


async def test_an_id_that_only_another_replica_remembers_is_not_charged_again(server, client, monkeypatch):
    """The one whose share it is in has told all that it has spent: more than its memory has ids of."""
    monkeypatch.setattr(memory, "SETTLEMENTS_MAX", 4)
    async with AsyncBudgetLimiter(server.url, BUDGETS) as busy, AsyncBudgetLimiter(server.url, BUDGETS) as other:
        await busy.record("agent", "1.00", id="op_1")
        assert (await other.record("agent", "1.00", id="op_1")).replayed
        for _ in range(8):
            await busy.record("agent", "0.01")
        client.flushall()
        await told(busy)
        await told(other)
        await repaired(busy, ("1.08", "0", "0"))


async def test_what_a_dead_replica_did_is_told_by_another_that_knows_of_it(other, server, client):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as dying:
        await dying.record("agent", "1.00", id="op_1")
    assert (await other.record("agent", "1.00", id="op_1")).replayed
    for losses in (1, 2):
        client.flushall()
        await told(other, losses)
        await repaired(other, ("1.00", "0", "0"))
        assert shares(other, client) == {dying.replica_id: Decimal("1.00")}


async def test_a_commit_whose_answer_was_lost_is_told_before_anything_is_granted(server, client, tmp_path_factory):
    """Its second attempt was a replay, of what this replica had done itself."""
    async with (
        Proxy(server.socket_path, tmp_path_factory.mktemp("p") / "s") as line,
        AsyncBudgetLimiter(line.url, BUDGETS, timeout=10) as limiter,
    ):
        hold = await limiter.reserve("agent", "4.90")
        line.lose_replies = 1
        assert (await hold.commit("4.90")).replayed
        client.flushall()
        await told(limiter)
        assert await figures(limiter) == (Decimal("4.90"), 0, 0)
        assert (await limiter.status("agent")).recovering_until, "nothing was granted yet"


async def test_an_acknowledgement_from_before_a_loss_that_comes_after_the_repair_is_told_as_well(limiter, client):
    """Another connection has noticed the loss, and told of the hold as open."""
    hold = await limiter.reserve("agent", "0.15")
    await limiter.record("agent", "0.01")
    dispatcher, late = limiter.engine.dispatcher, []
    answered, dispatcher.deliver = dispatcher.deliver, lambda *words: late.append(words)
    commit = asyncio.create_task(hold.commit("0.15"))
    await until(lambda: late)
    dispatcher.deliver = answered
    client.flushall()
    await told(limiter)
    assert await figures(limiter) == (Decimal("0.01"), Decimal("0.15"), 0)
    for words in late:
        answered(*words)
    assert (await commit).state == "committed"
    await repaired(limiter, ("0.16", "0", "0"))
    assert limiter.losses == 1


async def test_a_late_acknowledgement_of_what_was_made_again_after_a_loss_counts_once(limiter, client):
    """The first attempt reached a master that died; its reply arrives after the second has reached the next one."""
    await limiter.record("agent", "0.01")
    dispatcher, late = limiter.engine.dispatcher, []
    answered, dispatcher.deliver = dispatcher.deliver, lambda *words: late.append(words)
    first = asyncio.create_task(limiter.record("agent", "0.07", id="op_1"))
    await until(lambda: late)
    dispatcher.deliver = answered
    client.flushall()
    await told(limiter)
    assert not (await limiter.record("agent", "0.07", id="op_1")).replayed
    for words in late:
        answered(*words)
    await first
    await repaired(limiter, ("0.08", "0", "0"))
    await told(limiter)
    assert await figures(limiter) == (Decimal("0.08"), 0, 0)


async def test_each_batch_of_a_repair_keeps_the_store_from_granting(limiter, client, monkeypatch):
    """However many there are, and however long they take: not only those of shares and holds."""
    await asyncio.gather(*(limiter.record("agent", "0.001") for _ in range(300)))
    tell, kept = limiter.engine.dispatcher.background.send, []

    async def look(ops, within_s=None, **words):
        client.hset(limiter.keys.meta, "recovering_until", 1)
        head, lines = await tell(ops, within_s, **words)
        if ops and not head.data_loss:
            kept.append(int(client.hget(limiter.keys.meta, "recovering_until")) - head.now_us // 1000)
        return head, lines

    monkeypatch.setattr(limiter.engine.dispatcher.background, "send", look)
    client.flushall()
    await told(limiter)
    assert len(kept) >= 4 and min(kept) >= 1000


async def test_a_hold_that_another_replica_has_settled_is_forgotten(server, client, monkeypatch):
    """Else it would be open again after a loss, once the other one does not remember its settlement any more."""
    async with AsyncBudgetLimiter(server.url, BUDGETS) as granter, AsyncBudgetLimiter(server.url, BUDGETS) as settler:
        for hold_id in ("spent", "given back", "open"):
            await granter.reserve("agent", "0.15", id=hold_id.replace(" ", "_"))
        await settler.commit("spent", "0.10")
        await settler.release("given_back")
        await until(lambda: [op.hold_id for op in granter.engine.state.journal.holds(granter.keys)] == ["open"])
        settler.engine.state.journal.clear()
        client.flushall()
        await told(granter)
        assert await figures(granter) == (0, Decimal("0.15"), 0)


@pytest.mark.parametrize("operator", [False, True])
async def test_a_release_wins_over_an_open_hold_that_another_replica_remembers(limiter, other, client, operator):
    hold = await limiter.reserve("agent", "0.15", id="op_1")
    await other.release("op_1", operator=operator)
    client.flushall()
    for replica in (other, limiter):
        replica.engine.dispatcher.repair.suspect()
        await until(lambda replica=replica: replica.losses == 1 and not replica.engine.dispatcher.repair.active)
    await repaired(limiter, ("0", "0", "0"))
    assert (await limiter.get("op_1")).state == "released"
    if operator:  # the worker was not dead after all
        await hold.commit("0.07")
        await repaired(limiter, ("0.07", "0", "0"))
    else:
        with pytest.raises(HoldConflict):
            await hold.commit("0.07")


async def test_a_commit_that_meets_its_hold_being_told_again_is_made_once(limiter, client, monkeypatch):
    """It finds its hold gone, and when it says so, the hold is back."""
    hold = await limiter.reserve("agent", "0.15", id="op_1")
    hold.granted_in = "2.lost"
    record = client.get(limiter.keys.hold("op_1"))
    seen = []

    def lose_and_find(batch, header, answer, told=limiter.engine.dispatcher.deliver):
        if b"\nu" in answer and not seen:
            seen.append(answer)
            client.set(limiter.keys.hold("op_1"), record)
        told(batch, header, answer)

    monkeypatch.setattr(limiter.engine.dispatcher, "deliver", lose_and_find)
    client.delete(limiter.keys.hold("op_1"))
    assert (await hold.commit("0.07")).state == "committed"
    assert seen
    assert await figures(limiter) == (Decimal("0.07"), 0, 0)


async def test_a_repair_that_meets_another_loss_begins_again(limiter, client, monkeypatch):
    for _ in range(300):
        await limiter.record("agent", "0.01")
    tell, batches = limiter.engine.dispatcher.background.send, []

    async def lose_again(ops, within_s=None, **words):
        batches.append(len(ops))
        if len(batches) == 3:
            client.flushall()
        return await tell(ops, within_s, **words)

    monkeypatch.setattr(limiter.engine.dispatcher.background, "send", lose_again)
    client.flushall()
    await repaired(limiter, ("3.00", "0", "0"))
    assert limiter.losses == 2
    await told(limiter, 2)
    assert limiter.repaired.settlements == 300


async def test_a_repair_whose_store_goes_away_ends_when_it_is_back(start_server: Callable, monkeypatch):
    server = start_server(None, "--appendonly", "yes")
    async with AsyncBudgetLimiter(server.url, BUDGETS, timeout=0.2) as limiter:
        for _ in range(300):
            await limiter.record("agent", "0.01")
        tell, batches = limiter.engine.dispatcher.background.send, []

        async def go_away(ops, within_s=None, **words):
            batches.append(len(ops))
            if len(batches) == 3:
                server.kill()
            return await tell(ops, within_s, **words)

        monkeypatch.setattr(limiter.engine.dispatcher.background, "send", go_away)
        with server.client() as client:
            client.flushall()
        # It waits for the repair, until its deadline.
        with away(server.url), pytest.raises(StoreUnavailable):
            await limiter.reserve("agent", "0.01")
        await until(lambda: limiter.store_state == "open" or server.process is None)
        server.start()
        await repaired(limiter, ("3.00", "0", "0"))
        assert limiter.store_state == "closed"
    server.kill()


async def test_what_is_beyond_the_memory_is_counted_and_told(server, client, monkeypatch, caplog):
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
        assert "ids of 2 settlements, 3 holds" in caplog.text


async def test_what_the_store_cannot_take_any_more_holds_up_nothing_else(limiter, client, caplog):
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


async def test_a_replica_that_has_nothing_to_tell_does_not_hold_up_the_others(server, limiter, client):
    async with AsyncBudgetLimiter(server.url, BUDGETS, timeout=5) as reader:
        with pytest.raises(BudgetError):
            await reader.reserve("agent", "6.00")
        client.flushall()
        await limiter.reserve("agent", "0.01")  # it had nothing acknowledged either
        with pytest.raises(BudgetError):
            await reader.reserve("agent", "6.00")
        assert (await reader.status("agent")).recovering_until is None


async def test_a_limiter_that_was_dropped_asks_no_more(server):
    limiter = AsyncBudgetLimiter(server.url, BUDGETS)
    limiter.engine.state.policy_checked = True  # else a read of that is under way
    with away(server.url):  # for the timer of a call's deadline keeps it
        await limiter.record("agent", "0.01")
    forgotten = weakref.ref(limiter.engine.dispatcher.repair)
    connections = store_of(limiter).node.connections  # closed here; otherwise the collector closes them
    await connections.close()
    del limiter
    await until(lambda: gc.collect() >= 0 and forgotten() is None)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_losses_under_load_cost_nothing_that_was_acknowledged(server, client, seed):
    """Three replicas spend while the store is emptied again and again; every acknowledged cent is there in the end."""
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

    async def look() -> bool:
        return await figures(replicas[0]) == (acknowledged, 0, 0)

    work = [asyncio.create_task(spend(replica, 40)) for replica in replicas for _ in range(20)]
    try:
        for _ in range(2):
            await until(lambda at=acknowledged: acknowledged > at or all(task.done() for task in work))
            client.flushall()
            await until(lambda: all(not r.engine.dispatcher.repair.active and r.losses for r in replicas))
        await asyncio.gather(*work)
        await until(look)
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        for replica in replicas:
            await replica.close()


async def test_a_replica_that_does_not_know_a_budget_tells_what_it_settled_in_it(server, limiter, client):
    """Nor its definition: the window is defined by the first who knows it."""
    async with AsyncBudgetLimiter(server.url, [Budget("else", "1.00")]) as ignorant:
        for number in range(2):
            await limiter.reserve("agent", "0.15", id=f"op_{number}")
            await ignorant.commit(f"op_{number}", "0.07")
        client.flushall()
        ignorant.engine.dispatcher.repair.suspect()
        await until(lambda: ignorant.losses == 1 and not ignorant.engine.dispatcher.repair.active)
        await repaired(limiter, ("0.14", "0", "0"))
        await limiter.record("agent", "0.10")
        await repaired(limiter, ("0.24", "0", "0"))
        assert client.hget(window_key(client), "def") == BUDGETS[0].definition


# -- limits of windows that are repaired -------------------------------------------------------------------------------


async def test_p1_a_window_is_repaired_with_its_limit(server, limiter, client):
    """Whoever lets a hold grow there meets it, also without having been given the budget."""
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


async def test_p1_a_limit_that_is_known_to_nobody_admits_nothing(server, limiter, client):
    hold = await limiter.reserve("agent", "1.00", id="op_1")
    client.hdel(window_key(client, "agent"), "limit", "asserted_us")
    async with AsyncBudgetLimiter(server.url, [Budget("other", "1.00")], timeout=10) as stranger:
        with pytest.raises(UnknownBudget, match="budget 'agent' has no limit, neither here nor in the store"):
            await stranger.grow("op_1", {"agent": "2.00"})
        assert (await stranger.commit("op_1", "0.25")).amounts == {"agent": Decimal("0.25")}
    assert (await figures(limiter))[0] == Decimal("0.25")
    await limiter.reserve("agent", "1.00")
    assert hold.amounts == {"agent": 1}
