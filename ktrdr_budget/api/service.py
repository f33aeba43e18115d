"""The parts that the routes of one service share."""

from __future__ import annotations

from fastapi import Depends, Request, Security
from fastapi.params import Depends as Dependency

from ktrdr_budget.access_keys import AccessKeys
from ktrdr_budget.api.auth import BearerKey, Caller, Keys, permit
from ktrdr_budget.api.route import BUDGETS
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.money import AmountIn, from_units, to_units

__all__ = ["BudgetService"]


class BudgetService:
    """A limiter, the keys that give access to the limiter, and the estimate of a cycle."""

    def __init__(self, limiter: AsyncBudgetLimiter, keys: Keys, cycle_estimate: AmountIn) -> None:
        self.limiter = limiter
        """The limiter of the app's present run; each run has a new limiter, because a limiter needs one event loop."""
        self.keys = keys
        self.cycle_estimate = from_units(to_units(cycle_estimate, positive=True))
        self.use: Dependency = Depends(self.caller)
        """The dependency of operations that need a key: to read, any key. Its value is the :class:`Caller`."""
        self.admin: Dependency = Depends(self.admin_caller)
        """The dependency of operations that need an admin key. Its value is the :class:`Caller`."""
        if keys:
            self.use = Security(BearerKey("useKey", "KTRDR_API_KEY", self.caller))
            self.admin = Security(BearerKey("adminKey", "KTRDR_ADMIN_KEY", self.admin_caller))

    @property
    def access_keys(self) -> AccessKeys:
        """The access keys in the store."""
        return AccessKeys(self.limiter)

    async def caller(self, request: Request) -> Caller:
        """Authenticate the caller, and check that its key permits the request."""
        return permit(await self._authenticate(request), request.method)

    async def admin_caller(self, request: Request) -> Caller:
        """Authenticate the caller, and require an admin key."""
        return permit(await self._authenticate(request), request.method, admin=True)

    async def _authenticate(self, request: Request) -> Caller:
        request.scope[BUDGETS] = self.limiter.budgets
        return await self.keys.authenticate(request, self.access_keys)
