"""Policy `lease` on real servers: during an outage, holds are granted from a prepaid chunk within the cap (P12)."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from ktrdr_budget import (
    AsyncBudgetLimiter,
    Budget,
    BudgetExceeded,
    BudgetLimiter,
    HoldConflict,
    InvalidArgument,
    StoreUnavailable,
    UnknownHold,
)
from ktrdr_budget.money import to_units

from .helpers.keyspace import counted, immortal_keys, ledger_sum, sums
from .helpers.patience import away
from .helpers.processes import workers
from .helpers.proxy import Proxy
from .helpers.waiting import until, wait_until

BUDGETS = [Budget("agent", "5.00"), Budget("team", "2.00")]
MIDNIGHT_MS = 1_795_478_400_000
"""Midnight at the start of 2026-11-24, for the tests that set the clock."""


@pytest.fixture
async def limiter(proxy: Proxy) -> AsyncIterator[AsyncBudgetLimiter]:
    """A replica behind the proxy, with $4.00 of the budget `agent` prepaid."""
    async with limiter_for(proxy, {"agent": "4.00"}) as made:
        await prepaid(made)
        yield made


def limiter_for(store, slab="0.50", **options) -> AsyncBudgetLimiter:
    return AsyncBudgetLimiter(store.url, BUDGETS, timeout=0.2, on_store_error="lease", lease_slab=slab, **options)


async def prepaid(limiter: AsyncBudgetLimiter) -> None:
    """Wait until each lease has a prepaid chunk."""
    await until(lambda: limiter.prepaid and all(limiter.prepaid.values()))


async def replies(limiter: AsyncBudgetLimiter) -> None:
    """Wait until the store replies and the outbox is empty."""
    await until(lambda: limiter.store_state == "closed" and not (limiter.deferred or limiter.unresolved))


# -- one outage --------------------------------------------------------------------------------------------------------


async def test_the_cost_of_holds_granted_during_an_outage_is_committed_as_one_ledger_entry(own_server):
    async with limiter_for(own_server, {"agent": "0.50"}) as limiter:
        await prepaid(limiter)
        own_server.kill()
        first = await limiter.reserve("agent", "0.30", id="first", operation="chat")
        assert first.cap_checked
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
        await replies(limiter)
        with own_server.client() as client:
            await until(lambda: sums(client)["spent"] == ledger_sum(client) == to_units("0.25"))
            await until(lambda: sums(client)["held"] == to_units("0.50"))
            assert immortal_keys(client) == []
        [entry] = await limiter.ledger("agent")
        assert (entry.amount, entry.operation, entry.kind) == (Decimal("0.25"), "lease", "commit")
        assert entry.hold_id not in (first.id, third.id)
        assert (await first.commit("0.10")).replayed
        with pytest.raises(HoldConflict):
            await first.commit("0.11")
    with own_server.client() as client:
        assert sums(client) == {"spent": to_units("0.25"), "held": 0, "unconfirmed": 0, "events": 1}


async def test_a_chunk_stays_reserved_until_every_hold_granted_from_the_chunk_is_settled(proxy, limiter, client):
    proxy.cut()
    hold = await limiter.reserve("agent", "1.00")
    await (await limiter.reserve("agent", "0.50")).commit("0.30")
    proxy.mend()
    await replies(limiter)
    await until(lambda: limiter.prepaid == {"agent": Decimal("1.00")})
    assert sums(client)["held"] == to_units("5.00"), "the chunk of $4.00, and the rest of the budget"
    assert (await hold.commit("0.70")).deferred
    await until(lambda: sums(client)["spent"] == ledger_sum(client) == to_units("1.00"))
    await until(lambda: counted(client) <= to_units("5.00") and sums(client)["held"] < to_units("4.50"))


async def test_a_hold_granted_during_an_outage_can_be_read_only_by_the_granting_limiter(proxy, other):
    async with limiter_for(proxy, {"agent": "1.00"}) as limiter:
        await prepaid(limiter)
        proxy.cut()
        await limiter.reserve("agent", "0.50", id="op_1", owner="me", operation="chat")
        proxy.mend()
        await replies(limiter)
        with pytest.raises(UnknownHold):
            await other.get("op_1")
        view = await limiter.get("op_1")
        assert (view.state, view.owner, view.operation) == ("open", "me", "chat")
        assert not (await other.reserve("agent", "0.60", id="op_1")).replayed
        assert (await limiter.get("op_1")).amounts == {"agent": Decimal("0.50")}, "another hold, in another process"


async def test_during_an_outage_a_reservation_is_granted_only_if_every_reserved_budget_is_prepaid(own_server):
    budgets = [*BUDGETS, Budget("slots", 3, kind="slots")]
    slabs = {"agent": "0.50", "team": "0.10"}
    async with AsyncBudgetLimiter(
        own_server.url, budgets, timeout=0.2, on_store_error="lease", lease_slab=slabs
    ) as limiter:
        await prepaid(limiter)
        own_server.kill()
        for refused in ({"slots": 1}, {"agent": "0.10", "slots": 1}, {"agent": "0.10", "team": "0.11"}):
            with pytest.raises(StoreUnavailable):
                await limiter.reserve(refused)
        assert limiter.prepaid == {"agent": Decimal("0.50"), "team": Decimal("0.10")}
        both = await limiter.reserve({"agent": "0.20", "team": "0.05"})
        with pytest.raises(StoreUnavailable):
            await both.grow({"agent": "0.10", "team": "0.06"})
        assert limiter.prepaid == {"agent": Decimal("0.30"), "team": Decimal("0.05")}
        await both.commit({"agent": "0.20", "team": "0.04"})
        own_server.start()
        with own_server.client() as client:
            await until(lambda: sums(client)["spent"] == to_units("0.20"))
            await until(lambda: sums(client, "team")["spent"] == to_units("0.04"))


async def test_while_the_store_is_reachable_reservations_are_not_drawn_from_the_chunk(server):
    async with limiter_for(server) as limiter:
        await prepaid(limiter)
        with pytest.raises(BudgetExceeded) as denied:
            await limiter.reserve("agent", "4.51")
        assert (denied.value.reason, denied.value.held) == ("budget_held", Decimal("0.50"))
        assert (await limiter.reserve("agent", "4.50")).offline is None


def test_invalid_options_of_policy_lease_are_refused(server):
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


# -- idempotency -------------------------------------------------------------------------------------------------------


async def test_a_reservation_repeated_during_or_after_an_outage_is_a_replay(proxy, limiter, client):
    proxy.cut()
    names = ("open", "committed", "released")
    holds = {name: await limiter.reserve("agent", "0.50", id=name) for name in names}
    assert not any(hold.replayed for hold in holds.values())
    await holds["committed"].commit("0.20")
    await holds["released"].release()
    left = limiter.prepaid
    for store in ("away", "back"):
        for name in names:
            again = await limiter.reserve("agent", "0.50", id=name)
            assert (again.replayed, again.state) == (True, name), store
            with pytest.raises(HoldConflict):
                await limiter.reserve("agent", "0.60", id=name)
            with pytest.raises(HoldConflict):
                await limiter.record("agent", "0.50", id=name)
        if store == "away":
            assert limiter.prepaid == left
            proxy.mend()
            await replies(limiter)
    again = await limiter.reserve("agent", "0.50", id="open")
    await holds["open"].commit("0.10")
    assert (await again.commit("0.10")).replayed
    with pytest.raises(HoldConflict):
        await again.release()
    await until(lambda: sums(client)["spent"] == ledger_sum(client) == to_units("0.30"))


async def test_during_an_outage_the_lease_refuses_an_id_granted_by_the_store_before_the_outage(proxy, limiter, client):
    before = await limiter.reserve("agent", "0.20", id="open")
    await (await limiter.reserve("agent", "0.20", id="settled")).commit("0.10")
    await limiter.record("agent", "0.30", id="recorded")
    proxy.cut()
    for name in ("open", "settled"):
        with pytest.raises(StoreUnavailable):
            await limiter.reserve("agent", "0.20", id=name)
    assert (await limiter.record("agent", "0.30", id="recorded")).deferred
    assert limiter.prepaid == {"agent": Decimal("4.00")}
    assert (await before.commit("0.15")).deferred
    proxy.mend()
    await replies(limiter)
    assert sums(client)["spent"] == ledger_sum(client) == to_units("0.55")


async def test_a_hold_granted_during_an_outage_can_be_settled_extended_and_grown_by_id(proxy, limiter):
    proxy.cut()
    async with limiter.hold("agent", "0.10", id="op_1", ttl=1) as hold:
        hold.accrue("0.04")
        await hold.extend()
        await hold.grow("0.10")
        assert limiter.prepaid == {"agent": Decimal("3.80")}
        with pytest.raises(StoreUnavailable):
            await hold.grow("3.81")
        view = await limiter.get("op_1")
        assert (view.amounts, view.accrued, view.state) == (
            {"agent": Decimal("0.20")},
            {"agent": Decimal("0.04")},
            "open",
        )
        assert (await limiter.grow("op_1", {"agent": "0.30"})).amounts == {"agent": Decimal("0.30")}
        assert (await limiter.extend("op_1", accrued="0.05")).accrued == {"agent": Decimal("0.05")}
    await limiter.reserve("agent", "0.05", id="op_2")
    assert (await limiter.commit("op_2", "0.06")).overruns == ("agent",)
    await limiter.reserve("agent", "0.05", id="op_3")
    await limiter.release("op_3")
    assert limiter.prepaid == {"agent": Decimal("3.89")}


async def test_if_two_objects_of_one_hold_grow_the_hold_both_increases_count(proxy, limiter):
    proxy.cut()
    first = await limiter.reserve("agent", "0.15", id="op_1")
    second = await limiter.reserve("agent", "0.15", id="op_1")
    assert second.replayed
    await first.grow("0.10")
    await second.grow("0.05")
    assert second.amounts == {"agent": Decimal("0.30")}


async def test_a_hold_granted_during_an_outage_can_be_extended_and_grown_after_the_outage(proxy, limiter, client):
    proxy.cut()
    hold = await limiter.reserve("agent", "1.00", id="op_1", ttl=60)
    proxy.mend()
    await replies(limiter)
    before = hold.expires_at
    await hold.extend(120)
    assert hold.expires_at > before
    await hold.grow("0.50")
    assert (await limiter.get("op_1")).amounts == {"agent": Decimal("1.50")}
    with pytest.raises(StoreUnavailable):
        await hold.grow("2.51")
    await hold.commit("1.40")
    with pytest.raises(HoldConflict):
        await hold.extend()
    await until(lambda: sums(client)["spent"] == to_units("1.40"))


# -- spend without a reservation, and holds from before ----------------------------------------------------------------


async def test_spend_recorded_during_an_outage_is_drawn_from_the_chunk(own_server):
    async with limiter_for(own_server, {"agent": "0.50"}) as limiter:
        await prepaid(limiter)
        own_server.kill()
        await (await limiter.reserve("agent", "0.01")).release()  # from now on, no request is sent
        assert (await limiter.record("agent", "0.20", id="spent", operation="tts")).deferred
        assert (await limiter.record("agent", "0.20", id="spent")).replayed
        with pytest.raises(HoldConflict):
            await limiter.record("agent", "0.21", id="spent")
        with pytest.raises(HoldConflict):
            await limiter.reserve("agent", "0.20", id="spent")
        with pytest.raises(HoldConflict):
            await limiter.commit("spent", "0.10")
        with pytest.raises(StoreUnavailable):
            await limiter.record("agent", "0.31")
        with pytest.raises(StoreUnavailable):
            await limiter.record("team", 0)
        assert limiter.prepaid == {"agent": Decimal("0.30")}
        own_server.start()
        await replies(limiter)
        with own_server.client() as client:
            await until(lambda: sums(client)["spent"] == ledger_sum(client) == to_units("0.20"))
        [entry] = await limiter.ledger("agent")
        assert (entry.kind, entry.operation) == ("commit", "lease")


async def test_a_hold_reserved_before_an_outage_can_be_settled_during_the_outage(proxy, limiter, client):
    """A hold is settled through its object, or by its id on the replica that reserved the hold."""
    held = await limiter.reserve("agent", "0.20")
    for name in ("commits", "releases", "accrues"):
        await limiter.reserve("agent", "0.20", id=name)
    await limiter.extend("accrues", accrued="0.05")
    proxy.cut()
    assert (await held.commit("0.17")).deferred
    assert (await limiter.commit("commits", "0.15")).deferred
    assert (await limiter.release("releases")).deferred
    assert (await limiter.commit("accrues")).amounts == {"agent": Decimal("0.05")}
    with pytest.raises(StoreUnavailable):
        await limiter.commit("unknown_here", "0.15")
    assert limiter.prepaid == {"agent": Decimal("4.00")}
    proxy.mend()
    await replies(limiter)
    assert sums(client)["spent"] == ledger_sum(client) == to_units("0.37")
    assert sums(client)["held"] == to_units("4.00")
    assert (await held.commit("0.17")).replayed


# -- requests that the store may have executed -------------------------------------------------------------------------


@pytest.mark.parametrize("hold_id", ["op_1", None])
async def test_if_the_reply_to_a_reservation_is_lost_the_cost_counts_once(proxy, limiter, client, hold_id):
    with away(proxy.url):
        proxy.hold_replies()
        hold = await limiter.reserve("agent", "0.15", id=hold_id)
        assert hold.offline is not None
        assert (await limiter.get(hold.id)).state == "open"
        await hold.commit("0.07")
        proxy.release_replies()
    await replies(limiter)
    await until(
        lambda: sums(client) == {"spent": to_units("0.07"), "held": to_units("4.00"), "unconfirmed": 0, "events": 1}
    )
    assert (await limiter.get(hold.id)).state == "committed"
    assert (await hold.commit("0.07")).replayed


async def test_a_hold_granted_by_the_store_is_released_if_the_lease_grants_a_retry_of_the_reservation(
    proxy, limiter, client
):
    """The first attempt fails because the lease has no room and the reply of the store is late."""
    with away(proxy.url):
        filler = None
        proxy.hold_replies()
        filler = await limiter.reserve("agent", "4.00")
        with suppress(StoreUnavailable):
            await limiter.reserve("agent", "0.15", id="op_1")
        await filler.release()
        hold = await limiter.reserve("agent", "0.15", id="op_1")
        proxy.release_replies()
    await replies(limiter)
    await hold.commit("0.07")
    await until(lambda: sums(client)["spent"] == to_units("0.07"))
    await until(lambda: sums(client)["held"] == to_units("4.00"))


async def test_spend_recorded_twice_with_one_id_and_lost_replies_counts_once(proxy, limiter, client):
    with away(proxy.url):
        proxy.hold_replies()
        assert (await limiter.record("agent", "0.15", id="spent")).deferred
        assert (await limiter.record("agent", "0.15", id="spent")).deferred
        assert limiter.prepaid == {"agent": Decimal("4.00")}
        proxy.release_replies()
    await replies(limiter)
    assert sums(client)["spent"] == ledger_sum(client) == to_units("0.15")
    assert (await limiter.get("spent")).state == "recorded"


async def test_a_reservation_cancelled_during_an_outage_leaves_no_hold_and_can_be_retried(proxy, limiter, client):
    proxy.fate = lambda: "request"
    with away(proxy.url):
        task = asyncio.create_task(limiter.reserve("agent", "0.50", id="mine"))
        await until(lambda: proxy.requests_lost)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await until(lambda: limiter.unresolved)
        assert limiter.prepaid == {"agent": Decimal("4.00")}
    proxy.fate = lambda: None
    await replies(limiter)
    assert sums(client)["held"] == to_units("4.00")
    again = await limiter.reserve("agent", "0.50", id="mine")
    assert (again.replayed, again.state) == (False, "open")
    assert sums(client)["held"] == to_units("4.50")


# -- expiry ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "counts"), [("charge", "1.00"), ("accrued", "0.20"), ("release", "0")])
async def test_during_an_outage_the_expiry_policy_decides_how_much_of_an_expired_hold_is_charged(
    proxy, limiter, client, policy, counts
):
    proxy.cut()
    hold = await limiter.reserve("agent", "1.00", id="op_1", ttl=1, on_expiry=policy)
    hold.accrue("0.20")
    await until(lambda: limiter.prepaid == {"agent": Decimal("4.00") - Decimal(counts)} and _expired(limiter))
    rest = await limiter.reserve("agent", limiter.prepaid["agent"], id="rest")
    with pytest.raises(StoreUnavailable):
        await limiter.reserve("agent", "0.01")
    await rest.release()
    proxy.mend()
    await replies(limiter)
    assert counted(client) <= to_units("5.00")
    late = await hold.commit("0.40")
    assert (late.late, late.amounts) == (True, {"agent": Decimal("0.40")})
    await until(lambda: sums(client)["spent"] == ledger_sum(client) == to_units("0.40"))
    assert (await hold.commit("0.40")).replayed
    await until(lambda: sums(client)["held"] == to_units(limiter.prepaid["agent"]) >= to_units("4.00"))
    assert sums(client)["unconfirmed"] == 0


async def _expired(limiter: AsyncBudgetLimiter) -> bool:
    return (await limiter.get("op_1")).state == "unconfirmed"


async def test_if_a_hold_granted_during_an_outage_expires_afterwards_the_amount_is_available_again(
    proxy, limiter, client
):
    proxy.cut()
    await limiter.reserve("agent", "1.00", ttl=1, on_expiry="release")
    proxy.mend()
    await replies(limiter)
    await until(lambda: sums(client)["held"] == to_units(limiter.prepaid["agent"]) >= to_units("4.00"))
    assert sums(client)["spent"] == 0


async def test_a_late_commit_counts_even_if_another_process_reserved_the_same_id_during_the_outage(
    proxy, limiter, other, client
):
    proxy.cut()
    hold = await limiter.reserve("agent", "0.50", id="op_1", ttl=1, on_expiry="release")
    await until(lambda: _expired(limiter))
    theirs = await other.reserve("agent", "0.30", id="op_1")
    await hold.commit("0.40")
    proxy.mend()
    await replies(limiter)
    await theirs.commit("0.20")
    assert sums(client)["spent"] == ledger_sum(client) == to_units("0.60")


async def test_heartbeats_extend_a_hold_granted_during_an_outage(proxy, limiter):
    proxy.cut()
    async with limiter.hold("agent", "1.00", id="op_1", ttl=1) as hold:
        first = hold.expires_at
        await until(lambda: hold.expires_at.timestamp() > first.timestamp() + 1.2)
        assert (await limiter.get("op_1")).state == "open"


async def test_during_an_outage_a_heartbeat_reopens_an_expired_hold_unless_the_hold_was_released(proxy, limiter):
    proxy.cut()
    kept = await limiter.reserve("agent", "1.00", id="op_1", ttl=1, on_expiry="accrued")
    given_back = await limiter.reserve("agent", "1.00", ttl=1, on_expiry="release")
    kept.accrue("0.10")
    await until(lambda: limiter.prepaid == {"agent": Decimal("3.90")} and _expired(limiter))
    await kept.extend(60)
    assert (await limiter.get("op_1")).state == "open"
    assert limiter.prepaid == {"agent": Decimal("3.00")}
    with pytest.raises(StoreUnavailable):
        await given_back.extend(60)


async def test_a_hold_granted_during_an_outage_is_charged_to_the_window_in_which_the_chunk_was_reserved(clocked_server):
    """Midnight passes during the outage: nothing more is granted, and an open hold counts in the day of its chunk."""
    clocked_server.set(datetime(2026, 11, 23, 23, 59, 57, tzinfo=UTC))
    async with limiter_for(clocked_server, {"agent": "0.50"}) as limiter:
        await prepaid(limiter)
        clocked_server.pause()
        try:
            hold = await limiter.reserve("agent", "0.10", id="op_1", ttl=60)
            # The replica's estimate of the store's clock continues without the store.
            await until(lambda: limiter.engine.state.now_ms() >= MIDNIGHT_MS)
            with pytest.raises(StoreUnavailable):
                await limiter.reserve("agent", "0.10")
        finally:
            clocked_server.resume()
        await replies(limiter)
        with clocked_server.client() as client:
            await until(lambda: sums(client, window="2026-11-24")["held"] == to_units("0.50"))
            assert sums(client, window="2026-11-23")["held"] == to_units("0.50")
            assert (await limiter.get("op_1")).windows == {"agent": "2026-11-23"}
            await hold.commit("0.06")
            await until(lambda: sums(client, window="2026-11-23")["spent"] == to_units("0.06"))
            await until(lambda: sums(client, window="2026-11-23")["held"] == 0)


# -- overruns ----------------------------------------------------------------------------------------------------------


async def test_after_a_commit_above_the_chunk_the_lease_grants_nothing_more_during_the_outage(proxy, limiter, client):
    proxy.cut()
    hold = await limiter.reserve("agent", "1.00")
    assert (await hold.commit("4.50")).overruns == ("agent",)
    with pytest.raises(StoreUnavailable):
        await limiter.reserve("agent", "0.01")
    proxy.mend()
    await replies(limiter)
    await until(lambda: sums(client)["spent"] == ledger_sum(client) == to_units("4.50"))
    await until(lambda: sums(client)["held"] == to_units("0.50"))


# -- losses ------------------------------------------------------------------------------------------------------------


async def test_the_chunk_and_the_spend_are_restored_after_the_store_is_flushed_during_an_outage(proxy, limiter, client):
    proxy.cut()
    hold = await limiter.reserve("agent", "2.00")
    await (await limiter.reserve("agent", "1.00")).commit("1.00")
    client.flushall()
    proxy.mend()
    await until(lambda: limiter.repaired.holds)
    await replies(limiter)
    await until(lambda: counted(client) == to_units("5.00"))
    await hold.commit("1.50")
    await until(lambda: sums(client)["spent"] == to_units("2.50"))
    assert counted(client) <= to_units("5.00")
    client.flushall()
    await until(lambda: sums(client)["spent"] == to_units("2.50"))
    assert counted(client) <= to_units("5.00")


async def test_if_the_store_restarts_from_a_backup_older_than_the_outage_the_spend_counts_once(
    start_server, tmp_path_factory
):
    own_server = start_server()
    async with Proxy(own_server.socket_path, Path(tmp_path_factory.mktemp("p")) / "s") as proxy:
        async with limiter_for(proxy, {"agent": "4.00"}) as limiter:
            await prepaid(limiter)
            with own_server.client() as client:
                client.save()
            proxy.cut()
            await (await limiter.reserve("agent", "2.00")).commit("2.00")
            proxy.mend()
            await replies(limiter)
            with own_server.client() as client:
                await until(lambda: sums(client)["spent"] == to_units("2.00"))
            own_server.kill()
            own_server.start()
            await until(lambda: limiter.losses)
            with own_server.client() as client:
                await until(lambda: sums(client)["spent"] == to_units("2.00"))
                await until(lambda: sums(client)["held"] == to_units(limiter.prepaid["agent"]))
                assert counted(client) <= to_units("5.00")
    own_server.kill()


# -- the end of a process ----------------------------------------------------------------------------------------------


async def test_closing_the_limiter_charges_open_holds_in_full_and_releases_the_rest_of_the_chunk(own_server):
    async with limiter_for(own_server, {"agent": "0.50"}) as limiter:
        await prepaid(limiter)
        own_server.kill()
        await limiter.reserve("agent", "0.10", on_expiry="release")
        await (await limiter.reserve("agent", "0.10")).commit("0.04")
        own_server.start()
        await replies(limiter)
    with own_server.client() as client:
        assert sums(client) == {"spent": to_units("0.14"), "held": 0, "unconfirmed": 0, "events": 1}


async def test_if_the_limiter_is_closed_during_an_outage_the_whole_chunk_stays_counted(own_server, caplog):
    async with limiter_for(own_server, {"agent": "0.50"}) as limiter:
        await prepaid(limiter)
        own_server.kill()
        await (await limiter.reserve("agent", "0.10")).commit("0.10")
    assert "never sent" in caplog.text
    own_server.start()
    with own_server.client() as client:
        assert counted(client) == to_units("0.50")


def test_a_forked_child_uses_separate_leases_and_cannot_settle_a_hold_of_the_parent(own_server):
    with BudgetLimiter(
        own_server.url, BUDGETS, timeout=0.2, on_store_error="lease", lease_slab={"agent": "0.50"}
    ) as limiter:
        wait_until(lambda: all(limiter.prepaid.values()))
        own_server.kill()
        with limiter.hold("agent", "0.40") as hold:
            hold.accrue("0.20")
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    with pytest.raises(HoldConflict):
                        hold.commit("0.30")
                    with pytest.raises(StoreUnavailable):
                        limiter.reserve("agent", "0.01")
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        own_server.start()
        wait_until(lambda: limiter.store_state == "closed" and all(limiter.prepaid.values()))
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                limiter.record("agent", "0.01")
                limiter.reserve("agent", "0.01").release()
                wait_until(lambda: all(limiter.prepaid.values()))
                limiter.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with own_server.client() as client:
        assert sums(client) == {"spent": to_units("0.21"), "held": 0, "unconfirmed": 0, "events": 2}


# -- several processes and tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("outage", ["SIGSTOP", "SIGKILL"])
def test_three_processes_never_exceed_the_cap_even_if_a_process_is_killed_during_an_outage(own_server, outage: str):
    """Each process spends from its own chunk while the store is unreachable; then one process is killed."""
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
            limiter.record("agent", "3.80")  # the rest of the cap: only the chunks are left
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
        spent = [report["spent"] for report in reports]
        peaks = []

        def is_recorded() -> bool:
            peaks.append(counted(client))
            return sums(client)["spent"] == others + spent[0] + spent[1]

        wait_until(is_recorded)
        assert all(0 < of_one <= slab for of_one in spent)
        assert all(report["refused"] for report in reports), "a chunk has an end"
        assert max(peaks) <= to_units("5.00")
        assert ledger_sum(client) == others + spent[0] + spent[1]
        assert sums(client)["held"] >= slab, "the chunk of the killed process stays as large as it was"
        assert counted(client) <= to_units("5.00")


def test_the_cap_is_not_exceeded_if_a_process_stalls_until_an_outage_has_ended(own_server):
    """The process has spent its chunk before it stalls; during the stall, another process spends the rest."""
    options = {"url": own_server.url, "limit": "5.00", "slab": "0.40", "seed": random.randrange(2**32)}
    print(f"seed {options['seed']}")
    with workers("prepaid.py", 1, options) as [replica], own_server.client() as client:
        replica.send(do="ready")
        assert replica.receive() == "prepaid"
        own_server.kill()
        replica.send(do="spend", amounts=["0.05"] * 12)
        spent = replica.receive()["spent"]
        replica.pause()
        try:
            own_server.start()
            with BudgetLimiter(own_server.url, BUDGETS) as limiter:
                limiter.reserve("agent", "4.60").commit("4.60")
                with pytest.raises(BudgetExceeded):
                    limiter.reserve("agent", "0.000000001")
            assert counted(client) == to_units("5.00")
        finally:
            replica.resume()
        wait_until(lambda: sums(client)["spent"] == to_units("4.60") + spent)
        assert counted(client) <= to_units("5.00")


async def test_many_tasks_together_spend_no_more_than_the_shared_chunk(own_server):
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
        with own_server.client() as client:
            await until(lambda: sums(client)["spent"] == ledger_sum(client) == 71 * to_units("0.007"))


async def test_all_spend_is_recorded_once_in_a_random_history_with_outages(own_server):
    """The recorded spend equals the sum of all commits, and every reading is at most the cap."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    cap = to_units("5.00")
    spent: dict[str, int] = {}
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
        granted += hold.offline is not None
        await asyncio.sleep(chance.choice([0, 0.01, 0.2]))
        if chance.random() < 0.2:
            await hold.release()
            return
        cost = chance.randrange(1, units + 1)
        await hold.commit(Decimal(cost) / 10**9)
        spent[hold.id] = cost

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
    for limiter in limiters:
        await replies(limiter)
    with own_server.client() as client:
        for limiter in limiters:
            await limiter.close()
        assert granted
        assert refused
        assert sums(client)["spent"] == ledger_sum(client) == sum(spent.values())
        assert sums(client)["held"] == sums(client)["unconfirmed"] == 0


async def test_a_reservation_refused_during_an_outage_does_not_enlarge_the_chunk(proxy, limiter, client):
    proxy.cut()
    with pytest.raises(StoreUnavailable):
        await limiter.reserve("agent", "4.50")
    assert limiter.prepaid == {"agent": Decimal("4.00")}
    proxy.mend()
    await replies(limiter)
    await limiter.reserve("agent", "0.10")  # a round trip after the leases were renewed
    assert limiter.prepaid == {"agent": Decimal("4.00")}
