"""The first use of a budget registers its definition (unit, kind, period, timezone); a migration replaces it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial

import pytest

from ktrdr_budget import (
    AsyncBudgetLimiter,
    Budget,
    BudgetExceeded,
    BudgetLimiter,
    BudgetMismatch,
    BudgetTracker,
    DefinitionConflict,
    StoreError,
    StoreUnavailable,
)
from ktrdr_budget.audit import verify
from ktrdr_budget.engine.replica import state as session
from ktrdr_budget.money import to_units
from ktrdr_budget.telemetry.metrics import LimiterMetrics

from ...helpers.keyspace import counted, dump, immortal_keys, sums, window_key
from ...helpers.patience import set_timeout
from ...helpers.waiting import until

OTHER = Budget("other", "1.00")
WEEK = Budget("agent", 5, period="week")
SUNDAY_NIGHT = datetime(2026, 11, 29, 23, 30, tzinfo=UTC)
LAST_NIGHT_OF_THE_MONTH = datetime(2026, 11, 30, 23, 30, tzinfo=UTC)
MONDAY_NIGHT = datetime(2026, 11, 23, 23, 30, tzinfo=UTC)


def limiter_of(server, budget: Budget, **options) -> AsyncBudgetLimiter:
    return AsyncBudgetLimiter(server.url, [budget, OTHER], timeout=10.0, **options)


def check_message(error: DefinitionConflict, registered: str, configured: str) -> None:
    """Check that the error names both definitions and the command that migrates."""
    words = f"is registered with {registered}; this replica defines {configured}"
    assert words in str(error)
    assert "ktrdr budget migrate agent" in str(error)
    assert (error.registered, error.configured) == (registered, configured)


# -- a conflict --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "configured"),
    [
        ({"period": "week"}, "unit usd, period week, timezone UTC, kind spend"),
        ({"period": "ever"}, "unit usd, period ever, timezone UTC, kind spend"),
        ({"timezone": "Asia/Kathmandu"}, "unit usd, period day, timezone Asia/Kathmandu, kind spend"),
        ({"unit": "tokens"}, "unit tokens, period day, timezone UTC, kind spend"),
        ({"kind": "slots"}, "unit slots, period ever, timezone UTC, kind slots"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_a_replica_with_a_different_definition_cannot_use_the_budget(server, client, changed, configured):
    day = "unit usd, period day, timezone UTC, kind spend"
    async with (
        limiter_of(server, Budget("agent", 5)) as first,
        limiter_of(server, Budget("agent", 5, **changed)) as last,
    ):
        await (await first.reserve("agent", 3)).commit(3)
        before = dump(client)
        calls = [last.reserve("agent", 1), last.reserve({"other": "0.10", "agent": 1}), last.status("agent")]
        if "kind" not in changed:
            calls.append(last.record("agent", 1))
        for call in calls:
            with pytest.raises(DefinitionConflict) as refused:
                await call
            check_message(refused.value, day, configured)
        assert {key: value for key, value in dump(client).items() if ":meta" not in key} == {
            key: value for key, value in before.items() if ":meta" not in key
        }, "nothing was written"
        assert (await last.reserve("other", "0.10")).state == "open"
        assert (await first.reserve("agent", 2)).state == "open"
    assert counted(client) == to_units("5.00")


async def test_only_calls_that_use_the_budget_with_conflicting_definitions_fail(server):
    async with (
        limiter_of(server, Budget("agent", 5)) as first,
        limiter_of(server, WEEK) as last,
    ):
        await first.record("agent", 1)
        calls = [last.reserve("agent" if number % 3 == 0 else "other", "0.01") for number in range(30)]
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(each, DefinitionConflict) for each in found] == [number % 3 == 0 for number in range(30)]
        assert sum(each.state == "open" for each in found if not isinstance(each, Exception)) == 20


def test_the_names_budgetmismatch_and_definitionconflict_are_of_the_same_exception():
    assert BudgetMismatch is DefinitionConflict


async def test_holds_reserved_before_a_migration_can_be_settled_after_the_migration(server, client):
    """The test settles holds through their objects, by id, and from a replica without that budget."""
    async with (
        limiter_of(server, Budget("agent", 5)) as first,
        limiter_of(server, WEEK) as last,
        AsyncBudgetLimiter(server.url, [OTHER]) as stranger,
    ):
        holds = [await first.reserve("agent", "0.50", id=f"op_{number}") for number in range(5)]
        await last.migrate("agent")
        await holds[0].commit("0.10")
        await first.extend("op_1", 60, accrued="0.20")
        await last.commit("op_1", "0.20")
        await stranger.commit("op_2", "0.30")
        await stranger.release("op_3")
        await last.extend("op_4", 60, accrued="0.60")
        held = {key: int(client.hget(key, "held")) for key in client.scan_iter("*:w:agent:*")}
        assert held == {window_key(client): to_units("0.60")}, "in the window that admitted them"
        await first.release("op_4")
        assert sums(client) == {"spent": to_units("0.60"), "held": 0, "unconfirmed": 0, "events": 3}
    assert all(report.adds_up for report in await asyncio.to_thread(verify, server.url))


async def test_if_spend_is_deferred_and_the_budget_then_migrated_the_spend_is_still_recorded(start_server):
    own = start_server(None, "--appendonly", "yes", "--appendfsync", "always")
    async with limiter_of(own, Budget("agent", 5), on_store_error="allow") as first:
        set_timeout(first, 0.5)
        await first.record("agent", 1)
        own.kill()
        assert (await first.record("agent", "0.50", id="late")).deferred
        own.start()
        async with limiter_of(own, WEEK) as last:
            await last.migrate("agent")
            await until(lambda: first.deferred == 0)
            with own.client() as client:
                assert sums(client)["spent"] == to_units("1.50")


async def test_a_hold_reserved_before_a_migration_cannot_grow_after_the_migration(server, client):
    """No replica can grow the hold: neither with the old definition, nor with the new one, nor without the budget."""
    async with (
        limiter_of(server, Budget("agent", 5)) as first,
        limiter_of(server, WEEK) as last,
        AsyncBudgetLimiter(server.url, [OTHER]) as stranger,
    ):
        hold = await first.reserve("agent", "0.50", id="op_1")
        await last.migrate("agent")
        for call in (
            hold.grow("0.10"),
            *(limiter.grow("op_1", {"agent": "0.60"}) for limiter in (first, last, stranger)),
        ):
            with pytest.raises(DefinitionConflict):
                await call
        await hold.extend(60)
        await stranger.extend("op_1", 60, accrued="0.70")
        assert sums(client)["held"] == to_units("0.70"), "reported spend is a fact"
        assert (await hold.commit("0.70")).amounts == {"agent": Decimal("0.70")}
    assert sums(client) == {"spent": to_units("0.70"), "held": 0, "unconfirmed": 0, "events": 1}


async def test_after_a_migration_an_older_lease_can_spend_its_chunk_but_gets_no_further_chunk(server, client):
    async with limiter_of(server, Budget("agent", 5)) as first, limiter_of(server, WEEK) as last:
        async with first.lease("agent", "1.00", low_water=0) as lease:
            (await lease.acquire("0.60")).commit("0.60")
            await last.migrate("agent")
            (await lease.acquire("0.40")).commit("0.40")
            with pytest.raises(DefinitionConflict):
                await lease.acquire("0.10")
        assert sums(client) == {"spent": to_units("1.00"), "held": 0, "unconfirmed": 0, "events": 1}


# -- a migration in the last hour of both windows ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "instant", "windows"),
    [
        ("week", "day", SUNDAY_NIGHT, ("2026-W48", "2026-11-29")),
        ("month", "day", LAST_NIGHT_OF_THE_MONTH, ("2026-11", "2026-11-30")),
        ("day", "hour", MONDAY_NIGHT, ("2026-11-23", "2026-11-23T23Z")),
        ("day", "week", MONDAY_NIGHT, ("2026-11-23", "2026-W48")),
    ],
)
@pytest.mark.parametrize("policy", ["deny", "allow"])
async def test_after_a_migration_to_another_period_the_cap_is_still_enforced(
    clocked_server, before, after, instant, windows, policy
):
    clocked_server.set(instant)
    old, new = Budget("agent", "5.00", period=before), Budget("agent", "5.00", period=after)
    async with (
        limiter_of(clocked_server, old, on_store_error=policy) as first,
        limiter_of(clocked_server, new, on_store_error=policy) as last,
    ):
        hold = await first.reserve("agent", "1.00")
        await first.record("agent", "2.00")
        found = await asyncio.gather(*(last.reserve("agent", "1.00") for _ in range(50)), return_exceptions=True)
        assert {type(each) for each in found} == {DefinitionConflict}
        with pytest.raises(DefinitionConflict):
            await last.record("agent", "1.00")
        assert last.deferred == 0
        statuses = await last.statuses()
        assert [status.budget for status in statuses] == ["other"]
        assert [*statuses.unavailable] == ["agent"]
        assert isinstance(statuses.unavailable["agent"], DefinitionConflict)
        await last.record("other", "0.10")

        migration = await last.migrate("agent")
        assert (migration.before, migration.after) == (old.identity, new.identity)
        assert (await last.reserve("agent", "1.00")).windows == {"agent": windows[1]}, "at once"
        with pytest.raises(DefinitionConflict):
            await first.reserve("agent", "1.00")
        assert (await hold.commit("0.50")).amounts == {"agent": Decimal("0.50")}
        assert [status.budget for status in await first.statuses()] == ["other"]
        with pytest.raises(BudgetExceeded):
            await last.reserve("agent", "4.50")

        assert (await first.migrate("agent")).after == old.identity
        status = await first.status("agent")
        assert (status.window, status.spent, status.held) == (windows[0], Decimal("2.50"), 0), "the old one remains"
        with pytest.raises(BudgetExceeded):
            await first.reserve("agent", "3.00")
        await first.reserve("agent", "2.50")
    assert all(report.adds_up for report in await asyncio.to_thread(verify, clocked_server.url))


# -- migrate -----------------------------------------------------------------------------------------------------------


async def test_after_a_migration_the_first_reservation_with_the_former_definition_is_refused(server, monkeypatch):
    monkeypatch.setattr(session, "SLOW_BATCH_EVERY_S", 3600.0)
    async with (
        limiter_of(server, Budget("agent", 5)) as first,
        limiter_of(server, WEEK) as last,
    ):
        for _ in range(3):
            await (await first.reserve("agent", "0.01")).commit("0.01")
        await last.migrate("agent")
        with pytest.raises(DefinitionConflict):
            await first.reserve("agent", "0.01")
        assert (await last.reserve("agent", "0.01")).state == "open"
        assert (await last.status("agent")).spent == 0


async def test_reservations_with_the_former_definition_are_still_refused_after_a_repair(server, client, monkeypatch):
    """The repair restores the limit of the window, but not its field `asserted`, which the fast path requires."""
    monkeypatch.setattr(session, "SLOW_BATCH_EVERY_S", 3600.0)
    async with limiter_of(server, Budget("agent", 5)) as first, limiter_of(server, WEEK) as last:
        hold = await first.reserve("agent", "0.10", id="lost")
        await last.migrate("agent")
        client.delete(first.keys.hold("lost"))
        client.hincrby(first.keys.meta, f"r:{first.replica_id}", -1)  # simulates a lost write
        await hold.commit("0.10")
        assert first.losses == 1
        for _ in range(session.SLOW_BATCHES_AFTER_MISS + 1):  # the fast path is enabled again after these
            await first.record("other", "0.01")
        with pytest.raises(DefinitionConflict):
            await first.reserve("agent", "0.10")


async def test_after_a_loss_only_one_of_two_replicas_with_conflicting_definitions_can_reserve(
    server, client, monkeypatch
):
    """Each replica repairs its own windows, but only the definition of the first replica is registered."""
    monkeypatch.setattr(session, "SLOW_BATCH_EVERY_S", 3600.0)
    async with limiter_of(server, Budget("agent", 5)) as first, limiter_of(server, WEEK) as last:
        for limiter in (first, last):
            await limiter.migrate("agent")
            for _ in range(2):
                await (await limiter.reserve("agent", "0.10")).commit("0.10")
        client.flushall()
        for limiter in (first, last):
            await until(partial(repaired, limiter))
        outcomes = []
        for limiter in (first, last):
            for _ in range(session.SLOW_BATCHES_AFTER_MISS + 1):
                await limiter.record("other", "0.01")
            outcomes += await asyncio.gather(limiter.reserve("agent", "0.10"), return_exceptions=True)
        assert sum(isinstance(outcome, DefinitionConflict) for outcome in outcomes) == 1


async def repaired(limiter: AsyncBudgetLimiter) -> bool:
    """Whether the replica has noticed the loss and grants again."""
    with suppress(StoreUnavailable):
        await limiter.reserve("other", "0.01")
    return limiter.losses == 1 and (await limiter.status("other")).recovering_until is None


async def test_a_migration_to_the_registered_definition_changes_nothing(server, client):
    async with limiter_of(server, Budget("agent", 5)) as limiter:
        unused = await limiter.migrate("agent")
        assert (unused.before, unused.after) == (None, "unit usd, period day, timezone UTC, kind spend")
        await limiter.reserve("agent", 1)
        before = dump(client)
        again = await limiter.migrate("agent")
        assert (again.before, again.after) == (unused.after, unused.after)
        assert dump(client) == before


def test_a_migration_clears_a_limit_set_at_run_time_only_if_the_unit_changes(server):
    budgets = [
        Budget("agent", 5),
        Budget("agent", 5, period="week"),
        Budget("agent", 100, unit="tokens", period="week"),
    ]
    day, week, tokens = [BudgetLimiter(server.url, [budget]) for budget in budgets]
    with day, week, tokens:
        day.set_limit("agent", "2.00")
        with pytest.raises(DefinitionConflict):
            tokens.set_limit("agent", 7)
        with pytest.raises(DefinitionConflict):
            week.clear_limit("agent")
        assert week.migrate("agent").limit_cleared is False
        assert week.status("agent").limit == 2
        assert tokens.migrate("agent").limit_cleared is True
        assert (tokens.status("agent").limit, tokens.status("agent").limit_source) == (100, "configured")


async def test_every_key_has_an_expiry_even_before_a_budget_has_its_first_window(server, client):
    async with limiter_of(server, Budget("agent", 5)) as limiter:
        await limiter.set_limit("other", 1)
        assert immortal_keys(client) == []
        client.flushall()
        await limiter.migrate("agent")
        assert immortal_keys(client) == []


async def test_calls_raise_a_definition_conflict_if_the_stored_period_is_unknown(server, client):
    async with limiter_of(server, Budget("agent", 5)) as limiter:
        await limiter.record("agent", 1)
        [key] = [key for key in client.scan_iter() if client.type(key) == "hash" and client.hexists(key, "d:agent")]
        client.hset(key, "d:agent", "usd,fortnight,UTC,spend,monday")
        for call in (limiter.status("agent"), limiter.reserve("agent", 1), limiter.migrate("agent")):
            with pytest.raises(DefinitionConflict, match="usd,fortnight,UTC,spend,monday"):
                await call


# -- a fault of one budget hides no other ------------------------------------------------------------------------------


async def test_an_unreadable_window_of_one_budget_does_not_affect_other_budgets(server, client):
    async with limiter_of(server, Budget("agent", 5)) as limiter:
        await limiter.record({"agent": "0.10", "other": "0.20"})
        client.set(window_key(client), "not a hash")
        calls = [limiter.reserve("agent" if number % 3 == 0 else "other", "0.01") for number in range(12)]
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(each, StoreError) for each in found] == [number % 3 == 0 for number in range(12)]
        statuses = await limiter.statuses()
        assert [(status.budget, status.spent) for status in statuses] == [("other", Decimal("0.20"))]
        assert isinstance(statuses.unavailable["agent"], StoreError)
        with pytest.raises(StoreError):
            await limiter.status("agent")
        reports = {report.budget: report for report in await asyncio.to_thread(verify, server.url)}
        assert (reports["other"].adds_up, reports["other"].fault) == (True, "")
        assert (reports["agent"].adds_up, reports["agent"].conclusive) == (False, False)
        assert "WRONGTYPE" in reports["agent"].fault


async def test_a_missing_window_of_one_budget_does_not_affect_the_status_of_other_budgets(server, client):
    async with limiter_of(server, Budget("agent", 5)) as limiter:
        await limiter.record({"agent": "0.10", "other": "0.20"})
        client.delete(window_key(client))
        statuses = await limiter.statuses()
        assert [status.budget for status in statuses] == ["other"]
        assert "was begun and is not here" in str(statuses.unavailable["agent"])


async def test_only_the_gauges_of_the_budget_with_conflicting_definitions_are_absent(server):
    async with (
        limiter_of(server, Budget("agent", 5)) as first,
        limiter_of(server, WEEK) as last,
    ):
        await first.record("agent", 1)
        metrics = LimiterMetrics()
        metrics.watch(last)
        text = (await metrics.render())[0].decode()
        assert "ktrdr_budget_store_up 1.0" in text
        assert 'ktrdr_budget_remaining{budget="other",unit="usd"} 1.0' in text
        assert 'ktrdr_budget_remaining{budget="agent"' not in text
        assert "\nagent_budget_remaining_dollars " not in text


async def test_a_replica_with_a_conflicting_definition_can_list_the_holds_of_the_budget(server):
    async with (
        limiter_of(server, Budget("agent", 5)) as first,
        limiter_of(server, WEEK) as last,
    ):
        await first.reserve("agent", 1, id="op_1")
        assert [hold.id for hold in await last.holds("agent")] == ["op_1"]


def test_a_tracker_with_a_conflicting_definition_raises_an_error_instead_of_returning_figures(server):
    with BudgetLimiter(server.url, [Budget("agent", 5, period="week")]) as limiter:
        limiter.record("agent", 1)
    with BudgetTracker(1, url=server.url) as tracker:
        allowed, reason = tracker.can_spend(0.1)
        assert not allowed
        assert reason.startswith("budget_unavailable (budget 'agent' is registered with unit usd, period week")
        for call in (tracker.get_status, tracker.get_remaining, lambda: tracker.record_spend(0.1, "x")):
            with pytest.raises(DefinitionConflict):
                call()
