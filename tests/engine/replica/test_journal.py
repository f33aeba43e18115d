"""The journal of a replica: acknowledged writes, and their replay (P13)."""

from __future__ import annotations

from typing import Any

import pytest

from ktrdr_budget import Budget
from ktrdr_budget.engine.protocol.codes import CommitMode, ReleaseMode
from ktrdr_budget.engine.protocol.operations import (
    Commit,
    CommitAmount,
    RecordSpend,
    Release,
    Restore,
    SettleOnBehalf,
    SettlingOperation,
)
from ktrdr_budget.engine.protocol.window import Window
from ktrdr_budget.engine.replica import journal as journals
from ktrdr_budget.engine.replica.journal import AGE_MAX_MS, HOLD_AGE_MAX_MS, Journal
from ktrdr_budget.engine.replica.state import ReplicaState

from ...helpers.windows import text_of

NOW_MS = 1_764_000_000_000
BUDGETS = [Budget("agent", "5.00"), Budget("ever", "5.00", period="ever"), Budget("jobs", 3, kind="slots")]
STATE = ReplicaState("default", BUDGETS)
KEYS = STATE.keys
AGENT, EVER, JOBS = (STATE.current_window(name) for name in ("agent", "ever", "jobs"))


def commit(hold_id: str, *parts: tuple[Window, int], remark: str = "", trace_id: str = "", known: str = "") -> Commit:
    windows = [window for window, _ in parts]
    amounts = [CommitAmount(CommitMode.EXACT, units) for _, units in parts]
    return Commit(hold_id, KEYS.hold(hold_id), windows, amounts, remark=remark, trace_id=trace_id, known=known)


def release(hold_id: str, *windows: Window, mode: str = "0", known: str = "") -> Release:
    return Release(hold_id, KEYS.hold(hold_id), windows, ReleaseMode(mode), known=known)


def spend(hold_id: str, *parts: tuple[Window, int], **labels: Any) -> RecordSpend:
    return RecordSpend(hold_id, KEYS.hold(hold_id), parts, **labels)


def settle(journal: Journal, op: SettlingOperation, line: str, now_ms: int = NOW_MS) -> None:
    """Add a settlement and the store's reply to the journal."""
    journal.settled(op, op.parse(line), now_ms)


def grant(journal: Journal, hold_id: str, now_ms: int, labels: str = "- - - -") -> None:
    record = f"o c {NOW_MS + 900_000} {now_ms * 1000} 0 {labels}{AGENT.segment}5,,"
    journal.granted(hold_id, [AGENT], record, now_ms * 1000)


def totals(journal: Journal) -> dict[str, int]:
    return {op.windows[0].budget: op.units for op in journal.totals(KEYS)}


def open_texts(journal: Journal) -> dict[str, str]:
    return {op.hold_id: op.text for op in journal.holds(KEYS)}


AT = f"c {NOW_MS} {NOW_MS}000 0"
NAME = AGENT.name


@pytest.mark.parametrize(
    ("op", "line", "again"),
    [
        (commit("a", (AGENT, 5)), "k - 7", f"K a agent:\nc {AT} - - - -|u,{NAME},,7,,7"),
        (
            commit("a", (AGENT, 7), remark="model", trace_id="t1"),
            "k o 7",
            f"K a agent:\nc {AT} - model t1 -|u,{NAME},,7,,7",
        ),
        (commit("a", (AGENT, 7)), "k l 7", f"K a agent:\nc {AT} - - - -|u,{NAME},,7,,7"),
        (
            commit("a", (AGENT, 7), (JOBS, 1)),
            "k - 7,0",
            f"K a agent: jobs:\nc {AT} - - - -|u,{NAME},,7,,7|s,{JOBS.name},,0,,0",
        ),
        (spend("a", (AGENT, 7), operation="research", trace_id="t1"), "k - 7", "N a 1 - research t1 - agent:7"),
        (
            spend("a", (AGENT, 7), scope="user=alice;usd", digest="abc"),
            "k - 7",
            "N a 1 -!abc. - - user=alice;usd agent:7",
        ),
        (release("a", AGENT), "k - 0", f"K a agent:\nr {AT} - - - -|u,{NAME},,0,,"),
    ],
)
def test_the_journal_replays_a_settlement_even_if_the_reservation_is_not_in_the_journal(op, line, again):
    journal = Journal()
    settle(journal, op, line)
    [replayed] = journal.settlements(KEYS, NOW_MS)
    assert text_of(replayed) == again
    assert journal.settlements(KEYS, NOW_MS + AGE_MAX_MS + 1) == [], "the store may have dropped its id"
    assert totals(journal) == ({"agent": 7} if "7" in line else {})


def test_a_replayed_settlement_counts_for_the_replica_that_settled_first():
    journal = Journal("me")
    settle(journal, commit("other", (AGENT, 7)), "p - 7 you")
    settle(journal, commit("own", (AGENT, 5)), "k - 5")
    settle(journal, commit("own", (AGENT, 5)), "p - 5 me")
    own, other = journal.settlements(KEYS, NOW_MS)
    assert (own.hold_id, type(own)) == ("own", Restore)
    assert isinstance(other, SettleOnBehalf)
    assert text_of(other) == f"S you K other agent:\nc {AT} - - - -|u,{NAME},,7,,7"
    assert totals(journal) == {"agent": 5}


def test_a_settlement_that_is_retried_after_a_lost_reply_counts_for_this_replica():
    journal = Journal("me")
    settle(journal, commit("own", (AGENT, 5), (EVER, 5)), "p - 5,5 me")
    settle(journal, spend("spent", (AGENT, 2)), "p - 2 me agent:today")
    assert [op.hold_id for op in journal.settlements(KEYS, NOW_MS)] == ["own", "spent"]
    assert totals(journal) == {"agent": 7, "ever": 5}


def test_a_settlement_counts_for_the_replica_named_in_the_record_of_the_store():
    journal = Journal("me")
    op = commit("a", (AGENT, 7))
    settle(journal, op, "k - 7")
    journal.replayed("a", op.parse("p - 7 you"))
    assert totals(journal) == {}
    assert isinstance(journal.settlements(KEYS, NOW_MS)[0], SettleOnBehalf)
    journal.replayed("a", op.parse("p - 7 me"))
    assert totals(journal) == {"agent": 7}
    for line in ("p - 7 -", "p - 0", "k - 7", "c record", "u"):
        journal.replayed("a", op.parse(line))
    assert totals(journal) == {"agent": 7}


def test_each_round_checks_the_next_few_open_holds_of_the_journal():
    journal = Journal()
    for number in range(5):
        grant(journal, f"op_{number}", NOW_MS)
    grant(journal, "new", NOW_MS + 9_000)
    rounds = [journal.holds_to_check(NOW_MS + 10_000, 2) for _ in range(5)]
    assert rounds == [["op_0", "op_1"], ["op_2", "op_3"], ["op_4"], [], ["op_0", "op_1"]]
    for number, state in enumerate("crzxo"):
        journal.seen(f"op_{number}", f"{state} c 1 1 0 - - - -|u,{NAME},,5,,", NOW_MS * 1000)
    journal.seen("op_4", f"c c 1 1 0 - - - -|u,{NAME},,5,,", NOW_MS * 1000 - 1)
    states = {hold_id: text[0] for hold_id, text in open_texts(journal).items()}
    assert states == {"op_2": "z", "op_3": "x", "op_4": "o", "new": "o"}


def test_a_settlement_evicted_from_the_journal_still_counts_in_the_subtotal_of_the_window(monkeypatch):
    monkeypatch.setattr(journals, "SETTLEMENTS_MAX", 8)
    journal = Journal()
    for number in range(30):
        settle(journal, commit(f"op_{number}", (AGENT, 1), (EVER, 2)), "k - 1,2")
    kept = len(journal.settlements(KEYS, NOW_MS))
    assert 4 <= kept <= 8
    assert kept + journal.forgotten_settlements == 30
    assert totals(journal) == {"agent": 30, "ever": 60}


def test_the_journal_keeps_a_hold_until_the_hold_is_settled_or_too_old():
    journal = Journal()
    for hold_id in ("a", "b"):
        grant(journal, hold_id, NOW_MS, "me research t1 team=quant")
    settle(journal, commit("a", (AGENT, 7)), "k - 7")
    replay = f"K b agent:\no c {NOW_MS + 900_000} {NOW_MS * 1000} 0 me research t1 team=quant|u,{NAME},,5,,"
    assert [text_of(op) for op in journal.holds(KEYS)] == [replay]
    journal.settlements(KEYS, NOW_MS + HOLD_AGE_MAX_MS)
    [hold] = journal.holds(KEYS)
    journal.extended("b", hold.text, [AGENT], (NOW_MS + 2) * 1000)
    journal.settlements(KEYS, NOW_MS + HOLD_AGE_MAX_MS + 1)
    assert len(journal.holds(KEYS)) == 1, "the store had the hold since"
    journal.settlements(KEYS, NOW_MS + HOLD_AGE_MAX_MS + 3)
    assert journal.holds(KEYS) == []
    assert HOLD_AGE_MAX_MS <= AGE_MAX_MS, "else it would be replayed for longer than its settlement by another replica"


def test_the_age_of_a_hold_in_the_journal_counts_from_the_last_reply_with_the_record_of_the_hold():
    journal = Journal()
    grant(journal, "b", NOW_MS)
    [hold] = journal.holds(KEYS)
    journal.seen("b", hold.text, (NOW_MS + 2) * 1000)
    journal.settlements(KEYS, NOW_MS + HOLD_AGE_MAX_MS + 1)
    assert len(journal.holds(KEYS)) == 1


RECORD = f"o a 9 8 7 me ops t1 -|u,{NAME},5,6,3,|s,{JOBS.name},,1,,"


@pytest.mark.parametrize(
    ("make", "line", "settled"),
    [
        (lambda known: commit("a", (AGENT, 7), (JOBS, 1), known=known), "k - 7,0", "c ops t1 7 0"),
        (
            lambda known: commit("a", (AGENT, 7), (JOBS, 1), remark="model", trace_id="t2", known=known),
            "k o 7,0",
            "c ops%20model t2 7 0",
        ),
        (lambda known: release("a", AGENT, JOBS, known=known), "k - 0,0", "r ops t1  "),
        (lambda known: release("a", AGENT, JOBS, mode="i", known=known), "k - 0,0", "r ops t1  "),
    ],
)
@pytest.mark.parametrize("granted_here", [True, False])
def test_the_journal_replays_a_settlement_together_with_its_reservation(make, line, settled, granted_here):
    journal = Journal()
    if granted_here:
        journal.granted("a", [AGENT, JOBS], RECORD, NOW_MS * 1000)
    settle(journal, make("" if granted_here else RECORD), line)
    state, operation, trace, spent, slots = settled.split(" ")
    [again] = journal.settlements(KEYS, NOW_MS)
    head = f"{state} a 9 8 7 me {operation} {trace} -"
    assert again.text == f"{head}|u,{NAME},5,6,3,{spent}|s,{JOBS.name},,1,,{slots}"


def test_if_an_id_is_used_again_the_earlier_spend_of_the_id_stays_in_the_subtotal():
    """The store drops an id a day after its settlement."""
    journal = Journal()
    for units, now_ms in ((7, NOW_MS), (5, NOW_MS + 2 * AGE_MAX_MS)):
        settle(journal, spend("a", (EVER, units)), f"k - {units}", now_ms)
    assert totals(journal) == {"ever": 12}
    assert [op.units for op in journal.settlements(KEYS, NOW_MS + 2 * AGE_MAX_MS)] == [(5,)]


@pytest.mark.parametrize("others", [0, 2])
def test_a_lost_settlement_counts_only_once_if_the_caller_retries_before_the_journal_is_replayed(monkeypatch, others):
    """The store executes the caller's retry before the replay of the journal."""
    monkeypatch.setattr(journals, "SETTLEMENTS_MAX", 4)
    journal = Journal()
    settle(journal, spend("a", (EVER, 7)), "k - 7")
    for number in range(others):
        settle(journal, spend(f"op_{number}", (AGENT, 1)), "k - 1")
    settle(journal, spend("a", (EVER, 7)), "k - 7", NOW_MS + AGE_MAX_MS)
    assert totals(journal)["ever"] == 7


@pytest.mark.parametrize(("mode", "line"), [("1", "k - 0"), ("1", "p - 0"), ("i", "k l 0"), ("i", "p - 0")])
def test_if_an_operator_released_a_hold_the_journal_keeps_the_hold_as_unsettled(mode, line):
    journal = Journal()
    grant(journal, "a", NOW_MS)
    settle(journal, release("a", AGENT, mode=mode), line)
    settle(journal, release("b", AGENT, mode=mode), line)
    assert journal.settlements(KEYS, NOW_MS) == []
    assert open_texts(journal) == {
        "a": f"z c {NOW_MS + 900_000} {NOW_MS}000 0 - - - -|u,{NAME},,5,,",
        "b": f"z {AT} - - - -|u,{NAME},,0,,",
    }
    settle(journal, commit("a", (AGENT, 7)), "k l 7")
    assert [*open_texts(journal)] == ["b"]
