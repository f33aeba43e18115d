"""Limits set at run time, and migrations: the order of their requests, and what the caller receives."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from ktrdr_budget import Budget, DefinitionConflict, InvalidAmount, InvalidArgument, UnknownBudget
from ktrdr_budget.engine.calls.context import CallContext
from ktrdr_budget.engine.calls.limits import clear_limit, migrate, set_limit
from ktrdr_budget.engine.protocol.requests import Command, Read
from ktrdr_budget.periods import to_ms

from ...helpers.calls import NOW_MS, NOW_US, answer_status, call_context, drive, found

AGENT = Budget("agent", "5.00")
HOURLY = Budget("agent", "5.00", period="hour")
CHANGED = str(NOW_US)
"""The store's reply to a changed limit: the time of the change."""


@pytest.fixture
def context() -> CallContext:
    return call_context(AGENT)


def test_the_call_set_limit_reads_the_status_before_and_after_the_change_and_returns_the_later_status(context):
    """The first read brings the time of the store, so that an ``until`` in the past can be refused."""
    after = answer_status(runtime=f"2000000000 0 {CHANGED}")
    requests, now = drive(set_limit(context, "agent", "2.00", None), answer_status(), CHANGED, after)
    assert [type(request) for request in requests] == [Read, Command, Read]
    assert requests[1].args == ["agent", "2000000000", 0, AGENT.definition, "-", "-"]
    assert (now.limit, now.limit_source) == (2, "runtime")


def test_setting_or_clearing_a_limit_is_journalled_with_the_time_of_the_change(context):
    drive(set_limit(context, "agent", "2.00", None), answer_status(), CHANGED, answer_status(now_us=NOW_US - 1))
    [replayed] = context.state.journal.limits(context.state.keys, NOW_MS)
    assert (replayed.limit, replayed.changed_us) == (2_000_000_000, NOW_US)
    requests, _ = drive(clear_limit(context, "agent"), str(NOW_US + 5), answer_status())
    assert requests[0].args[1] == ""
    [replayed] = context.state.journal.limits(context.state.keys, NOW_MS)
    assert (replayed.limit, replayed.changed_us) == (None, NOW_US + 5)


@pytest.mark.parametrize(
    ("name", "limit", "until", "error"),
    [
        ("agnt", "1", None, UnknownBudget),
        ("agent", "-1", None, InvalidAmount),
        ("agent", "1", datetime(2026, 1, 1), InvalidArgument),
        ("agent", "1", "tomorrow", InvalidArgument),
    ],
    ids=["unknown budget", "negative", "a time without a zone", "another text than 'window'"],
)
def test_a_limit_with_an_invalid_argument_is_refused_before_anything_is_sent(context, name, limit, until, error):
    assert drive(set_limit(context, name, limit, until), raises=error).requests == []


@pytest.mark.parametrize("label", ["x" * 257, "\ud800", 7])
def test_an_author_or_reason_that_cannot_be_logged_is_refused_before_anything_is_sent(context, label):
    for named in ({"by": label}, {"reason": label}):
        assert drive(set_limit(context, "agent", "1", None, **named), raises=InvalidArgument).requests == []
        assert drive(clear_limit(context, "agent", **named), raises=InvalidArgument).requests == []


def test_a_limit_is_refused_if_its_end_is_in_the_past_by_the_clock_of_the_store(context):
    until = datetime.fromtimestamp(NOW_MS / 1000, UTC)
    requests, _ = drive(set_limit(context, "agent", "1", until), answer_status(), raises=InvalidArgument)
    assert [type(request) for request in requests] == [Read]


def test_a_limit_is_set_again_for_the_next_window_if_the_window_ends_meanwhile():
    context = call_context(HOURLY)
    span = context.state.current_window("agent").span

    def next_window(request):
        context.state.set_clock(span.end_ms * 1000, 0)
        return answer_status(now_us=span.end_ms * 1000)

    later = answer_status(now_us=span.end_ms * 1000)
    replies = answer_status(), CHANGED, next_window, later, later, CHANGED, later
    requests, now = drive(set_limit(context, "agent", "1", "window"), *replies)
    untils_ms = [request.args[2] for request in requests if isinstance(request, Command)]
    assert untils_ms == [span.end_ms, to_ms(now.resets_at)]


def test_a_limit_until_the_end_of_the_window_never_ends_if_the_window_has_no_end():
    context = call_context(Budget("agent", "5.00", period="ever"))
    requests, now = drive(set_limit(context, "agent", "1", "window"), answer_status(), CHANGED, answer_status())
    assert (requests[1].args[2], now.resets_at) == (0, None)


def test_a_limit_cannot_be_set_or_cleared_if_a_different_definition_is_registered(context):
    other = f"m {HOURLY.definition}"
    error = drive(set_limit(context, "agent", "1", None), answer_status(), other, raises=DefinitionConflict).result
    assert error.registered == HOURLY.identity
    drive(clear_limit(context, "agent"), other, raises=DefinitionConflict)


# -- migration ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_same", [True, False])
def test_a_migration_replaces_the_registered_definition_only_if_the_definitions_differ(context, is_same):
    registered = AGENT if is_same else HOURLY
    replies = [found(registered.definition)] + [""] * (not is_same)
    requests, migration = drive(migrate(context, "agent"), *replies)
    assert [request.args[1:3] for request in requests[1:]] == [[HOURLY.definition, AGENT.definition]] * (not is_same)
    assert (migration.before, migration.after) == (registered.identity, AGENT.identity)


def test_the_log_line_of_a_migration_shows_none_if_no_definition_was_registered_before(caplog):
    endless = Budget("agent", "5.00", period="ever")
    requests, migration = drive(migrate(call_context(endless), "agent"), found(None), "")
    assert (migration.before, migration.limit_cleared, requests[1].args[4]) == (None, False, 0)
    assert caplog.messages == [f"definition of budget agent registered: {endless.identity}; before: none"]


def test_a_migration_is_repeated_if_the_registered_definition_changes_meanwhile(context):
    weekly = Budget("agent", "5.00", period="week")
    replies = found(HOURLY.definition), "w", found(weekly.definition), "cleared"
    requests, migration = drive(migrate(context, "agent"), *replies)
    assert requests[3].args[1] == weekly.definition
    assert (migration.before, migration.limit_cleared) == (HOURLY.identity, True)


@pytest.mark.parametrize(("unit", "drops"), [("usd", 0), ("tokens", 1)])
def test_a_migration_to_a_different_unit_clears_the_limit_set_at_run_time(context, unit, drops):
    registered = Budget("agent", 5, unit=unit, period="hour").definition
    requests, _ = drive(migrate(context, "agent"), found(registered), "")
    assert requests[1].args[-1] == drops


def test_a_migration_does_not_replace_a_definition_registered_by_a_later_version(context):
    drive(migrate(context, "agent"), found("usd,fortnight,UTC,spend"), raises=DefinitionConflict)
