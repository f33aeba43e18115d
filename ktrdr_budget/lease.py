"""The leases of the async and the sync limiter: decisions without the store; see ``docs/leases.md``."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ktrdr_budget.engine.leases.chunks import Grant
from ktrdr_budget.engine.leases.lease import IDLE_DEFAULT_S, LEASE_TTL_DEFAULT_S, LeaseBase
from ktrdr_budget.money import AmountIn

__all__ = ["IDLE_DEFAULT_S", "LEASE_TTL_DEFAULT_S", "AsyncLease", "Grant", "Lease"]


class AsyncLease(LeaseBase):
    """A prepaid part of a budget, that this process spends by itself: ``async with limiter.lease(...) as lease``.

    :meth:`spend` and :meth:`reserve` decide at once; :meth:`acquire` waits for another slab if need be. On leaving,
    what was spent is committed and the rest given back; a grant that is still open keeps its slab until it is settled.
    Of a store without room, or without an answer, the first decision tells, not the beginning.
    """

    async def __aenter__(self) -> AsyncLease:
        await self.opened()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.closed()

    async def acquire(self, amount: AmountIn) -> Grant:
        """As :meth:`reserve`, but waits for the store where there is no room here, at most for the limiter's deadline.

        Raises:
            BudgetExceeded: the store has no room either.
            StoreUnavailable: no room here, and the store does not answer.
            InvalidAmount: not an amount above 0.
        """
        units = self.units(amount, positive=True)
        if not self._waiters and (grant := self.try_reserve(units)) is not None:
            return grant
        future: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self.wait(units, future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().release()  # granted in the very moment
            raise


class Lease(LeaseBase):
    """:class:`AsyncLease` without ``await``, safe to share between threads."""

    def __init__(self, portal: Any, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._portal = portal

    def __enter__(self) -> Lease:
        self._portal.run(self.opened())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.belongs_here:
            self._portal.run(self.closed())

    def acquire(self, amount: AmountIn) -> Grant:
        """See :meth:`AsyncLease.acquire`."""
        units = self.units(amount, positive=True)
        if not self._waiters and (grant := self.try_reserve(units)) is not None:
            return grant
        future: concurrent.futures.Future[Grant] = concurrent.futures.Future()
        waits: Callable[..., None] = self.wait
        try:
            return self._portal.wait(future, waits, units, future)  # type: ignore[no-any-return]
        except BaseException:
            if not future.cancel() and not future.cancelled() and future.exception() is None:
                future.result().release()  # Ctrl-C, while it was granted
            raise
