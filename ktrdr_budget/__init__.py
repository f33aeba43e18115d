"""One hard spend cap, held by Redis, for every replica of a backend that runs LLM agents.

Each public name is imported when it is first used, so that a command that uses few names starts quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktrdr_budget.errors import (
        BudgetError,
        BudgetExceeded,
        BudgetMismatch,
        DefinitionConflict,
        HoldConflict,
        InvalidAmount,
        InvalidArgument,
        InvalidScope,
        KeyConflict,
        StoreError,
        StoreUnavailable,
        TooManyBudgets,
        TooManyHolds,
        UnknownBudget,
        UnknownHold,
        UnknownKey,
        UnknownPrice,
        UnmeteredCall,
    )
    from ktrdr_budget.lease import AsyncLease, Grant
    from ktrdr_budget.limiter import AsyncBudgetLimiter, AsyncHold
    from ktrdr_budget.metering.decorators import budgeted, current_hold, set_default_limiter
    from ktrdr_budget.metering.guards import guard
    from ktrdr_budget.metering.meter import Meter
    from ktrdr_budget.metering.prices import ModelPrice, Pricer, Prices
    from ktrdr_budget.metering.rates import Cost
    from ktrdr_budget.metering.usage import Usage
    from ktrdr_budget.models import (
        Budget,
        Change,
        Denial,
        HoldView,
        LedgerEntry,
        Migration,
        Page,
        Settlement,
        Status,
        Statuses,
    )
    from ktrdr_budget.sync import BudgetLimiter, Hold, Lease
    from ktrdr_budget.tracker import BudgetTracker, get_budget_tracker

__all__ = [
    "AsyncBudgetLimiter",
    "AsyncHold",
    "AsyncLease",
    "Budget",
    "BudgetError",
    "BudgetExceeded",
    "BudgetLimiter",
    "BudgetMismatch",
    "BudgetTracker",
    "Change",
    "Cost",
    "DefinitionConflict",
    "Denial",
    "Grant",
    "Hold",
    "HoldConflict",
    "HoldView",
    "InvalidAmount",
    "InvalidArgument",
    "InvalidScope",
    "KeyConflict",
    "Lease",
    "LedgerEntry",
    "Meter",
    "Migration",
    "ModelPrice",
    "Page",
    "Pricer",
    "Prices",
    "Settlement",
    "Status",
    "Statuses",
    "StoreError",
    "StoreUnavailable",
    "TooManyBudgets",
    "TooManyHolds",
    "UnknownBudget",
    "UnknownHold",
    "UnknownKey",
    "UnknownPrice",
    "UnmeteredCall",
    "Usage",
    "budgeted",
    "current_hold",
    "get_budget_tracker",
    "guard",
    "set_default_limiter",
]

_MODULES = {
    "AsyncBudgetLimiter": "limiter",
    "AsyncHold": "limiter",
    "AsyncLease": "lease",
    "Budget": "models",
    "BudgetLimiter": "sync",
    "BudgetTracker": "tracker",
    "Change": "models",
    "Cost": "metering.rates",
    "Denial": "models",
    "Grant": "lease",
    "Hold": "sync",
    "HoldView": "models",
    "Lease": "sync",
    "LedgerEntry": "models",
    "Meter": "metering.meter",
    "Migration": "models",
    "ModelPrice": "metering.prices",
    "Page": "models",
    "Pricer": "metering.prices",
    "Prices": "metering.prices",
    "Settlement": "models",
    "Status": "models",
    "Statuses": "models",
    "Usage": "metering.usage",
    "budgeted": "metering.decorators",
    "current_hold": "metering.decorators",
    "get_budget_tracker": "tracker",
    "guard": "metering.guards",
    "set_default_limiter": "metering.decorators",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
