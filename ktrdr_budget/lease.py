"""The lease of the async limiter: prepaid money that this process spends without the store; see ``docs/leases.md``."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from ktrdr_budget.engine.leases.chunks import Grant
from ktrdr_budget.engine.leases.lease import LeaseBase
from ktrdr_budget.engine.runner import AsyncRunner
from ktrdr_budget.money import AmountIn

__all__ = ["AsyncLease", "Grant"]


class AsyncLease(LeaseBase):
    """A prepaid part of a budget, spent by this process without the store: ``async with limiter.lease(...) as lease``.

    The lease prepays one chunk after the other; ``slab`` is the amount of a chunk. :meth:`spend` and :meth:`reserve`
    decide at once. :meth:`acquire` waits for the next chunk if necessary. If the budget has no room or the store does
    not reply, the first of these calls raises the error; the start of the block does not.

    At the end of the block, the spend is committed and the unspent amount is released. A chunk with an open grant is
    settled after that grant.
    """

    def __init__(self, runner: AsyncRunner, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._runner = runner

    async def __aenter__(self) -> AsyncLease:
        await self._runner.open_lease(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.close_lease(self)

    async def acquire(self, amount: AmountIn) -> Grant:
        """Reserve an amount as :meth:`reserve` does, but wait for the next chunk if necessary.

        The wait ends at the limiter's deadline.

        Raises:
            BudgetExceeded: neither the lease nor the store has room.
            StoreUnavailable: the lease has no room, and the store does not reply.
            InvalidAmount: the amount is not above 0.
        """
        units = self.to_units(amount, positive=True)
        if not self._waiters and (grant := self.try_reserve(units)) is not None:
            return grant
        return await self._runner.acquire(self, units)
