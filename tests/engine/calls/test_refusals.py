"""The exception for each reply that refuses a request, and when a denied caller may retry."""

from __future__ import annotations

import pytest

from ktrdr_budget import (
    Budget,
    BudgetExceeded,
    DefinitionConflict,
    HoldConflict,
    InvalidAmount,
    StoreError,
    TooManyBudgets,
    TooManyHolds,
    UnknownBudget,
    UnknownHold,
)
from ktrdr_budget.engine.calls.context import CallContext
from ktrdr_budget.engine.calls.refusals import error_for, refusal
from ktrdr_budget.engine.protocol.codes import ExtendMode
from ktrdr_budget.engine.protocol.operations import Extend, ExtendAmount, Labels, Operation, Reserve
from ktrdr_budget.engine.protocol.replies import (
    Conflict,
    Denied,
    OtherDefinition,
    TooManyBudgetsReply,
    TooManyHoldsReply,
    UnexpectedReply,
    UnknownHoldReply,
    UnknownLimit,
    Unreadable,
    WindowFull,
)

from ...helpers.calls import NOT_SENT, NOW_MS, NOW_US, call_context, drive, found, hold_record

AGENT, TOKENS = Budget("agent", "5.00"), Budget("tokens", 1000, unit="tokens")
HOURLY = Budget("tokens", 1000, unit="tokens", period="hour")
SECOND = 1000


@pytest.fixture
def context() -> CallContext:
    return call_context(AGENT, TOKENS, Budget("total", 1000, unit="tokens", period="ever"))


def reservation(context, name="tokens", units=40) -> Operation:
    parts = [(context.state.current_window(name), units)]
    return Reserve("a", context.state.keys.hold("a"), parts, ttl_ms=1000, policy="c", labels=Labels(), now_ms=NOW_MS)


def growth(context) -> Operation:
    windows, amounts = [context.state.current_window("tokens")], [ExtendAmount(reserved=40)]
    return Extend("a", context.state.keys.hold("a"), windows, amounts, 1000, ExtendMode.GROW)


# -- refusals besides denials ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (TooManyBudgetsReply("tokens"), TooManyBudgets, "has the maximum of 1000 budgets; 'tokens' would be one more"),
        (TooManyHoldsReply(7, 0), TooManyHolds, "'default' has 7 open and unconfirmed holds; the maximum is 1000000"),
        (UnknownLimit("tokens"), UnknownBudget, "'tokens' has no limit"),
        (UnknownHoldReply(), UnknownHold, "unknown hold 'a'"),
        (Unreadable("WRONGTYPE"), StoreError, "hold 'a': WRONGTYPE"),
        (UnexpectedReply("?"), StoreError, "unexpected reply to Reserve of 'a': UnexpectedReply"),
        (OtherDefinition("tokens", HOURLY.definition), DefinitionConflict, "migrate tokens"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, tuple) else "",
)
def test_each_kind_of_refusal_by_the_store_has_an_exception_and_a_message(context, reply, error, message):
    raised = error_for(context, reservation(context), reply, NOW_US)
    assert type(raised) is error
    assert message in str(raised)


def test_the_error_for_a_conflict_describes_the_hold_that_already_has_the_id(context):
    raised = error_for(context, reservation(context), Conflict(hold_record(context, tokens=7).render()), NOW_US)
    assert isinstance(raised, HoldConflict)
    assert str(raised).startswith("hold 'a' was reserved at 7 tokens and is open")


@pytest.mark.parametrize(
    ("name", "bound"), [("agent", "$4,611,686,018.43"), ("tokens", "4,611,686,018,427,387,904 tokens")]
)
def test_the_error_for_a_full_window_names_the_bound_in_the_unit_of_its_budget(context, name, bound):
    op = reservation(context, name)
    raised = error_for(context, op, WindowFull(op.windows[0].name), NOW_US)
    assert isinstance(raised, InvalidAmount)
    assert f"{name!r} would count {bound}" in str(raised)


@pytest.mark.parametrize(
    ("deadline_ms", "seconds"), [(NOW_MS + 1001, 2), (NOW_MS + 1000, 1), (NOW_MS - 5000, 1), (0, None)]
)
def test_the_caller_may_retry_at_the_first_deadline_if_there_are_too_many_holds(context, deadline_ms, seconds):
    raised = error_for(context, reservation(context), TooManyHoldsReply(7, deadline_ms), NOW_US)
    assert isinstance(raised, TooManyHolds)
    assert raised.retry_after == seconds


def test_the_error_for_growth_after_a_migration_says_that_the_hold_cannot_grow(context):
    raised = error_for(context, growth(context), OtherDefinition("tokens", TOKENS.definition), NOW_US)
    assert "cannot grow" in str(raised)
    raised = error_for(context, growth(context), OtherDefinition("tokens", HOURLY.definition), NOW_US)
    assert "migrate" in str(raised), "here it is another definition"


def test_the_figures_are_counts_if_growth_is_denied_in_a_budget_unknown_to_this_limiter(context):
    window = context.state.window("elsewhere", "2025-12-01~aaaaaa")
    op = Extend("a", "key", [window], [ExtendAmount(reserved=40)], 1000, ExtendMode.GROW)
    reply = Denied(window.name, 1000, 990, 0, 0, 40, 0)
    assert drive(refusal(context, op, reply, NOW_US)).result.fits == 10
    assert "cannot grow" in str(error_for(context, op, OtherDefinition("elsewhere", HOURLY.definition), NOW_US))


# -- denials -----------------------------------------------------------------------------------------------------------


def denied(context, name="tokens", **figures) -> Denied:
    """A denial caused by the amounts of other holds; the first deadline of any hold is in five seconds."""
    amounts = {"spent": 0, "held": 990, "unconfirmed": 0, "requested": 40, "first_deadline_ms": NOW_MS + 5 * SECOND}
    return Denied(context.state.current_window(name).name, 1000, **(amounts | figures))


def record(context, seconds, **units) -> str:
    return hold_record(context, **units)._replace(deadline_ms=NOW_MS + seconds * SECOND).render()


def test_a_denied_caller_may_retry_when_the_first_hold_in_the_same_window_expires(context):
    """The first deadline in the store's reply may belong to a hold of another budget."""
    holds = found(["b", "c"]), found([record(context, 5, agent=1), record(context, 20, tokens=990)])
    requests, error = drive(refusal(context, reservation(context), denied(context), NOW_US), *holds)
    assert len(requests) == 2
    assert isinstance(error, BudgetExceeded)
    assert (error.reason, error.retry_after, error.fits) == ("budget_held", 20, 10)


def test_callers_denied_within_one_second_share_one_search_for_the_first_deadline(context):
    holds = found(["b"]), found([record(context, 20, tokens=990)])
    drive(refusal(context, reservation(context), denied(context), NOW_US), *holds)
    requests, error = drive(refusal(context, reservation(context), denied(context), NOW_US + 900_000))
    assert requests == []
    assert error.retry_after == 20


def test_a_caller_denied_during_a_search_for_the_deadline_receives_the_first_deadline_of_any_hold(context):
    searching = refusal(context, reservation(context), denied(context), NOW_US)
    next(searching)
    assert drive(refusal(context, reservation(context), denied(context), NOW_US)).result.retry_after == 5
    searching.close()


def test_retry_after_for_a_denied_growth_ignores_the_deadline_of_the_growing_hold(context):
    holds = found(["a", "b"]), found([record(context, 20, tokens=40), record(context, 30, tokens=940)])
    error = drive(refusal(context, growth(context), denied(context), NOW_US), *holds).result
    assert error.retry_after == 30


@pytest.mark.parametrize("reply", [NOT_SENT, found([])], ids=["no reply to the search", "no hold of this window"])
def test_a_denied_caller_may_retry_at_the_end_of_the_window_if_no_hold_is_found(context, reply):
    error = drive(refusal(context, reservation(context), denied(context), NOW_US), reply).result
    assert error.retry_after == 12 * 3600


@pytest.mark.parametrize("state", ["c", "x", None, "o"], ids=["settled", "unconfirmed", "unknown", "past its deadline"])
def test_retry_after_considers_only_open_holds_before_their_deadline(context, state):
    gone = state and hold_record(context, state, tokens=990, due=state == "o").render()
    holds = found(["b", "c"]), found([gone, record(context, 20, tokens=990)])
    assert drive(refusal(context, reservation(context), denied(context), NOW_US), *holds).result.retry_after == 20


@pytest.mark.parametrize(("name", "searched", "seconds"), [("total", 127, None), ("tokens", 128, 12 * 3600)])
def test_retry_after_is_the_end_of_the_window_if_only_holds_of_other_windows_are_found(
    context, name, searched, seconds
):
    holds = found(["h"] * searched), found([record(context, 1 + number, agent=1) for number in range(searched)])
    error = drive(refusal(context, reservation(context, name), denied(context, name), NOW_US), *holds).result
    assert error.retry_after == seconds


def test_retry_after_in_a_window_without_end_is_the_last_deadline_of_the_128_holds_that_were_read(context):
    names = [f"h{number}" for number in range(128)]
    holds = found(names), found([record(context, 1 + number, agent=1) for number in range(128)])
    error = drive(refusal(context, reservation(context, "total"), denied(context, "total"), NOW_US), *holds).result
    assert error.retry_after == 128


@pytest.mark.parametrize("figures", [{"spent": 990, "held": 0}, {"requested": 1001}, {"first_deadline_ms": 0}])
def test_holds_are_read_for_retry_after_only_if_their_expiry_can_make_room(context, figures):
    requests, error = drive(refusal(context, reservation(context), denied(context, **figures), NOW_US))
    assert requests == []
    assert isinstance(error, BudgetExceeded)
