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


def test_a_hold_is_granted_above_the_cap_and_marked_as_not_checked(context, caplog):
    hold = offline_hold(context, tokens=2000)
    assert hold.reserved_units == {"tokens": 2000}
    assert not hold.cap_checked
    assert granted_hold(context, "b", tokens=1).cap_checked
    assert caplog.messages == ["hold a granted without a check of the cap: store unreachable"]


def test_a_granted_hold_is_found_by_its_id_and_expires_by_the_clock_of_the_store(context):
    hold = offline_hold(context, tokens=40)
    assert context.offline_hold("a") is hold
    assert 0 <= hold.deadline_ms - TTL_MS - NOW_MS < 60_000
    assert not context.policy.owns("a"), "the store settles it"


def test_a_commit_restores_the_hold_in_the_store_with_its_spend(context):
    """The store may have the hold, from a request whose reply was lost, or not."""
    op = context.policy.settle(offline_hold(context, tokens=40, jobs=1), exact(7, 1), "gpt")
    assert isinstance(op, Restore)
    record = parse_record(op.text)
    assert (record.state, record.operation) == (COMMITTED, "gpt")
    assert [(each.reserved, each.charged) for each in record.segments] == [(40, 7), (1, 0)], "slots are never spent"


def test_a_release_closes_the_id_to_a_request_that_arrives_later(context):
    op = context.policy.settle(offline_hold(context, tokens=40), None, "")
    assert isinstance(op, Release)
    assert op.mode is ReleaseMode.FINAL


def test_spend_is_recorded_later_for_the_window_in_which_it_was_spent(context):
    parts = [(context.state.current_window("tokens"), 7)]
    settlement = context.policy.record(RecordSpend("r", "key", parts), ambiguous=False)
    [(kind, request)] = queued(context)
    assert (settlement.deferred, kind, request.is_late, request.parts) == (True, "deferred", True, parts)


@pytest.mark.parametrize(("remark", "trace_id"), [("gpt", "t1"), ("", "")])
def test_a_commit_with_a_remark_has_the_trace_of_the_commit(remark, trace_id):
    context = call_context(*BUDGETS, policy=AllowPolicy, trace_id="t1")
    op = context.policy.settle(offline_hold(context, tokens=40), exact(7), remark)
    assert isinstance(op, Restore)
    assert parse_record(op.text).trace_id == trace_id


def test_a_hold_is_extended_by_the_store(context):
    hold = offline_hold(context, tokens=40)
    assert not context.policy.extend(hold, lambda: hold.parts, None)


def test_a_deferred_settlement_settles_the_hold_of_this_process(context):
    hold = offline_hold(context, tokens=40)
    context.policy.defer(context.policy.settle(hold, exact(7), ""))
    assert hold.state == "committed"


def test_a_grant_that_its_caller_did_not_receive_is_dropped_and_a_forked_child_has_none(context):
    given_up, other = offline_hold(context, "a", tokens=40), offline_hold(context, "b", tokens=40)
    context.policy.give_up(given_up)
    assert list(context.policy.holds.values()) == [other]
    context.policy.clear()
    assert not context.policy.holds


def exact(*units: int) -> list[CommitAmount]:
    return [CommitAmount(CommitMode.EXACT, each) for each in units]
