"""The deadlines of calls that wait for their turn.

What is under way ends in time by itself. What waits behind it may have less time left, if it has been to the store
before: a reservation that was denied while holds were due, a commit by id that first read its hold.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

__all__ = ["Deadlines"]

_APART_S = 0.01
"""Timers are no closer than this: many calls may wait, and looking at all of them takes time."""


class Deadlines:
    """One timer, for the earliest of them: a timer for each call would cost as much as sending it.

    Args:
        look: ends the calls whose deadline has come, and tells the earliest of the others; infinite if none waits.
    """

    def __init__(self, look: Callable[[], float]) -> None:
        self._look = look
        self._timer: asyncio.TimerHandle | None = None
        self.next_s = math.inf
        """The time of the event loop that the timer is set to; whoever waits with an earlier deadline says so."""

    def watch(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        """Looks at this time of the event loop."""
        self.stop()
        self.next_s = deadline
        self._timer = loop.call_at(deadline, self._run, loop)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer, self.next_s = None, math.inf
        next_s = self._look()
        if next_s < self.next_s:
            self.watch(loop, max(next_s, loop.time() + _APART_S))

    def stop(self) -> None:
        """Looks no more, until somebody says so."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self.next_s = None, math.inf
