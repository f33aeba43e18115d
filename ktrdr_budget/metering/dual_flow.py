"""Flows written once for sync and async callers: generators that yield actions and receive the results.

A driver runs (or awaits) each action, and sends its result or throws its exception into the generator. Cancellation is
thrown in as well, so a ``finally`` block may yield further actions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any, TypeVar

__all__ = ["DualFlow", "drive", "drive_sync"]

Result = TypeVar("Result")
Action = Callable[[], Any]
DualFlow = Generator[Action, Any, Result]
"""Yields functions without arguments; receives their results (awaited by :func:`drive`), or their exceptions."""


async def drive(flow: DualFlow[Result]) -> Result:
    """Run a flow to its end, awaiting each action; return the flow's result."""
    resume: Callable[[], Action] = partial(flow.send, None)
    while True:
        try:
            action = resume()
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        try:
            resume = partial(flow.send, await action())
        except BaseException as error:
            resume = partial(flow.throw, error)


def drive_sync(flow: DualFlow[Result]) -> Result:
    """Run a flow to its end without awaiting; return the flow's result."""
    resume: Callable[[], Action] = partial(flow.send, None)
    while True:
        try:
            action = resume()
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        try:
            resume = partial(flow.send, action())
        except BaseException as error:
            resume = partial(flow.throw, error)
