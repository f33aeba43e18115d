"""The judge of the chaos bench finds what is wrong with a history, whatever it is."""

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


def a_call(name: str, hold_id: str, asked: dict[str, int], at_s: float, **words) -> Call:
    began_ns = int(at_s * SECOND_NS)
    given = {"ended_ns": began_ns + SECOND_NS // 100, "word": "done", "told": asked, "ttl_ms": 60_000} | words
    if name == "reserve":
        given.setdefault("windows", dict.fromkeys(asked, DAY))
    return Call("0.0", name, "default", hold_id, asked, began_ns, **given)


def a_record(state: str, reserved: int, charged: int, accrued: int = 0) -> Stored:
    return parse(f"{state} c 1 1 0 - - -|u,{WINDOW},,{reserved},{accrued},{charged}")


def some_books(entered: dict[str, int], holds: dict[str, Stored], **sums: int) -> Books:
    books = Books(sums={WINDOW: Counter({"spent": 0, "held": 0, "unconfirmed": 0} | sums)}, holds=holds)
    books.entered[WINDOW] = Counter(entered)
    return books


class Case:
    """Three holds within a limit of 100: one is committed, one left, one released; and a denial that is right."""

    def __init__(self) -> None:
        self.calls = [
            a_call("reserve", "a", {"agent": 60}, 1),
            a_call("reserve", "b", {"agent": 30}, 2),
            a_call("reserve", "c", {"agent": 20}, 2.5, word="BudgetExceeded", told={}),
            a_call("commit", "a", {"agent": 50}, 3),
            a_call("reserve", "d", {"agent": 20}, 4),
            a_call("release", "d", {}, 5, told={"agent": 0}),
        ]
        self.books = some_books(
            {"a": 50, "b": 30},
            {"a": a_record("c", 60, 50), "b": a_record("x", 30, 30), "d": a_record("r", 20, 0)},
            spent=50, unconfirmed=30,
        )  # fmt: skip
        self.terms = Terms({"agent": 100}, timeout_s=1.0)

    def judged(self) -> Verdict:
        return judge(self.calls, self.books, self.terms)


def test_a_history_that_keeps_every_promise_is_not_blamed():
    verdict = Case().judged()
    assert verdict.violations == []
    assert (verdict.operations, verdict.grants, verdict.spend) == (6, 3, 50)
    assert (verdict.overspend, verdict.lost, verdict.unknown) == (0, 0, 0)


def a_call_ends_late_though_its_process_ran(case: Case) -> None:
    call = case.calls[5]
    call.ended_ns = call.began_ns + SECOND_NS * 14 // 10
    call.stood_ns = [(call.began_ns, call.began_ns + SECOND_NS * 11 // 10)]


def an_acknowledged_commit_is_lost(case: Case) -> None:
    case.books = some_books({"b": 30}, {"b": a_record("x", 30, 30), "d": a_record("r", 20, 0)}, unconfirmed=30)


def a_commit_is_in_the_ledger_twice(case: Case) -> None:
    case.books.entered[WINDOW]["a"] = 100
    case.books.sums[WINDOW]["spent"] = 100


def a_commit_has_another_amount(case: Case) -> None:
    case.books.holds["a"] = a_record("c", 60, 40)
    case.books.entered[WINDOW]["a"] = case.books.sums[WINDOW]["spent"] = 40


def nobody_asked_for_it(case: Case) -> None:
    case.books.holds["e"] = a_record("c", 5, 5)
    case.books.entered[WINDOW]["e"] = 5
    case.books.sums[WINDOW]["spent"] = 55


def a_grant_passes_the_cap(case: Case) -> None:
    case.terms.limits = {"agent": 85}


def a_denial_is_unfounded(case: Case) -> None:
    case.calls[2].asked["agent"] = 10


def a_call_takes_too_long(case: Case) -> None:
    case.calls[5].ended_ns = case.calls[5].began_ns + 2 * SECOND_NS


def a_call_ends_with_an_unexpected_error(case: Case) -> None:
    case.calls[2].word = "!KeyError: 'agent'"


def the_sums_are_not_the_ledgers(case: Case) -> None:
    case.books.sums[WINDOW]["spent"] = 51


def something_stays_held(case: Case) -> None:
    case.books.sums[WINDOW]["held"] = 20


def a_hold_of_a_worker_that_left_is_free(case: Case) -> None:
    case.books.holds["b"] = a_record("r", 30, 0)
    del case.books.entered[WINDOW]["b"]
    case.books.sums[WINDOW]["unconfirmed"] = 0


def a_key_never_expires(case: Case) -> None:
    case.books.immortal.append("ktrdr:{default}:h:a")


def it_pays_on_the_wrong_side_of_midnight(case: Case) -> None:
    case.terms.midnight_ns = int(3.5 * SECOND_NS)


def a_settlement_was_denied_although_it_was_made(case: Case) -> None:
    case.calls[3].word = "HoldConflict"


def an_error_that_the_fault_does_not_explain(case: Case) -> None:
    case.calls[2].word = "StoreError"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (an_acknowledged_commit_is_lost, "does not know the id"),
        (a_commit_is_in_the_ledger_twice, "the ledger has +50 units of 'a' more"),
        (a_commit_has_another_amount, "nobody called commit with {'agent': 40}"),
        (nobody_asked_for_it, "'e' is stored, but nobody asked for it"),
        (a_grant_passes_the_cap, "above the limit"),
        (a_denial_is_unfounded, "although there was room"),
        (a_call_takes_too_long, "took 2.00 s"),
        (a_call_ends_late_though_its_process_ran, "ended 0.30 s late"),
        (a_call_ends_with_an_unexpected_error, "ended with !KeyError"),
        (the_sums_are_not_the_ledgers, "the ledger adds up to 80"),
        (something_stays_held, "20 units are held, but no hold is open"),
        (a_hold_of_a_worker_that_left_is_free, "nobody released it"),
        (a_key_never_expires, "will never expire"),
        (it_pays_on_the_wrong_side_of_midnight, "before midnight these windows paid"),
        (a_settlement_was_denied_although_it_was_made, "by the model it is acknowledged"),
        (an_error_that_the_fault_does_not_explain, "ended with StoreError"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_wrong_is_found(spoil: Callable[[Case], None], words: str):
    case = Case()
    spoil(case)
    violations = case.judged().violations
    assert any(words in violation for violation in violations), violations


def test_what_is_lost_is_counted():
    case = Case()
    an_acknowledged_commit_is_lost(case)
    assert case.judged().lost == 50
    case = Case()
    case.books.entered[WINDOW]["a"] = case.books.sums[WINDOW]["spent"] = 20
    assert case.judged().lost == 30


@pytest.mark.parametrize("made", [True, False])
def test_a_call_without_an_answer_may_have_been_made_or_not(made: bool):
    case = Case()
    commit = case.calls[3]
    commit.word, commit.ended_ns, commit.told = "killed", None, {}
    if not made:
        case.books.holds["a"] = a_record("x", 60, 60)
        case.books.entered[WINDOW]["a"] = case.books.sums[WINDOW]["unconfirmed"] = 60
        case.books.sums[WINDOW] = Counter(spent=0, held=0, unconfirmed=90)
        case.calls[4].word = "BudgetExceeded"
        case.calls.pop()
        del case.books.holds["d"]
    verdict = case.judged()
    assert verdict.violations == []
    assert (verdict.unknown, verdict.resolved) == (1, 1)


def test_a_history_is_read_as_far_as_a_killed_process_had_written_it(tmp_path: Path):
    begun = {"n": 1, "at": 5, "call": "record", "tenant": "default", "id": "x", "asked": {"agent": 1}}
    ended = {"n": 1, "at": 9, "word": "done", "ambiguous": False, "told": {"agent": 1}, "windows": {}, "hold_id": "x"}
    lines = [json.dumps(words) for words in (begun, ended, begun | {"n": 2, "at": 10, "id": "y"})]
    (tmp_path / "0.0.jsonl").write_text("\n".join([*lines, '{"n": 2, "at": 1']))
    first, second = read(tmp_path)
    assert (first.acknowledged, first.unknown, first.seconds) == (True, False, 4e-9)
    assert (second.acknowledged, second.unknown, second.word) == (False, True, "killed")


def test_what_a_process_stood_still_is_not_the_limiters_lateness(tmp_path: Path):
    ms = 10**6
    begun = {"n": 1, "at": 0, "call": "record", "tenant": "default", "id": "x", "asked": {"agent": 1}}
    ended = {"n": 1, "at": 1400 * ms, "word": "StoreUnavailable", "ambiguous": True}
    stood = [{"at": at * ms, "stood_ns": long * ms} for at, long in ((100, 90), (1100, 200), (1300, 50), (1500, 130))]
    (tmp_path / "0.0.jsonl").write_text("\n".join(map(json.dumps, (begun, *stood[:3], ended, stood[3]))))
    [call] = read(tmp_path)
    assert call.late_s(1.0) == pytest.approx(0.4 - 0.1 - 0.05 - 0.03)
    assert call.late_s(1.5) == 0


class DrawnCase(Case):
    """The same, and two holds that replica 1 drew from a chunk of 40 in an outage; one is open when it is closed."""

    def __init__(self, charged: int) -> None:
        super().__init__()
        drawn = [
            a_call("reserve", "a", {"agent": 20}, 6, word="prepaid"),
            a_call("commit", "a", {"agent": 15}, 7, word="deferred"),
            a_call("reserve", "e", {"agent": 10}, 8, word="prepaid"),
        ]
        for call in drawn:
            call.replica = "0.1"
        self.calls += drawn
        self.terms = Terms({"agent": 120}, timeout_s=1.0, prepaid_units=40)
        self.books.holds["chunk"] = parse(f"c c 1 1 0 - lease -|u,{WINDOW},,40,0,{charged}")
        self.books.entered[WINDOW]["chunk"] = charged
        self.books.sums[WINDOW]["spent"] += charged
        del self.calls[2]  # with a chunk, it is unknown whether there was room


@pytest.mark.parametrize("charged", [15, 25])
def test_a_chunk_that_commits_what_was_drawn_from_it_is_not_blamed(charged: int):
    verdict = DrawnCase(charged).judged()
    assert verdict.violations == []
    assert (verdict.grants, verdict.overspend, verdict.lost, verdict.spend) == (5, 0, 0, 50 + charged)


@pytest.mark.parametrize(("charged", "lost"), [(14, 1), (26, 0)])
def test_a_chunk_that_commits_another_sum_is_found(charged: int, lost: int):
    verdict = DrawnCase(charged).judged()
    assert any("chunks have charged" in violation for violation in verdict.violations), verdict.violations
    assert verdict.lost == lost


def test_a_hold_that_was_drawn_above_the_cap_is_found():
    case = DrawnCase(15)
    case.terms.limits = {"agent": 104}
    assert case.judged().overspend == 1
