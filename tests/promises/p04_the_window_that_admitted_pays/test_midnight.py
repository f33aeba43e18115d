"""Windows follow the store's clock: midnight, DST days, timezones, wrong clocks, late settlements (P4, P8)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from zoneinfo import ZoneInfo

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, HoldConflict
from ktrdr_budget.money import to_units

from ...helpers.keyspace import counted, dump, immortal_keys, ledger_sum, public, sums, window_key
from ...helpers.patience import set_timeout
from ...helpers.processes import workers
from ...helpers.waiting import until

BEFORE = datetime(2026, 11, 23, 23, 59, 50, tzinfo=UTC)
AFTER = datetime(2026, 11, 24, 0, 0, 10, tzinfo=UTC)
MONDAY, TUESDAY = "2026-11-23", "2026-11-24"


def limiter_for(server, *budgets: Budget, **options) -> AsyncBudgetLimiter:
    return AsyncBudgetLimiter(server.url, budgets or [Budget("agent", "5.00")], timeout=10.0, **options)


@pytest.fixture
async def limiter(clocked_server):
    """A limiter that starts shortly before midnight; the clock stands still."""
    clocked_server.set(BEFORE, frozen=True)
    async with limiter_for(clocked_server) as made:
        yield made


@pytest.fixture
def client(clocked_server):
    with clocked_server.client() as made:
        yield made


# -- across midnight ---------------------------------------------------------------------------------------------------


async def test_34733_and_36940_a_commit_after_midnight_counts_in_the_day_of_its_reservation(
    clocked_server, client, limiter
):
    """Windows are never reset, so no reset can erase spend or race with it."""
    await limiter.record("agent", "1.00")
    hold = await limiter.reserve("agent", "0.15")
    clocked_server.set(AFTER, frozen=True)
    await limiter.record("agent", "0.02")
    settlement = await hold.commit("0.07")
    assert (hold.windows, settlement.late) == ({"agent": MONDAY}, False)
    assert sums(client, window=MONDAY) == {"spent": to_units("1.07"), "held": 0, "unconfirmed": 0, "events": 2}
    assert sums(client, window=TUESDAY) == {"spent": to_units("0.02"), "held": 0, "unconfirmed": 0, "events": 1}
    status = await limiter.status("agent")
    assert (status.window, status.spent, status.resets_at) == (TUESDAY, Decimal("0.02"), midnight(25))
    assert [entry.amount for entry in await limiter.ledger("agent", MONDAY)] == [Decimal("0.07"), Decimal("1.00")]


def midnight(day: int) -> datetime:
    return datetime(2026, 11, day, tzinfo=UTC)


async def test_a_commit_by_id_on_another_replica_counts_in_the_day_of_the_reservation(clocked_server, client, limiter):
    await limiter.reserve("agent", "0.15", id="op_1")
    clocked_server.set(AFTER, frozen=True)
    async with limiter_for(clocked_server, Budget("other", "1.00")) as other:
        await other.extend("op_1", 60, accrued="0.03")
        await other.commit("op_1", "0.07")
    assert sums(client, window=MONDAY)["spent"] == to_units("0.07")
    assert client.exists(window_key(client, window=TUESDAY)) == 0


async def test_growth_after_midnight_is_denied_if_the_window_of_the_reservation_has_no_room(
    clocked_server, client, limiter
):
    await limiter.record("agent", "4.50")
    hold = await limiter.reserve("agent", "0.15")
    clocked_server.set(AFTER, frozen=True)
    await hold.grow("0.35")
    with pytest.raises(BudgetExceeded) as denied:
        await hold.grow("0.01")
    assert (denied.value.spent, denied.value.held) == (Decimal("4.50"), Decimal("0.50"))
    assert sums(client, window=MONDAY)["held"] == to_units("0.50")


async def test_a_call_made_before_midnight_and_retried_after_midnight_is_a_replay(clocked_server, client, limiter):
    await limiter.reserve("agent", "0.15", id="op_1")
    await limiter.record("agent", "0.02", id="op_2")
    before = dump(client)
    clocked_server.set(AFTER, frozen=True)
    async with limiter_for(clocked_server) as retrying:
        hold = await retrying.reserve("agent", "0.15", id="op_1")
        assert (hold.replayed, hold.windows, hold.state) == (True, {"agent": MONDAY}, "open")
        assert (await retrying.record("agent", "0.02", id="op_2")).replayed
        with pytest.raises(HoldConflict):
            await retrying.reserve("agent", "0.16", id="op_1")
        assert dump(client) == before
        await hold.commit("0.07")
    assert sums(client, window=MONDAY)["spent"] == to_units("0.09")


@pytest.mark.parametrize("retried_by", ["the same replica", "another replica"])
async def test_a_record_retried_after_midnight_counts_in_the_day_of_its_first_attempt(
    clocked_server, client, limiter, retried_by
):
    async with limiter_for(clocked_server) as other:
        await limiter.record("agent", "0.02", id="op_2")
        if retried_by == "the same replica":
            limiter.engine.state.journal.clear()  # as if the reply had been lost
        clocked_server.set(AFTER, frozen=True)
        retrying = limiter if retried_by == "the same replica" else other
        assert (await retrying.record("agent", "0.02", id="op_2")).replayed
        client.flushall()
        await retrying.record("agent", "0.01")
        assert sums(client, window=MONDAY)["spent"] == to_units("0.02")
        assert sums(client, window=TUESDAY)["spent"] == to_units("0.01")


@pytest.mark.parametrize("settle", ["commit", "release"])
async def test_a_late_settlement_counts_in_the_day_of_the_reservation(clocked_server, client, limiter, settle):
    """Reported for litellm-rs."""
    hold = await limiter.reserve("agent", "0.15", ttl=60)
    clocked_server.set(AFTER + timedelta(hours=30), frozen=True)
    assert (await limiter.status("agent")).unconfirmed == 0
    assert sums(client, window=MONDAY)["unconfirmed"] == to_units("0.15"), "it expired in its own window"
    settlement = await (hold.commit("0.20") if settle == "commit" else hold.release())
    assert settlement.late
    spent = "0.20" if settle == "commit" else "0"
    assert sums(client, window=MONDAY)["spent"] == ledger_sum(client, window=MONDAY) == to_units(spent)
    assert sums(client, window="2026-11-25") == {"spent": 0, "held": 0, "unconfirmed": 0, "events": 0}


async def test_denied_callers_that_retry_until_midnight_are_admitted_in_the_new_window(clocked_server, client):
    clocked_server.set(midnight(24) - timedelta(seconds=0.7))
    async with limiter_for(clocked_server) as limiter, limiter_for(clocked_server) as other:
        await limiter.record("agent", "5.00")
        expiry = {key: client.pexpiretime(key) for key in client.scan_iter("*agent:*")}
        denials: list[BudgetExceeded] = []

        async def retry(replica: AsyncBudgetLimiter):
            while True:
                try:
                    return await replica.reserve("agent", "0.15")
                except BudgetExceeded as denied:
                    denials.append(denied)

        holds = await asyncio.gather(retry(limiter), retry(other))
        assert [hold.windows for hold in holds] == [{"agent": TUESDAY}] * 2
        assert len(denials) > 20
        assert {denied.retry_after for denied in denials} == {1}
        assert {key: client.pexpiretime(key) for key in expiry} == expiry
    assert sums(client, window=MONDAY)["spent"] == to_units("5.00")
    assert sums(client, window=TUESDAY)["held"] == to_units("0.30")


@pytest.mark.parametrize(("before_s", "retry_after"), [(1.2, 2), (0.001, 1), (59.5, 60), (3600, 3600)])
async def test_retry_after_is_the_time_to_the_end_of_the_window_rounded_up_to_seconds(
    clocked_server, before_s, retry_after
):
    clocked_server.set(midnight(24) - timedelta(seconds=before_s), frozen=True)
    async with limiter_for(clocked_server) as limiter:
        await limiter.record("agent", "5.00")
        with pytest.raises(BudgetExceeded) as denied:
            await limiter.reserve("agent", "0.15")
        # A frozen clock moves by some milliseconds; the remaining time is rounded up.
        assert denied.value.retry_after in (retry_after, max(1, retry_after - (before_s == retry_after)))


async def test_a_limit_set_until_the_end_of_the_window_expires_at_midnight(clocked_server, limiter):
    changed = await limiter.set_limit("agent", "6.00", until="window")
    assert (changed.limit, changed.limit_until) == (6, midnight(24))
    await limiter.reserve("agent", "5.50")
    clocked_server.set(AFTER, frozen=True)
    assert (await limiter.status("agent")).limit == 5
    with pytest.raises(BudgetExceeded):
        await limiter.reserve("agent", "5.50")


async def test_deferred_spend_counts_in_the_day_of_the_call_if_the_store_returns_on_the_next_day(
    start_clocked_server: Callable,
):
    """Policy `allow` defers the spend, and the store returns after midnight."""
    server = start_clocked_server(None, "--appendonly", "yes")
    server.set(BEFORE)
    async with limiter_for(server, on_store_error="allow") as limiter:
        set_timeout(limiter, 0.2)
        before = await limiter.reserve("agent", "1.00")
        server.kill()
        during = await limiter.reserve("agent", "0.15")
        assert (during.cap_checked, during.windows) == (False, {"agent": MONDAY})
        assert (await limiter.record("agent", "0.02")).deferred
        assert (await during.commit("0.07")).deferred
        assert (await before.commit("0.90")).deferred
        server.offset_s += 60
        server.start()
        await until(lambda: limiter.deferred == 0)
        assert (await limiter.status("agent")).window == TUESDAY
        with server.client() as client:
            expected = {"spent": to_units("0.99"), "held": 0, "unconfirmed": 0, "events": 3}
            assert sums(client, window=MONDAY) == expected
            assert ledger_sum(client, window=MONDAY) == to_units("0.99")
            assert sums(client, window=TUESDAY)["spent"] == 0
    server.kill()


# -- the longest life of a hold; retention -----------------------------------------------------------------------------


async def test_a_hold_cannot_be_extended_beyond_a_day_after_its_reservation(clocked_server, client, limiter):
    hold = await limiter.reserve("agent", "0.15", ttl=86_400, id="op_1")
    born = clocked_server.now()
    clocked_server.advance(86_400 - 60)
    await hold.extend(900)
    assert abs(hold.expires_at - born - timedelta(days=1)) < timedelta(seconds=1)
    await hold.extend(86_400)
    assert abs(hold.expires_at - born - timedelta(days=1)) < timedelta(seconds=1)
    clocked_server.advance(61)
    with pytest.raises(HoldConflict):
        await hold.extend()
    assert (await limiter.get("op_1")).state == "unconfirmed"
    assert (await hold.commit("0.07")).late
    assert sums(client, window=MONDAY)["spent"] == to_units("0.07")


async def test_all_keys_of_a_day_are_deleted_after_the_retention_period(clocked_server, client, limiter):
    await limiter.record("agent", "0.02")
    await limiter.reserve("agent", "0.15", ttl=60)
    await (await limiter.reserve("agent", "0.15")).commit("0.07")
    clocked_server.set(midnight(24) + timedelta(days=35, hours=23), frozen=True)
    async with limiter_for(clocked_server) as later:
        assert [entry.kind for entry in await later.ledger("agent", MONDAY)][-1] == "record"
        assert sums(client, window=MONDAY)["spent"] == to_units("0.09")
        clocked_server.advance(3601)
        await later.record("agent", "0.01")
        await until(lambda: not client.zcard("ktrdr:{default}:due"))
    names = {key.split("}:")[1] for key in client.scan_iter()}
    assert not any(MONDAY in name for name in names)


# -- timezones and DST -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "timezone",
    ["UTC", "America/New_York", "Asia/Kathmandu", "America/St_Johns", "Pacific/Kiritimati", "Pacific/Pago_Pago"],
)
async def test_a_day_ends_at_midnight_in_the_timezone_of_the_budget(clocked_server, client, timezone):
    zone = ZoneInfo(timezone)
    end = datetime(2026, 11, 24, tzinfo=zone)
    clocked_server.set(end - timedelta(seconds=1), frozen=True)
    async with limiter_for(clocked_server, Budget("agent", "5.00", timezone=timezone)) as limiter:
        hold = await limiter.reserve("agent", "5.00")
        status = await limiter.status("agent")
        assert (hold.windows, status.window) == ({"agent": MONDAY}, MONDAY)
        assert (status.starts_at, status.resets_at) == (datetime(2026, 11, 23, tzinfo=zone), end)
        clocked_server.advance(1.5)
        assert (await limiter.reserve("agent", "5.00")).windows == {"agent": TUESDAY}
        await hold.commit("0.07")
        assert sums(client, window=MONDAY)["spent"] == to_units("0.07")


@pytest.mark.parametrize(
    ("timezone", "day", "hours"),
    [
        ("Europe/Berlin", date(2026, 3, 29), 23),
        ("Europe/Berlin", date(2026, 10, 25), 25),
        ("America/New_York", date(2026, 3, 8), 23),
        ("America/New_York", date(2026, 11, 1), 25),
        ("Australia/Lord_Howe", date(2026, 4, 5), 24.5),
        ("America/Havana", date(2026, 3, 8), 23),  # its clocks skip midnight
        ("America/Havana", date(2026, 11, 1), 25),  # its clocks repeat the hour after midnight
    ],
    ids=str,
)
async def test_a_day_with_a_dst_change_is_one_window(clocked_server, client, timezone, day, hours):
    clocked_server.set(datetime(day.year, day.month, day.day, 12, tzinfo=ZoneInfo(timezone)), frozen=True)
    async with limiter_for(clocked_server, Budget("agent", "5.00", timezone=timezone)) as limiter:
        status = await limiter.status("agent")
        assert (status.window, status.resets_at - status.starts_at) == (day.isoformat(), timedelta(hours=hours))
        for instant in (status.starts_at, status.resets_at - timedelta(seconds=1)):
            clocked_server.set(instant, frozen=True)
            await limiter.record("agent", "2.50")
        with pytest.raises(BudgetExceeded) as denied:
            await limiter.reserve("agent", "0.01")
        assert denied.value.spent == 5
        for instant in (status.starts_at - timedelta(seconds=1), status.resets_at):
            clocked_server.set(instant, frozen=True)
            assert day.isoformat() not in (await limiter.reserve("agent", "0.01")).windows.values()


async def test_the_repeated_hour_of_a_dst_day_is_two_windows(clocked_server, client):
    """Half past two comes twice; hours are named by their start in UTC."""
    zone = ZoneInfo("Europe/Berlin")
    twice = [datetime(2026, 10, 25, 2, 30, fold=fold, tzinfo=zone) for fold in (0, 1)]
    async with limiter_for(clocked_server, Budget("agent", "1.00", period="hour", timezone="Europe/Berlin")) as limiter:
        for instant in twice:
            clocked_server.set(instant.astimezone(UTC), frozen=True)
            await limiter.reserve("agent", "1.00")
            with pytest.raises(BudgetExceeded):
                await limiter.reserve("agent", "0.01")
    windows = ("2026-10-25T00Z", "2026-10-25T01Z")
    assert [counted(client, window=window) for window in windows] == [to_units("1.00")] * 2


@pytest.mark.parametrize(
    ("period", "before", "windows"),
    [
        ("hour", datetime(2026, 11, 23, 14, 59, 59, tzinfo=UTC), ("2026-11-23T14Z", "2026-11-23T15Z")),
        ("week", datetime(2027, 1, 3, 23, 59, 59, tzinfo=UTC), ("2026-W53", "2027-W01")),
        ("month", datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC), ("2026-12", "2027-01")),
        ("month", datetime(2028, 2, 29, 23, 59, 59, tzinfo=UTC), ("2028-02", "2028-03")),
        ("ever", datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC), ("ever", "ever")),
    ],
)
async def test_a_new_window_starts_at_the_boundary_of_each_period(clocked_server, client, period, before, windows):
    clocked_server.set(before, frozen=True)
    budgets = [Budget("agent", "1.00", period=period), Budget("team", "1.00", period="ever")]
    async with limiter_for(clocked_server, *budgets) as limiter:
        hold = await limiter.reserve({"agent": "0.60", "team": "0.10"})
        assert hold.windows == {"agent": windows[0], "team": "ever"}
        clocked_server.advance(1.5)
        if period == "ever":
            with pytest.raises(BudgetExceeded) as denied:
                await limiter.reserve("agent", "0.60")
            assert denied.value.retry_after is not None, "the time to the deadline of the open hold"
            assert (await limiter.status("agent")).resets_at is None
        else:
            assert (await limiter.reserve("agent", "0.60")).windows == {"agent": windows[1]}
        await hold.commit("0.07")
        assert sums(client, window=windows[0])["spent"] == to_units("0.07")
        assert (await limiter.status("team")).spent == Decimal("0.07")


# -- wrong clocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("wrong_by", ["+26h", "-26h"])
def test_spend_of_a_replica_with_a_wrong_clock_counts_in_the_current_day_of_the_store(
    clocked_server, client, wrong_by, started
):
    """The store's clock decides, whether the clock of the replica is a day ahead or behind."""
    library = clocked_server.environment["LD_PRELOAD"].split(":")[0]
    environment = {"LD_PRELOAD": library, "FAKETIME": wrong_by, "DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}
    environment["FAKETIME_DONT_FAKE_MONOTONIC"] = "1"
    options = {"url": clocked_server.url, "budget": "agent", "timezone": "Asia/Kathmandu", "started": started}
    with workers("clock.py", 1, options, environment) as [replica]:
        replica.send(go=True)
        report = replica.receive()
    now = clocked_server.now()
    today = f"{now.astimezone(ZoneInfo('Asia/Kathmandu')):%Y-%m-%d}"
    assert report["own_date"] != f"{now:%Y-%m-%d}", "the clock of the replica is wrong"
    assert (report["window"], report["status_window"], report["spent"]) == (today, today, "0.09")
    assert abs(datetime.fromisoformat(report["as_of"]) - now) < timedelta(seconds=30)
    assert [public(key.rpartition(":")[2]) for key in client.scan_iter("*:w:*")] == [today]


# -- expired windows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settle", ["release", "commit"])
@pytest.mark.parametrize("days", [36, 37, 38, 45])
async def test_if_the_window_of_a_hold_has_expired_a_settlement_does_not_create_the_window_again(
    clocked_server, client, days, settle
):
    """The settling replica lacks the hourly budget, so it does not know when the window of that budget expires (P7)."""
    both = [Budget("hourly", "5.00", period="hour"), Budget("monthly", "5.00", period="month")]
    clocked_server.set(datetime(2026, 11, 2, 12, 30, tzinfo=UTC), frozen=True)
    async with limiter_for(clocked_server, *both) as maker:
        await maker.reserve({"hourly": "1.00", "monthly": "1.00"}, id="op_1")
    clocked_server.advance(days * 86_400)
    async with limiter_for(clocked_server, both[1]) as stranger:
        if settle == "release":
            await stranger.release("op_1")
        else:
            await stranger.commit("op_1", "0.25")
        assert immortal_keys(client) == []
        lifetime_ms = 3 * 86_400_000
        for key in client.scan_iter("*:hourly:*"):
            assert 0 < client.pttl(key) < lifetime_ms, key
        assert not list(client.scan_iter("*:hourly:*")) or days < 38
        (key,) = client.scan_iter("*:w:monthly:2026-11*")
        assert int(client.hget(key, "spent") or 0) == (0 if settle == "release" else to_units("0.25"))
