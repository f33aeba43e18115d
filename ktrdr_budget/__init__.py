"""One hard spend cap, held by Redis, for every replica of a backend that runs LLM agents.

Names are loaded when they are first used, so that a command that needs few of them starts quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_ROOMS = {
    "AsyncBudgetLimiter": "limiter",
    "AsyncHold": "limiter",
    "Budget": "models",
    "BudgetLimiter": "sync",
    "BudgetTracker": "tracker",
    "Denial": "models",
    "Hold": "sync",
    "HoldView": "models",
    "LedgerEntry": "models",
    "Page": "models",
    "Settlement": "models",
    "Status": "models",
    "get_budget_tracker": "tracker",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOMS.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
