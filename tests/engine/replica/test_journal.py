"""What a replica remembers of what was acknowledged, and how it tells it again (P13)."""

from __future__ import annotations

import pytest

from ktrdr_budget import Budget
from ktrdr_budget.engine.protocol import Commit, Op
from ktrdr_budget.engine.replica import journal as memory
from ktrdr_budget.engine.replica.journal import AGE_MAX_MS, HOLD_AGE_MAX_MS, Memory
from ktrdr_budget.engine.replica.state import Session

NOW_MS = 1_764_000_000_000
SESSION = Session(
    "default", [Budget("agent", "5.00"), Budget("ever", "5.00", period="ever"), Budget("jobs", 3, kind="slots")]
)
KEYS = SESSION.keys
AGENT, EVER, JOBS = (SESSION.current_window(name) for name in ("agent", "ever", "jobs"))


def commit(hold_id: str, *parts: tuple, remark: str = "-", trace: str = "-") -> Commit:
    return Commit(hold_id, KEYS.hold(hold_id), list(parts), remark, trace)


def plain(hold_id: str, head: str, *parts: tuple) -> Op:
    return Op(hold_id, KEYS.hold(hold_id), head, list(parts))


def grant(known: Memory, hold_id: str, now_ms: int, labels: str = "- - -") -> None:
    record = f"o c {NOW_MS + 900_000} {now_ms * 1000} 0 {labels}{AGENT.segment}5,,"
    known.granted(hold_id, [(AGENT, ":5")], record, now_ms * 1000)


def told(ops: list[Op]) -> list[tuple[str, list[str]]]:
    return [(op.head + op.tail, [f"{window.budget}{tail}" for window, tail in op.parts]) for op in ops]


AT = f"c {NOW_MS} {NOW_MS}000 0"
NAME = AGENT.name


@pytest.mark.parametrize(
    ("op", "line", "again"),
    [
        (commit("a", (AGENT, ":r5")), "k - 7", (f"K a\nc {AT} - - -|u,{NAME},,7,,7", ["agent:"])),
        (
            commit("a", (AGENT, ":x7"), remark="model", trace="t1"),
            "k o 7",
            (f"K a\nc {AT} - model t1|u,{NAME},,7,,7", ["agent:"]),
        ),
        (commit("a", (AGENT, ":x7")), "k l 7", (f"K a\nc {AT} - - -|u,{NAME},,7,,7", ["agent:"])),
        (
            commit("a", (AGENT, ":x7"), (JOBS, ":r1")),
            "k - 7,0",
            (f"K a\nc {AT} - - -|u,{NAME},,7,,7|s,{JOBS.name},,0,,0", ["agent:", "jobs:"]),
        ),
        (plain("a", "N a 0 research t1", (AGENT, ":7")), "k - 7", ("N a 1 research t1", ["agent:7"])),
        (plain("a", "L a 0", (AGENT, ":x0")), "k - 0", (f"K a\nr {AT} - - -|u,{NAME},,0,,", ["agent:"])),
    ],
)
def test_a_settlement_of_a_hold_that_is_not_known_is_replayed_as_it_was(op, line, again):
    known = Memory()
    known.acknowledged(op, line, NOW_MS)
    assert told(known.settlements(KEYS, NOW_MS)) == [again]
    assert known.settlements(KEYS, NOW_MS + AGE_MAX_MS + 1) == [], "the store may have forgotten its id"
    units = [tail for window, tail in known.shares(KEYS)[0].parts] if known.shares(KEYS) else []
    assert units == ([":7"] if "7" in line else [])


def test_what_was_a_replay_is_in_the_share_of_another():
    known = Memory("me")
    known.acknowledged(commit("other", (AGENT, ":x7")), "p - 7 you", NOW_MS)
    known.acknowledged(commit("own", (AGENT, ":x5")), "k - 5", NOW_MS)
    known.acknowledged(commit("own", (AGENT, ":x5")), "p - 5 me", NOW_MS)
    assert [op.id for op in known.settlements(KEYS, NOW_MS)] == ["own"]
    others = known.others(KEYS, NOW_MS)
    assert told(others) == [(f"S you K other\nc {AT} - - -|u,{NAME},,7,,7", ["agent:"])]
    assert told(known.shares(KEYS)) == [("T -", ["agent:5"])]


def test_a_replay_of_what_this_replica_did_is_in_its_share():
    """The first answer was lost."""
    known = Memory("me")
    known.acknowledged(commit("own", (AGENT, ":x5"), (EVER, ":x5")), "p - 5,5 me", NOW_MS)
    known.acknowledged(plain("spent", "N spent 0 - -", (AGENT, ":2")), "p - 2 me agent:today", NOW_MS)
    assert [op.id for op in known.settlements(KEYS, NOW_MS)] == ["own", "spent"]
    assert {op.parts[0][0].budget: op.parts[0][1] for op in known.shares(KEYS)} == {"agent": ":7", "ever": ":5"}


def test_whose_share_a_settlement_is_in_the_store_knows_best():
    known = Memory("me")
    known.acknowledged(commit("a", (AGENT, ":x7")), "k - 7", NOW_MS)
    known.told("a", "p - 7 you")
    assert (known.settlements(KEYS, NOW_MS), known.shares(KEYS)) == ([], [])
    known.told("a", "p - 7 me")
    assert told(known.shares(KEYS)) == [("T -", ["agent:7"])]
    for line in ("p - 7 -", "p - 0", "k - 7", "c record", "a"):
        known.told("a", line)
    assert told(known.shares(KEYS)) == [("T -", ["agent:7"])]


def test_open_holds_are_asked_about_some_at_a_time_and_all_in_turn():
    known = Memory()
    for number in range(5):
        grant(known, f"op_{number}", NOW_MS)
    grant(known, "new", NOW_MS + 9_000)
    rounds = [known.unsettled(NOW_MS + 10_000, 2) for _ in range(5)]
    assert rounds == [["op_0", "op_1"], ["op_2", "op_3"], ["op_4"], [], ["op_0", "op_1"]]
    for number, state in enumerate("crzxo"):
        known.seen(f"op_{number}", f"{state} c 1 1 0 - - -|u,{NAME},,5,,", NOW_MS * 1000)
    known.seen("op_4", f"c c 1 1 0 - - -|u,{NAME},,5,,", NOW_MS * 1000 - 1)
    assert [(op.id, op.record[0]) for op in known.holds(KEYS)] == [
        ("op_2", "z"), ("op_3", "x"), ("op_4", "o"), ("new", "o"),
    ]  # fmt: skip


def test_what_is_forgotten_one_by_one_stays_in_the_share(monkeypatch):
    monkeypatch.setattr(memory, "SETTLEMENTS_MAX", 8)
    known = Memory()
    for number in range(30):
        known.acknowledged(commit(f"op_{number}", (AGENT, ":x1"), (EVER, ":x2")), "k - 1,2", NOW_MS)
    remembered = len(known.settlements(KEYS, NOW_MS))
    assert 4 <= remembered <= 8
    assert remembered + known.forgotten_settlements == 30
    assert {op.parts[0][0].budget: op.parts[0][1] for op in known.shares(KEYS)} == {"agent": ":30", "ever": ":60"}


def test_a_hold_is_remembered_until_it_is_settled_or_too_old():
    known = Memory()
    for hold_id in ("a", "b"):
        grant(known, hold_id, NOW_MS, "me research t1")
    known.acknowledged(commit("a", (AGENT, ":x7")), "k - 7", NOW_MS)
    head = f"K b\no c {NOW_MS + 900_000} {NOW_MS * 1000} 0 me research t1|u,{NAME},,5,,"
    assert told(known.holds(KEYS)) == [(head, ["agent:"])]
    known.settlements(KEYS, NOW_MS + HOLD_AGE_MAX_MS)
    known.seen("b", known.holds(KEYS)[0].record, (NOW_MS + 2) * 1000)
    known.settlements(KEYS, NOW_MS + HOLD_AGE_MAX_MS + 1)
    assert len(known.holds(KEYS)) == 1, "the store was seen to have it since"
    known.settlements(KEYS, NOW_MS + HOLD_AGE_MAX_MS + 3)
    assert known.holds(KEYS) == []
    assert HOLD_AGE_MAX_MS <= AGE_MAX_MS, "who settled it would not tell of it any more"


@pytest.mark.parametrize(
    ("op", "line", "settled"),
    [
        (commit("a", (AGENT, ":x7"), (JOBS, ":r1")), "k - 7,0", "c ops t1 7 0"),
        (commit("a", (AGENT, ":x7"), (JOBS, ":r1"), remark="model", trace="t2"), "k o 7,0", "c ops%20model t2 7 0"),
        (plain("a", "L a 0", (AGENT, ":x0"), (JOBS, ":x0")), "k - 0,0", "r ops t1  "),
        (plain("a", "L a i", (AGENT, ":x0"), (JOBS, ":x0")), "k - 0,0", "r ops t1  "),
    ],
)
@pytest.mark.parametrize("granted_here", [True, False])
def test_a_settlement_is_replayed_with_what_was_asked(op, line, settled, granted_here):
    known = Memory()
    record = f"o a 9 8 7 me ops t1|u,{NAME},5,6,3,|s,{JOBS.name},,1,,"
    op.record = "" if granted_here else record
    if granted_here:
        known.granted("a", [(AGENT, ":5"), (JOBS, ":1")], record, NOW_MS * 1000)
    known.acknowledged(op, line, NOW_MS)
    state, operation, trace, spent, slots = settled.split(" ")
    head = f"{state} a 9 8 7 me {operation} {trace}"
    [again] = known.settlements(KEYS, NOW_MS)
    assert again.record == f"{head}|u,{NAME},5,6,3,{spent}|s,{JOBS.name},,1,,{slots}"


def test_a_slab_that_was_shrunk_was_asked_for_as_a_whole():
    known = Memory()
    grant(known, "slab", NOW_MS)
    for left in (5, 3, 4):
        known.shrunk("slab", [left])
    assert known.holds(KEYS)[0].record.endswith(f"|u,{NAME},5,3,,")


def test_the_spend_of_an_id_that_is_used_again_stays_in_the_share():
    """The store forgets an id a day after its settlement."""
    known = Memory()
    for units, now_ms in ((7, NOW_MS), (5, NOW_MS + 2 * AGE_MAX_MS)):
        known.acknowledged(plain("a", "N a 0 - -", (EVER, f":{units}")), f"k - {units}", now_ms)
    assert told(known.shares(KEYS)) == [("T -", ["ever:12"])]
    assert [op.parts[0][1] for op in known.settlements(KEYS, NOW_MS + 2 * AGE_MAX_MS)] == [":5"]


@pytest.mark.parametrize("others", [0, 2])
def test_a_settlement_that_was_lost_and_is_made_again_is_in_the_share_once(monkeypatch, others):
    """The store records it anew, before it has been replayed."""
    monkeypatch.setattr(memory, "SETTLEMENTS_MAX", 4)
    known = Memory()
    known.acknowledged(plain("a", "N a 0 - -", (EVER, ":7")), "k - 7", NOW_MS)
    for number in range(others):
        known.acknowledged(plain(f"op_{number}", f"N op_{number} 0 - -", (AGENT, ":1")), "k - 1", NOW_MS)
    known.acknowledged(plain("a", "N a 0 - -", (EVER, ":7")), "k - 7", NOW_MS + AGE_MAX_MS)
    assert ("T -", ["ever:7"]) in told(known.shares(KEYS))


@pytest.mark.parametrize(("mode", "line"), [("1", "k - 0"), ("1", "p - 0"), ("i", "k l 0"), ("i", "p - 0")])
def test_a_hold_that_was_released_by_hand_is_kept_as_one_that_is_not_settled(mode, line):
    known = Memory()
    grant(known, "a", NOW_MS)
    known.acknowledged(plain("a", f"L a {mode}", (AGENT, ":x0")), line, NOW_MS)
    known.acknowledged(plain("b", f"L b {mode}", (AGENT, ":x0")), line, NOW_MS)
    assert known.settlements(KEYS, NOW_MS) == []
    assert [op.record for op in known.holds(KEYS)] == [
        f"z c {NOW_MS + 900_000} {NOW_MS}000 0 - - -|u,{NAME},,5,,",
        f"z {AT} - - -|u,{NAME},,0,,",
    ]
    known.acknowledged(commit("a", (AGENT, ":x7")), "k l 7", NOW_MS)
    assert [op.id for op in known.holds(KEYS)] == ["b"]
