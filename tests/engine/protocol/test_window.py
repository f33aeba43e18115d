"""The forms of a window in requests: keys, the words of a batch, and the segment of a hold record."""

from __future__ import annotations

import pytest

from ktrdr_budget import Budget
from ktrdr_budget.engine.protocol.codes import COUNT, DOLLARS, SLOTS
from ktrdr_budget.engine.protocol.keys import stored_window
from ktrdr_budget.engine.protocol.window import Window, flag_of

from ...helpers.windows import DAY, KEYS, make_window

STORED = stored_window("2026-11-30", "usd,day,UTC,spend")


@pytest.mark.parametrize(
    ("budget", "flag"),
    [
        (Budget("agent", "5.00"), DOLLARS),
        (Budget("tokens", 100, unit="tokens"), COUNT),
        (Budget("jobs", 2, kind="slots"), SLOTS),
        (Budget("jobs", 2, unit="jobs", kind="slots"), SLOTS),
    ],
)
def test_the_flag_of_a_budget_is_dollars_or_count_or_slots(budget, flag):
    assert flag_of(budget) == flag


def test_a_window_has_the_same_name_in_its_keys_and_in_hold_records():
    window = make_window()
    assert window.name == f"agent:{STORED}"
    assert window.key == KEYS.window("agent", STORED)
    assert window.ledger_key == KEYS.ledger("agent", STORED)
    assert window.segment == f"|u,agent:{STORED},,"


def test_a_batch_describes_a_window_by_name_and_definition_and_bounds_and_limit():
    window = make_window(expires_ms=DAY.end_ms + 1, limit=5, asserts_limit=True)
    bounds = str(DAY.start_ms), str(DAY.end_ms), str(DAY.end_ms + 1)
    assert window.words == (f"agent:{STORED}", "u", "usd,day,UTC,spend", *bounds, "5", "!")


@pytest.mark.parametrize(
    ("limit", "asserts_limit", "words"),
    [
        (5, True, ("5", "!")),
        (0, True, ("0", "!")),
        (None, True, ("-", "!")),
        (None, False, ("-", "?")),
    ],
)
def test_a_window_without_a_limit_is_sent_differently_from_a_window_with_an_unknown_limit(limit, asserts_limit, words):
    assert make_window(limit=limit, asserts_limit=asserts_limit).words[-2:] == words


def test_a_window_without_end_is_sent_with_zeros_as_its_bounds():
    assert make_window("jobs", SLOTS).words[3:6] == ("0", "0", "0")


def test_a_window_with_an_unknown_definition_keeps_its_stored_name():
    window = Window(KEYS, "agent", DAY, DOLLARS, stored="2026-11-30~k3f9a1")
    assert window.name == "agent:2026-11-30~k3f9a1"
    assert window.words[2] == "-", "the store compares no definition"


@pytest.mark.parametrize(("flag", "unit"), [(DOLLARS, "usd"), (COUNT, "count"), (SLOTS, "count")])
def test_the_unit_of_a_window_is_dollars_or_a_count(flag, unit):
    assert make_window(flag=flag).unit == unit
