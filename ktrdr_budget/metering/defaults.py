"""The limiter of whoever names none: the one that the program has set, or one made from the environment."""

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
_made: dict[asyncio.AbstractEventLoop, tuple[AsyncBudgetLimiter, asyncio.Task[None]]] = {}


def set_default_limiter(limiter: AsyncBudgetLimiter | BudgetLimiter | None) -> None:
    """The limiter of everything that is not given one, from now on: one for async code, and one for sync code.

    Args:
        limiter: ``None`` forgets both; then the environment counts again, as for
            :class:`~ktrdr_budget.tracker.BudgetTracker`.

    Raises:
        InvalidArgument: it is no limiter.
    """
    global _async_limiter, _limiter
    if limiter is None:
        _async_limiter = _limiter = None
    elif isinstance(limiter, AsyncBudgetLimiter):
        _async_limiter = limiter
    elif isinstance(limiter, BudgetLimiter):
        _limiter = limiter
    else:
        raise InvalidArgument(f"a limiter is an AsyncBudgetLimiter or a BudgetLimiter, not {limiter!r}")


def default_limiter() -> BudgetLimiter:
    """The one that was set for sync code, or that of :func:`~ktrdr_budget.tracker.get_budget_tracker`."""
    return get_budget_tracker().limiter if _limiter is None else _limiter


def default_async_limiter() -> AsyncBudgetLimiter:
    """The one that was set for async code, or one of the running event loop, made from the environment.

    The latter closes when the loop cancels its tasks, as ``asyncio.run`` does at its end.

    Raises:
        InvalidArgument: what the environment says is not usable.
    """
    if _async_limiter is not None:
        return _async_limiter
    loop = asyncio.get_running_loop()
    if loop not in _made:
        environment.check_names()
        limiter = AsyncBudgetLimiter(
            environment.store_url(),
            [environment.agent_budget(environment.daily_limit())],
            tenant=environment.tenant(),
            data_dir=environment.data_dir(),
            **environment.limiter_options(),
        )
        _made[loop] = limiter, loop.create_task(_close_with(loop, limiter))
    return _made[loop][0]


async def _close_with(loop: asyncio.AbstractEventLoop, limiter: AsyncBudgetLimiter) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        del _made[loop]
        await limiter.close()
