"""Flows written once for sync and async callers: generators that yield actions and receive the results.

A driver runs (or awaits) each action, and sends its result or throws its exception into the generator. Cancellation is
thrown in as well, so a ``finally`` block may yield further actions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

__all__ = ["DualFlow", "drive", "drive_sync"]

Result = TypeVar("Result")
DualFlow = Generator[Callable[[], Any], Any, Result]
"""Yields functions without arguments; receives what they returned (awaited by :func:`drive`) or raised."""


async def drive(flow: DualFlow[Result]) -> Result:
    """Run a flow to its end, awaiting each action; return the flow's result."""
    value: Any = None
    failure: BaseException | None = None
    while True:
        try:
            action = flow.send(value) if failure is None else flow.throw(failure)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        try:
            value, failure = await action(), None
        except BaseException as error:
            value, failure = None, error


def drive_sync(flow: DualFlow[Result]) -> Result:
    """Run a flow to its end without awaiting; return the flow's result."""
    value: Any = None
    failure: BaseException | None = None
    while True:
        try:
            action = flow.send(value) if failure is None else flow.throw(failure)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        try:
            value, failure = action(), None
        except BaseException as error:
            value, failure = None, error
