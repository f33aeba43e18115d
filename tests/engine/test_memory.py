"""What a replica remembers of what was acknowledged, and how it tells it again (P13)."""

from __future__ import annotations

import pytest

from ktrdr_budget import Budget
from ktrdr_budget.engine import memory
from ktrdr_budget.engine.memory import AGE_MAX_MS, HOLD_AGE_MAX_MS, Memory
from ktrdr_budget.engine.protocol import Commit, Op
from ktrdr_budget.engine.session import Session

NOW_MS = 1_764_000_000_000
SESSION = Session(
    "default", [Budget("agent", "5.00"), Budget("ever", "5.00", period="ever"), Budget("jobs", 3, kind="slots")]
)
KEYS = SESSION.keys
AGENT, EVER, JOBS = (SESSION.current_window(name) for name in ("agent", "ever", "jobs"))


def commit(hold_id: str, *parts: tuple, remark: str = "-", trace: str = "-") -> Commit:
    return Commit(hold_id, KEYS.hold(hold_id), list(parts), True, remark, trace)


def plain(hold_id: str, head: str, *parts: tuple) -> Op:
    return Op(hold_id, KEYS.hold(hold_id), head, list(parts))


def told(ops: list[Op]) -> list[tuple[str, list[str]]]:
    return [(op.head, [f"{window.budget}{tail}" for window, tail in op.parts]) for op in ops]


@pytest.mark.parametrize(
    ("op", "line", "again"),
    [
        (commit("a", (AGENT, ":r5")), "k - 7", ("D a", ["agent:x7"])),
        (commit("a", (AGENT, ":x7"), remark="model", trace="t1"), "k o 7", ("M a model t1", ["agent:x7"])),
        (commit("a", (AGENT, ":x7")), "k l 7", ("D a", ["agent:x7"])),
        (commit("a", (AGENT, ":x7"), (JOBS, ":r1")), "k - 7,0", ("D a", ["agent:x7", "jobs:x0"])),
        (commit("a", (AGENT, ":x7"), trace="t1").otherwise("u"), "k - 7", ("D a", ["agent:x7"])),
        (plain("a", "N a 0 research t1", (AGENT, ":7")), "k - 7", ("N a 1 research t1", ["agent:7"])),
        (plain("a", "L a 0", (AGENT, ":x0")), "k - 0", ("L a f", ["agent:x0"])),
        (plain("a", "L a 1", (AGENT, ":x0")), "k - 0", ("L a o", ["agent:x0"])),
    ],
)
def test_a_settlement_is_told_again_as_it_was(op, line, again):
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
    assert told(others) == [("S you D other", ["agent:x7"])]
    assert told([others[0].otherwise("u")]) == [("S you K other 1 - -", ["agent:7"])]
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
    for number, at_ms in enumerate([NOW_MS] * 5 + [NOW_MS + 9_000]):
        record = f"o c {at_ms + 900_000} {at_ms * 1000} 0 - - -{AGENT.segment}5,,"
        known.granted(f"op_{number}", [(AGENT, ":5")], record, at_ms)
    rounds = [known.unsettled(NOW_MS + 10_000, 2) for _ in range(5)]
    assert rounds == [["op_0", "op_1"], ["op_2", "op_3"], ["op_4"], [], ["op_0", "op_1"]]
    known.forget("op_0")
    assert "op_0" not in [op.id for op in known.holds(KEYS)]


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
        record = f"o c {NOW_MS + 900_000} {NOW_MS * 1000} 0 me research t1{AGENT.segment}5,,"
        known.granted(hold_id, [(AGENT, ":5")], record, NOW_MS)
    known.acknowledged(commit("a", (AGENT, ":x7")), "k - 7", NOW_MS)
    head = f"O b c {NOW_MS + 900_000} {NOW_MS * 1000} me research t1"
    assert told(known.holds(KEYS)) == [(head, ["agent:5:0"])]
    known.settlements(KEYS, NOW_MS + HOLD_AGE_MAX_MS + 1)
    assert known.holds(KEYS) == []
    assert HOLD_AGE_MAX_MS <= AGE_MAX_MS, "who settled it would not tell of it any more"
