"""The report at the start of the service: the store, the budgets, and warnings about both."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from ktrdr_budget.api.schemas import instant_json
from ktrdr_budget.environment import ZERO_BUDGET
from ktrdr_budget.errors import BudgetError, DefinitionConflict, StoreUnavailable
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.models import Budget, Status
from ktrdr_budget.money import format_amount, from_units

if TYPE_CHECKING:
    from ktrdr_budget.api.settings import Settings

__all__ = ["budget_line", "startup_report"]

_PERIODS = {"hour": "an hour", "day": "a day", "week": "a week", "month": "a month", "ever": "in all"}


async def startup_report(settings: Settings, limiter: AsyncBudgetLimiter) -> AsyncIterator[str]:
    """Yield the report line by line. If the store is unreachable, the report ends with a warning."""
    yield f"store: {settings.store_shown}"
    for budget in limiter.budgets.values():
        yield budget_line(budget)
    if settings.agent_daily_budget == 0:
        yield f"warning: {ZERO_BUDGET}"
    faults = await limiter.check()
    if faults["store"]:
        yield f"warning: {faults['store']}"
        return
    for name in ("policy", "scripts"):
        if faults[name]:
            yield f"warning: the store is not ready: {faults[name]}"
    for name in limiter.budgets:
        try:
            line = _warning(await limiter.status(name))
        except DefinitionConflict as error:
            line = f"warning: budget {name}: {error}"
        except (StoreUnavailable, BudgetError):
            continue
        if line:
            yield line


def budget_line(budget: Budget) -> str:
    """A line such as ``budget agent: $5.00 a day (UTC)``."""
    units = budget.limit_units
    limit = format_amount(None if units is None else from_units(units, budget.unit), budget.unit)
    timezone = f" ({budget.timezone})" if budget.period in ("day", "week", "month") else ""
    per = "at a time" if budget.kind == "slots" else _PERIODS[budget.period] + timezone
    line = f"budget {budget.name}: {limit.removesuffix(' slots')} {per}"
    return f"{line}: denies all" if budget.limit == 0 else line


def _warning(status: Status) -> str | None:
    """A warning if a run-time limit overrides the configured limit, else ``None``."""
    if status.limit_source != "runtime" or status.limit == status.configured_limit:
        return None
    name, limit = status.budget, format_amount(status.limit, status.unit)
    until = f" until {instant_json(status.limit_until)}" if status.limit_until else ""
    return (
        f"warning: budget {name}: run-time limit {limit} is in force{until};"
        f" configured {format_amount(status.configured_limit, status.unit)} is not (ktrdr budget clear-limit {name})"
    )
