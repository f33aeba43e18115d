"""The calls to the store that leases make."""

from __future__ import annotations

import asyncio
from typing import Any

from ktrdr_budget.engine.calls import extend as extensions
from ktrdr_budget.engine.calls.context import CallContext, Flow
from ktrdr_budget.engine.calls.reserve import reserve_units
from ktrdr_budget.engine.calls.settle import commit_units
from ktrdr_budget.engine.leases.lease import LeaseBase
from ktrdr_budget.engine.protocol.codes import POLICY_CODES, CommitMode
from ktrdr_budget.engine.protocol.hold_record import HoldRecord
from ktrdr_budget.engine.protocol.operations import Commit, CommitAmount, Labels, RecordSpend, Release
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.models import check_ttl_ms

__all__ = ["LeaseCalls"]


class LeaseCalls:
    """The implementation of :class:`~..leases.lease.ChunkCalls`."""

    def __init__(self, context: CallContext, timeout_s: float) -> None:
        self._context = context
        self.state = context.state
        self.open_leases: set[LeaseBase] = set()
        self.timeout_s = timeout_s
        self.driver: Any = None
        """Starts calls on the event loop of the limiter; ``Engine`` sets it."""

    def bind(self) -> asyncio.AbstractEventLoop:
        return self.driver.bind()  # type: ignore[no-any-return]

    def submit(self, call: Flow[Any]) -> asyncio.Future[Any]:
        return self.driver.submit(call, "lease")  # type: ignore[no-any-return]

    def reserve(self, budget: str, units: int, ttl_s: float, operation: str) -> Flow[HoldBase]:
        context = self._context
        labels = Labels("", operation, context.trace_id)
        hold_id, policy = context.state.new_id(), POLICY_CODES["charge"]
        wanted, ttl_ms = [(budget, units)], check_ttl_ms(ttl_s)
        return reserve_units(context, wanted, hold_id, ttl_ms, policy, labels, store_only=True)

    def extend(self, hold: HoldBase, accrued: int, ttl_ms: int) -> Flow[HoldRecord]:
        return extensions.report_units(self._context, hold, accrued, ttl_ms)

    def grow(self, hold: HoldBase, total: int, ttl_ms: int) -> Flow[HoldRecord]:
        return extensions.raise_units(self._context, hold, total, ttl_ms)

    def settle(self, hold: HoldBase, spent: int) -> Flow[None]:
        yield from commit_units(self._context, hold, spent)

    def settle_later(self, hold: HoldBase, spent: int) -> None:
        key, windows = self.state.keys.hold(hold.id), hold.window_list
        if spent:
            op: Commit | Release = Commit(hold.id, key, windows, [CommitAmount(CommitMode.EXACT, spent)])
        else:
            op = Release(hold.id, key, windows)
        self._context.policy.defer(op)

    def record_later(self, hold: HoldBase, spent: int, operation: str) -> None:
        hold_id = f"{hold.id}:spent"
        parts = [(hold.parts[0][0], spent)]
        op = RecordSpend(hold_id, self.state.keys.hold(hold_id), parts, operation=operation, is_late=True)
        self._context.policy.defer(op)
