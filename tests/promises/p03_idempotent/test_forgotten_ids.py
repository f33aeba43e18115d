"""The store forgets only settled ids, after 24 h; a later retry charges nothing twice (P3)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, UnknownHold
from ktrdr_budget.engine.replica import journal

from ...helpers.keyspace import ledger_sum, sums
from ...helpers.waiting import until

BUDGETS = [Budget("agent", "5.00"), Budget("ever", "5.00", period="ever"), Budget("jobs", 3, kind="slots")]
HOUR_S = 3600
DAY_MS = 86_400_000


@pytest.fixture
async def limiter(clocked_server) -> AsyncIterator[AsyncBudgetLimiter]:
    async with AsyncBudgetLimiter(clocked_server.url, BUDGETS, timeout=20) as made:
        yield made


@pytest.fixture
async def other(clocked_server) -> AsyncIterator[AsyncBudgetLimiter]:
    async with AsyncBudgetLimiter(clocked_server.url, BUDGETS, timeout=20) as made:
        yield made


@pytest.fixture
def client(clocked_server):
    with clocked_server.client() as made:
        yield made


async def check_unknown(call, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    with pytest.raises(UnknownHold):
        await call
    assert "commit of hold op_1 not recorded: unknown hold" in caplog.text


@pytest.mark.parametrize("loss", [False, True])
async def test_a_committed_hold_is_not_charged_again_after_its_id_has_expired_in_the_store(
    clocked_server, limiter, other, client, caplog, loss
):
    hold = await limiter.reserve({"ever": "0.15", "jobs": 1}, id="op_1")
    await other.commit("op_1", "0.10")
    if loss:  # the hold was granted in an earlier epoch than the one in which its id is forgotten
        client.flushall()
        for replica in (other, limiter):
            await replica.status("ever")
    clocked_server.advance(25 * HOUR_S)
    assert client.exists(limiter.keys.hold("op_1")) == 0
    await check_unknown(hold.commit("0.10"), caplog)
    await check_unknown(hold.commit("0.12"), caplog)
    await check_unknown(limiter.commit("op_1", "0.10"), caplog)
    status = await limiter.status("ever")
    assert (status.spent, status.held, status.events) == (Decimal("0.10"), 0, 1)


async def test_a_commit_is_refused_if_the_record_of_its_hold_was_deleted(limiter, client, caplog):
    hold = await limiter.reserve("agent", "0.15", id="op_1")
    client.delete(limiter.keys.hold("op_1"))
    await check_unknown(hold.commit("0.07"), caplog)
    assert "{'agent': Decimal('0.07')}" in caplog.text
    assert sums(client)["spent"] == 0


async def test_an_unconfirmed_hold_can_be_committed_after_30_days(clocked_server, limiter, client):
    window = (await limiter.status("agent")).window
    hold = await limiter.reserve({"agent": "0.15", "ever": "0.15"}, id="op_1", ttl=60)
    daily = await limiter.reserve("agent", "0.20", id="op_2", ttl=60)
    clocked_server.advance(30 * 24 * HOUR_S)
    for late, amount in ((hold, "0.07"), (daily, "0.10")):
        assert (await late.commit(amount)).late
    assert sums(client, "agent", window)["spent"] == 170_000_000
    assert (await limiter.status("ever")).spent == Decimal("0.07")


@pytest.mark.parametrize("loss", [False, True])
@pytest.mark.parametrize("budget", ["agent", "ever"])
async def test_the_record_of_an_unsettled_hold_expires_no_earlier_than_the_window_of_the_hold(
    clocked_server, limiter, other, client, budget, loss
):
    async def kept(name: str, ttl: float = 60):
        return await limiter.reserve(
            {budget: "0.15", "jobs": 1} if name == "slot" else {budget: "0.15"}, id=name, ttl=ttl
        )

    await kept("open")
    await (await kept("extended")).extend(7200)
    await (await kept("grown")).grow("0.05")
    revived = await kept("revived", 1)
    await kept("expired", 1)
    by_hand = await kept("by_hand", 1)
    clocked_server.advance(2)

    async def expired() -> bool:
        return (await other.status(budget)).unconfirmed == Decimal("0.45")

    await until(expired)
    await revived.extend(3600)
    await other.release("by_hand", operator=True)
    await kept("released_open")
    await other.release("released_open", operator=True)
    if loss:
        client.flushall()
        for replica in (other, limiter):
            await replica.status(budget)
    names = ["open", "extended", "grown", "revived", "expired", "by_hand", "released_open"]
    records = client.mget([limiter.keys.hold(name) for name in names])
    assert [record[0] for record in records] == ["o", "o", "o", "o", "x", "z", "z"]
    now_ms = int(clocked_server.now().timestamp() * 1000)
    lives_ms = [client.pexpiretime(limiter.keys.hold(name)) - now_ms for name in names]
    least_ms = 36 * DAY_MS if budget == "ever" else client.pexpiretime(
        *client.scan_iter(limiter.keys.window(budget, "*"))
    ) - now_ms  # fmt: skip
    assert min(lives_ms) >= least_ms - 60_000, dict(zip(names, lives_ms, strict=True))
    if budget == "ever":
        assert min(lives_ms[:4]) > 3650 * DAY_MS - 60_000, "only the record has the amounts that a release gives back"
    assert (await by_hand.commit("0.07")).late


async def test_after_a_data_loss_a_hold_that_is_more_than_a_day_old_is_restored(clocked_server, limiter, client):
    """The journal keeps each hold that the store still has, whatever its age."""
    await limiter.reserve("ever", "0.15", id="op_1", ttl=60)
    for _ in range(3):
        clocked_server.advance(9 * HOUR_S)
        await limiter.status("ever")
        await limiter.engine.dispatcher.repair.check_holds()
    client.flushall()
    status = await limiter.status("ever")
    assert (status.held, status.unconfirmed) == (0, Decimal("0.15"))
    assert (await limiter.commit("op_1", "0.07")).late


async def test_a_commit_is_recorded_although_the_store_and_the_journal_no_longer_have_its_hold(
    limiter, client, monkeypatch
):
    monkeypatch.setattr(journal, "HOLDS_MAX", 2)
    holds = [await limiter.reserve("agent", "0.15", id=f"op_{number}") for number in range(5)]
    client.flushall()
    assert (await limiter.status("agent")).held < Decimal("0.75")
    for hold in holds:
        assert (await hold.commit("0.07")).amounts == {"agent": Decimal("0.07")}
        assert (await hold.commit("0.07")).replayed
    assert (await limiter.status("agent")).spent == Decimal("0.35")
    assert ledger_sum(client) == 350_000_000
