"""Reservations: the requests that a reservation sends, and its result for each reply of the store."""

from __future__ import annotations

import pytest

from ktrdr_budget import (
    Budget,
    BudgetExceeded,
    HoldConflict,
    InvalidAmount,
    InvalidArgument,
    StoreError,
    StoreUnavailable,
    UnknownBudget,
)
from ktrdr_budget.engine.calls.context import CallContext
from ktrdr_budget.engine.calls.reserve import release_grant, reserve
from ktrdr_budget.engine.outage.allow import AllowPolicy
from ktrdr_budget.engine.outage.policy import OutagePolicy
from ktrdr_budget.engine.protocol.codes import OPEN, RELEASED, RELEASED_BY_OPERATOR, ReleaseMode
from ktrdr_budget.engine.protocol.hold_record import digest_of
from ktrdr_budget.engine.protocol.operations import Release, Reserve, Retire
from ktrdr_budget.engine.protocol.replies import Conflict, Denied, Granted, Replayed, Settled, StaleWindow
from ktrdr_budget.engine.protocol.requests import Read

from ...helpers.calls import (
    NO_REPLY,
    NOT_READY,
    NOT_SENT,
    NOW_MS,
    answer,
    call_context,
    drive,
    found,
    granted_hold,
    hold_record,
    offline_hold,
    queued,
    units_of,
)

BUDGETS = [Budget("agent", "5.00"), Budget("tokens", 1000, unit="tokens")]
GRANTED = answer(Granted())
UNITS = 250_000_000
"""$0.25"""


@pytest.fixture
def context() -> CallContext:
    return call_context(*BUDGETS)


def reservation(context, budget="agent", amount="0.25", id=None, ttl=60, on_expiry="charge", operation="", owner=""):
    return reserve(context, budget, amount, id, ttl, on_expiry, operation, owner)


def kinds(requests) -> list[type]:
    return [type(request) for request in requests]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"budget": "agnt"}, UnknownBudget),
        ({"amount": "-1"}, InvalidAmount),
        ({"amount": "0"}, InvalidAmount),
        ({"amount": None}, InvalidAmount),
        ({"budget": {}, "amount": None}, InvalidArgument),
        ({"budget": {"agent": "1"}}, InvalidArgument),
        ({"id": "two words"}, InvalidArgument),
        ({"ttl": 0}, InvalidArgument),
        ({"on_expiry": "keep"}, InvalidArgument),
        ({"owner": "o" * 257}, InvalidArgument),
    ],
)
def test_a_reservation_with_an_invalid_argument_is_refused_before_anything_is_sent(context, wrong, error):
    assert drive(reservation(context, **wrong), raises=error).requests == []


def test_a_reservation_in_several_budgets_is_one_request_with_the_current_window_of_each_budget(context):
    [request], hold = drive(reservation(context, {"agent": "0.25", "tokens": 40}, None), GRANTED)
    windows = [(window.budget, window.span.name, units) for window, units in request.parts]
    assert windows == [("agent", "2025-12-01", UNITS), ("tokens", "2025-12-01", 40)]
    assert units_of(hold) == {"agent": UNITS, "tokens": 40}


def test_a_granted_hold_is_journalled_with_a_deadline_by_the_clock_of_the_store(context):
    _, hold = drive(reservation(context, ttl=30), answer(Granted(), now_us=(NOW_MS + 5000) * 1000))
    assert hold.deadline_ms == NOW_MS + 35_000
    journalled = context.state.journal.open_hold(hold.id)
    assert journalled is not None
    assert journalled.deadline_ms == hold.deadline_ms


def test_a_reservation_sends_a_new_request_name_only_if_the_caller_chose_the_id(context):
    """A generated id belongs to one request, but several requests may use an id that the caller chose."""
    [generated], _ = drive(reservation(context), GRANTED)
    [first], _ = drive(reservation(context, id="op_1"), GRANTED)
    [second], _ = drive(reservation(context, id="op_1"), GRANTED)
    assert generated.request == ""
    assert first.request != second.request != ""


def test_the_digest_in_a_request_depends_on_its_contents_but_not_on_its_ttl_or_labels(context):
    def digest(**given):
        [request], _ = drive(reservation(context, id="op_1", **given), GRANTED)
        return digest_of(request.request)

    assert digest() == digest(ttl=90, operation="research", owner="me") == digest(amount=0.25) != ""
    both = [{"agent": "1", "tokens": 2}, {"tokens": 2, "agent": 1}]
    assert digest(budget=both[0], amount=None) == digest(budget=both[1], amount=None)
    for other in ({"amount": "0.26"}, {"budget": "tokens", "amount": 1}, {"on_expiry": "release"}):
        assert digest(**other) != digest()


def test_holds_past_their_deadline_are_retired_after_a_denial_and_the_reservation_is_repeated(context):
    denied = Denied(context.state.current_window("agent").name, UNITS, 0, UNITS, 0, UNITS, NOW_MS - 1)
    record = hold_record(context, agent=UNITS, due=True).render()
    replies = answer(denied, "old"), found([record]), answer(Granted()), GRANTED
    requests, hold = drive(reservation(context), *replies)
    assert kinds(requests) == [Reserve, Read, Retire, Reserve]
    assert requests[2].hold_id == "old"
    assert hold.state == "open"


def test_a_reservation_is_denied_if_no_hold_is_past_its_deadline(context):
    denied = Denied(context.state.current_window("agent").name, UNITS, UNITS, 0, 0, UNITS, 0)
    requests, error = drive(reservation(context), answer(denied), raises=BudgetExceeded)
    assert (kinds(requests), error.reason) == ([Reserve], "budget_exhausted")


def test_a_reservation_is_denied_after_64_attempts_even_if_more_holds_are_past_their_deadline(context):
    denied = answer(Denied(context.state.current_window("agent").name, UNITS, UNITS, 0, 0, UNITS, 0), "old")
    rounds = [denied, found([None]), answer(Granted())] * 63
    requests, _ = drive(reservation(context), *rounds, denied, raises=BudgetExceeded)
    assert kinds(requests).count(Reserve) == 64


def test_a_reservation_is_repeated_in_the_next_window_if_its_window_has_ended(context):
    midnight_ms = context.state.current_window("agent").span.end_ms

    def stale(request):
        context.state.set_clock(midnight_ms * 1000, 0)
        return answer(StaleWindow(), now_us=midnight_ms * 1000)

    requests, hold = drive(reservation(context), stale, GRANTED)
    assert [request.windows[0].span.name for request in requests] == ["2025-12-01", "2025-12-02"]
    assert hold.windows == {"agent": "2025-12-02"}


@pytest.mark.parametrize(
    ("of_this_request", "unreceived", "is_replay"), [(False, False, True), (True, False, False), (True, True, True)]
)
def test_a_repeated_reservation_returns_the_hold_of_the_first_reservation(
    context, of_this_request, unreceived, is_replay
):
    """It is no replay if an earlier attempt of this request was granted: the caller has not received the hold yet."""

    def replayed(request):
        name = request.request if of_this_request else "first"
        record = hold_record(context, RELEASED_BY_OPERATOR if unreceived else OPEN, agent=UNITS)
        return answer(Replayed(record._replace(request=name, unreceived=unreceived).render()))

    _, hold = drive(reservation(context, id="op_1", ttl=30), replayed)
    assert units_of(hold) == {"agent": UNITS}
    assert hold.replayed is is_replay
    assert context.state.journal.open_hold("op_1") is not None


def test_a_replayed_hold_is_retired_and_returned_as_unconfirmed_if_it_is_past_its_deadline(context):
    due = answer(Replayed(hold_record(context, agent=UNITS, due=True).render()))
    unconfirmed = answer(Replayed(hold_record(context, "x", agent=UNITS, due=True).render()))
    requests, hold = drive(reservation(context, id="op_1"), due, answer(Granted()), unconfirmed)
    assert kinds(requests) == [Reserve, Retire, Reserve]
    assert hold.state == "unconfirmed"


def test_a_reservation_removes_the_tombstone_left_by_an_earlier_request_with_the_same_id(context):
    text = hold_record(context, RELEASED).render().replace("- - - -", "- ! - -")
    requests, _ = drive(reservation(context, id="op_1"), answer(Conflict(text)), answer(Settled(())), GRANTED)
    assert kinds(requests) == [Reserve, Release, Reserve]
    assert requests[1].mode is ReleaseMode.LIFT


def test_a_reservation_is_a_conflict_if_the_id_has_a_hold_with_other_contents(context):
    conflict = answer(Conflict(hold_record(context, agent=1).render()))
    assert drive(reservation(context, id="op_1"), conflict, raises=HoldConflict).result.state == "open"


@pytest.mark.parametrize(
    ("id", "error", "kept"),
    [(None, NO_REPLY, ["release"]), (None, NOT_SENT, []), ("op_1", NO_REPLY, [])],
    ids=["generated id", "never sent", "id of the caller, who may retry"],
)
def test_a_possible_grant_is_released_after_a_lost_reply_only_if_its_id_was_generated(context, id, error, kept):
    drive(reservation(context, id=id), error, raises=StoreUnavailable)
    assert [kind for kind, _ in queued(context)] == kept


@pytest.mark.parametrize(
    ("policy", "error", "granted"),
    [(OutagePolicy, NOT_SENT, False), (AllowPolicy, NOT_SENT, True), (AllowPolicy, NOT_READY, False)],
    ids=["deny", "allow", "allow, but the store replies"],
)
def test_the_outage_policy_may_grant_only_while_the_store_cannot_be_reached(policy, error, granted):
    flow = reservation(call_context(*BUDGETS, policy=policy))
    _, result = drive(flow, error, raises=None if granted else StoreUnavailable)
    assert (getattr(result, "offline", None) is not None) is granted


def test_repeating_a_reservation_that_was_granted_offline_returns_the_hold_without_a_request():
    context = call_context(*BUDGETS, policy=AllowPolicy)
    offline_hold(context, "op_1", agent=UNITS).accrue("0.10")
    requests, hold = drive(reservation(context, id="op_1"))
    assert requests == []
    assert hold.replayed
    assert hold.accrued_units == [100_000_000]


def test_two_concurrent_reservations_with_the_same_id_receive_the_same_offline_hold():
    context = call_context(*BUDGETS, policy=AllowPolicy)
    first = reservation(context, id="op_1")
    next(first)
    granted = drive(reservation(context, id="op_1"), NOT_SENT).result
    with pytest.raises(StopIteration) as end:
        first.throw(NOT_SENT)
    assert (granted.replayed, end.value.value.replayed) == (False, True)


@pytest.mark.parametrize("other", [{"amount": "0.26"}, {"budget": "tokens", "amount": 1}, {"on_expiry": "release"}])
def test_a_reservation_with_the_id_of_an_offline_hold_but_other_contents_is_a_conflict(other):
    context = call_context(*BUDGETS, policy=AllowPolicy)
    offline_hold(context, "op_1", agent=UNITS)
    drive(reservation(context, id="op_2"), NOT_SENT)
    for hold_id in ("op_1", "op_2"):
        assert drive(reservation(context, id=hold_id, **other), raises=HoldConflict).requests == []


def test_a_retry_of_a_reservation_that_was_granted_offline_is_recognized_by_its_digest():
    context = call_context(*BUDGETS, policy=AllowPolicy)
    granted = drive(reservation(context, id="op_1"), NOT_SENT).result
    granted.offline_record = granted.offline_record._replace(policy="r")
    assert drive(reservation(context, id="op_1")).result.replayed


def test_the_grant_of_a_cancelled_caller_is_released_at_once_or_after_the_store_replies_again(context):
    hold = granted_hold(context, agent=UNITS)
    drive(release_grant(context, hold), NO_REPLY)
    [(kind, queued_release)] = queued(context)
    [request], _ = drive(release_grant(context, hold), answer(Settled((0,))))
    assert kind == "release"
    assert queued_release.same_as(request)
    assert context.state.journal.open_hold(hold.id) is None


def test_the_release_of_a_grant_is_not_repeated_if_the_store_refuses_the_release(context):
    flow = release_grant(context, granted_hold(context, agent=UNITS))
    drive(flow, StoreError("WRONGTYPE"), raises=StoreError)
    assert queued(context) == []


def test_each_reservation_prepares_the_outage_policy():
    class Counting(OutagePolicy):
        begun = 0

        def begin(self) -> None:
            type(self).begun += 1

    drive(reservation(call_context(*BUDGETS, policy=Counting)), GRANTED)
    assert Counting.begun == 1
