"""The judge of the chaos bench finds each kind of violation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from .history import Books, Call, Stored, parse, read
from .judge import Terms, Verdict, judge

DAY = "2026-11-24"
WINDOW = f"agent:{DAY}"
SECOND_NS = 10**9


def make_call(name: str, hold_id: str, requested: dict[str, int], at_s: float, **fields) -> Call:
    began_ns = int(at_s * SECOND_NS)
    given = {
        "ended_ns": began_ns + SECOND_NS // 100,
        "outcome": "done",
        "amounts": requested,
        "ttl_ms": 60_000,
    } | fields
    if name == "reserve":
        given.setdefault("windows", dict.fromkeys(requested, DAY))
    return Call("0.0", name, "default", hold_id, requested, began_ns, **given)


def make_record(state: str, reserved: int, charged: int, accrued: int = 0) -> Stored:
    return parse(f"{state} c 1 1 0 - - - -|u,{WINDOW},,{reserved},{accrued},{charged}")


def make_books(entered: dict[str, int], holds: dict[str, Stored], **sums: int) -> Books:
    books = Books(sums={WINDOW: Counter({"spent": 0, "held": 0, "unconfirmed": 0} | sums)}, holds=holds)
    books.entered[WINDOW] = Counter(entered)
    return books


class Case:
    """Three holds within a limit of 100: one committed, one expired, one released; and a correct denial."""

    def __init__(self) -> None:
        self.calls = [
            make_call("reserve", "a", {"agent": 60}, 1),
            make_call("reserve", "b", {"agent": 30}, 2),
            make_call("reserve", "c", {"agent": 20}, 2.5, outcome="BudgetExceeded", amounts={}),
            make_call("commit", "a", {"agent": 50}, 3),
            make_call("reserve", "d", {"agent": 20}, 4),
            make_call("release", "d", {}, 5, amounts={"agent": 0}),
        ]
        self.books = make_books(
            {"a": 50, "b": 30},
            {"a": make_record("c", 60, 50), "b": make_record("x", 30, 30), "d": make_record("r", 20, 0)},
            spent=50, unconfirmed=30,
        )  # fmt: skip
        self.terms = Terms({"agent": 100}, timeout_s=1.0)

    def judged(self) -> Verdict:
        return judge(self.calls, self.books, self.terms)


def test_a_correct_history_has_no_violations():
    verdict = Case().judged()
    assert verdict.violations == []
    assert (verdict.operations, verdict.grants, verdict.spend) == (6, 3, 50)
    assert (verdict.overspend, verdict.lost, verdict.unknown) == (0, 0, 0)


def a_call_ends_late_without_a_stall(case: Case) -> None:
    call = case.calls[5]
    call.ended_ns = call.began_ns + SECOND_NS * 14 // 10
    call.stalls_ns = [(call.began_ns, call.began_ns + SECOND_NS * 11 // 10)]


def an_acknowledged_commit_is_lost(case: Case) -> None:
    case.books = make_books({"b": 30}, {"b": make_record("x", 30, 30), "d": make_record("r", 20, 0)}, unconfirmed=30)


def a_commit_is_in_the_ledger_twice(case: Case) -> None:
    case.books.entered[WINDOW]["a"] = 100
    case.books.sums[WINDOW]["spent"] = 100


def a_commit_has_another_amount(case: Case) -> None:
    case.books.holds["a"] = make_record("c", 60, 40)
    case.books.entered[WINDOW]["a"] = case.books.sums[WINDOW]["spent"] = 40


def an_id_was_never_requested(case: Case) -> None:
    case.books.holds["e"] = make_record("c", 5, 5)
    case.books.entered[WINDOW]["e"] = 5
    case.books.sums[WINDOW]["spent"] = 55


def a_grant_passes_the_cap(case: Case) -> None:
    case.terms.limits = {"agent": 85}


def a_denial_is_unfounded(case: Case) -> None:
    case.calls[2].requested["agent"] = 10


def a_call_takes_too_long(case: Case) -> None:
    case.calls[5].ended_ns = case.calls[5].began_ns + 2 * SECOND_NS


def a_call_ends_with_an_unexpected_error(case: Case) -> None:
    case.calls[2].outcome = "!KeyError: 'agent'"


def the_sums_are_not_the_ledgers(case: Case) -> None:
    case.books.sums[WINDOW]["spent"] = 51


def an_amount_stays_held(case: Case) -> None:
    case.books.sums[WINDOW]["held"] = 20


def a_hold_of_a_dead_worker_is_released(case: Case) -> None:
    case.books.holds["b"] = make_record("r", 30, 0)
    del case.books.entered[WINDOW]["b"]
    case.books.sums[WINDOW]["unconfirmed"] = 0


def a_key_never_expires(case: Case) -> None:
    case.books.immortal.append("ktrdr:{default}:h:a")


def a_grant_uses_the_window_of_another_day(case: Case) -> None:
    case.terms.midnight_ns = int(3.5 * SECOND_NS)


def an_executed_settlement_was_refused(case: Case) -> None:
    case.calls[3].outcome = "HoldConflict"


def an_error_has_no_explanation_in_the_fault(case: Case) -> None:
    case.calls[2].outcome = "StoreError"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (an_acknowledged_commit_is_lost, "does not have the id"),
        (a_commit_is_in_the_ledger_twice, "the ledger has +50 units of 'a' more"),
        (a_commit_has_another_amount, "no call of commit had {'agent': 40}"),
        (an_id_was_never_requested, "'e' is stored, but was never requested"),
        (a_grant_passes_the_cap, "above the limit"),
        (a_denial_is_unfounded, "although there was room"),
        (a_call_takes_too_long, "took 2.00 s"),
        (a_call_ends_late_without_a_stall, "ended 0.30 s late"),
        (a_call_ends_with_an_unexpected_error, "ended with !KeyError"),
        (the_sums_are_not_the_ledgers, "the ledger adds up to 80"),
        (an_amount_stays_held, "20 units are held, but no hold is open"),
        (a_hold_of_a_dead_worker_is_released, "no call released it"),
        (a_key_never_expires, "has no expiry"),
        (a_grant_uses_the_window_of_another_day, "windows used before midnight"),
        (an_executed_settlement_was_refused, "in the model with acknowledged"),
        (an_error_has_no_explanation_in_the_fault, "ended with StoreError"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_the_judge_finds_each_kind_of_violation(spoil: Callable[[Case], None], words: str):
    case = Case()
    spoil(case)
    violations = case.judged().violations
    assert any(words in violation for violation in violations), violations


def test_the_judge_counts_lost_spend_in_units():
    case = Case()
    an_acknowledged_commit_is_lost(case)
    assert case.judged().lost == 50
    case = Case()
    case.books.entered[WINDOW]["a"] = case.books.sums[WINDOW]["spent"] = 20
    assert case.judged().lost == 30


@pytest.mark.parametrize("made", [True, False])
def test_the_judge_accepts_either_outcome_of_a_call_without_a_reply(made: bool):
    case = Case()
    commit = case.calls[3]
    commit.outcome, commit.ended_ns, commit.amounts = "killed", None, {}
    if not made:
        case.books.holds["a"] = make_record("x", 60, 60)
        case.books.entered[WINDOW]["a"] = case.books.sums[WINDOW]["unconfirmed"] = 60
        case.books.sums[WINDOW] = Counter(spent=0, held=0, unconfirmed=90)
        case.calls[4].outcome = "BudgetExceeded"
        case.calls.pop()
        del case.books.holds["d"]
    verdict = case.judged()
    assert verdict.violations == []
    assert (verdict.unknown, verdict.resolved) == (1, 1)


def test_an_incomplete_last_line_of_a_history_is_ignored(tmp_path: Path):
    begun = {"n": 1, "at": 5, "call": "record", "tenant": "default", "id": "x", "requested": {"agent": 1}}
    ended = {
        "n": 1,
        "at": 9,
        "outcome": "done",
        "ambiguous": False,
        "amounts": {"agent": 1},
        "windows": {},
        "hold_id": "x",
    }
    lines = [json.dumps(fields) for fields in (begun, ended, begun | {"n": 2, "at": 10, "id": "y"})]
    (tmp_path / "0.0.jsonl").write_text("\n".join([*lines, '{"n": 2, "at": 1']))
    first, second = read(tmp_path)
    assert (first.acknowledged, first.unknown, first.seconds) == (True, False, 4e-9)
    assert (second.acknowledged, second.unknown, second.outcome) == (False, True, "killed")


def test_the_lateness_of_a_call_does_not_include_stalls_of_the_process(tmp_path: Path):
    ms = 10**6
    begun = {"n": 1, "at": 0, "call": "record", "tenant": "default", "id": "x", "requested": {"agent": 1}}
    ended = {"n": 1, "at": 1400 * ms, "outcome": "StoreUnavailable", "ambiguous": True}
    stalls = [
        {"at": at * ms, "stalled_ns": length * ms} for at, length in ((100, 90), (1100, 200), (1300, 50), (1500, 130))
    ]
    (tmp_path / "0.0.jsonl").write_text("\n".join(map(json.dumps, (begun, *stalls[:3], ended, stalls[3]))))
    [call] = read(tmp_path)
    assert call.late_s(1.0) == pytest.approx(0.4 - 0.1 - 0.05 - 0.03)
    assert call.late_s(1.5) == 0


class DrawnCase(Case):
    """``Case``, and two holds that replica 1 drew from a chunk of 40 in an outage; one hold is never settled."""

    def __init__(self, charged: int) -> None:
        super().__init__()
        drawn = [
            make_call("reserve", "a", {"agent": 20}, 6, outcome="prepaid"),
            make_call("commit", "a", {"agent": 15}, 7, outcome="deferred"),
            make_call("reserve", "e", {"agent": 10}, 8, outcome="prepaid"),
        ]
        for call in drawn:
            call.replica = "0.1"
        self.calls += drawn
        self.terms = Terms({"agent": 120}, timeout_s=1.0, prepaid_units=40)
        self.books.holds["chunk"] = parse(f"c c 1 1 0 - lease - -|u,{WINDOW},,40,0,{charged}")
        self.books.entered[WINDOW]["chunk"] = charged
        self.books.sums[WINDOW]["spent"] += charged
        del self.calls[2]  # a chunk leaves unknown whether there was room


@pytest.mark.parametrize("charged", [15, 25])
def test_the_judge_accepts_a_chunk_charged_with_the_spend_of_its_grants(charged: int):
    verdict = DrawnCase(charged).judged()
    assert verdict.violations == []
    assert (verdict.grants, verdict.overspend, verdict.lost, verdict.spend) == (5, 0, 0, 50 + charged)


def test_the_judge_accepts_a_denial_if_prepaid_chunks_may_have_filled_the_window():
    case = DrawnCase(15)
    case.calls.append(make_call("reserve", "f", {"team": 61}, 2, outcome="BudgetExceeded", amounts={}))
    case.terms.limits["team"] = 100
    assert case.judged().violations == []
    case.terms.limits["team"] = 101
    assert case.judged().violations == ["'f' was denied {'team': 61} although there was room"]


def test_the_judge_accepts_a_chunk_released_with_amount_zero_if_its_reservation_did_not_arrive():
    case = DrawnCase(15)
    case.books.holds["chunk-2"] = make_record("r", 0, 0)
    assert case.judged().violations == []
    case.terms.prepaid_units = 0
    assert "'chunk-2' is stored, but was never requested" in case.judged().violations


@pytest.mark.parametrize(("charged", "lost"), [(14, 1), (26, 0)])
def test_the_judge_rejects_a_chunk_charged_with_less_or_more_than_the_spend_of_its_grants(charged: int, lost: int):
    verdict = DrawnCase(charged).judged()
    assert any("chunks have charged" in violation for violation in verdict.violations), verdict.violations
    assert verdict.lost == lost


def test_the_judge_counts_a_prepaid_grant_above_the_cap_as_overspend():
    case = DrawnCase(15)
    case.terms.limits = {"agent": 104}
    assert case.judged().overspend == 1
