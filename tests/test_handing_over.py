"""Policy `lease`: holds that were granted without the store become ordinary holds of it, and slabs only ever shrink."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, HoldConflict, StoreUnavailable, UnknownHold
from ktrdr_budget.engine.outage import prepaid as prepaid_module
from ktrdr_budget.engine.protocol import Op
from ktrdr_budget.errors import StoreError
from ktrdr_budget.money import to_units

from .helpers.keyspace import counted, immortal_keys, ledger_sum, sums
from .helpers.patience import away
from .helpers.proxy import Proxy
from .helpers.waiting import until

BUDGETS = [Budget("agent", "5.00")]
WITHIN_S = 15.0


@pytest.fixture
async def proxy(server, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Proxy]:
    async with Proxy(server.socket_path, Path(tmp_path_factory.mktemp("p")) / "s") as made:
        yield made


@pytest.fixture
async def limiter(proxy: Proxy) -> AsyncIterator[AsyncBudgetLimiter]:
    async with AsyncBudgetLimiter(
        proxy.url, BUDGETS, timeout=0.3, on_store_error="lease", lease_slab={"agent": "4.00"}
    ) as made:
        await prepaid(made)
        yield made


@pytest.fixture
async def other(server) -> AsyncIterator[AsyncBudgetLimiter]:
    """Another replica, whose store is not away."""
    async with AsyncBudgetLimiter(server.url, BUDGETS) as made:
        yield made


@pytest.fixture
def client(server):
    with server.client() as made:
        yield made


async def prepaid(limiter: AsyncBudgetLimiter) -> None:
    await until(lambda: limiter.prepaid.get("agent"), WITHIN_S)


async def told(limiter: AsyncBudgetLimiter) -> None:
    """The store answers, and has heard of everything."""
    await until(lambda: limiter.store_state == "closed" and not limiter.deferred, WITHIN_S)


def silence(limiter: AsyncBudgetLimiter) -> None:
    """Nothing that waits is told, until :func:`speak`."""
    limiter._coalescer._backlog._ended = True


def speak(limiter: AsyncBudgetLimiter) -> None:
    limiter._coalescer._backlog._ended = False
    limiter._coalescer._backlog.hasten()


# -- slabs -------------------------------------------------------------------------------------------------------------


async def test_a_slab_that_the_store_takes_for_larger_than_it_is_does_not_grow(proxy, limiter, client):
    """It is told of what was spent only after the next slab was asked for: what fits then is another slab."""
    proxy.cut()
    await (await limiter.reserve("agent", "2.50")).commit("2.50")
    silence(limiter)
    proxy.mend()
    await until(lambda: limiter.prepaid == {"agent": Decimal("2.50")}, WITHIN_S)
    assert sums(client)["held"] == to_units("5.00"), "1.50 are left of one slab, and 1.00 are another"
    speak(limiter)
    await told(limiter)
    assert sums(client)["spent"] == to_units("2.50")
    await until(lambda: sums(client)["held"] == to_units(limiter.prepaid["agent"]), WITHIN_S)
    assert counted(client) <= to_units("5.00")
    proxy.cut()
    spent = Decimal("2.50")
    with pytest.raises(StoreUnavailable):
        while True:
            await (await limiter.reserve("agent", "0.25")).commit("0.25")
            spent += Decimal("0.25")
    proxy.mend()
    await told(limiter)
    assert sums(client)["spent"] == ledger_sum(client) == to_units(spent) <= to_units("5.00")


async def test_each_of_two_slabs_is_drawn_from_without_giving_up_the_other(proxy, limiter):
    proxy.cut()
    await (await limiter.reserve("agent", "2.50")).commit("2.50")
    silence(limiter)
    proxy.mend()
    await until(lambda: limiter.prepaid == {"agent": Decimal("2.50")}, WITHIN_S)
    proxy.cut()
    for amount in ("1.20", "0.90", "0.30", "0.10"):
        await limiter.reserve("agent", amount)
    assert limiter.prepaid == {"agent": 0}
    proxy.mend()
    speak(limiter)


async def test_what_the_store_refuses_to_record_leaves_the_slab_as_large_as_it_was(proxy, limiter, client, monkeypatch):
    proxy.cut()
    refused = await limiter.reserve("agent", "0.50", id="refused")
    await refused.commit("0.50")
    await (await limiter.reserve("agent", "0.30")).commit("0.30")
    backlog = limiter._coalescer._backlog
    tell = backlog._tell

    async def refuse(ops: list[Op]):
        if any(op.id == "refused" for op in ops):
            raise StoreError("WRONGTYPE, for one")
        return await tell(ops)

    monkeypatch.setattr(backlog, "_tell", refuse)
    proxy.mend()
    await until(lambda: sums(client)["spent"] == to_units("0.30"), WITHIN_S)
    await until(lambda: limiter.deferred == 3, WITHIN_S)
    assert sums(client)["held"] == to_units("4.00"), "neither the slab's rest then, nor that of later, is told"
    monkeypatch.setattr(backlog, "_tell", tell)
    await told(limiter)
    assert sums(client)["spent"] == to_units("0.80")
    assert sums(client)["held"] == to_units(limiter.prepaid["agent"])


async def test_a_lost_store_is_told_of_what_is_left_of_a_slab(proxy, limiter, client):
    proxy.cut()
    await (await limiter.reserve("agent", "2.00")).commit("2.00")
    proxy.mend()
    await told(limiter)
    limiter._core.prepaid.tell_left = lambda: None  # it is remembered, whatever else is told
    client.flushall()
    await until(lambda: limiter.repaired.holds, WITHIN_S)
    await until(lambda: sums(client)["held"] == to_units("2.00"), WITHIN_S)
    assert sums(client)["spent"] == to_units("2.00")


async def test_a_store_that_went_back_to_a_larger_slab_is_told_what_is_left(start_server, tmp_path_factory):
    """The snapshot knows the whole slab, which nothing that is told in a repair makes smaller."""
    own_server = start_server()
    async with Proxy(own_server.socket_path, Path(tmp_path_factory.mktemp("p")) / "s") as proxy:
        async with AsyncBudgetLimiter(
            proxy.url, BUDGETS, timeout=0.3, on_store_error="lease", lease_slab={"agent": "4.00"}
        ) as limiter:
            await prepaid(limiter)
            with own_server.client() as client:
                client.save()
            proxy.cut()
            await (await limiter.reserve("agent", "2.00")).commit("2.00")
            proxy.mend()
            await told(limiter)
            own_server.kill()
            own_server.start()
            await until(lambda: limiter.losses, WITHIN_S)
            with own_server.client() as client:
                await until(lambda: sums(client)["spent"] == to_units("2.00"), WITHIN_S)
                await until(lambda: sums(client)["held"] == to_units("2.00"), WITHIN_S)
    own_server.kill()


async def test_nothing_is_granted_while_too_much_is_to_be_told(proxy, limiter, monkeypatch):
    """Spend must never be dropped for want of memory: its slab would be told to be smaller all the same."""
    monkeypatch.setattr(prepaid_module, "_TO_BE_TOLD_MAX", 1)
    proxy.cut()
    await (await limiter.reserve("agent", "0.10")).commit("0.10")
    assert limiter.deferred == 2
    with pytest.raises(StoreUnavailable):
        await limiter.reserve("agent", "0.10")
    with pytest.raises(StoreUnavailable):
        await limiter.record("agent", "0.10")
    proxy.mend()
    await told(limiter)
    assert (await limiter.reserve("agent", "0.10")).prepaid is None


# -- holds -------------------------------------------------------------------------------------------------------------


async def test_an_open_hold_is_an_ordinary_one_once_the_store_is_back(proxy, limiter, other, client):
    proxy.cut()
    hold = await limiter.reserve("agent", "1.00", id="op_1", ttl=60, operation="chat", owner="me")
    hold.accrue("0.20")
    await hold.grow("0.50")
    with pytest.raises(UnknownHold):
        await other.get("op_1")
    proxy.mend()
    await told(limiter)
    await until(lambda: sums(client)["held"] == to_units("4.00"), WITHIN_S)
    view = await other.get("op_1")
    assert (view.state, view.amounts, view.accrued, view.owner, view.operation) == (
        "open", {"agent": Decimal("1.50")}, {"agent": Decimal("0.20")}, "me", "chat",
    )  # fmt: skip
    assert immortal_keys(client) == []
    assert (await other.reserve("agent", "1.00", id="op_1")).replayed
    assert (await limiter.reserve("agent", "1.00", id="op_1")).replayed
    with pytest.raises(HoldConflict):
        await limiter.reserve("agent", "1.50", id="op_1")
    await hold.extend()
    await hold.grow("0.10")
    assert (await other.get("op_1")).amounts == {"agent": Decimal("1.60")}
    assert not (await hold.commit("0.70")).deferred
    assert sums(client)["spent"] == ledger_sum(client) == to_units("0.70")
    assert (await other.commit("op_1", "0.70")).replayed


@pytest.mark.parametrize(("policy", "counts"), [("charge", "1.00"), ("accrued", "0.20"), ("release", "0")])
async def test_a_hold_that_was_walked_away_from_expires_by_its_policy(proxy, limiter, other, client, policy, counts):
    """During the outage; what it gives back can be granted again there."""
    proxy.cut()
    hold = await limiter.reserve("agent", "1.00", id="op_1", ttl=1, on_expiry=policy)
    hold.accrue("0.20")
    await until(lambda: limiter.prepaid == {"agent": Decimal("4.00") - Decimal(counts)}, WITHIN_S)
    await until(lambda: _state_of(limiter, "op_1", "unconfirmed"), WITHIN_S)
    rest = await limiter.reserve("agent", limiter.prepaid["agent"], id="rest")
    with pytest.raises(StoreUnavailable):
        await limiter.reserve("agent", "0.01")
    proxy.mend()
    await told(limiter)
    assert sums(client)["unconfirmed"] == to_units(counts)
    held = sum(rest.amounts.values())
    await until(lambda: sums(client)["held"] == to_units(held + limiter.prepaid["agent"]), WITHIN_S)
    assert counted(client) <= to_units("5.00")
    assert (await other.get("op_1")).state == "unconfirmed"
    await rest.release()
    late = await hold.commit("0.40")
    assert late.late
    assert sums(client)["spent"] == ledger_sum(client) == to_units("0.40")
    assert sums(client)["unconfirmed"] == 0


async def _state_of(limiter: AsyncBudgetLimiter, hold_id: str, state: str) -> bool:
    return (await limiter.get(hold_id)).state == state


async def test_a_heartbeat_without_the_store_prolongs(proxy, limiter, other):
    proxy.cut()
    async with limiter.hold("agent", "1.00", id="op_1", ttl=1) as hold:
        first = hold.expires_at
        await until(lambda: hold.expires_at.timestamp() > first.timestamp() + 1.2, WITHIN_S)
        assert (await limiter.get("op_1")).state == "open"
        proxy.mend()
        await told(limiter)
        assert (await other.get("op_1")).state == "open"


async def test_a_hold_is_settled_before_the_store_has_heard_of_it(proxy, limiter, other, client):
    proxy.cut()
    committed, released, extended = [
        await limiter.reserve("agent", "0.50", id=name) for name in ("committed", "released", "extended")
    ]
    silence(limiter)
    proxy.mend()
    await until(lambda: limiter.store_state == "closed", WITHIN_S)
    limiter._core.prepaid.hand_over()
    await committed.commit("0.20")
    await released.release()
    await extended.extend(60)
    assert (await other.get("extended")).state == "open"
    speak(limiter)
    await told(limiter)
    assert sums(client)["spent"] == to_units("0.20")
    assert sums(client)["held"] == to_units("0.50") + to_units(limiter.prepaid["agent"])
    assert [(await other.get(name)).state for name in ("committed", "released", "extended")] == [
        "committed", "released", "open",
    ]  # fmt: skip


async def test_the_same_id_is_granted_once_though_the_store_is_back(proxy, limiter, other, client):
    proxy.cut()
    names = ("open", "committed", "released")
    holds = {name: await limiter.reserve("agent", "0.50", id=name) for name in names}
    await holds["committed"].commit("0.20")
    await holds["released"].release()
    silence(limiter)
    proxy.mend()
    await until(lambda: limiter.store_state == "closed", WITHIN_S)
    for state in ("not told", "told"):
        for name in names:
            again = await limiter.reserve("agent", "0.50", id=name)
            assert (again.replayed, again.state) == (True, name), state
            with pytest.raises(HoldConflict):
                await limiter.reserve("agent", "0.60", id=name)
        speak(limiter)
        await told(limiter)
    assert sums(client)["spent"] == to_units("0.20")
    assert sums(client)["held"] == to_units("0.50") + to_units(limiter.prepaid["agent"])


async def test_a_reservation_that_had_arrived_is_the_hold_that_is_handed_over(proxy, limiter, other, client):
    proxy.hold_replies()
    hold = await limiter.reserve("agent", "0.50", id="op_1")
    assert hold.prepaid is not None
    await hold.grow("0.10")
    proxy.release_replies()
    await told(limiter)
    await until(lambda: sums(client)["held"] == to_units("4.00"), WITHIN_S)
    assert (await other.get("op_1")).amounts == {"agent": Decimal("0.60")}
    await hold.commit("0.40")
    assert sums(client)["spent"] == to_units("0.40")


async def test_a_cancelled_caller_leaves_nothing_and_may_try_again(proxy, limiter, client):
    """His grant was prepaid, and his request is lost, or arrives very late."""
    proxy.fate = lambda: "request"
    with away(proxy.url):
        task = asyncio.create_task(limiter.reserve("agent", "0.50", id="mine"))
        await until(lambda: proxy.requests_lost, WITHIN_S)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await until(lambda: limiter.unresolved, WITHIN_S)
        assert limiter.prepaid == {"agent": Decimal("4.00")}
    proxy.fate = lambda: None
    await until(lambda: limiter.store_state == "closed" and not limiter.unresolved, WITHIN_S)
    assert sums(client)["held"] == to_units("4.00")
    again = await limiter.reserve("agent", "0.50", id="mine")
    assert (again.replayed, again.state) == (False, "open")
    assert sums(client)["held"] == to_units("4.50")


async def test_closing_makes_open_holds_the_stores(proxy, limiter, other, client):
    proxy.cut()
    await limiter.reserve("agent", "0.50", id="op_1", ttl=60, on_expiry="release")
    proxy.mend()
    await until(lambda: limiter.store_state == "closed", WITHIN_S)
    await limiter.close()
    assert (await other.get("op_1")).on_expiry == "release"
    assert sums(client)["held"] == to_units("0.50")


async def test_by_id_what_this_replica_was_granted_before_is_settled_without_the_store(proxy, limiter, client):
    committed, _, _ = [await limiter.reserve("agent", "0.20", id=name) for name in ("commits", "releases", "accrues")]
    await limiter.extend("accrues", accrued="0.05")
    proxy.cut()
    assert (await limiter.commit("commits", "0.15")).deferred
    assert (await limiter.release("releases")).deferred
    assert (await limiter.commit("accrues")).amounts == {"agent": Decimal("0.05")}
    with pytest.raises(StoreUnavailable):
        await limiter.commit("of_somebody_else", "0.15")
    proxy.mend()
    await told(limiter)
    assert sums(client)["spent"] == to_units("0.20")
    assert sums(client)["held"] == to_units(limiter.prepaid["agent"])
    assert (await committed.commit("0.15")).replayed


# -- the script --------------------------------------------------------------------------------------------------------


async def hand_over(
    limiter: AsyncBudgetLimiter, hold_id: str, deadline_ms: int, amounts: str, policy: str = "c"
) -> str:
    window = limiter._core.session.current_window("agent")
    head = f"P {hold_id} {policy} {deadline_ms} {limiter._core.session.now_ms() * 1000} - - -"
    op = Op(hold_id, limiter.keys.hold(hold_id), head, [(window, f":{amounts}")])

    def flow():
        line, _ = yield op
        return line

    return await limiter._coalescer.submit(flow(), "test")


async def test_handing_over_can_be_repeated_and_changes_nothing_that_is_settled(other, client):
    await other.record("agent", 0)
    later_ms = other._core.session.now_ms() + 60_000
    for _ in range(2):
        assert await hand_over(other, "op_1", later_ms, "100:150:20") == "g"
        assert sums(client)["held"] == 150
    assert (await other.reserve("agent", Decimal(100) / 10**9, id="op_1")).replayed
    assert await hand_over(other, "op_1", later_ms, "100:170:180") == "g"
    assert sums(client)["held"] == 180
    await other.commit("op_1", Decimal(90) / 10**9)
    assert await hand_over(other, "op_1", later_ms, "100:170:180") == "p"
    assert sums(client) == {"spent": 90, "held": 0, "unconfirmed": 0, "events": 2}
    assert immortal_keys(client) == []


@pytest.mark.parametrize(("policy", "counts"), [("c", 150), ("a", 20), ("r", 0)])
async def test_handing_over_what_has_expired_makes_it_unconfirmed(other, client, policy, counts):
    await other.record("agent", 0)
    past_ms = other._core.session.now_ms() - 1000
    assert await hand_over(other, "op_1", past_ms, "100:150:20", policy) == "g"
    assert (sums(client)["held"], sums(client)["unconfirmed"]) == (0, counts)
    assert (await other.get("op_1")).state == "unconfirmed"
    assert await hand_over(other, "op_1", past_ms, "100:150:20", policy) == "p"
    later_ms = other._core.session.now_ms() + 60_000
    assert await hand_over(other, "op_1", later_ms, "100:150:20", policy) == "g"
    assert (sums(client)["held"], sums(client)["unconfirmed"]) == (150, 0)
    assert ledger_sum(client) == 0
    assert immortal_keys(client) == []


async def test_midnight_comes_before_the_store_is_told(clocked_server):
    clocked_server.set(datetime(2026, 11, 23, 23, 59, 57, tzinfo=UTC))
    async with AsyncBudgetLimiter(
        clocked_server.url, BUDGETS, timeout=0.3, on_store_error="lease", lease_slab={"agent": "4.00"}
    ) as limiter:
        await prepaid(limiter)
        clocked_server.pause()
        try:
            await limiter.reserve("agent", "0.10", id="op_1", ttl=60)
            await until(lambda: limiter._session.now_ms() >= 1_795_478_400_000)
        finally:
            clocked_server.resume()
        await told(limiter)
        with clocked_server.client() as client:
            await until(lambda: sums(client, window="2026-11-23")["held"] == to_units("0.10"), WITHIN_S)
        assert (await limiter.get("op_1")).windows == {"agent": "2026-11-23"}
        await limiter.commit("op_1", "0.05")
        with clocked_server.client() as client:
            assert sums(client, window="2026-11-23")["spent"] == to_units("0.05")
