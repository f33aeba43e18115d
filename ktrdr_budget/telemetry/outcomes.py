"""Outcomes of the limiter's calls for metrics and spans, and the composition of observers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ktrdr_budget.errors import (
    BudgetExceeded,
    DefinitionConflict,
    HoldConflict,
    InvalidArgument,
    StoreError,
    StoreUnavailable,
    TooManyBudgets,
    TooManyHolds,
    UnknownBudget,
    UnknownHold,
)

if TYPE_CHECKING:
    from ktrdr_budget.engine.batching.pending import Observation, Observer

__all__ = ["OUTCOMES", "combined", "outcome_of"]

logger = logging.getLogger("ktrdr_budget")

OUTCOMES = (
    ("granted", ""),
    ("replayed", ""),
    ("unchecked", ""),
    ("denied", "budget_exhausted"),
    ("denied", "budget_held"),
    ("denied", "exceeds_limit"),
    ("unavailable", "no_answer"),
    ("unavailable", "refused"),
    ("error", "conflict"),
    ("error", "invalid"),
    ("error", "mismatch"),
    ("error", "too_many_budgets"),
    ("error", "too_many_holds"),
    ("error", "unknown_budget"),
    ("error", "unexpected"),
)
"""All outcomes of a reservation, each with its reason."""
# The first matching class decides.
_REASONS: tuple[tuple[type[BaseException], str, str], ...] = (
    (StoreError, "unavailable", "refused"),
    (StoreUnavailable, "unavailable", "no_answer"),
    (HoldConflict, "error", "conflict"),
    (DefinitionConflict, "error", "mismatch"),
    (TooManyBudgets, "error", "too_many_budgets"),
    (TooManyHolds, "error", "too_many_holds"),
    (UnknownBudget, "error", "unknown_budget"),
    (UnknownHold, "error", "unknown_hold"),
    (InvalidArgument, "error", "invalid"),
)


def outcome_of(result: object, error: BaseException | None) -> tuple[str, str]:
    """Return the outcome of a reservation and the reason for this outcome; the reason is empty without an error."""
    if error is None:
        if getattr(result, "replayed", False):
            return "replayed", ""
        return ("granted" if getattr(result, "cap_checked", True) else "unchecked"), ""
    if isinstance(error, BudgetExceeded):
        return "denied", error.reason
    return next(
        ((outcome, reason) for kind, outcome, reason in _REASONS if isinstance(error, kind)), ("error", "unexpected")
    )


def combined(*observers: Observer) -> Observer:
    """Combine observers into one that calls them in order; an exception is logged and affects no other observer."""

    def observe(observation: Observation) -> None:
        for observer in observers:
            try:
                observer(observation)
            except Exception:
                logger.exception("observer failed; the budget is not affected")

    return observe
