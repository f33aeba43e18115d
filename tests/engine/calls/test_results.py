"""Denials, conflicts, figures and pages of the public API, derived from replies of the store."""

from __future__ import annotations

from decimal import Decimal

import pytest

from ktrdr_budget import Budget, InvalidArgument
from ktrdr_budget.engine.calls.results import (
    amounts_of,
    amounts_text,
    conflict_error,
    denial,
    eviction_fault,
    holds_cursor,
    page_size,
    refusal_faults,
    status_of,
)
from ktrdr_budget.engine.protocol.codes import COMMITTED, RECORDED, RELEASED, RELEASED_BY_OPERATOR
from ktrdr_budget.engine.protocol.operations import Extend, Operation, RecordSpend, Release
from ktrdr_budget.engine.protocol.replies import Denied
from ktrdr_budget.engine.protocol.requests import RuntimeLimit, WindowFigures
from ktrdr_budget.money import MAX_UNITS
from ktrdr_budget.periods import from_ms

from ...helpers.calls import NOW_MS, NOW_US, call_context, hold_record

AGENT, TOKENS = Budget("agent", "5.00"), Budget("tokens", 1000, unit="tokens")
CONTEXT = call_context(AGENT, TOKENS, Budget("total", 1000, unit="tokens", period="ever"))
WINDOW, ENDLESS = CONTEXT.state.current_window("tokens"), CONTEXT.state.current_window("total")
HOUR_S = 3600
FIRST_MS = NOW_MS + 20_000
"""The first deadline of an open hold."""


# -- denials -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spent", "held", "unconfirmed", "requested", "total", "reason", "fits"),
    [
        (0, 961, 0, 40, 0, "budget_held", 39),
        (960, 1, 0, 40, 0, "budget_held", 39),
        (961, 0, 0, 40, 0, "budget_exhausted", 39),
        (0, 0, 961, 40, 0, "budget_exhausted", 39),
        (0, 0, 0, 1001, 0, "exceeds_limit", 1000),
        (0, 990, 0, 20, 1001, "exceeds_limit", 10),
        (1500, 0, 0, 1, 0, "budget_exhausted", 0),
    ],
    ids=["held", "fits exactly without holds", "spent", "unconfirmed", "too large", "grown too large", "overrun"],
)
def test_a_denial_distinguishes_held_budgets_and_exhausted_budgets_and_requests_above_the_limit(
    spent, held, unconfirmed, requested, total, reason, fits
):
    denied = denial(WINDOW, Denied("", 1000, spent, held, unconfirmed, requested, FIRST_MS, total), NOW_US, "tokens")
    assert (denied.reason, denied.fits, denied.remaining) == (reason, fits, fits)


@pytest.mark.parametrize(
    ("window", "figures", "first_ms", "seconds"),
    [
        (WINDOW, {"held": 990}, FIRST_MS + 1, 21),
        (WINDOW, {"held": 990}, NOW_MS - 5000, 1),
        (WINDOW, {"held": 990}, 0, 12 * HOUR_S),
        (WINDOW, {"held": 990}, NOW_MS + 13 * HOUR_S * 1000, 12 * HOUR_S),
        (WINDOW, {"spent": 990}, FIRST_MS, 12 * HOUR_S),
        (ENDLESS, {"held": 990}, FIRST_MS, 20),
        (ENDLESS, {"spent": 990}, FIRST_MS, None),
        (WINDOW, {"requested": 1001}, FIRST_MS, None),
    ],
)
def test_a_denied_caller_may_retry_when_a_hold_expires_or_the_window_ends(window, figures, first_ms, seconds):
    """Whole seconds, rounded up; ``None`` if waiting cannot help."""
    amounts = {"spent": 0, "held": 0, "unconfirmed": 0, "requested": 40, "first_deadline_ms": first_ms}
    assert denial(window, Denied("", 1000, **(amounts | figures)), NOW_US, "tokens").retry_after == seconds


def test_a_denial_by_an_uncapped_budget_shows_the_largest_exact_sum_as_the_limit():
    denied = denial(WINDOW, Denied("", None, MAX_UNITS - 1, 0, 0, 5, 0), NOW_US, "tokens")
    assert (denied.limit, denied.reason, denied.fits) == (MAX_UNITS - 1, "budget_exhausted", 0)


# -- conflicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "found"),
    [
        (COMMITTED, "was already committed at $0.07"),
        (RECORDED, "was recorded at $0.07"),
        (RELEASED, "was already released"),
        (RELEASED_BY_OPERATOR, "was released by an operator"),
        ("x", "was reserved at $0.25 and is unconfirmed"),
    ],
)
def test_the_error_for_a_refused_release_describes_the_state_of_the_hold(state, found):
    record = hold_record(CONTEXT, agent=250_000_000)
    charged = 70_000_000 if state in (COMMITTED, RECORDED) else 0
    op = Release("a", "key", [CONTEXT.state.current_window("agent")])
    error = conflict_error(op, record.settled(state, [charged]), CONTEXT.state.budgets)
    assert str(error) == f"hold 'a' {found}; it cannot be released"


@pytest.mark.parametrize(
    ("op", "obeys"), [(Extend("a", "k", [], [], 1, "0"), True), (RecordSpend("a", "k", []), False)]
)
def test_only_the_error_of_a_heartbeat_shows_that_an_operator_released_the_hold(op: Operation, obeys):
    """The worker of the hold stops, and can still commit the cost."""
    record = hold_record(CONTEXT, RELEASED_BY_OPERATOR, agent=1)
    assert conflict_error(op, record, CONTEXT.state.budgets).released_by_operator is obeys


def test_the_error_for_a_conflict_shows_dollars_or_a_count_if_the_budget_is_not_configured():
    record, op = hold_record(CONTEXT, agent=250_000_000), Release("a", "key", [])
    assert "reserved at $0.25 and" in str(conflict_error(op, record, {}))
    assert "reserved at 7 count and" in str(conflict_error(op, hold_record(CONTEXT, tokens=7), {}))


def test_amounts_of_many_budgets_are_abbreviated():
    names = {f"b{number}": (number, "tokens") for number in range(1, 6)}
    assert amounts_text(dict([*names.items()][:1])) == "1 tokens"
    assert amounts_text(names) == "b1 1 tokens, b2 2 tokens, b3 3 tokens, … (5 budgets)"


def test_zero_is_shown_for_each_budget_if_a_settlement_has_no_amounts():
    assert amounts_of([WINDOW], [7]) == {"tokens": 7}
    assert amounts_of([WINDOW], []) == {"tokens": 0}


# -- status ------------------------------------------------------------------------------------------------------------

FIGURES = WindowFigures(None, "", 2000, True, 7, 40, 0, 1, 0, (NOW_US - 10, "another"))
MINE = (NOW_US - 5, "mine")


def status(figures, claim=MINE, repaired_ms=0):
    return status_of(TOKENS, WINDOW, figures, NOW_US, repaired_ms, claim)


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({}, 1000),
        ({"claim": (NOW_US - 1, "another")}, 2000),
        ({"claim": (NOW_US + 1, "another")}, 1000),
        ({"has_limit": False, "limit": None, "claim": (NOW_US - 1, "another")}, 1000),
        ({"claim": (NOW_US - 1, "another"), "limit": None}, None),
    ],
    ids=["older replica", "newer replica", "replica ahead of the clock", "no reservation yet", "newer, uncapped"],
)
def test_a_status_shows_the_configured_limit_of_the_replica_that_started_last(changes, limit):
    now = status(FIGURES._replace(**changes))
    assert (now.limit, now.limit_source, now.configured_limit) == (limit, "configured", 1000)


@pytest.mark.parametrize(("until_ms", "limit"), [(0, 9), (NOW_MS + 1, 9), (NOW_MS, 1000)])
def test_a_limit_set_at_run_time_applies_until_its_end(until_ms, limit):
    now = status(FIGURES._replace(runtime=RuntimeLimit(9, until_ms)))
    assert (now.limit, now.limit_until) == (limit, from_ms(until_ms) if until_ms > NOW_MS else None)


def test_a_status_shows_the_end_of_the_recovery_after_a_data_loss():
    assert status(FIGURES).recovering_until is None
    assert status(FIGURES, repaired_ms=NOW_MS + 3000).recovering_until == from_ms(NOW_MS + 3000)


def test_the_status_of_a_dollar_budget_has_exact_amounts():
    figures = FIGURES._replace(spent=10**9 // 2, held=1)
    now = status_of(AGENT, CONTEXT.state.current_window("agent"), figures, NOW_US, 0, MINE)
    assert (now.spent, now.held, now.remaining) == (Decimal("0.5"), Decimal("0.000000001"), Decimal("4.499999999"))


# -- faults of the store, and pages ------------------------------------------------------------------------------------


def test_every_eviction_policy_except_noeviction_is_a_fault():
    assert eviction_fault("noeviction") is None
    assert "maxmemory-policy is volatile-ttl" in str(eviction_fault("volatile-ttl"))


@pytest.mark.parametrize(
    ("refused", "store", "scripts"),
    [
        ([("GET", ""), ("SET", "")], None, "the store's user may not run GET, SET"),
        ([("GET", "ERR a"), ("SET", "ERR b")], None, "the store refuses GET: ERR a; the store refuses SET: ERR b"),
        ([("GET", "OOM a"), ("SET", "READONLY b")], "it is full, and refuses GET: OOM a", None),
        ([("GET", "ERR a"), ("SET", "ERR a")], None, "the store refuses GET, SET: ERR a"),
        ([("SET", "-READONLY x"), ("GET", "")], "it is a read-only replica, and refuses SET: -READONLY x",
         "the store's user may not run GET"),
    ],
)  # fmt: skip
def test_refused_commands_are_faults_of_the_store_or_of_its_scripts(refused, store, scripts):
    assert refusal_faults(refused) == (store, scripts)


@pytest.mark.parametrize("size", [0, 1001, True, "10"])
def test_the_size_of_a_page_must_be_from_1_to_1000_items(size):
    assert (page_size(1), page_size(1000)) == (1, 1000)
    with pytest.raises(InvalidArgument):
        page_size(size)


@pytest.mark.parametrize("cursor", ["", "7", "2-0", "0-", "0-9999999999", "0-٣", 7])
def test_a_cursor_of_a_list_of_holds_must_be_an_index_and_an_offset(cursor):
    assert (holds_cursor(None), holds_cursor("1-20")) == ((0, 0), (1, 20))
    with pytest.raises(InvalidArgument):
        holds_cursor(cursor)
