"""Operations: their text on the wire, and their properties. Replies are in ``test_replies.py``."""

from __future__ import annotations

import pytest

from ktrdr_budget.engine.protocol.codes import CommitMode, ExtendMode, ReleaseMode
from ktrdr_budget.engine.protocol.hold_record import is_settled, parse_record
from ktrdr_budget.engine.protocol.operations import (
    Commit,
    CommitAmount,
    Extend,
    ExtendAmount,
    Labels,
    RecordSpend,
    Release,
    ReplayLimit,
    ReplayTotal,
    Reserve,
    Restore,
    Retire,
    SettleOnBehalf,
)
from ktrdr_budget.engine.protocol.replies import Settled
from ktrdr_budget.engine.protocol.window import Window

from ...helpers.windows import make_window, text_of

NOW_MS = 1_796_040_000_000
EXPIRES_MS = NOW_MS + 86_400_000
TEN_YEARS_MS = 315_360_000_000
AGENT = make_window("agent", expires_ms=EXPIRES_MS)
TOKENS = make_window("tokens", "n", expires_ms=EXPIRES_MS + 1)
JOBS = make_window("jobs", "s")
NO_LABELS = Labels()
RECORD = f"o c 9 8 0 - - - -{AGENT.segment}5,,"


def reserve(*parts: tuple[Window, int], labels: Labels = NO_LABELS, request: str = "") -> Reserve:
    terms = {"ttl_ms": 1000, "policy": "c", "now_ms": NOW_MS}
    return Reserve("a", "key", parts or [(AGENT, 5)], **terms, labels=labels, request=request)


def commit(*parts: tuple[Window, int], mode: CommitMode = CommitMode.EXACT, **texts: str) -> Commit:
    amounts = [CommitAmount(mode, units) for _, units in parts]
    return Commit("a", "key", [window for window, _ in parts], amounts, **texts)


def extend(mode: ExtendMode = ExtendMode.HEARTBEAT, **totals: int) -> Extend:
    return Extend("a", "key", [AGENT], [ExtendAmount(**totals)], 1000, mode)


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "text"),
    [
        (reserve(), f"R a 1000 c {EXPIRES_MS} agent:5\n- - - -{AGENT.segment}5,,"),
        (
            reserve((AGENT, 5), (TOKENS, 3)),
            f"R a 1000 c {EXPIRES_MS + 1} agent:5 tokens:3\n- - - -{AGENT.segment}5,,{TOKENS.segment}3,,",
        ),
        (commit((AGENT, 7)), "D a agent:x7"),
        (commit((AGENT, 7), mode=CommitMode.ACCRUED), "D a agent:a7"),
        (commit((AGENT, 7), remark="a call", trace_id="t1"), "M a a%20call t1 agent:x7"),
        (Release("a", "key", [AGENT]), "L a 0 agent:x0"),
        (Release("a", "key", [AGENT], ReleaseMode.UNRECEIVED, request="r1"), "L a sr1 agent:x0"),
        (RecordSpend("a", "key", [(AGENT, 7), (TOKENS, 3)], operation="b c"), "N a 0 - b%20c - - agent:7 tokens:3"),
        (RecordSpend("a", "key", [(AGENT, 7)], is_late=True), "N a 1 - - - - agent:7"),
        (
            RecordSpend("a", "key", [(AGENT, 7)], scope="user=alice;usd", digest="abc"),
            "N a 0 -!abc. - - user=alice;usd agent:7",
        ),
        (extend(accrued=5), "E a 1000 0 agent:5:0"),
        (extend(ExtendMode.GROW, reserved=9, expected=5), "E a 1000 1 agent:0:9:5"),
        (Retire("a", "key", [AGENT, TOKENS]), "X a agent tokens"),
        (Restore("a", "key", [AGENT], RECORD), f"K a agent:\n{RECORD}"),
        (SettleOnBehalf("you", Restore("a", "key", [AGENT], RECORD)), f"S you K a agent:\n{RECORD}"),
        (ReplayTotal("key", AGENT, 7), "T - agent:7"),
        (ReplayLimit("key", "agent", 5, 0, 8, "usd,day,UTC,spend"), "Q - agent 5 0 8 usd,day,UTC,spend"),
        (ReplayLimit("key", "agent", None, 9, 8, "usd,day,UTC,spend"), "Q - agent - 9 8 usd,day,UTC,spend"),
    ],
)
def test_each_operation_is_rendered_as_the_wire_document_describes(op, text):
    assert text_of(op) == text


@pytest.mark.parametrize(
    ("labels", "request_name", "words"),
    [
        (NO_LABELS, "", "- - - -"),
        (Labels("w 1", "a|b", "t1"), "", "w%201 a%7Cb t1 -"),
        (NO_LABELS, "r1", "-!r1 - - -"),
        (Labels("w1"), "r1", "w1!r1 - - -"),
        (Labels(scope="team=quant,user=alice"), "", "- - - team=quant,user=alice"),
        (Labels("w1", scope=";usd"), "r1", "w1!r1 - - -;usd"),
    ],
)
def test_the_record_of_a_reservation_contains_the_labels_and_the_request_as_words(labels, request_name, words):
    _, record = text_of(reserve(labels=labels, request=request_name)).split("\n")
    assert record == f"{words}{AGENT.segment}5,,"


def test_a_hold_record_expires_with_its_last_window_or_in_ten_years_if_a_window_has_no_end():
    assert text_of(reserve((TOKENS, 3), (AGENT, 5))).startswith(f"R a 1000 c {TOKENS.expires_ms} ")
    for parts in ([(JOBS, 1)], [(AGENT, 5), (JOBS, 1)]):
        assert text_of(reserve(*parts)).startswith(f"R a 1000 c {NOW_MS + TEN_YEARS_MS} ")


# -- the fast path -----------------------------------------------------------------------------------------------------


def test_a_reservation_takes_the_fast_path_after_a_first_grant_in_each_of_its_windows():
    agent, team = make_window("agent"), make_window("team")
    assert not reserve((agent, 5)).uses_fast_path
    reserve((agent, 5)).granted(8, 9)
    assert reserve((agent, 5)).uses_fast_path
    assert not reserve((agent, 5), (team, 5)).uses_fast_path
    reserve((agent, 5), (team, 5)).granted(8, 9)
    assert reserve((agent, 5), (team, 5)).uses_fast_path


def test_a_replica_computes_the_record_of_a_granted_hold_without_reading_the_store():
    record = parse_record(reserve((AGENT, 5), (JOBS, 1), labels=Labels("w1"), request="r1").granted(8_000, 9))
    assert (record.state, record.deadline_ms, record.created_us, record.owner) == ("o", 9, 8_000, "w1")
    assert [(s.budget, s.reserved, s.charged) for s in record.segments] == [("agent", 5, 0), ("jobs", 1, 0)]
    assert record.request == "r1"


@pytest.mark.parametrize(
    ("parts", "reserved", "amounts", "overrun"),
    [
        ([(AGENT, 7)], [9], "agent:9:7", False),
        ([(AGENT, 7)], [5], "agent:5:7o", True),
        ([(JOBS, 5)], [1], "jobs:1:", False),
        ([(AGENT, 7), (JOBS, 5)], [9, 1], "agent:9:7 jobs:1:", False),
        ([(TOKENS, 4), (AGENT, 7)], [3, 9], "tokens:3:4o agent:9:7", True),
    ],
)
def test_a_fast_commit_sends_the_old_and_the_new_record_of_the_hold(parts, reserved, amounts, overrun):
    held = [(window, units) for (window, _), units in zip(parts, reserved, strict=True)]
    granted = reserve(*held).granted(8, 9)
    op = commit(*parts)
    op.enable_fast_path("0123456789ab", granted, held)
    assert op.uses_fast_path
    settled = op.parse("k")
    after = op.record(settled, granted, 9).render()
    assert text_of(op, fast=True) == f"C a - - - {amounts}\n{granted}\n{after} 0123456789ab"
    assert settled.overrun == overrun
    assert op.record_text(settled, granted, 9) == after


def test_a_fast_commit_names_the_scope_for_the_ledger_without_the_units_of_the_hold():
    granted = reserve((AGENT, 9), labels=Labels(operation="a;b", scope="user=alice;usd")).granted(8, 9)
    op = commit((AGENT, 7))
    op.enable_fast_path("0123456789ab", granted, [(AGENT, 9)])
    assert text_of(op, fast=True).startswith("C a a%3Bb - user=alice agent:9:7\n")
    assert parse_record(op.record_text(op.parse("k"), granted, 9)).units == ("usd",)


@pytest.mark.parametrize("parts", [[(AGENT, 2**46 + 1)], [(AGENT, 2**46 + 1), (TOKENS, 3)]])
def test_a_commit_of_more_than_2_to_the_46_units_does_not_take_the_fast_path(parts):
    op = commit(*parts)
    op.enable_fast_path("0123456789ab", reserve(*parts).granted(8, 9), parts)
    assert not op.uses_fast_path


# -- properties that the batching reads --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "asks_for_money", "is_fact", "is_urgent"),
    [
        (reserve(), True, False, False),
        (commit((AGENT, 7)), False, True, False),
        (Release("a", "key", [AGENT]), False, True, False),
        (extend(), False, False, True),
        (extend(accrued=5), False, True, True),
        (extend(ExtendMode.GROW, reserved=9), True, False, False),
        (extend(ExtendMode.GROW, reserved=9, accrued=5), True, True, False),
    ],
)
def test_an_extension_is_a_fact_if_it_has_spend_and_asks_for_money_if_it_has_growth(
    op, asks_for_money, is_fact, is_urgent
):
    assert (op.asks_for_money, op.is_fact, op.is_urgent) == (asks_for_money, is_fact, is_urgent)


def test_two_commits_are_the_same_only_if_their_amounts_modes_and_remarks_are_equal():
    assert commit((AGENT, 7)).same_as(commit((AGENT, 7)))
    for other in (commit((AGENT, 8)), commit((AGENT, 7), mode=CommitMode.ACCRUED), commit((AGENT, 7), remark="call")):
        assert not commit((AGENT, 7)).same_as(other)


def test_an_extension_sent_as_a_report_has_the_same_totals_and_does_not_change_the_deadline():
    assert text_of(extend(accrued=5, reserved=9).as_report()) == "E a 1000 3 agent:5:9"


def test_a_late_record_of_spend_has_the_windows_and_labels_of_the_original_record():
    labels = {"operation": "call", "trace_id": "t1", "scope": "user=alice", "digest": "abc"}
    late = RecordSpend("a", "key", [(AGENT, 7)], **labels).as_late()
    assert text_of(late) == "N a 1 -!abc. call t1 user=alice agent:7"
    assert late.as_late() is late


@pytest.mark.parametrize(
    ("mode", "settled", "correctable"),
    [
        (ReleaseMode.BY_WORKER, Settled((0,)), False),
        (ReleaseMode.BY_OPERATOR, Settled((0,)), True),
        (ReleaseMode.UNRECEIVED, Settled((0,)), True),
        (ReleaseMode.FINAL, Settled((0,)), False),
        (ReleaseMode.BY_ID, Settled((0,)), False),
        (ReleaseMode.BY_ID, Settled((0,), late=True), True),
        (ReleaseMode.BY_ID, Settled((0,), replayed=True), True),
    ],
)
def test_a_release_by_an_operator_or_after_the_deadline_can_be_corrected_by_a_commit(mode, settled, correctable):
    op = Release("a", "key", [AGENT], mode)
    assert op.is_correctable(settled) == correctable
    assert is_settled(op.record_text(settled, RECORD, 9)) == (not correctable)


def test_an_operation_that_only_probes_the_store_names_no_hold_and_no_window():
    assert text_of(Retire.nothing("key")) == "X -"
