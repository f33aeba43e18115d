"""One hard spend cap, held by Redis, for every replica of a backend that runs LLM agents."""

from ktrdr_budget.errors import (
    BudgetError,
    BudgetExceeded,
    BudgetMismatch,
    HoldConflict,
    InvalidAmount,
    InvalidArgument,
    StoreError,
    StoreUnavailable,
    UnknownBudget,
    UnknownHold,
)
from ktrdr_budget.limiter import AsyncBudgetLimiter, AsyncHold
from ktrdr_budget.models import Budget, Denial, HoldView, LedgerEntry, Page, Settlement, Status
from ktrdr_budget.sync import BudgetLimiter, Hold
from ktrdr_budget.tracker import BudgetTracker, get_budget_tracker

__all__ = [
    "AsyncBudgetLimiter",
    "AsyncHold",
    "Budget",
    "BudgetError",
    "BudgetExceeded",
    "BudgetLimiter",
    "BudgetMismatch",
    "BudgetTracker",
    "Denial",
    "Hold",
    "HoldConflict",
    "HoldView",
    "InvalidAmount",
    "InvalidArgument",
    "LedgerEntry",
    "Page",
    "Settlement",
    "Status",
    "StoreError",
    "StoreUnavailable",
    "UnknownBudget",
    "UnknownHold",
    "get_budget_tracker",
]
