"""The hold of the async limiter. The hold of the sync limiter is derived from it (:mod:`ktrdr_budget.sync`)."""

from __future__ import annotations

from ktrdr_budget.engine.calls import extend as extensions
from ktrdr_budget.engine.calls import settle
from ktrdr_budget.engine.protocol.amounts import Amounts
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.engine.runner import AsyncRunner
from ktrdr_budget.models import Settlement
from ktrdr_budget.money import AmountIn

__all__ = ["AsyncHold"]


class AsyncHold(HoldBase):
    """An open reservation. Settle it with :meth:`commit` or :meth:`release`; move its deadline with :meth:`extend`."""

    __slots__ = ()

    @property
    def _runner(self) -> AsyncRunner:
        return self.engine.runner  # type: ignore[no-any-return]

    async def extend(self, ttl: float | None = None) -> None:
        """Send a heartbeat: move the deadline, and report the accrued amount.

        A heartbeat reopens an expired hold, but not a hold that an operator has released. No hold stays open for longer
        than 24 h after its grant.

        Args:
            ttl: seconds from now to the new deadline; by default the ``ttl`` of the reservation.

        Raises:
            BudgetExceeded: the hold had expired and returned money, and the budget has no room for this money any more.
            HoldConflict: the hold is settled, or an operator has released it (``released_by_operator``).
            UnknownHold: the store does not have the hold.
            StoreUnavailable: the store did not reply within the deadline.
        """
        await self._runner.run(extensions.extend(self.engine.context, self, ttl), "extend")

    async def grow(self, amount: Amounts | None = None, **counts: AmountIn) -> None:
        """Add an amount to the reservation, in all budgets or in none.

        If others add at the same time, all amounts are added. After an ambiguous ``StoreUnavailable``, a call with the
        same amount is a retry: the amount is added only once.

        Args:
            amount: as for :meth:`accrue`.
            counts: as for :meth:`accrue`.

        Raises:
            BudgetExceeded: a budget has no room; nothing changed.
            HoldConflict, UnknownHold, StoreUnavailable: as for :meth:`extend`.
        """
        await self._runner.run(extensions.grow(self.engine.context, self, amount, counts), "grow")

    async def commit(self, amount: Amounts | None = None, **counts: AmountIn) -> Settlement:
        """Record the actual cost.

        A commit is never refused because the budget has no room, the commit is late, or the cost exceeds the
        reservation.

        Args:
            amount: one amount, or a mapping of budgets to amounts. By default, the accrued amount is committed.
                One amount applies to every ``usd`` budget; each budget that counts commits its reservation.
                A budget that a mapping omits commits 0.

                The amounts of a hold that was reserved by scope go by unit: one amount is in ``usd``, and a mapping is
                of units to amounts. In a unit without an amount, what was accrued is committed, else what was reserved.
                An amount in a unit that the hold does not have is ignored.
            counts: more amounts by unit, if the hold was reserved by scope: ``commit("0.07", tokens=1800)``.

        Raises:
            HoldConflict: the hold was settled differently before, or metered calls of the hold are in progress.
            StoreUnavailable: the store did not reply within the deadline. A retry is safe.
        """
        return await self._runner.run(settle.commit(self.engine.context, self, amount, counts), "commit")

    async def release(self) -> Settlement:
        """Return the whole reserved amount to the budgets. The errors are those of :meth:`commit`."""
        return await self._runner.run(settle.release(self.engine.context, self), "release")
