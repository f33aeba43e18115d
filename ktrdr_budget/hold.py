"""The hold of the async limiter; that of the sync one is derived from it (:mod:`ktrdr_budget.sync`)."""

from __future__ import annotations

from ktrdr_budget.engine.calls import extend as extensions
from ktrdr_budget.engine.calls import settle
from ktrdr_budget.engine.protocol.amounts import Amounts
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.engine.runner import AsyncRunner
from ktrdr_budget.models import Settlement

__all__ = ["AsyncHold"]


class AsyncHold(HoldBase):
    """An open reservation. Settle it with :meth:`commit` or :meth:`release`; move its deadline with :meth:`extend`."""

    __slots__ = ()

    @property
    def _runner(self) -> AsyncRunner:
        return self.engine.runner  # type: ignore[no-any-return]

    async def extend(self, ttl: float | None = None) -> None:
        """Send a heartbeat: a new deadline ``ttl`` seconds from now (as reserved, by default), and what was accrued.

        Reopens an expired hold, but not one that an operator has released. No hold stays open for longer than 24 h
        after its grant.

        Raises:
            BudgetExceeded: the hold had expired and returned money, and the budget has no room for it any more.
            HoldConflict: the hold is settled, or an operator has released it (``released_by_operator``).
            UnknownHold: the store does not have it.
            StoreUnavailable: no reply within the deadline.
        """
        await self._runner.run(extensions.extend(self.engine.context, self, ttl), "extend")

    async def grow(self, amount: Amounts) -> None:
        """Add to the reservation, in all budgets or in none. Concurrent additions by others are added as well.

        After an ambiguous ``StoreUnavailable``, growing by the same amount is a retry, and adds it once.

        Raises:
            BudgetExceeded: a budget has no room; nothing changed.
            HoldConflict, UnknownHold, StoreUnavailable: as for :meth:`extend`.
        """
        await self._runner.run(extensions.grow(self.engine.context, self, amount), "grow")

    async def commit(self, amount: Amounts | None = None) -> Settlement:
        """Record the actual cost. A commit is never refused for lack of budget, lateness, or exceeding the reservation.

        Args:
            amount: a scalar for every ``usd`` budget (counts then commit their reservation), or a mapping (omitted
                budgets commit 0); by default the accrued amount.

        Raises:
            HoldConflict: the hold was settled differently before, or metered calls inside it are in progress.
            StoreUnavailable: no reply within the deadline. A retry is safe.
        """
        return await self._runner.run(settle.commit(self.engine.context, self, amount), "commit")

    async def release(self) -> Settlement:
        """Return the whole amount. Errors as for :meth:`commit`."""
        return await self._runner.run(settle.release(self.engine.context, self), "release")
