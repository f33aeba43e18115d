"""A hold in the process of its worker: accruals, updates by the store's record, and the record of an offline hold."""

from __future__ import annotations

from contextvars import copy_context
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest

from ktrdr_budget import Budget, InvalidAmount, InvalidArgument, UnknownBudget
from ktrdr_budget.engine.protocol.hold_record import HoldRecord, parse_record, segments_of
from ktrdr_budget.engine.protocol.operations import Labels
from ktrdr_budget.engine.protocol.window import Window
from ktrdr_budget.engine.replica.hold import HoldBase, added, check_on_error, current_hold, restore_hold
from ktrdr_budget.engine.replica.state import ReplicaState

from ...helpers.windows import make_window

NOW_MS = 1_796_040_000_000
CENT = 10_000_000
AGENT, TOKENS, JOBS = make_window("agent"), make_window("tokens", "n"), make_window("jobs", "s")
BUDGETS = [Budget("agent", "5.00"), Budget("tokens", 100, unit="tokens"), Budget("jobs", 2, kind="slots")]
ENGINE = SimpleNamespace(state=ReplicaState("t", BUDGETS))


def hold(*parts: tuple[Window, int], **options: Any) -> HoldBase:
    """A hold of 15 cents in the budget ``agent``, or of the given parts."""
    return HoldBase(ENGINE, "op_1", parts or [(AGENT, 15 * CENT)], 60_000, NOW_MS + 60_000, **options)


def record(state: str = "o", reserved: int = 15 * CENT, accrued: int = 0) -> HoldRecord:
    [segment] = segments_of([(AGENT, reserved)])
    return HoldRecord(state, "c", NOW_MS + 90_000, 8, 0, "", "", "", (segment._replace(accrued=accrued),))


def test_a_hold_shows_its_figures_in_the_units_of_its_budgets():
    shown = hold((AGENT, 15 * CENT), (TOKENS, 100), (JOBS, 1))
    assert shown.amounts == {"agent": Decimal("0.15"), "tokens": 100, "jobs": 1}
    assert shown.accrued == {"agent": Decimal("0.00"), "tokens": 0, "jobs": 0}
    assert shown.windows == {"agent": "2026-11-30", "tokens": "2026-11-30", "jobs": "ever"}
    assert shown.expires_at.isoformat() == "2026-11-30T12:01:00+00:00"
    assert shown.ttl == 60


def test_a_hold_belongs_only_to_limiters_with_the_same_engine():
    assert hold().belongs_to(SimpleNamespace(engine=ENGINE))
    assert not hold().belongs_to(SimpleNamespace(engine=SimpleNamespace(state=ENGINE.state)))
    assert not hold().belongs_to(object())


# -- accruals ----------------------------------------------------------------------------------------------------------


def test_accruals_are_summed_and_an_amount_without_a_budget_counts_only_in_dollar_budgets():
    used = hold((AGENT, 15 * CENT), (TOKENS, 100))
    used.accrue("0.01")
    used.accrue({"agent": "0.02", "tokens": 7})
    assert used.accrued == {"agent": Decimal("0.03"), "tokens": 7}
    assert used.accrued_units == [3 * CENT, 7]


@pytest.mark.parametrize(
    ("amount", "error"),
    [
        ("-0.01", InvalidAmount),
        ({"agent": "0.01", "tokens": "0.5"}, InvalidAmount),
        ({"agent": "0.01", "agnet": "0.01"}, UnknownBudget),
        ({"agent": "0.01", "tokens": 2**53 - 1}, InvalidAmount),
    ],
)
def test_a_refused_accrual_adds_nothing_to_any_budget(amount, error):
    used = hold((AGENT, 15 * CENT), (TOKENS, 100))
    used.accrue({"tokens": 1})
    with pytest.raises(error):
        used.accrue(amount)
    assert used.accrued_units == [0, 1]


def test_an_invalid_accrual_to_a_hold_of_slots_is_refused():
    hold((JOBS, 1)).accrue("0.01")
    with pytest.raises(InvalidAmount):
        hold((JOBS, 1)).accrue("-0.01")


def test_a_lower_total_does_not_lower_the_accrued_amount():
    used = hold()
    used.accrue_to("0.05")
    used.accrue_to("0.03")
    used.accrue_to(None)
    assert used.accrued_units == [5 * CENT]


def test_an_adjustment_keeps_the_accrued_amount_between_zero_and_the_largest_amount():
    used = hold()
    for change, total in ((5, 5), (-3, 2), (-9, 0), (2**53, 2**53 - 1)):
        used.adjust({"agent": change})
        assert used.accrued_units == [total]


def test_the_error_for_a_sum_that_is_too_large_shows_the_bound_in_the_unit_of_the_budget():
    units = {"agent": "usd", "tokens": "tokens"}
    assert added({"agent": 2**53 - 2}, {"agent": 1}, units.__getitem__) == {"agent": 2**53 - 1}
    with pytest.raises(InvalidAmount, match=r"'agent'; it must be below \$9,007,199\.25"):
        added({"agent": 2**53 - 1}, {"agent": 1}, units.__getitem__)
    with pytest.raises(InvalidAmount, match=r"'tokens'; it must be below 9,007,199,254,740,992 tokens"):
        added({}, {"tokens": 2**53}, units.__getitem__)


def test_equal_remarks_are_kept_once_and_a_remark_with_first_true_is_put_before_the_others():
    noted = hold()
    for remark in ("estimated", "x" * 300, "estimated"):
        noted.note(remark)
    noted.note("prices/1.0", first=True)
    assert noted.remark == f"prices/1.0 estimated {'x' * 300}"[:256]


# -- the store's record ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "state", "settled"),
    [
        ("o", "open", False),
        ("x", "unconfirmed", False),
        ("c", "committed", True),
        ("r", "released", True),
        ("z", "released", False),
    ],
)
def test_a_repeated_reservation_returns_the_hold_in_its_current_state(code, state, settled):
    repeated = hold()
    repeated.resume(record(code, accrued=CENT))
    assert (repeated.state, repeated.settled, repeated.replayed) == (state, settled, True)
    assert repeated.accrued_units == [CENT]


def test_a_record_of_the_store_updates_a_hold_but_an_older_record_does_not_shrink_the_hold():
    followed = hold(granted="a record")
    followed.update(record("x", reserved=20 * CENT))
    assert (followed.state, followed.deadline_ms, followed.granted) == ("unconfirmed", NOW_MS + 90_000, None)
    followed.update(record(reserved=15 * CENT))
    assert followed.reserved_units == {"agent": 20 * CENT}


# -- the record without a store ----------------------------------------------------------------------------------------


def test_the_record_of_a_hold_granted_offline_shows_the_growth_and_the_accruals_of_the_hold():
    offline = hold((AGENT, 15 * CENT), request="r1")
    kept = offline.keep_offline("a", 8, Labels("w1", "call", "t1"))
    assert (kept.state, kept.policy, kept.created_us, kept.request) == ("o", "a", 8, "r1")
    offline.parts = [(AGENT, 20 * CENT)]
    offline.accrue("0.01")
    offline.deadline_ms += 1
    view = offline.offline_view()
    assert view.segments == (kept.segments[0]._replace(reserved=20 * CENT, accrued=CENT),)
    assert view.deadline_ms == kept.deadline_ms + 1
    assert (view.owner, view.operation, view.trace_id) == ("w1", "call", "t1")


def test_the_commit_of_an_offline_hold_sends_a_record_with_the_amounts_before_and_after_growth():
    offline = hold((AGENT, 15 * CENT), (JOBS, 1))
    offline.keep_offline("c", 8, Labels("w1", "call", "t1"))
    offline.parts = [(AGENT, 20 * CENT), (JOBS, 1)]
    op = offline.restored_commit([7 * CENT, 1], remark="estimated", trace_id="t2")
    restored = parse_record(op.text)
    agent, jobs = restored.segments
    assert (agent.base, agent.reserved, agent.charged) == (15 * CENT, 20 * CENT, 7 * CENT)
    assert (jobs.base, jobs.reserved, jobs.charged) == (None, 1, 0), "slots are not spent"
    assert (restored.state, restored.operation, restored.trace_id) == ("c", "call estimated", "t2")
    assert (op.key, op.windows) == (ENGINE.state.keys.hold("op_1"), [AGENT, JOBS])


def test_if_the_store_has_lost_a_hold_the_commit_sends_the_amounts_known_in_this_process():
    lost = hold(created_us=8)
    lost.accrue("0.01")
    restored = parse_record(lost.restored_commit([7 * CENT]).text)
    assert (restored.state, restored.created_us, restored.deadline_ms) == ("c", 8, NOW_MS + 60_000)
    [segment] = restored.segments
    assert (segment.reserved, segment.accrued, segment.charged) == (15 * CENT, CENT, 7 * CENT)


# -- blocks ------------------------------------------------------------------------------------------------------------


def stop() -> None:
    """Stands for the function that stops the heartbeats of a block."""


def test_if_metered_calls_are_open_at_the_end_of_a_block_the_last_call_settles_the_hold():
    left = hold()
    assert not left.leave_to_calls(False, "release", stop), "no call was made"
    left.growth = SimpleNamespace(open=0, left=None)
    assert not left.leave_to_calls(False, "release", stop), "all calls have ended"
    left.growth.open = 1
    assert left.leave_to_calls(True, "charge", stop)
    assert left.growth.left == (True, "charge", stop), "for the last call, which settles the hold"


@pytest.mark.parametrize(("name", "value"), [("state", "committed"), ("settling", True), ("uncertain_commit", [])])
def test_a_hold_whose_settlement_has_begun_is_not_settled_by_the_last_metered_call(name, value):
    ending = hold()
    ending.growth = SimpleNamespace(open=1, left=None)
    setattr(ending, name, value)
    assert not ending.leave_to_calls(False, "release", stop)


def test_the_outer_hold_becomes_current_after_a_block_only_in_the_context_of_the_block():
    outer, inner = hold(), hold()
    outermost = current_hold.set(outer)
    token = current_hold.set(inner)
    copy_context().run(restore_hold, token)
    assert current_hold.get() is inner, "a generator that is closed in another task"
    restore_hold(token)
    assert current_hold.get() is outer
    restore_hold(outermost)
    assert current_hold.get() is None


@pytest.mark.parametrize("value", ["keep", "", None, True])
def test_a_value_of_on_error_other_than_release_or_charge_is_refused(value):
    check_on_error("release")
    check_on_error("charge")
    with pytest.raises(InvalidArgument, match="on_error must be 'release' or 'charge'"):
        check_on_error(value)
