"""Commits, releases and records of spend: what is sent, and the result for each reply of the store."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ktrdr_budget import Budget, HoldConflict, InvalidAmount, InvalidArgument, StoreError, StoreUnavailable, UnknownHold
from ktrdr_budget.engine.calls.context import CallContext
from ktrdr_budget.engine.calls.settle import commit, commit_units, leave, record, release, settle_by_id
from ktrdr_budget.engine.outage.allow import AllowPolicy
from ktrdr_budget.engine.outage.policy import OutagePolicy
from ktrdr_budget.engine.protocol.codes import COMMITTED, RELEASED, CommitMode, ReleaseMode
from ktrdr_budget.engine.protocol.operations import Commit, CommitAmount, Extend, RecordSpend, Release, Restore
from ktrdr_budget.engine.protocol.replies import Conflict, Extended, Settled, StaleWindow, UnknownHoldReply
from ktrdr_budget.engine.protocol.requests import Read
from ktrdr_budget.money import from_units

from ...helpers.calls import (
    NO_REPLY,
    NOT_SENT,
    answer,
    call_context,
    drive,
    errors_of,
    found,
    granted_hold,
    hold_record,
    offline_hold,
    queued,
)

BUDGETS = [Budget("agent", "5.00"), Budget("tokens", 1000, unit="tokens"), Budget("jobs", 2, kind="slots")]
CENT = 10_000_000
"""$0.01"""
UNKNOWN = answer(UnknownHoldReply())
RELEASED_NOW = answer(Settled((0,)))


@pytest.fixture
def context() -> CallContext:
    return call_context(*BUDGETS)


def committed(*units: int, **flags) -> tuple:
    return answer(Settled(units, **flags))


# -- a hold in hand ----------------------------------------------------------------------------------------------------


def test_a_commit_sends_the_amount_of_each_budget_and_journals_the_settlement(context):
    hold = granted_hold(context, agent=25 * CENT, tokens=40)
    [request], settlement = drive(commit(context, hold, {"agent": "0.07", "tokens": 30}), committed(7 * CENT, 30))
    assert request.amounts == [CommitAmount(CommitMode.EXACT, 7 * CENT), CommitAmount(CommitMode.EXACT, 30)]
    assert settlement.amounts == {"agent": from_units(7 * CENT), "tokens": 30}
    assert (settlement.state, hold.state) == ("committed", "committed")
    assert context.state.journal.has_settled(hold.id)


@pytest.mark.parametrize(
    ("reserved", "amount", "amounts"),
    [
        ({"agent": 25 * CENT, "tokens": 40}, "0.07", [("x", 7 * CENT), ("r", 40)]),
        ({"tokens": 40}, 30, [("x", 30)]),
        ({"jobs": 1}, "0.07", [("r", 1)]),
    ],
    ids=["dollars of the amount, counts as reserved", "the only count", "slots as reserved"],
)
def test_a_scalar_amount_is_committed_to_dollar_budgets_or_to_the_only_count(context, reserved, amount, amounts):
    [request], _ = drive(commit(context, granted_hold(context, **reserved), amount), committed(*reserved.values()))
    assert request.amounts == amounts


def test_the_result_of_a_commit_shows_if_the_commit_was_late_or_replayed_or_over_the_reservation(context):
    hold = granted_hold(context, agent=CENT, tokens=40)
    reply = committed(2 * CENT, 40, overrun=True, late=True, replayed=True)
    _, settlement = drive(commit(context, hold, {"agent": "0.02", "tokens": 40}), reply)
    assert (settlement.overruns, settlement.late, settlement.replayed) == (("agent",), True, True)


def test_a_commit_takes_the_fast_path_only_if_the_hold_is_unchanged_and_has_no_remark(context):
    """The fast path compares the record in the store with the record at the grant."""
    unchanged, extended, noted = (granted_hold(context, hold_id, agent=CENT) for hold_id in "abc")
    extended.update(hold_record(context, agent=CENT))
    noted.note("gpt")
    requests = [
        drive(commit(context, hold, "0.01"), committed(CENT)).requests[0] for hold in (unchanged, extended, noted)
    ]
    assert [request.uses_fast_path for request in requests] == [True, False, False]


def test_a_commit_with_a_remark_sends_the_remark_and_the_current_trace_id():
    context = call_context(*BUDGETS, trace_id="t1")
    plain, noted = granted_hold(context, "a", agent=CENT), granted_hold(context, "b", agent=CENT)
    noted.note("gpt")
    requests = [drive(commit(context, hold, "0.01"), committed(CENT)).requests[0] for hold in (plain, noted)]
    assert [(request.remark, request.trace_id) for request in requests] == [("", ""), ("gpt", "t1")]


def test_a_commit_of_zero_units_releases_the_hold(context):
    [request], settlement = drive(commit_units(context, granted_hold(context, agent=CENT), 0), RELEASED_NOW)
    assert isinstance(request, Release)
    assert settlement.state == "released"


def test_the_end_of_a_block_repeats_a_commit_that_got_no_reply_with_the_same_amount(context):
    hold = granted_hold(context, agent=25 * CENT)
    drive(commit(context, hold, "0.07"), NO_REPLY, raises=StoreUnavailable)
    assert (hold.state, hold.settling) == ("open", False)
    [request], _ = drive(leave(context, hold, False, "release"), committed(7 * CENT))
    assert request.amounts == [CommitAmount(CommitMode.EXACT, 7 * CENT)]


def test_a_commit_without_a_reply_is_queued_as_deferred_if_the_outage_policy_is_allow():
    context = call_context(*BUDGETS, policy=AllowPolicy)
    hold = granted_hold(context, agent=25 * CENT)
    [request], settlement = drive(commit(context, hold, "0.07"), NO_REPLY)
    assert queued(context) == [("deferred", request)]
    assert (settlement.deferred, hold.state) == (True, "committed")


def test_a_commit_restores_a_hold_that_the_store_has_lost(context):
    hold = granted_hold(context, agent=25 * CENT)
    hold.granted_in = "before the loss"
    requests, settlement = drive(commit(context, hold, "0.07"), UNKNOWN, committed(7 * CENT))
    assert [type(request) for request in requests] == [Commit, Restore]
    assert settlement.state == "committed"


def test_a_commit_fails_and_the_lost_spend_is_logged_if_the_store_has_dropped_the_hold(context, caplog):
    hold = granted_hold(context, agent=25 * CENT)
    drive(commit(context, hold, "0.07"), UNKNOWN, raises=UnknownHold)
    assert ["commit of hold a not recorded" in line for line in errors_of(caplog)] == [True]
    caplog.clear()
    drive(release(context, hold), UNKNOWN, raises=UnknownHold)
    assert errors_of(caplog) == [], "a release loses no spend"


def test_releasing_an_offline_hold_succeeds_with_amounts_of_zero_if_the_store_lacks_the_hold():
    context = call_context(*BUDGETS, policy=AllowPolicy)
    _, settlement = drive(release(context, offline_hold(context, agent=CENT)), UNKNOWN)
    assert (settlement.state, settlement.amounts) == ("released", {"agent": 0})


def test_a_release_fails_and_does_not_restore_the_hold_if_the_store_has_lost_the_hold(context):
    hold = granted_hold(context, agent=CENT)
    hold.granted_in = "before the loss"
    drive(release(context, hold), UNKNOWN, raises=UnknownHold)


@pytest.mark.parametrize("policy", [OutagePolicy, AllowPolicy])
def test_a_settlement_that_conflicts_with_an_earlier_commit_fails_without_logging_lost_spend(policy, caplog):
    context = call_context(*BUDGETS, policy=policy)
    hold = offline_hold(context, agent=CENT) if policy is AllowPolicy else granted_hold(context, agent=CENT)
    conflict = answer(Conflict(hold_record(context, COMMITTED, agent=CENT).render()))
    drive(release(context, hold), conflict, raises=HoldConflict)
    drive(commit(context, hold, "0.02"), conflict, raises=HoldConflict)
    assert errors_of(caplog) == []


def test_a_hold_cannot_be_settled_while_its_metered_calls_are_in_progress(context):
    hold = granted_hold(context, agent=CENT)
    hold.growth = SimpleNamespace(open=1)
    assert drive(commit(context, hold, "0.01"), raises=HoldConflict).requests == []


# -- the end of a block ------------------------------------------------------------------------------------------------

CHARGED_IN_FULL = [CommitAmount(CommitMode.RESERVED, 25 * CENT)]
CHARGED_ACCRUED = [CommitAmount(CommitMode.ACCRUED, 7 * CENT)]


@pytest.mark.parametrize(
    ("accrued", "drawn", "failed", "on_error", "expected"),
    [
        (None, False, False, "release", CHARGED_IN_FULL),
        (None, False, True, "release", Release),
        (None, False, True, "charge", None),
        (None, True, False, "release", Release),
        (None, True, False, "charge", Release),
        (None, True, True, "charge", None),
        ("0.07", False, False, "release", CHARGED_ACCRUED),
        ("0.07", False, True, "release", CHARGED_ACCRUED),
        ("0.07", True, False, "charge", CHARGED_ACCRUED),
        ("0.07", False, True, "charge", Extend),
    ],
)
def test_the_end_of_a_block_settles_or_reports_the_hold_depending_on_accruals_and_failure(
    context, accrued, drawn, failed, on_error, expected
):
    """With ``None`` or ``Extend``, the hold is charged later, at its expiry; ``Extend`` reports the accrued amount."""
    hold = granted_hold(context, agent=25 * CENT)
    hold.drawn = {"agent": 0} if drawn else {}
    if accrued is not None:
        hold.accrue(accrued)
    flow = leave(context, hold, failed, on_error)
    if expected is None:
        assert flow is None
        return
    record_after = hold_record(context, agent=25 * CENT).render()
    reply = answer(Extended(record_after)) if expected is Extend else committed(0)
    [request], _ = drive(flow, reply)
    assert (request.amounts if isinstance(expected, list) else type(request)) == expected


@pytest.mark.parametrize("settled", [COMMITTED, RELEASED])
def test_the_end_of_a_block_succeeds_if_another_client_has_settled_the_hold(context, settled):
    hold = granted_hold(context, agent=CENT)
    drive(leave(context, hold, False, "release"), answer(Conflict(hold_record(context, settled, agent=CENT).render())))
    assert hold.settled
    assert leave(context, hold, False, "release") is None


def test_the_end_of_a_block_fails_if_the_id_has_an_open_hold_with_other_contents(context):
    hold = granted_hold(context, agent=CENT)
    conflict = answer(Conflict(hold_record(context, agent=2 * CENT).render()))
    drive(leave(context, hold, False, "release"), conflict, raises=HoldConflict)
    assert hold.state == "open"


def test_the_accrued_amount_is_committed_if_the_block_of_an_offline_hold_fails():
    """The store does not have the hold, so nothing would expire there."""
    context = call_context(*BUDGETS, policy=AllowPolicy)
    hold = offline_hold(context, agent=25 * CENT)
    hold.accrue("0.07")
    drive(leave(context, hold, True, "charge"), NOT_SENT)
    [(kind, request)] = queued(context)
    assert (kind, request.units) == ("deferred", (7 * CENT,))


def test_the_end_of_a_block_sends_nothing_while_a_settlement_of_the_hold_is_in_flight(context):
    """That settlement completes, although its caller was cancelled."""
    hold = granted_hold(context, agent=CENT)
    settling = commit(context, hold, "0.01")
    next(settling)
    assert leave(context, hold, True, "release") is None
    settling.close()


# -- by id -------------------------------------------------------------------------------------------------------------


def test_a_commit_by_id_first_reads_the_hold_and_then_commits_in_the_windows_of_the_hold(context):
    known = hold_record(context, agent=25 * CENT).render()
    requests, settlement = drive(settle_by_id(context, "a", "0.07"), found(known), committed(7 * CENT))
    assert [type(request) for request in requests] == [Read, Commit]
    assert requests[1].windows == [context.state.current_window("agent")]
    assert settlement.amounts == {"agent": from_units(7 * CENT)}


@pytest.mark.parametrize(("by_operator", "mode"), [(False, ReleaseMode.BY_ID), (True, ReleaseMode.BY_OPERATOR)])
def test_the_request_of_a_release_by_id_shows_if_an_operator_releases_the_hold(context, by_operator, mode):
    known = found(hold_record(context, agent=CENT).render())
    flow = settle_by_id(context, "a", None, released=True, by_operator=by_operator)
    assert drive(flow, known, RELEASED_NOW).requests[1].mode is mode


def test_a_settlement_by_id_can_be_completed_later_if_the_hold_cannot_be_read(context):
    requests, _ = drive(settle_by_id(context, "a", "0.07"), NO_REPLY, raises=StoreUnavailable)
    fact = requests[0].prepares
    assert fact.complete(hold_record(context, agent=25 * CENT)).units == (7 * CENT,)


def test_a_settlement_by_id_without_a_reply_is_deferred_if_the_hold_is_in_the_journal():
    context = call_context(*BUDGETS, policy=AllowPolicy)
    granted_hold(context, "a", agent=25 * CENT)
    assert drive(settle_by_id(context, "a", "0.07"), NOT_SENT, NOT_SENT).result.deferred
    drive(settle_by_id(context, "elsewhere", "0.07"), NOT_SENT, raises=StoreUnavailable)


def test_a_settlement_by_id_is_not_deferred_if_the_store_refuses_it():
    context = call_context(*BUDGETS, policy=AllowPolicy)
    granted_hold(context, "a", agent=25 * CENT)
    drive(settle_by_id(context, "a", "0.07"), StoreError("WRONGTYPE"), raises=StoreError)
    assert queued(context) == []


def test_different_settlements_by_id_have_different_contents(context):
    """The outbox queues settlements with equal contents only once."""
    flows = (
        settle_by_id(context, "a", "0.07"),
        settle_by_id(context, "a", "0.08"),
        settle_by_id(context, "a", None),
        settle_by_id(context, "a", None, released=True),
        settle_by_id(context, "a", None, released=True, by_operator=True),
    )
    assert len({next(flow).prepares.contents for flow in flows}) == len(flows)


def test_a_settlement_by_id_fails_if_the_store_drops_the_hold_between_the_read_and_the_commit(context):
    known = found(hold_record(context, agent=CENT).render())
    drive(settle_by_id(context, "a", "0.01"), known, UNKNOWN, raises=UnknownHold)


def test_a_commit_by_id_of_an_unknown_hold_is_logged_but_a_release_by_id_is_not(context, caplog):
    drive(settle_by_id(context, "a", None, released=True), found(None), raises=UnknownHold)
    assert errors_of(caplog) == []
    drive(settle_by_id(context, "a", "0.07"), found(None), raises=UnknownHold)
    assert ["commit of hold a not recorded" in line for line in errors_of(caplog)] == [True]


# -- spend without a reservation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "amount", "error"), [("jobs", 1, InvalidArgument), ("agent", "-1", InvalidAmount)])
def test_a_record_of_slots_or_of_a_negative_amount_is_refused_before_anything_is_sent(context, budget, amount, error):
    assert drive(record(context, budget, amount, None, ""), raises=error).requests == []


def test_a_record_of_zero_spend_succeeds_but_conflicts_if_the_id_is_in_use(context):
    assert drive(record(context, "agent", 0, "r", ""), committed(0)).result.amounts == {"agent": 0}
    conflict = answer(Conflict(hold_record(context, agent=CENT).render()))
    drive(record(context, "agent", 0, "a", ""), conflict, raises=HoldConflict)


def test_a_record_of_spend_sends_a_digest_only_if_the_caller_chose_the_id(context):
    [generated], _ = drive(record(context, "agent", "0.07", None, ""), committed(7 * CENT))
    digests = [
        drive(record(context, "agent", amount, "r", operation), committed(7 * CENT)).requests[0].digest
        for amount, operation in (("0.07", ""), ("0.07", "research"), ("0.08", ""))
    ]
    assert generated.digest == ""
    assert digests[0] == digests[1] != digests[2]


def test_a_record_of_spend_is_repeated_in_the_current_window_if_its_window_has_ended(context):
    requests, settlement = drive(record(context, "agent", "0.07", "r", ""), answer(StaleWindow()), committed(7 * CENT))
    assert [type(request) for request in requests] == [RecordSpend, RecordSpend]
    assert (settlement.state, settlement.amounts) == ("recorded", {"agent": from_units(7 * CENT)})


def test_a_record_of_spend_without_a_reply_fails_or_is_deferred_as_the_outage_policy_decides(context):
    drive(record(context, "agent", "0.07", "r", ""), NOT_SENT, raises=StoreUnavailable)
    allowing = call_context(*BUDGETS, policy=AllowPolicy)
    assert drive(record(allowing, "agent", "0.07", "r", ""), NOT_SENT).result.deferred
    [(_, request)] = queued(allowing)
    assert request.is_late, "its window may have ended when it arrives"
