"""The internal operations of limiters that metering needs. Sync and async limiters have the same signatures here.

Functions that reach the store return the result for a :class:`BudgetLimiter`, and an awaitable for an
:class:`AsyncBudgetLimiter`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from ktrdr_budget.engine.calls import settle as settlements
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.metering.hold_claim import BlockExit
from ktrdr_budget.money import AmountIn
from ktrdr_budget.periods import from_ms

__all__ = ["commit", "leave_hold", "record", "release", "start_heartbeat", "store_time"]


def store_time(limiter: Any) -> datetime:
    """The current time by the store's clock, as far as this process can compute it."""
    return from_ms(limiter.engine.state.now_ms())


def commit(limiter: Any, hold: HoldBase, amounts: Mapping[str, AmountIn]) -> Any:
    """Commit a hold. If the store does not reply, the limiter resends the commit later; the caller need not retry."""
    return _settle(limiter, settlements.commit(limiter.engine.context, hold, amounts), "commit")


def release(limiter: Any, hold: HoldBase) -> Any:
    """Release a hold. If the store does not reply, the limiter resends the release later."""
    return _settle(limiter, settlements.release(limiter.engine.context, hold), "release")


def record(limiter: Any, amounts: Mapping[str, AmountIn], label: str) -> Any:
    """Record spend without a reservation. If the store does not reply, the limiter resends the record later."""
    return _settle(limiter, settlements.record(limiter.engine.context, amounts, None, None, label), "record")


def _settle(limiter: Any, flow: Any, operation: str) -> Any:
    return limiter.engine.runner.settle(flow, operation)


def leave_hold(limiter: Any, hold: HoldBase, block_exit: BlockExit) -> Any:
    """Settle a hold whose block has ended. A ``limiter.hold(...)`` block ends in the same way."""
    return limiter.leave(hold, *block_exit)


def start_heartbeat(limiter: Any, hold: HoldBase) -> Callable[[], object]:
    """Start to extend a hold regularly, as ``limiter.hold(...)`` does; return a function that stops the extensions."""
    return limiter.engine.runner.start_heartbeat(hold)  # type: ignore[no-any-return]
