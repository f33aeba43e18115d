"""Opening the circuit breaker of a limiter."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from ktrdr_budget import AsyncBudgetLimiter, StoreUnavailable


async def open_breaker(limiter: AsyncBudgetLimiter, call: Callable[[], Awaitable[Any]]) -> None:
    """Make a call that opens the breaker. Repeat the call only if the event loop was stalled: a stall is no outage."""
    deadlines = limiter.engine.dispatcher.deadlines
    while limiter.store_state == "closed":
        stalled_before_s = deadlines.stalled_s
        with suppress(StoreUnavailable):
            await call()
        assert limiter.store_state == "open" or deadlines.stalled_s > stalled_before_s
