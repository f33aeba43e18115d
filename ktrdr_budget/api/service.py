"""What the operations of the service share."""

from __future__ import annotations

from ktrdr_budget.api.auth import Keys
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.money import AmountIn, from_units, to_units

__all__ = ["Service"]


class Service:
    """What the operations work with."""

    def __init__(self, limiter: AsyncBudgetLimiter, keys: Keys, cycle_estimate: AmountIn) -> None:
        self.limiter = limiter
        """Another one for each run of the app, for a limiter belongs to one event loop."""
        self.keys = keys
        self.cycle_estimate = from_units(to_units(cycle_estimate, positive=True))
