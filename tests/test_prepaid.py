"""Policy `lease`: without the store, only what was prepaid is granted, and the cap holds at every moment (P12)."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from ktrdr_budget import (
    AsyncBudgetLimiter,
    Budget,
    BudgetExceeded,
    BudgetLimiter,
    HoldConflict,
    InvalidArgument,
    StoreUnavailable,
)
from ktrdr_budget.engine.protocol import Op
from ktrdr_budget.money import to_units

from .helpers.keyspace import counted, immortal_keys, ledger_entries, ledger_sum, sums
from .helpers.processes import workers
from .helpers.waiting import until, wait_until

BUDGETS = [Budget("agent", "5.00"), Budget("team", "2.00")]
TIMEOUT_S = 0.2


@pytest.fixture
def own_server(start_server: Callable):
    """A server that a test may kill, with a file that keeps what it acknowledged."""
    made = start_server(None, "--appendonly", "yes", "--appendfsync", "always")
    yield made
    if made.process is not None:
        made.resume()
    made.kill()


def limiter_for(server, slab="0.50", **options) -> AsyncBudgetLimiter:
    return AsyncBudgetLimiter(
        server.url, BUDGETS, timeout=TIMEOUT_S, on_store_error="lease", lease_slab=slab, **options
    )


async def prepaid(limiter: AsyncBudgetLimiter) -> None:
    """Returns once every slab is there."""
    await until(lambda: limiter.prepaid and all(limiter.prepaid.values()))


async def _answers(limiter: AsyncBudgetLimiter) -> bool:
    try:
        await limiter.status("agent")
    except StoreUnavailable:
        return False
    return True


# -- one replica -------------------------------------------------------------------------------------------------------


async def test_what_was_prepaid_is_granted_and_told_once_when_the_store_is_back(own_server):
    async with limiter_for(own_server, {"agent": "0.50"}) as limiter:
        await prepaid(limiter)
        own_server.kill()
        first = await limiter.reserve("agent", "0.30", id="first", operation="chat")
        assert first.guarded, "the cap was checked"
        second = await limiter.reserve("agent", "0.20")
        with pytest.raises(StoreUnavailable):
            await limiter.reserve("agent", "0.01")
        assert limiter.prepaid == {"agent": 0}
        assert (await first.commit("0.10")).deferred
        assert (await second.release()).amounts == {"agent": 0}
        third = await limiter.reserve("agent", "0.40")
        with pytest.raises(StoreUnavailable):
            await limiter.reserve("agent", "0.01")
        await third.commit("0.15")
        own_server.start()
        await until(lambda: limiter.deferred == 0)
        with own_server.client() as client:
            assert sums(client)["spent"] == ledger_sum(client) == to_units("0.25")
            assert (await limiter.get("first")).charged == {"agent": Decimal("0.10")}
            entries = await limiter.ledger("agent")
            assert {(entry.hold_id, entry.amount, entry.operation) for entry in entries} == {
                ("first", Decimal("0.10"), "chat"),
                (third.id, Decimal("0.15"), ""),
            }
            assert sums(client)["held"] == to_units("0.25"), "the slab is smaller by what was spent"
            assert immortal_keys(client) == []
        assert (await first.commit("0.10")).replayed
        with pytest.raises(HoldConflict):
            await first.commit("0.11")
    with own_server.client() as client:
        assert sums(client) == {"spent": to_units("0.25"), "held": 0, "unconfirmed": 0, "events": 2}


async def test_nothing_is_granted_that_was_not_prepaid(own_server):
    """Off unless asked for; a budget without a slab, slots, and several budgets of which one lacks room: refused."""
    budgets = [*BUDGETS, Budget("slots", 3, kind="slots")]
    async with AsyncBudgetLimiter(
        own_server.url, budgets, timeout=TIMEOUT_S, on_store_error="lease", lease_slab={"agent": "0.50", "team": "0.10"}
    ) as limiter:
        await prepaid(limiter)
        own_server.kill()
        for refused in ({"slots": 1}, {"agent": "0.10", "slots": 1}, {"agent": "0.10", "team": "0.11"}):
            with pytest.raises(StoreUnavailable):
                await limiter.reserve(refused)
        assert limiter.prepaid == {"agent": Decimal("0.50"), "team": Decimal("0.10")}, "all or none"
        both = await limiter.reserve({"agent": "0.20", "team": "0.10"})
        await both.commit({"agent": "0.20", "team": "0.04"})
        assert limiter.prepaid == {"agent": Decimal("0.30"), "team": Decimal("0.06")}
        own_server.start()
        await until(lambda: limiter.deferred == 0)
        with own_server.client() as client:
            assert sums(client)["spent"] == to_units("0.20")
            assert sums(client, "team")["spent"] == to_units("0.04")


async def test_the_same_id_is_granted_once(own_server):
    async with limiter_for(own_server) as limiter:
        await prepaid(limiter)
        own_server.kill()
        hold = await limiter.reserve("agent", "0.30", id="op_1")
        again = await limiter.reserve("agent", "0.30", id="op_1")
        assert (hold.replayed, again.replayed) == (False, True)
        with pytest.raises(HoldConflict):
            await limiter.reserve("agent", "0.31", id="op_1")
        assert limiter.prepaid["agent"] == Decimal("0.20")
        await hold.commit("0.10")
        assert (await again.commit("0.10")).replayed
        own_server.start()
        await until(lambda: limiter.deferred == 0)
        assert (await limiter.reserve("agent", "0.30", id="op_2")).prepaid is None
        with own_server.client() as client:
            assert sums(client)["spent"] == to_units("0.10")


async def test_by_id_and_with_heartbeats_and_growth(own_server):
    async with limiter_for(own_server) as limiter:
        await prepaid(limiter)
        own_server.kill()
        async with limiter.hold("agent", "0.10", id="op_1", ttl=1) as hold:
            hold.accrue("0.04")
            await hold.extend()
            await hold.grow("0.10")
            assert limiter.prepaid["agent"] == Decimal("0.30")
            with pytest.raises(StoreUnavailable):
                await hold.grow("0.31")
            view = await limiter.get("op_1")
            assert (view.amounts, view.accrued, view.state) == (
                {"agent": Decimal("0.20")},
                {"agent": Decimal("0.04")},
                "open",
            )
        await limiter.reserve("agent", "0.05", id="op_2")
        await limiter.commit("op_2", "0.06")
        assert limiter.prepaid["agent"] == Decimal("0.40")
        own_server.start()
        await until(lambda: limiter.deferred == 0)
        with own_server.client() as client:
            assert sums(client)["spent"] == to_units("0.10")


async def test_spend_without_a_reservation_is_recorded_if_it_was_prepaid(own_server):
    async with limiter_for(own_server) as limiter:
        await prepaid(limiter)
        own_server.kill()
        assert (await limiter.record("agent", "0.20", id="spent", operation="tts")).deferred
        with pytest.raises(StoreUnavailable):
            await limiter.record("agent", "0.31")
        own_server.start()
        await until(lambda: limiter.deferred == 0)
        assert (await limiter.record("agent", "0.20", id="spent")).replayed
        with own_server.client() as client:
            assert sums(client)["spent"] == to_units("0.20")
        [entry] = await limiter.ledger("agent")
        assert (entry.kind, entry.operation) == ("record", "tts")


async def test_a_hold_from_before_the_outage_settles_and_is_told_later(own_server):
    async with limiter_for(own_server) as limiter:
        before = await limiter.reserve("agent", "1.00")
        own_server.kill()
        assert (await before.commit("0.70")).deferred
        own_server.start()
        with own_server.client() as client:
            await until(lambda: sums(client)["spent"] == to_units("0.70"))


async def test_a_reservation_that_the_store_had_granted_before_it_fell_silent_counts_once(server, tmp_path_factory):
    from .helpers.proxy import Proxy

    path = tmp_path_factory.mktemp("p") / "s"
    async with Proxy(server.socket_path, path) as proxy:
        async with AsyncBudgetLimiter(
            proxy.url, BUDGETS, timeout=TIMEOUT_S, on_store_error="lease", lease_slab={"agent": "0.50"}
        ) as limiter:
            await prepaid(limiter)
            proxy.hold_replies()
            committed = await limiter.reserve("agent", "0.15", id="committed")
            assert committed.prepaid is not None
            await committed.commit("0.07")
            released = await limiter.reserve("agent", "0.25", id="released")
            await released.release()
            proxy.release_replies()
            await until(lambda: limiter.deferred == 0 and not limiter._core.unresolved.count)
            with server.client() as client:
                await until(lambda: sums(client)["spent"] == to_units("0.07"))
                assert counted(client) <= to_units("1.50")
    with server.client() as client:
        assert sums(client) == {"spent": to_units("0.07"), "held": 0, "unconfirmed": 0, "events": 1}


async def test_the_window_that_admitted_the_slab_pays(clocked_server):
    """Midnight during the outage: nothing more is granted, and what was granted is told to its own day."""
    clocked_server.set(datetime(2026, 11, 23, 23, 59, 57, tzinfo=UTC))
    async with limiter_for(clocked_server, {"agent": "0.50"}) as limiter:
        await prepaid(limiter)
        clocked_server.pause()
        try:
            hold = await limiter.reserve("agent", "0.10")
            # The replica's own reckoning of the store's clock goes on without it.
            await until(lambda: limiter._session.now_ms() >= 1_795_478_400_000)
            with pytest.raises(StoreUnavailable):
                await limiter.reserve("agent", "0.10")
            await hold.commit("0.06")
        finally:
            clocked_server.resume()
        await until(lambda: limiter.deferred == 0)
        with clocked_server.client() as client:
            await until(lambda: sums(client, window="2026-11-23")["held"] == 0)
            assert sums(client, window="2026-11-23")["spent"] == to_units("0.06")
            await until(lambda: sums(client, window="2026-11-24")["held"] == to_units("0.50"))


async def test_closing_while_the_store_is_away_leaves_the_slab_to_be_charged(own_server, caplog):
    async with limiter_for(own_server, {"agent": "0.50"}) as limiter:
        await prepaid(limiter)
        own_server.kill()
        await (await limiter.reserve("agent", "0.10")).commit()
    assert "never told" in caplog.text
    own_server.start()
    with own_server.client() as client:
        assert counted(client) == to_units("0.50")


async def test_closing_with_open_holds_keeps_what_they_reserved(own_server):
    async with limiter_for(own_server, {"agent": "0.50"}) as limiter:
        await prepaid(limiter)
        own_server.kill()
        await limiter.reserve("agent", "0.10")
        await (await limiter.reserve("agent", "0.10")).commit("0.04")
        own_server.start()
        await until(lambda: _answers(limiter))
    with own_server.client() as client:
        assert sums(client) == {"spent": to_units("0.04"), "held": to_units("0.10"), "unconfirmed": 0, "events": 1}


def test_the_sync_limiter_and_its_forked_child(own_server):
    with BudgetLimiter(
        own_server.url, BUDGETS, timeout=TIMEOUT_S, on_store_error="lease", lease_slab="0.50"
    ) as limiter:
        wait_until(lambda: all(limiter.prepaid.values()))
        pid = os.fork()
        if pid == 0:
            try:
                limiter.record("agent", "0.01")
                limiter.reserve("agent", "0.01").release()
                wait_until(lambda: all(limiter.prepaid.values()))
                limiter.close()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        own_server.kill()
        with limiter.hold("agent", "0.40") as hold:
            hold.accrue("0.20")
        own_server.start()
        wait_until(lambda: limiter.deferred == 0)
    with own_server.client() as client:
        assert sums(client) == {"spent": to_units("0.21"), "held": 0, "unconfirmed": 0, "events": 2}


async def test_a_store_that_answers_still_decides(server):
    async with limiter_for(server) as limiter:
        await prepaid(limiter)
        with pytest.raises(BudgetExceeded) as denied:
            await limiter.reserve("agent", "4.51")
        assert (denied.value.reason, denied.value.held) == ("budget_held", Decimal("0.50"))
        assert (await limiter.reserve("agent", "4.50")).prepaid is None


def test_the_options_are_checked(server):
    for options in (
        {"on_store_error": "lease"},
        {"on_store_error": "lease", "lease_slab": {"other": 1}},
        {"on_store_error": "lease", "lease_slab": {}},
        {"on_store_error": "lease", "lease_slab": 0},
        {"on_store_error": "deny", "lease_slab": "0.50"},
        {"on_store_error": "else"},
    ):
        with pytest.raises((InvalidArgument, LookupError)):
            AsyncBudgetLimiter(server.url, BUDGETS, **options)


# -- the script --------------------------------------------------------------------------------------------------------


async def shrink(limiter: AsyncBudgetLimiter, hold, left: str) -> str:
    [(window, _)] = hold.parts
    parts = [(window, f":{to_units(left)}")]
    op = Op(hold.id, limiter.keys.hold(hold.id), f"H {hold.id}", parts)

    def flow():
        line, _ = yield op
        return line

    return await limiter._coalescer.submit(flow(), "test")


async def test_shrinking_a_hold_can_be_repeated_and_never_grows_it(server):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        with server.client() as client:
            hold = await limiter.reserve("agent", "0.50", id="slab")
            for left in ("0.30", "0.30", "0.40"):
                assert await shrink(limiter, hold, left) == "u"
                assert sums(client)["held"] == to_units("0.30")
            assert (await limiter.reserve("agent", "0.50", id="slab")).replayed, "the same reservation, still"
            await hold.release()
            assert await shrink(limiter, hold, "0.10") == "u"
            assert sums(client) == {"spent": 0, "held": 0, "unconfirmed": 0, "events": 0}


async def test_shrinking_an_unconfirmed_hold_corrects_its_charge(clocked_server):
    clocked_server.set(datetime(2026, 11, 23, 12, tzinfo=UTC), frozen=True)
    async with AsyncBudgetLimiter(clocked_server.url, BUDGETS) as limiter:
        with clocked_server.client() as client:
            hold = await limiter.reserve("agent", "0.50", ttl=60)
            clocked_server.advance(61)
            for left in ("0.30", "0.30", "0"):
                await shrink(limiter, hold, left)
                found = sums(client, window="2026-11-23")
                assert found["unconfirmed"] == ledger_sum(client, window="2026-11-23") == to_units(left)
                assert found["held"] == 0
            await hold.commit("0.10")
            assert sums(client, window="2026-11-23")["spent"] == to_units("0.10")
            assert ledger_sum(client, window="2026-11-23") == to_units("0.10")


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outage", ["SIGSTOP", "SIGKILL"])
def test_three_processes_never_pass_the_cap_and_each_id_is_told_once(own_server, outage: str):
    """Each spends from its slab while the store is away; one of them is killed then: its slab stays, to be charged."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    slab, others = to_units("0.40"), to_units("3.80")
    options = {"url": own_server.url, "limit": "5.00", "slab": "0.40", "seed": seed}
    with workers("prepaid.py", 3, options) as replicas, own_server.client() as client:
        for replica in replicas:
            replica.send(do="ready")
        assert [replica.receive() for replica in replicas] == ["prepaid"] * 3
        with BudgetLimiter(own_server.url, BUDGETS) as limiter:
            limiter.record("agent", "3.80")  # all the rest of the cap: nothing is left but the slabs
        if outage == "SIGSTOP":
            own_server.pause()
        else:
            own_server.kill()
        for replica in replicas:
            amounts = [f"{chance.randrange(1, to_units('0.05')) / 10**9:.9f}" for _ in range(60)]
            replica.send(do="spend", amounts=amounts)
        reports = [replica.receive() for replica in replicas]
        replicas[2].kill()
        if outage == "SIGSTOP":
            own_server.resume()
        else:
            own_server.start()
        for replica in replicas[:2]:
            replica.send(do="told")
        heard: list[str] = []
        listener = threading.Thread(target=lambda: heard.extend(replica.receive() for replica in replicas[:2]))
        listener.start()
        peak = counted(client)
        while listener.is_alive():
            peak = max(peak, counted(client))
            listener.join(0.002)
        assert heard == ["told"] * 2
        spent = [sum(report["spent"].values()) for report in reports]
        assert all(0 < of_one <= slab for of_one in spent)
        assert all(report["refused"] for report in reports), "a slab has an end"
        assert peak <= to_units("5.00")
        assert sums(client)["spent"] == ledger_sum(client) == others + spent[0] + spent[1]
        # What the dead one spent is covered by its slab, which nobody has reduced.
        assert sums(client)["held"] >= slab
        assert counted(client) <= to_units("5.00")
        told = _told_by_id(client)
        for report in reports[:2]:
            assert {hold_id: told.get(hold_id) for hold_id in report["spent"]} == {
                hold_id: [units] for hold_id, units in report["spent"].items()
            }


def _told_by_id(client) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for key in client.scan_iter("*:l:agent:*"):
        for entry in ledger_entries(client, key):
            found.setdefault(entry.hold_id, []).append(entry.units)
    return found


async def test_many_tasks_in_an_outage_share_one_slab_to_the_unit(own_server):
    async with limiter_for(own_server, {"agent": "0.50"}) as limiter:
        await prepaid(limiter)
        own_server.kill()

        async def work() -> int:
            try:
                hold = await limiter.reserve("agent", "0.007")
            except StoreUnavailable:
                return 0
            await hold.commit("0.007")
            return 1

        granted = sum(await asyncio.gather(*(work() for _ in range(200))))
        assert granted == 71
        own_server.start()
        await until(lambda: limiter.deferred == 0)
        with own_server.client() as client:
            assert sums(client)["spent"] == ledger_sum(client) == 71 * to_units("0.007")


async def test_a_random_history_with_outages_adds_up(own_server):
    """Against plain arithmetic: each id is told once and exactly, and the cap holds whenever the store can be asked."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    cap = to_units("5.00")
    truth: dict[str, int] = {}
    limiters = [limiter_for(own_server, {"agent": chance.choice(["0.10", "0.30"])}) for _ in range(2)]
    for limiter in limiters:
        await limiter.start()
        await prepaid(limiter)
    granted = refused = 0

    async def work(limiter: AsyncBudgetLimiter) -> None:
        nonlocal granted, refused
        units = chance.randrange(2, to_units("0.05"))
        try:
            hold = await limiter.reserve("agent", Decimal(units) / 10**9)
        except (StoreUnavailable, BudgetExceeded):
            refused += 1
            return
        granted += hold.prepaid is not None
        await asyncio.sleep(chance.choice([0, 0.01, 0.2]))
        if chance.random() < 0.2:
            await hold.release()
            return
        cost = chance.randrange(1, units + 1)
        await hold.commit(Decimal(cost) / 10**9)
        truth[hold.id] = cost

    for _ in range(3):
        own_server.pause()
        await asyncio.gather(*(work(limiter) for limiter in limiters for _ in range(25)))
        own_server.resume()
        with own_server.client() as client:
            assert counted(client) <= cap
            working = [asyncio.create_task(work(limiter)) for limiter in limiters for _ in range(15)]
            await until(lambda: counted(client) <= cap and not any(limiter.deferred for limiter in limiters))
            await asyncio.gather(*working)
            assert counted(client) <= cap
    await until(lambda: not any(limiter.deferred or limiter._core.unresolved.count for limiter in limiters))
    with own_server.client() as client:
        for limiter in limiters:
            await limiter.close()
        assert granted
        assert refused
        told = _told_by_id(client)
        assert told == {hold_id: [units] for hold_id, units in truth.items()}
        assert sums(client)["spent"] == ledger_sum(client) == sum(truth.values())
        assert sums(client)["held"] == sums(client)["unconfirmed"] == 0
        assert counted(client) <= cap
