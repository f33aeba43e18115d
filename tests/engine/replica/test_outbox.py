"""The outbox of a replica: entries that it keeps, replaces and evicts."""

from __future__ import annotations

import pytest

from ktrdr_budget import Budget
from ktrdr_budget.engine.outage.policy import release_unreceived
from ktrdr_budget.engine.protocol.codes import CommitMode
from ktrdr_budget.engine.protocol.operations import Commit, CommitAmount, Labels, Reserve
from ktrdr_budget.engine.protocol.requests import PreparedFact
from ktrdr_budget.engine.replica import outbox as outboxes
from ktrdr_budget.engine.replica.outbox import Entry, Outbox
from ktrdr_budget.engine.replica.state import ReplicaState

STATE = ReplicaState("default", [Budget("agent", "5.00")])
AGENT = STATE.current_window("agent")
NOW_US = 1_764_000_000_000_000


def commit(hold_id: str, units: int = 7) -> Commit:
    return Commit(hold_id, STATE.keys.hold(hold_id), [AGENT], [CommitAmount(CommitMode.EXACT, units)])


def reserve(hold_id: str, request: str) -> Reserve:
    terms = {"ttl_ms": 1000, "policy": "c", "labels": Labels(), "now_ms": 0, "request": request}
    return Reserve(hold_id, STATE.keys.hold(hold_id), [(AGENT, 5)], **terms)


def release(hold_id: str, request: str) -> Entry:
    op = release_unreceived(hold_id, STATE.keys.hold(hold_id), [AGENT], request)
    return Entry(op, "release", NOW_US)


def test_the_outbox_counts_deferred_settlements_and_requests_in_doubt_separately():
    outbox = Outbox()
    outbox.add(Entry(commit("a"), "deferred", None))
    outbox.add(Entry(commit("b"), "settlement", NOW_US))
    assert (outbox.deferred, outbox.in_doubt, len(outbox)) == (1, 1, 2)
    for entry in outbox:
        assert outbox.end(entry, "executed")
        assert not outbox.end(entry, "executed"), "it has ended"
    assert (len(outbox), outbox.outcomes["executed"]) == (0, 1), "outcomes count requests in doubt only"


def test_the_outbox_queues_equal_settlements_only_once():
    outbox = Outbox()
    for _ in range(2):
        outbox.add(Entry(commit("a"), "settlement", NOW_US))
    outbox.add(Entry(commit("a", 8), "settlement", NOW_US))
    assert [entry.request.units for entry in outbox] == [(7,), (8,)]


def test_the_outbox_queues_two_settlements_by_id_only_once_if_the_contents_are_equal():
    outbox = Outbox()
    for contents in ("'0.07'", "'0.07'", "'0.08'"):
        fact = PreparedFact("a", STATE.keys.hold("a"), contents, lambda _: commit("a"))
        outbox.add(Entry(fact, "by id", NOW_US))
    assert outbox.in_doubt == 2


def test_a_repeated_deferred_settlement_keeps_the_earliest_time_of_a_possible_execution():
    """An attempt may have been executed; the store drops the id a day later."""
    outbox = Outbox()
    for maybe_executed_us in (None, NOW_US, NOW_US + 1):
        outbox.add(Entry(commit("a"), "deferred", maybe_executed_us))
    [entry] = outbox
    assert entry.maybe_executed_us == NOW_US


def test_a_queued_release_of_a_grant_replaces_the_look_up_of_the_same_reservation():
    outbox = Outbox()
    outbox.add(Entry(reserve("a", "r1"), "look up", NOW_US))
    outbox.add(release("a", "r1"))
    outbox.add(Entry(reserve("a", "r1"), "look up", NOW_US))
    assert [entry.kind for entry in outbox] == ["release"]
    outbox.add(Entry(reserve("a", "r2"), "look up", NOW_US))
    assert [entry.kind for entry in outbox] == ["release", "look up"], "another request for the same id"


@pytest.mark.parametrize(
    ("kind", "bound", "event"),
    [
        ("deferred", "DEFERRED_MAX", "deferred spend of a dropped"),
        ("settlement", "IN_DOUBT_MAX", "dropped a request with id a; its outcome is unknown"),
    ],
)
def test_a_full_outbox_evicts_and_logs_the_oldest_entry_of_the_same_kind(monkeypatch, caplog, kind, bound, event):
    monkeypatch.setattr(outboxes, bound, 2)
    outbox = Outbox()
    other = "settlement" if kind == "deferred" else "deferred"
    outbox.add(Entry(commit("first"), other, NOW_US))
    evicted = [outbox.add(Entry(commit(hold_id), kind, NOW_US)) for hold_id in "abc"]
    assert [entry and entry.hold_id for entry in evicted] == [None, None, "a"]
    assert {entry.hold_id for entry in outbox} == {"first", "b", "c"}
    assert outbox.deferred_lost == (kind == "deferred")
    assert caplog.messages == [f"outbox full: {event}"]


def test_a_successful_retry_by_the_caller_removes_requests_in_doubt_for_the_same_hold():
    outbox = Outbox()
    outbox.add(Entry(reserve("a", "r1"), "look up", NOW_US))
    outbox.add(Entry(commit("a"), "settlement", NOW_US))
    outbox.add(Entry(commit("a"), "deferred", None))
    assert not outbox.retried("a", settled=False), "the hold was received, its settlement is still in doubt"
    assert outbox.retried("a", settled=True)
    assert [entry.kind for entry in outbox] == ["deferred"], "its caller continued without a reply"
