"""The words for how a call ended, and several hooks on one limiter."""

from __future__ import annotations

import logging
from contextvars import copy_context

import pytest

from ktrdr_budget import HoldConflict, StoreUnavailable, UnknownBudget, UnknownHold
from ktrdr_budget.engine.batching.dispatcher import Observation
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
def test_an_error_has_an_outcome_and_a_reason(error: Exception, outcome: tuple[str, str]):
    assert outcome_of(None, error) == outcome
    assert outcome in OUTCOMES


def test_an_unknown_hold_is_told_apart():
    assert outcome_of(None, UnknownHold("?")) == ("error", "unknown_hold")


def test_each_hook_is_told_whatever_another_raises(caplog: pytest.LogCaptureFixture):
    told = []

    def broken(observation: Observation) -> None:
        raise RuntimeError("broken hook")

    observation = Observation("status", None, None, 0.0, copy_context())
    with caplog.at_level(logging.ERROR):
        combined(told.append, broken, told.append)(observation)
    assert told == [observation, observation]
    (record,) = caplog.records
    assert record.getMessage() == "a hook failed; the budget is not affected"
