"""Internal operations of a limiter that metering needs: one signature for sync and async limiters.

Functions that reach the store return the result for a :class:`BudgetLimiter`, and an awaitable for an
:class:`AsyncBudgetLimiter`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from typing import Any

from ktrdr_budget.engine.batching.heartbeat import Heartbeat
from ktrdr_budget.engine.calls.reads import Flow
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.metering.hold_claim import BlockExit
from ktrdr_budget.money import AmountIn
from ktrdr_budget.periods import from_ms

__all__ = ["leave_hold", "record", "settle", "start_heartbeat", "store_time"]


def store_time(limiter: Any) -> datetime:
    """The current time by the store's clock, as far as this process can compute it."""
    return from_ms(limiter._session.now_ms())


def settle(limiter: Any, flow: Flow[Any], operation: str) -> Any:
    """Run a settlement that the caller cannot retry: if the store does not reply, the limiter resends it later."""
    return limiter._conclude(flow, operation)


def record(limiter: Any, amounts: Mapping[str, AmountIn], label: str) -> Any:
    """Record spend without a reservation, resent like a settlement."""
    return settle(limiter, limiter._core.record(amounts, None, None, label), "record")


def leave_hold(limiter: Any, hold: HoldBase, block_exit: BlockExit) -> Any:
    """Settle a hold whose block has ended, as leaving ``limiter.hold(...)`` does."""
    return limiter._leave(hold, *block_exit)


def start_heartbeat(limiter: Any, hold: Any) -> Callable[[], None]:
    """Extend a hold regularly, as ``limiter.hold(...)`` does; return the function that stops it."""
    if not hasattr(limiter, "_portal"):
        return Heartbeat(limiter._coalescer, hold).stop
    portal = limiter._portal
    started: list[Heartbeat] = []
    # The portal's thread runs both in order, so neither call has to wait for the thread.
    portal.tell(lambda: started.append(Heartbeat(limiter._coalescer, hold)))
    return partial(portal.tell, lambda: started[0].stop())
