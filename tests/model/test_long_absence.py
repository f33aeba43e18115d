"""The state after a long time without calls, when windows and records have expired (P5, P7, P11)."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, UnknownHold

from .observed import RawStore

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
DAY_S = 86_400
BUDGETS = [
    Budget("agent", "5.00"),
    Budget("monthly", "5.00", period="month"),
    Budget("lifetime", "5.00", period="ever"),
    Budget("gpu", 2, kind="slots"),
]


@pytest.fixture
async def limiter(clocked_server):
    """A limiter that starts at noon; the clock of its store is frozen."""
    clocked_server.set(NOON, frozen=True)
    async with AsyncBudgetLimiter(clocked_server.url, BUDGETS, timeout=30) as made:
        yield made


def check(server) -> RawStore:
    with server.client() as client:
        store = RawStore(client)
    store.check_it_adds_up()
    store.check_keys_expire()
    return store


async def test_a_slot_held_by_a_dead_worker_is_free_two_months_later(clocked_server, limiter):
    await limiter.reserve("gpu", 1, id="alone")
    await limiter.reserve({"agent": "1.00", "gpu": 1}, id="with_money")
    clocked_server.advance(60 * DAY_S)
    status = await limiter.status("gpu")
    assert (status.held, status.remaining) == (0, 2)
    check(clocked_server)


async def test_an_unconfirmed_hold_of_an_endless_window_can_be_settled_months_later(clocked_server, limiter):
    await limiter.reserve("lifetime", "1.00", id="abandoned")
    clocked_server.advance(200 * DAY_S)
    status = await limiter.status("lifetime")
    assert (status.held, status.unconfirmed) == (0, Decimal("1.00"))
    assert [hold.id for hold in await limiter.holds("lifetime")] == ["abandoned"]
    await limiter.commit("abandoned", "0.25")
    assert (await limiter.status("lifetime")).spent == Decimal("0.25")
    check(clocked_server)


@pytest.mark.parametrize("on_expiry", ["charge", "accrued", "release"])
async def test_if_the_window_of_a_hold_has_expired_a_settlement_does_not_create_the_window_again(
    clocked_server, limiter, on_expiry
):
    await limiter.reserve({"agent": "1.00", "monthly": "1.00", "lifetime": "1.00"}, id="op_1", on_expiry=on_expiry)
    clocked_server.advance(40 * DAY_S)  # the day has expired, the month has not
    expected = Decimal("1.00") if on_expiry == "charge" else 0
    assert (await limiter.status("lifetime")).unconfirmed == expected
    assert set(check(clocked_server).windows) == {"monthly:2026-11", "lifetime:ever"}
    await limiter.commit("op_1", "0.40")
    store = check(clocked_server)
    assert set(store.windows) == {"monthly:2026-11", "lifetime:ever"}
    assert store.sums("monthly:2026-11")["spent"] == 400_000_000


async def test_an_ended_window_and_the_holds_of_the_window_are_deleted_after_the_retention(clocked_server, limiter):
    for number in range(50):
        hold = await limiter.reserve("agent", "0.01", id=f"op_{number}")
        if number % 2:
            await hold.commit("0.01")
    await limiter.record("agent", "0.01", id="spent")
    clocked_server.advance(3600)
    assert (await limiter.status("agent")).unconfirmed == Decimal("0.25")
    clocked_server.advance(40 * DAY_S)
    assert (await limiter.status("agent")).spent == 0
    await (await limiter.reserve("agent", "0.01")).release()
    store = check(clocked_server)
    assert set(store.windows) == {"agent:2027-01-02"}
    assert len(store.holds) == 1
    with clocked_server.client() as client:
        assert client.zcard("ktrdr:{default}:due") == 0


async def test_the_store_deletes_a_settled_hold_one_day_after_the_settlement_and_not_earlier(clocked_server, limiter):
    await limiter.reserve("agent", "1.00", id="open", ttl=DAY_S)
    settled = await limiter.reserve("agent", "1.00", id="settled")
    await settled.commit("1.00")
    clocked_server.advance(DAY_S - 2)
    assert (await limiter.commit("settled", "1.00")).replayed
    clocked_server.advance(4)
    with pytest.raises(UnknownHold):
        await limiter.get("settled")
    assert [hold.state for hold in await limiter.holds("agent")] == ["unconfirmed"]
    clocked_server.advance(30 * DAY_S)
    late = await limiter.commit("open", "0.10")
    assert late.late
    assert not late.replayed
    entries = await limiter.ledger("agent", "2026-11-23")
    assert sum(entry.amount for entry in entries) == Decimal("1.10")
    check(clocked_server)
