"""Reads, and commands that are no batches: their arguments, and the parsed replies."""

from __future__ import annotations

import pytest

from ktrdr_budget.engine.protocol.replies import OtherDefinition
from ktrdr_budget.engine.protocol.requests import (
    ReadHead,
    RuntimeLimit,
    WindowFigures,
    changes_read,
    due_read,
    index_read,
    ledger_read,
    parse_eviction_policy,
    parse_hold_records,
    parse_hold_texts,
    parse_ledger_page,
    parse_migrate,
    parse_read,
    parse_refused,
    parse_set_limit,
    parse_status,
    record_read,
    records_read,
    set_limit,
    status_read,
)

from ...helpers.windows import KEYS, make_window

AGENT = make_window()
RECORD = f"o c 9 8 0 - - - -{AGENT.segment}5,,"
TOMBSTONE = f"r c 9 8 0 - ! - -{AGENT.segment}0,,"
NOW_MS = 1_796_040_000_000


# -- reads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "while_recovering"),
    [
        (records_read(KEYS, "r1", ["a"]), "answers"),
        (record_read(KEYS, "r1", "a"), "answers if found"),
        (due_read(KEYS, "r1", 10), "answers"),
        (index_read(KEYS, "r1", KEYS.due, 0, 10), "waits"),
        (ledger_read(KEYS, "r1", "agent", AGENT.stored, "", 10), "waits"),
        (changes_read(KEYS, "r1", "", 10), "answers"),
        (status_read(KEYS, "r1", [AGENT]), "answers"),
        (status_read(KEYS, "r1", [AGENT], complete=True), "waits"),
    ],
)
def test_a_read_waits_for_the_replays_after_a_data_loss_only_if_its_reply_must_be_complete(read, while_recovering):
    assert read.while_recovering == while_recovering
    assert read.keys[0] == KEYS.meta, "for the head of the reply"
    assert read.args[0] == "r1"


def test_a_read_of_records_names_their_keys_and_a_read_of_a_list_names_its_range():
    assert records_read(KEYS, "r1", ["a", "b"]).keys == [KEYS.meta, KEYS.hold("a"), KEYS.hold("b")]
    assert due_read(KEYS, "r1", 10).args == ["r1", "ZRANGE", 0, 9]
    assert index_read(KEYS, "r1", KEYS.due, 20, 10).args == ["r1", "ZREVRANGE", 20, 29]


def test_a_reply_to_a_read_begins_with_the_state_of_the_store():
    head, items = parse_read([b"1796040000000999 e1 3 0", b"first", b"second"])
    assert head == ReadHead(NOW_MS * 1000 + 999, "e1", 3, 0)
    assert head.now_ms == NOW_MS
    assert items == [b"first", b"second"]
    assert parse_read(["8 - 0 0"])[0].epoch is None, "nothing was ever written"


def test_a_record_that_has_expired_or_is_a_tombstone_is_read_as_an_unknown_hold():
    items = [[RECORD.encode(), None, TOMBSTONE.encode()]]
    assert parse_hold_texts(items) == [RECORD, None, None]
    first, *unknown = parse_hold_records(items)
    assert first is not None and first.segments[0].reserved == 5
    assert unknown == [None, None]


@pytest.mark.parametrize(("stored", "text"), [(RECORD.encode(), RECORD), (None, None)])
def test_a_reply_with_a_single_hold_record_is_parsed_to_a_list(stored, text):
    assert parse_hold_texts([stored]) == [text]


def test_a_reply_with_a_ledger_page_has_the_first_entry_number_and_a_flag_for_trimmed_entries():
    assert parse_ledger_page([1, 7, [b"8 5 commit a - - -"]]) == (True, 7, ["8 5 commit a - - -"])
    assert parse_ledger_page([0, 1, []]) == (False, 1, [])


# -- figures of windows ------------------------------------------------------------------------------------------------


def figures(runtime: str = "", limit: str = "", claim: str = "") -> WindowFigures:
    due, [found] = parse_status([[], [runtime, "", limit, "", "", "", "", "", claim]])
    assert due == []
    assert isinstance(found, WindowFigures)
    return found


def test_a_status_reply_has_the_due_holds_and_the_figures_or_an_error_for_each_window():
    stored = [b"5 0 9", b"usd,day,UTC,spend", b"50", b"1", b"2", b"3", b"4", b"5", b"7 r1"]
    due, windows = parse_status([[b"op_1"], stored, b"WRONGTYPE"])
    assert due == ["op_1"]
    limit = RuntimeLimit(5, until_ms=0, changed_us=9)
    assert windows == [WindowFigures(limit, "usd,day,UTC,spend", 50, True, 1, 2, 3, 4, 5, (7, "r1")), "WRONGTYPE"]


def test_a_window_that_does_not_exist_has_zero_figures_and_no_limit():
    assert figures() == WindowFigures(None, "", None, False, 0, 0, 0, 0, 0, None)


def test_a_window_without_a_cap_differs_from_a_window_whose_limit_is_unknown():
    assert (figures(limit="-").limit, figures(limit="-").has_limit) == (None, True)
    assert (figures(limit="0").limit, figures(limit="0").has_limit) == (0, True)
    assert (figures(limit="").limit, figures(limit="").has_limit) == (None, False)
    assert figures(runtime="- 9").runtime == RuntimeLimit(None, until_ms=9)


@pytest.mark.parametrize(
    ("until_ms", "in_force"), [(0, True), (NOW_MS - 1, False), (NOW_MS, False), (NOW_MS + 1, True)]
)
def test_a_limit_set_at_run_time_is_in_force_until_its_end_or_forever_if_its_end_is_zero(until_ms, in_force):
    assert RuntimeLimit(5, until_ms).is_in_force(NOW_MS) == in_force


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "clear", "word"), [(5, False, "5"), (0, False, "0"), (None, False, "-"), (None, True, ""), (5, True, "")]
)
def test_a_zero_limit_and_an_uncapped_limit_and_a_cleared_limit_are_sent_as_different_words(units, clear, word):
    assert set_limit(KEYS, "agent", units, 9, "usd,day,UTC,spend", "a b", "", clear=clear).args == [
        *("agent", word, 9, "usd,day,UTC,spend", "a%20b", "-")
    ]


def test_the_reply_to_set_limit_is_the_time_of_the_change_or_a_conflicting_definition():
    assert parse_set_limit(b"8", "agent") == 8
    assert parse_set_limit(b"m usd,day,UTC,spend", "agent") == OtherDefinition("agent", "usd,day,UTC,spend")


@pytest.mark.parametrize(("reply", "dropped"), [(b"cleared", True), (b"done", False), (b"w", None)])
def test_the_reply_to_a_migration_shows_a_cleared_limit_or_a_concurrent_change_of_the_definition(reply, dropped):
    assert parse_migrate(reply) is dropped


def test_a_readiness_reply_pairs_each_refused_command_with_its_error():
    assert parse_refused([b"zadd", b"", b"rpush", b"WRONGTYPE"]) == [("zadd", ""), ("rpush", "WRONGTYPE")]
    assert parse_refused([]) == []


@pytest.mark.parametrize(
    ("reply", "policy"),
    [
        (b"# Memory\r\nused_memory:1\r\nmaxmemory_policy:allkeys-lru\r\n", "allkeys-lru"),
        ("maxmemory_policy:noeviction", "noeviction"),
        ({"maxmemory_policy": "noeviction"}, "noeviction"),
        ("# Memory", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_eviction_policy_is_unknown_if_the_server_does_not_show_it(reply, policy):
    assert parse_eviction_policy(reply) == policy
