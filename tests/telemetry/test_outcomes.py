"""Outcomes of calls, and several observers on one limiter."""

from __future__ import annotations

import logging
from contextvars import copy_context

import pytest

from ktrdr_budget import HoldConflict, StoreUnavailable, UnknownBudget, UnknownHold
from ktrdr_budget.engine.batching.pending import Observation
from ktrdr_budget.errors import (
    BudgetMismatch,
    InvalidAmount,
    InvalidArgument,
    StoreError,
    TooManyBudgets,
    TooManyHolds,
)
from ktrdr_budget.telemetry.outcomes import OUTCOMES, combined, outcome_of


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (StoreUnavailable("?"), ("unavailable", "no_answer")),
        (StoreError("?"), ("unavailable", "refused")),
        (HoldConflict("?"), ("error", "conflict")),
        (BudgetMismatch("?"), ("error", "mismatch")),
        (TooManyHolds("?"), ("error", "too_many_holds")),
        (TooManyBudgets("?"), ("error", "too_many_budgets")),
        (UnknownBudget("?"), ("error", "unknown_budget")),
        (InvalidArgument("?"), ("error", "invalid")),
        (InvalidAmount("?"), ("error", "invalid")),
        (RuntimeError("?"), ("error", "unexpected")),
    ],
)
def test_each_error_is_mapped_to_an_outcome_and_a_reason(error: Exception, outcome: tuple[str, str]):
    assert outcome_of(None, error) == outcome
    assert outcome in OUTCOMES


def test_the_error_for_an_unknown_hold_has_the_reason_unknown_hold():
    assert outcome_of(None, UnknownHold("?")) == ("error", "unknown_hold")


def test_if_one_observer_raises_an_error_the_other_observers_still_run(caplog: pytest.LogCaptureFixture):
    observed = []

    def broken(observation: Observation) -> None:
        raise RuntimeError("broken hook")

    observation = Observation("status", None, None, 0.0, copy_context())
    with caplog.at_level(logging.ERROR):
        combined(observed.append, broken, observed.append)(observation)
    assert observed == [observation, observation]
    (record,) = caplog.records
    assert record.getMessage() == "observer failed; the budget is not affected"
