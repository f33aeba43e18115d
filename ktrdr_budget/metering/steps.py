"""What sync and async code do alike, written once: generators that yield what is to be done, and are sent the results.

They are thrown what goes wrong, cancellation included, so that a ``finally`` may yield what is to be done even then.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

__all__ = ["Steps", "drive", "drive_sync"]

Result = TypeVar("Result")
Steps = Generator[Callable[[], Any], Any, Result]
"""Yields functions, and is sent their results (awaited by :func:`drive`), or thrown what they raised."""


async def drive(steps: Steps[Result]) -> Result:
    """Takes each step, and awaits it; what the last one returns."""
    value: Any = None
    failure: BaseException | None = None
    while True:
        try:
            step = steps.send(value) if failure is None else steps.throw(failure)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        try:
            value, failure = await step(), None
        except BaseException as error:
            value, failure = None, error


def drive_sync(steps: Steps[Result]) -> Result:
    """The same without ``await``."""
    value: Any = None
    failure: BaseException | None = None
    while True:
        try:
            step = steps.send(value) if failure is None else steps.throw(failure)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        try:
            value, failure = step(), None
        except BaseException as error:
            value, failure = None, error
