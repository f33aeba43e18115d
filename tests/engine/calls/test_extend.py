"""Heartbeats, growth and reports: what is sent, and what the hold is afterwards."""

from __future__ import annotations

import pytest

from ktrdr_budget import Budget, HoldConflict, InvalidAmount, InvalidArgument, StoreUnavailable, UnknownHold
from ktrdr_budget.engine.calls.context import CallContext
from ktrdr_budget.engine.calls.extend import extend, extend_by_id, grow, grow_by_id, grow_to, report
from ktrdr_budget.engine.outage.allow import AllowPolicy
from ktrdr_budget.engine.protocol.codes import COMMITTED, RELEASED_BY_OPERATOR, ExtendMode
from ktrdr_budget.engine.protocol.operations import Extend, ExtendAmount, Retire
from ktrdr_budget.engine.protocol.replies import Conflict, Denied, Extended, Outgrown, Retired, UnknownHoldReply
from ktrdr_budget.engine.protocol.requests import Read

from ...helpers.calls import (
    NO_REPLY,
    NOT_READY,
    NOT_SENT,
    NOW_MS,
    TTL_MS,
    answer,
    call_context,
    drive,
    found,
    granted_hold,
    hold_record,
    offline_hold,
    units_of,
)

BUDGETS = [Budget("agent", "5.00"), Budget("tokens", 1000, unit="tokens")]


@pytest.fixture
def context() -> CallContext:
    return call_context(*BUDGETS)


def extended(context, deadline_ms=NOW_MS + TTL_MS, **units):
    return answer(Extended(hold_record(context, **units)._replace(deadline_ms=deadline_ms).render()))


def outgrown(context, **units):
    return answer(Outgrown(hold_record(context, **units).render()))


# -- heartbeats --------------------------------------------------------------------------------------------------------


def test_a_heartbeat_sends_the_accrued_totals_and_the_hold_takes_the_deadline_from_the_reply(context):
    hold = granted_hold(context, agent=500, tokens=40)
    hold.accrue({"tokens": 7})
    [request], _ = drive(extend(context, hold, 30), extended(context, NOW_MS + 30_500, agent=500, tokens=40))
    assert (request.mode, request.ttl_ms) == (ExtendMode.HEARTBEAT, 30_000)
    assert request.amounts == [ExtendAmount(accrued=0), ExtendAmount(accrued=7)]
    assert (hold.deadline_ms, hold.ttl_ms) == (NOW_MS + 30_500, 30_000)


def test_a_report_sends_the_accrued_totals_without_changing_the_deadline(context):
    hold = granted_hold(context, tokens=40)
    hold.accrue({"tokens": 7})
    [request], _ = drive(report(context, hold), extended(context, tokens=40))
    assert (request.mode, request.amounts) == (ExtendMode.REPORT, [ExtendAmount(accrued=7)])


@pytest.mark.parametrize(
    ("policy", "error", "continues"),
    [("deny", NOT_SENT, False), ("allow", NO_REPLY, True), ("allow", NOT_SENT, True), ("allow", NOT_READY, False)],
)
def test_a_heartbeat_without_a_reply_succeeds_only_if_the_outage_policy_extends_holds(policy, error, continues):
    context = call_context(*BUDGETS, **({"policy": AllowPolicy} if policy == "allow" else {}))
    hold = granted_hold(context, tokens=40)
    drive(extend(context, hold, None), error, raises=None if continues else StoreUnavailable)
    assert units_of(hold) == {"tokens": 40}


def test_the_heartbeat_of_a_hold_released_by_an_operator_fails_and_marks_the_hold_as_released(context):
    hold = granted_hold(context, tokens=40)
    conflict = answer(Conflict(hold_record(context, RELEASED_BY_OPERATOR, tokens=40).render()))
    drive(extend(context, hold, None), conflict, raises=HoldConflict)
    assert (hold.state, hold.released_by_operator) == ("released", True)


def test_a_heartbeat_removes_the_hold_from_the_journal_if_another_replica_has_committed_the_hold(context):
    hold = granted_hold(context, tokens=40)
    conflict = answer(Conflict(hold_record(context, COMMITTED, tokens=40).render()))
    drive(extend(context, hold, None), conflict, raises=HoldConflict)
    assert context.state.journal.open_hold("a") is None


@pytest.mark.parametrize("is_growth", [False, True])
def test_an_offline_hold_cannot_grow_but_its_heartbeats_succeed(is_growth):
    context = call_context(*BUDGETS, policy=AllowPolicy)
    hold = offline_hold(context, tokens=40)
    flow = grow_to(context, hold, {"tokens": 50}) if is_growth else extend(context, hold, None)
    _, error = drive(flow, answer(UnknownHoldReply()), raises=StoreUnavailable if is_growth else None)
    assert not is_growth or error.reached
    assert units_of(hold) == {"tokens": 40}


def test_a_heartbeat_fails_if_the_store_has_dropped_the_hold(context):
    drive(extend(context, granted_hold(context, tokens=40), None), answer(UnknownHoldReply()), raises=UnknownHold)


# -- growth ------------------------------------------------------------------------------------------------------------


def test_growth_to_a_total_sends_the_totals_of_all_budgets_and_lowers_no_total(context):
    hold = granted_hold(context, agent=500, tokens=40)
    flow = grow_to(context, hold, {"tokens": 30, "agent": "0.000000600"})
    [request], _ = drive(flow, extended(context, agent=600, tokens=40))
    assert [amount.reserved for amount in request.amounts] == [600, 40]
    assert (request.mode, units_of(hold)) == (ExtendMode.GROW, {"agent": 600, "tokens": 40})


def test_growth_by_an_amount_sends_the_new_total_and_the_total_before_the_growth(context):
    hold = granted_hold(context, agent=500, tokens=40)
    [request], _ = drive(grow(context, hold, {"tokens": 10}), extended(context, agent=500, tokens=50))
    assert request.amounts == [ExtendAmount(), ExtendAmount(reserved=50, expected=40)]
    assert units_of(hold) == {"agent": 500, "tokens": 50}


def test_growth_in_this_process_is_added_to_growth_in_other_processes(context):
    hold = granted_hold(context, tokens=40)
    flow = grow(context, hold, {"tokens": 10})
    requests, _ = drive(flow, outgrown(context, tokens=45), extended(context, tokens=55))
    assert [request.amounts[0][1:] for request in requests] == [(50, 40), (55, 45)]
    assert units_of(hold) == {"tokens": 55}


def test_growth_that_is_repeated_after_a_lost_reply_adds_its_amount_once(context):
    hold = granted_hold(context, tokens=40)
    [first], _ = drive(grow(context, hold, {"tokens": 10}), NO_REPLY, raises=StoreUnavailable)
    drive(grow(context, hold, {"tokens": 10}), NOT_SENT, raises=StoreUnavailable)
    [second], _ = drive(grow(context, hold, {"tokens": 10}), outgrown(context, tokens=50))
    assert second.amounts == first.amounts == [ExtendAmount(reserved=50, expected=40)]
    assert units_of(hold) == {"tokens": 50}


def test_growth_by_a_different_amount_after_a_lost_reply_is_added_to_the_total_in_the_store(context):
    hold = granted_hold(context, tokens=40)
    drive(grow(context, hold, {"tokens": 10}), NO_REPLY, raises=StoreUnavailable)
    flow = grow(context, hold, {"tokens": 3})
    assert drive(flow, outgrown(context, tokens=50), extended(context, tokens=53)).requests[1].amounts[0].reserved == 53


def test_a_growth_request_is_not_treated_as_a_retry_of_an_equal_request_that_was_never_sent(context):
    hold = granted_hold(context, tokens=40)
    drive(grow(context, hold, {"tokens": 10}), NOT_SENT, raises=StoreUnavailable)
    flow = grow(context, hold, {"tokens": 10})
    requests, _ = drive(flow, outgrown(context, tokens=50), extended(context, tokens=60))
    assert len(requests) == 2, "the total of 50 is of others"


def test_growth_above_the_largest_amount_is_refused_before_anything_is_sent(context):
    hold = granted_hold(context, tokens=40)
    with pytest.raises(InvalidAmount):
        grow(context, hold, {"tokens": 2**53 - 40})


def test_holds_past_their_deadline_are_retired_after_a_denied_growth_and_the_growth_is_repeated(context):
    hold = granted_hold(context, tokens=40)
    denied = Denied(context.state.current_window("tokens").name, 1000, 0, 990, 0, 20, NOW_MS - 1, 60)
    due = found([hold_record(context, tokens=950, due=True).render()])
    flow = grow_to(context, hold, {"tokens": 60})
    requests, _ = drive(flow, answer(denied, "old"), due, answer(Retired()), extended(context, tokens=60))
    assert [type(request) for request in requests] == [Extend, Read, Retire, Extend]


# -- by id -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ttl", "mode"), [(None, ExtendMode.HEARTBEAT_NO_SOONER), (5, ExtendMode.HEARTBEAT)])
def test_only_a_heartbeat_by_id_with_a_ttl_can_move_the_deadline_earlier(context, ttl, mode):
    record = found(hold_record(context, tokens=40).render())
    requests, view = drive(extend_by_id(context, "a", ttl, {"tokens": 7}), record, extended(context, tokens=40))
    assert (requests[1].mode, requests[1].amounts) == (mode, [ExtendAmount(accrued=7)])
    assert (view.id, view.amounts) == ("a", {"tokens": 40})


def test_the_accrued_amount_can_be_reported_later_if_the_hold_of_a_heartbeat_by_id_cannot_be_read(context):
    record = hold_record(context, tokens=40)
    [read], _ = drive(extend_by_id(context, "a", 5, {"tokens": 7}), NO_REPLY, raises=StoreUnavailable)
    kept = read.prepares.complete(record)
    assert (kept.mode, kept.amounts) == (ExtendMode.REPORT, [ExtendAmount(accrued=7)])
    [read], _ = drive(extend_by_id(context, "a", 5, None), NO_REPLY, raises=StoreUnavailable)
    assert read.prepares is None


def test_growth_by_id_sends_new_totals_only_for_the_budgets_that_grow(context):
    record = found(hold_record(context, agent=500, tokens=40).render())
    requests, view = drive(grow_by_id(context, "a", {"tokens": 60}, 5), record, extended(context, agent=500, tokens=60))
    assert requests[1].amounts == [ExtendAmount(), ExtendAmount(reserved=60)]
    assert view.amounts["tokens"] == 60


@pytest.mark.parametrize(("hold_id", "ttl"), [("two words", 5), ("a", 0)])
def test_an_extension_by_id_with_an_invalid_argument_is_refused_before_anything_is_sent(context, hold_id, ttl):
    assert drive(extend_by_id(context, hold_id, ttl, None), raises=InvalidArgument).requests == []
    assert drive(grow_by_id(context, hold_id, {"tokens": 1}, ttl), raises=InvalidArgument).requests == []


def test_extending_an_offline_hold_by_id_updates_the_hold_object_of_this_process():
    context = call_context(*BUDGETS, policy=AllowPolicy)
    hold = offline_hold(context, "a", tokens=40)
    _, view = drive(extend_by_id(context, "a", None, {"tokens": 7}), NOT_SENT)
    assert (hold.accrued_units, view.accrued) == ([7], {"tokens": 7})
