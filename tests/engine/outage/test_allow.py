"""Policy `allow`: holds are granted without a check of the cap, and settled by id once the store replies."""

from __future__ import annotations

import pytest

from ktrdr_budget import Budget
from ktrdr_budget.engine.calls.context import CallContext
from ktrdr_budget.engine.outage.allow import AllowPolicy
from ktrdr_budget.engine.protocol.codes import COMMITTED, CommitMode, ReleaseMode
from ktrdr_budget.engine.protocol.hold_record import parse_record
from ktrdr_budget.engine.protocol.operations import CommitAmount, RecordSpend, Release, Restore

from ...helpers.calls import NOW_MS, TTL_MS, call_context, granted_hold, offline_hold, queued

BUDGETS = [Budget("tokens", 1000, unit="tokens"), Budget("jobs", 1, kind="slots")]


@pytest.fixture
def context() -> CallContext:
    return call_context(*BUDGETS, policy=AllowPolicy)


def test_policy_allow_grants_a_hold_above_the_cap_and_marks_the_hold_as_not_checked(context, caplog):
    hold = offline_hold(context, tokens=2000)
    assert hold.reserved_units == {"tokens": 2000}
    assert not hold.cap_checked
    assert granted_hold(context, "b", tokens=1).cap_checked
    assert caplog.messages == ["hold a granted without a check of the cap: store unreachable"]


def test_an_offline_hold_is_found_by_id_and_its_deadline_follows_the_clock_of_the_store(context):
    hold = offline_hold(context, tokens=40)
    assert context.offline_hold("a") is hold
    assert 0 <= hold.deadline_ms - TTL_MS - NOW_MS < 60_000
    assert not context.policy.owns("a"), "the store settles it"


def test_the_commit_of_an_offline_hold_writes_the_hold_and_its_spend_to_the_store(context):
    """The store has the hold only if the reservation was executed and its reply was lost."""
    op = context.policy.settle(offline_hold(context, tokens=40, jobs=1), exact(7, 1), "gpt")
    assert isinstance(op, Restore)
    record = parse_record(op.text)
    assert (record.state, record.operation) == (COMMITTED, "gpt")
    assert [(each.reserved, each.charged) for each in record.segments] == [(40, 7), (1, 0)], "slots are never spent"


def test_the_release_of_an_offline_hold_prevents_a_later_reservation_with_the_same_id(context):
    op = context.policy.settle(offline_hold(context, tokens=40), None, "")
    assert isinstance(op, Release)
    assert op.mode is ReleaseMode.FINAL


def test_a_record_made_in_an_outage_is_queued_for_the_window_in_which_the_spend_occurred(context):
    parts = [(context.state.current_window("tokens"), 7)]
    settlement = context.policy.record(RecordSpend("r", "key", parts), ambiguous=False)
    [(kind, request)] = queued(context)
    assert (settlement.deferred, kind, request.is_late, request.parts) == (True, "deferred", True, parts)


@pytest.mark.parametrize(("remark", "trace_id"), [("gpt", "t1"), ("", "")])
def test_an_offline_commit_stores_its_trace_id_only_together_with_a_remark(remark, trace_id):
    context = call_context(*BUDGETS, policy=AllowPolicy, trace_id="t1")
    op = context.policy.settle(offline_hold(context, tokens=40), exact(7), remark)
    assert isinstance(op, Restore)
    assert parse_record(op.text).trace_id == trace_id


def test_policy_allow_leaves_the_extension_of_a_hold_to_the_store(context):
    hold = offline_hold(context, tokens=40)
    assert not context.policy.extend(hold, lambda: hold.parts, None)


def test_a_deferred_commit_marks_the_offline_hold_as_committed(context):
    hold = offline_hold(context, tokens=40)
    context.policy.defer(context.policy.settle(hold, exact(7), ""))
    assert hold.state == "committed"


def test_undelivered_offline_holds_are_dropped_and_a_forked_child_starts_without_offline_holds(context):
    given_up, other = offline_hold(context, "a", tokens=40), offline_hold(context, "b", tokens=40)
    context.policy.give_up(given_up)
    assert list(context.policy.holds.values()) == [other]
    context.policy.clear()
    assert not context.policy.holds


def exact(*units: int) -> list[CommitAmount]:
    return [CommitAmount(CommitMode.EXACT, each) for each in units]
