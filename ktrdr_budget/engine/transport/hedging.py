"""Hedged requests: if an attempt gets no reply for a while, start a second one; the first result is used."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from typing import TypeVar

__all__ = ["hedged"]

Result = TypeVar("Result")


async def hedged(
    first: Callable[[], Awaitable[Result]],
    second_at_s: float,
    second: Callable[[], Awaitable[Result]],
    ignored: tuple[type[Exception], ...],
) -> Result:
    """Await ``first()``. If ``first()`` is still running at ``second_at_s``, start ``second()`` concurrently.

    If the second attempt fails with one of ``ignored``, the first continues alone.
    """
    loop = asyncio.get_running_loop()
    context = contextvars.copy_context()
    attempts: list[asyncio.Task[Result]] = []
    scope = asyncio.timeout(None)

    def start() -> None:
        task = loop.create_task(_awaited(second), context=context)
        attempts.append(task)
        task.add_done_callback(finished)

    def finished(task: asyncio.Task[Result]) -> None:
        if not task.cancelled() and not isinstance(task.exception(), ignored) and attempts:
            scope.reschedule(loop.time())

    timer = loop.call_at(second_at_s, start)
    try:
        async with scope:
            return await first()
    except TimeoutError:
        if not scope.expired():
            raise
        return attempts[0].result()
    finally:
        timer.cancel()
        unfinished = [task for task in attempts if not task.done()]
        attempts.clear()
        for task in unfinished:
            task.cancel()
        if unfinished:  # else its connection would return to a pool that is closed by then
            await asyncio.wait(unfinished)


async def _awaited(attempt: Callable[[], Awaitable[Result]]) -> Result:
    return await attempt()
