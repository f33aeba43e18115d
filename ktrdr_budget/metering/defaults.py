"""Default limiters for callers that pass no limiter. The program sets them, or the environment configures them."""

from __future__ import annotations

import asyncio

from ktrdr_budget import environment
from ktrdr_budget.errors import InvalidArgument
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.sync import BudgetLimiter
from ktrdr_budget.tracker import get_budget_tracker

__all__ = ["default_async_limiter", "default_limiter", "set_default_limiter"]

_async_limiter: AsyncBudgetLimiter | None = None
_limiter: BudgetLimiter | None = None
loop_limiters: dict[asyncio.AbstractEventLoop, tuple[AsyncBudgetLimiter, asyncio.Task[None]]] = {}
"""For each running event loop: the limiter created from the environment, and the task that closes that limiter."""


def set_default_limiter(limiter: AsyncBudgetLimiter | BudgetLimiter | None) -> None:
    """Set the default limiter of async code or of sync code, depending on the type of ``limiter``.

    Args:
        limiter: the new default. ``None`` clears both defaults: default limiters are then created from the
            environment, as for :class:`~ktrdr_budget.tracker.BudgetTracker`.

    Raises:
        InvalidArgument: ``limiter`` is not a limiter.
    """
    global _async_limiter, _limiter
    if limiter is None:
        _async_limiter = _limiter = None
    elif isinstance(limiter, AsyncBudgetLimiter):
        _async_limiter = limiter
    elif isinstance(limiter, BudgetLimiter):
        _limiter = limiter
    else:
        raise InvalidArgument(f"limiter must be an AsyncBudgetLimiter or a BudgetLimiter, not {limiter!r}")


def default_limiter() -> BudgetLimiter:
    """Return the default limiter of sync code.

    If none is set, return the limiter of :func:`~ktrdr_budget.tracker.get_budget_tracker`.
    """
    return get_budget_tracker().limiter if _limiter is None else _limiter


def default_async_limiter() -> AsyncBudgetLimiter:
    """Return the default limiter of async code.

    If none is set, each running event loop gets a limiter of its own, created from the environment. That limiter closes
    when the event loop cancels its tasks, as ``asyncio.run`` does at its end.

    Raises:
        InvalidArgument: a setting of the environment is invalid.
    """
    if _async_limiter is not None:
        return _async_limiter
    loop = asyncio.get_running_loop()
    if loop not in loop_limiters:
        environment.check_names()
        limiter = AsyncBudgetLimiter(
            environment.store_url(),
            [environment.agent_budget(environment.daily_limit())],
            tenant=environment.tenant(),
            data_dir=environment.data_dir(),
            **environment.limiter_options(),
        )
        loop_limiters[loop] = limiter, loop.create_task(_close_with(loop, limiter))
    return loop_limiters[loop][0]


async def _close_with(loop: asyncio.AbstractEventLoop, limiter: AsyncBudgetLimiter) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        del loop_limiters[loop]
        await limiter.close()
