"""Flows written once for sync and async callers: generators that yield actions and receive the results.

An action is a function without arguments. A driver (:func:`drive` or :func:`drive_sync`) runs each action, and sends
the action's result into the generator, or throws the action's exception into the generator. A cancellation is thrown
into the generator too, so a ``finally`` block can yield further actions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any, TypeVar

__all__ = ["DualFlow", "drive", "drive_sync"]

Result = TypeVar("Result")
Action = Callable[[], Any]
DualFlow = Generator[Action, Any, Result]
"""The type of a flow: a generator that yields actions and receives their results or exceptions."""


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
