"""The runner of an async limiter. :mod:`.portal` is the runner of a sync limiter, whose callers do not ``await``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ktrdr_budget.engine.batching.dispatcher import Dispatcher
from ktrdr_budget.engine.batching.heartbeat import Heartbeat
from ktrdr_budget.engine.calls.context import Flow
from ktrdr_budget.engine.engine import Engine
from ktrdr_budget.engine.leases.chunks import Grant
from ktrdr_budget.engine.leases.lease import LeaseBase
from ktrdr_budget.engine.replica.hold import HoldBase

__all__ = ["AsyncRunner"]

Result = TypeVar("Result")


class AsyncRunner:
    """Runs calls on the event loop of the caller."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._dispatcher: Dispatcher = engine.dispatcher

    async def run(self, flow: Flow[Result], operation: str, kept: bool = False) -> Result:
        """Run a call. If the caller does not receive the result, the limiter takes over the outcome.

        Args:
            kept: see :meth:`settle`.
        """
        call = self._dispatcher.begin(flow, operation, None, kept)
        try:
            result: Result = await call.future
            return result
        except BaseException as error:
            self._dispatcher.leave(call, error)
            raise

    def settle(self, flow: Flow[Result], operation: str) -> Awaitable[Result]:
        """Run a settlement that its caller cannot retry. After a lost reply, the limiter resends the settlement."""
        return self.run(flow, operation, True)

    async def open(self) -> None:
        """Open the store."""
        await self._engine.store.open()

    async def close(self) -> None:
        """Finish calls in flight, within twice the deadline, and disconnect.

        If the caller is cancelled, the cancellation is raised after the close.
        """
        closing = asyncio.get_running_loop().create_task(self._close())
        cancelled: asyncio.CancelledError | None = None
        while not closing.done():
            try:
                await asyncio.wait({closing})
            except asyncio.CancelledError as error:  # may be raised at each await; calls in flight complete anyway
                cancelled = error
        closing.result()
        if cancelled is not None:
            raise cancelled

    async def _close(self) -> None:
        for lease in list(self._engine.lease_calls.open_leases):
            await lease.closed(all_grants=True)
        await self._dispatcher.close()

    def start_heartbeat(self, hold: HoldBase) -> Callable[[], object]:
        """Extend a hold whenever a third of its ttl has passed. Return the function that stops these heartbeats."""
        return Heartbeat(self._dispatcher, hold).stop

    async def open_lease(self, lease: LeaseBase) -> None:
        """Open a lease, and wait for its first chunk."""
        await lease.opened()

    async def close_lease(self, lease: LeaseBase) -> None:
        """Close a lease, and wait until its chunks are settled."""
        await lease.closed()

    async def acquire(self, lease: LeaseBase, units: int) -> Grant:
        """Wait until a lease has room, and return the grant."""
        future: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        lease.wait(units, future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().release()  # granted at this very moment
            raise
