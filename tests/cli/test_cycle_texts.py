"""Text forms of a research cycle: its row, its progress and its end."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from ktrdr_budget.cli.cycle_texts import CYCLE_COLUMNS, cycle_row, ending, has_ended, milestones, picture, status_text

PASSED = {"gate": "training", "passed": True, "reason": ""}
FAILED = {"gate": "training", "passed": False, "reason": "accuracy 0.41 is below 0.45"}


def cycle(**changes: Any) -> dict[str, Any]:
    """A cycle in its phase ``training``."""
    return {
        "operation_id": "op_1",
        "status": "running",
        "phase": "training",
        "outcome": None,
        "reason": None,
        "error": None,
        "strategy_name": "momentum",
        "started_at": "2026-11-23T12:00:00Z",
        "elapsed_seconds": Decimal("4.2"),
        "spend": "0.03",
        "estimate": "0.15",
        "tokens": {"designing": 1000, "assessing": 200},
        "gates": [],
        "results": {},
        **changes,
    }


def test_a_cycle_has_ended_if_the_cycle_has_an_outcome() -> None:
    assert not has_ended(cycle())
    assert has_ended(cycle(outcome="failed"))


def test_the_row_of_a_cycle_has_one_cell_for_each_column() -> None:
    row = dict(zip(CYCLE_COLUMNS, cycle_row(cycle(gates=[PASSED, {**FAILED, "bypassed": True}])), strict=True))
    assert row["STATUS"] == "running (training)"
    assert (row[">TIME"], row[">SPEND"], row[">TOKENS"]) == ("4.2 s", "$0.03", "1200")
    assert row["GATES"] == "training pass, training fail (bypassed)"


@pytest.mark.parametrize(
    ("status", "reason", "text"),
    [
        ("completed", None, "completed"),
        ("failed", "gate_failed", "failed (gate_failed)"),
        ("cancelled", "cancelled", "cancelled"),
    ],
)
def test_a_row_shows_the_reason_of_a_cycle_unless_reason_and_status_are_equal(
    status: str, reason: str | None, text: str
) -> None:
    assert cycle_row(cycle(status=status, reason=reason))[2] == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [("4.24", "4.2 s"), ("59.9", "59.9 s"), ("60", "1 min 00 s"), ("125.9", "2 min 05 s"), ("3720", "1 h 02 min")],
)
def test_the_duration_in_a_row_has_at_most_two_units(seconds: str, text: str) -> None:
    assert cycle_row(cycle(elapsed_seconds=Decimal(seconds)))[3] == text


def test_a_later_state_of_a_cycle_keeps_all_earlier_milestones() -> None:
    designing = list(milestones(cycle(phase="designing", strategy_name=None)))
    training = list(milestones(cycle()))
    figures = {"accuracy": Decimal("0.53"), "final_loss": Decimal("0.69")}
    trained = list(milestones(cycle(phase="backtesting", results=figures, gates=[PASSED])))
    assert designing == ["designing"]
    assert training == ["designing", "designing: momentum", "training"]
    assert trained == [
        *training,
        "training: accuracy 0.530, final loss 0.690",
        "training: gate passed",
        "backtesting",
    ]


def test_the_picture_of_a_cycle_marks_each_phase_as_done_or_running_or_pending() -> None:
    running = picture(cycle()).splitlines()
    assert [line.split()[:2] for line in running[1:-1]] == [
        ["✓", "designing"],
        ["▸", "training"],
        ["·", "backtesting"],
        ["·", "assessing"],
    ]
    assert running[-1] == "Spend: $0.03 of $0.15 estimated, 1200 tokens"


@pytest.mark.parametrize(("outcome", "mark"), [("failed", "✗"), ("completed", "✓")])
def test_the_picture_of_an_ended_cycle_marks_the_last_phase_as_failed_or_completed(outcome: str, mark: str) -> None:
    drawn = picture(cycle(status=outcome, outcome=outcome, gates=[FAILED])).splitlines()
    assert drawn[2] == f"  {mark} training     gate failed"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"outcome": "completed"}, "completed after 4.2 s, $0.03"),
        ({"outcome": "cancelled", "reason": "cancelled"}, "cancelled after 4.2 s, $0.03"),
        (
            {"outcome": "failed", "reason": "gate_failed", "gates": [FAILED]},
            "failed after 4.2 s, $0.03 (gate_failed: accuracy 0.41 is below 0.45)",
        ),
        (
            {"outcome": "failed", "reason": "error", "error": "no\nreply", "gates": [FAILED]},
            "failed after 4.2 s, $0.03 (error: no reply)",
        ),
        ({"outcome": "completed", "gates": [{**FAILED, "bypassed": True}]}, "completed after 4.2 s, $0.03"),
    ],
)
def test_the_text_of_an_ended_cycle_shows_the_cause_of_a_failure(changes: dict[str, Any], text: str) -> None:
    assert ending(cycle(**changes)) == text


def test_the_status_text_shows_missing_figures_as_unknown_and_absent_limits_as_unlimited() -> None:
    status = {"status": "idle", "active_cycles": [], "last_cycle": None}
    unknown = status_text({**status, "budget": None, "capacity": None}).splitlines()
    assert unknown[2:] == ["Status: idle", "Budget: unknown", "Capacity: unknown", "Last Cycle: none"]
    unlimited = {"budget": {"remaining": None}, "capacity": {"limit": None, "active": 2}}
    assert status_text({**status, **unlimited}).splitlines()[3:5] == [
        "Budget: unlimited",
        "Capacity: unlimited, 2 running",
    ]
