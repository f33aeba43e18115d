"""The interface of outage policies, and policy `deny`: nothing is granted or recorded without the store."""

from __future__ import annotations

import pytest

from ktrdr_budget import Budget
from ktrdr_budget.engine.calls.context import CallContext
from ktrdr_budget.engine.outage.policy import OfflineReservation, release_unreceived
from ktrdr_budget.engine.protocol.codes import CommitMode, ReleaseMode
from ktrdr_budget.engine.protocol.operations import Commit, CommitAmount, Labels, RecordSpend, Release
from ktrdr_budget.engine.replica import outbox as outboxes
from ktrdr_budget.money import from_units

from ...helpers.calls import NOW_US, TTL_MS, call_context, errors_of, queued

AGENT = Budget("agent", "5.00")
CENT = 10_000_000


@pytest.fixture
def context() -> CallContext:
    return call_context(AGENT)


def commit(context: CallContext, hold_id: str = "a") -> Commit:
    window = context.state.current_window("agent")
    return Commit(hold_id, "key", [window], [CommitAmount(CommitMode.EXACT, 7 * CENT)])


def test_policy_deny_grants_nothing_and_records_nothing_without_the_store(context):
    parts = [(context.state.current_window("agent"), CENT)]
    request = OfflineReservation("a", parts, TTL_MS, "c", Labels(), "", False)
    assert context.policy.reserve(request) is None
    assert context.policy.record(RecordSpend("r", "key", parts), ambiguous=False) is None
    assert not context.policy.owns("a")
    assert (context.policy.defers, context.policy.extends, dict(context.policy.remaining)) == (False, False, {})
    assert queued(context) == []


@pytest.mark.parametrize(("kind", "state", "units"), [
    (Commit, "committed", 7), (Release, "released", 0), (RecordSpend, "recorded", 3),
])  # fmt: skip
def test_a_deferred_settlement_is_queued_and_its_caller_receives_the_result(context, kind, state, units):
    window = context.state.current_window("agent")
    ops = {
        Commit: commit(context),
        Release: Release("a", "key", [window]),
        RecordSpend: RecordSpend("a", "key", [(window, 3 * CENT)]),
    }
    settlement = context.policy.defer(ops[kind])
    assert (settlement.state, settlement.amounts) == (state, {"agent": from_units(units * CENT)})
    assert settlement.deferred
    assert queued(context) == [("deferred", ops[kind])]


@pytest.mark.parametrize("ambiguous", [False, True])
def test_the_time_of_the_attempt_is_kept_if_a_deferred_settlement_may_have_been_executed(context, ambiguous):
    """A day later, the store has dropped the id of the settlement, and would count a second execution."""
    context.policy.defer(commit(context), ambiguous=ambiguous)
    [entry] = context.outbox
    assert (entry.maybe_executed_us is None) is not ambiguous
    assert entry.maybe_executed_us is None or entry.maybe_executed_us >= NOW_US


def test_an_error_is_logged_if_a_full_outbox_drops_a_deferred_settlement(context, monkeypatch, caplog):
    monkeypatch.setattr(outboxes, "DEFERRED_MAX", 1)
    context.policy.defer(commit(context, "first"))
    assert errors_of(caplog) == []
    context.policy.defer(commit(context, "second"))
    assert ["spend of first dropped" in line for line in errors_of(caplog)] == [True]


@pytest.mark.parametrize(("request_name", "mode"), [("", ReleaseMode.FINAL), ("r1", ReleaseMode.UNRECEIVED)])
def test_an_id_chosen_by_the_caller_stays_usable_after_its_undelivered_grant_is_released(context, request_name, mode):
    window = context.state.current_window("agent")
    release = release_unreceived("a", "key", iter([window]), request_name)
    assert (release.mode, release.request, list(release.windows)) == (mode, request_name, [window])
