"""What all calls share: amounts, labels, reads of holds by id, and the deadlines that are shown to denied callers."""

from __future__ import annotations

import pytest

from ktrdr_budget import Budget, InvalidAmount, InvalidArgument, StoreError, UnknownBudget, UnknownHold
from ktrdr_budget.engine.calls.context import CallContext, DenialCache, checked_label
from ktrdr_budget.engine.protocol.codes import ReleaseMode
from ktrdr_budget.engine.protocol.operations import Labels, Retire
from ktrdr_budget.engine.protocol.replies import Retired
from ktrdr_budget.engine.protocol.requests import Read
from ktrdr_budget.engine.replica import outbox as outboxes

from ...helpers.calls import answer, call_context, drive, errors_of, found, hold_record, queued

BUDGETS = [Budget("agent", "5.00"), Budget("tokens", 1000, unit="tokens")]
RETIRED = answer(Retired())


@pytest.fixture
def context() -> CallContext:
    return call_context(*BUDGETS)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "amount", "wanted"),
    [
        ("agent", "0.25", [("agent", 250_000_000)]),
        ("tokens", 40, [("tokens", 40)]),
        ({"tokens": 40, "agent": 1}, None, [("tokens", 40), ("agent", 1_000_000_000)]),
    ],
)
def test_amounts_become_whole_units_of_each_budget_in_the_order_of_the_caller(context, budget, amount, wanted):
    assert context.wanted(budget, amount) == wanted


@pytest.mark.parametrize(
    ("budget", "amount", "error"),
    [
        ("agent", None, InvalidAmount),
        ("agnt", 1, UnknownBudget),
        ("tokens", "0.5", InvalidAmount),
        ({}, None, InvalidArgument),
        (["agent"], 1, InvalidArgument),
        ({"agent": 1}, 1, InvalidArgument),
        ({"agent": 1, "agnt": 1}, None, UnknownBudget),
    ],
)
def test_amounts_with_an_unknown_budget_or_with_a_missing_or_invalid_value_are_refused(context, budget, amount, error):
    with pytest.raises(error):
        context.wanted(budget, amount)


def test_an_amount_of_zero_is_accepted_only_if_the_argument_positive_is_false(context):
    assert context.wanted("agent", 0, positive=False) == [("agent", 0)]
    with pytest.raises(InvalidAmount):
        context.wanted("agent", 0)


@pytest.mark.parametrize("trace_id", ["", "t1"])
def test_labels_contain_the_current_trace(trace_id):
    assert call_context(*BUDGETS, trace_id=trace_id).labels("me", "chat") == Labels("me", "chat", trace_id)
    assert call_context(*BUDGETS, trace_id=trace_id).labels("me", "") == Labels("me", "", trace_id)
    assert call_context(*BUDGETS, trace_id=trace_id).labels("", "") == Labels("", "", trace_id)


@pytest.mark.parametrize("label", ["l" * 257, b"bytes", 7, "\ud800"], ids=["too long", "bytes", "number", "surrogate"])
def test_a_label_that_is_too_long_or_not_valid_text_is_refused(label):
    with pytest.raises(InvalidArgument):
        checked_label(label)
    assert checked_label("l" * 256) == "l" * 256


# -- holds by id -------------------------------------------------------------------------------------------------------


def test_a_hold_past_its_deadline_is_retired_and_read_again(context):
    due, retired = hold_record(context, agent=5, due=True), hold_record(context, "x", agent=5, due=True)
    requests, record = drive(context.read_hold("a"), found(due.render()), RETIRED, found(retired.render()))
    assert [type(request) for request in requests] == [Read, Retire, Read]
    assert record == retired


def test_the_second_read_of_a_hold_is_returned_if_the_hold_cannot_be_retired(context):
    """The caller then receives the open hold."""
    due = hold_record(context, agent=5, due=True)
    assert drive(context.read_hold("a"), found(due.render()), RETIRED, found(due.render())).result == due


def test_reading_an_unknown_hold_is_an_error(context):
    drive(context.read_hold("a"), found(None), raises=UnknownHold)


def test_the_other_holds_are_still_retired_if_one_hold_cannot_be_retired(context, caplog):
    texts = [hold_record(context, agent=5, due=True).render(), None]
    requests, _ = drive(context.retire(["a", "b"]), found(texts), StoreError("WRONGTYPE"), RETIRED)
    assert [(request.hold_id, len(request.windows)) for request in requests[1:]] == [("a", 1), ("b", 0)]
    assert "retirement of hold a failed: WRONGTYPE" in caplog.text


@pytest.mark.parametrize(("request_name", "mode"), [("", ReleaseMode.FINAL), ("r1", ReleaseMode.UNRECEIVED)])
def test_a_grant_that_no_caller_received_is_queued_for_release(context, request_name, mode):
    context.release_later("a", [context.state.current_window("agent")], request_name)
    [(kind, release)] = queued(context)
    assert (kind, release.mode, release.request) == ("release", mode, request_name)


def test_an_error_is_logged_if_a_full_outbox_drops_the_release_of_a_grant(context, caplog, monkeypatch):
    monkeypatch.setattr(outboxes, "IN_DOUBT_MAX", 1)
    for hold_id in ("first", "second"):
        context.release_later(hold_id, [context.state.current_window("agent")], "")
    assert errors_of(caplog) == ["outbox full: dropped a request with id first; its outcome is unknown"]


# -- denied callers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "first_deadline_ms", "now_ms", "cached"),
    [
        ("agent", 9_000, 1_999, 7_000),
        ("agent", 9_000, 2_000, None),
        ("agent", 9_000, 999, None),
        ("agent", 9_001, 1_000, None),
        ("tokens", 9_000, 1_000, None),
    ],
    ids=["within a second", "after a second", "clock set back", "the first hold has changed", "another window"],
)
def test_a_deadline_that_was_read_for_a_denied_caller_is_cached_for_one_second(
    context, budget, first_deadline_ms, now_ms, cached
):
    cache = DenialCache()
    cache.put(context.state.current_window("agent"), 9_000, 1_000, 7_000)
    assert cache.get(context.state.current_window(budget), first_deadline_ms, now_ms) == cached
