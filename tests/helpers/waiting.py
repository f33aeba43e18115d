"""Waiting for a condition, bounded, instead of sleeping."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

WITHIN_S = 120.0
"""The longest wait, generous for a busy machine: only a failing test takes that long."""


async def until(condition: Callable[[], Any], within_s: float = WITHIN_S) -> Any:
    """Poll a condition, plain or async, until it is truthy; return its value."""
    ends = time.monotonic() + within_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < ends, f"not within {within_s} s: {inspect.getsource(condition).strip()}"
        await asyncio.sleep(0.005)


def wait_until(condition: Callable[[], Any], within_s: float = WITHIN_S, every_s: float = 0.005) -> Any:
    """Poll a condition until it is truthy, without an event loop; return its value."""
    ends = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < ends, f"not within {within_s} s: {inspect.getsource(condition).strip()}"
        time.sleep(every_s)
    return value
