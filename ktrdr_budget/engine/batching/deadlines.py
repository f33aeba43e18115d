"""The deadlines of calls that wait to be sent.

A batch in flight ends by its own deadline. A call that waits behind the batch may have an earlier deadline, if the call
is sent for the second time. For example, a commit by id first reads the hold. A denied reservation is sent again if
other holds are past their deadline.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

__all__ = ["LATE_S", "Deadlines"]

_APART_S = 0.01
"""The least time between two checks: many calls may wait, and a check visits all of them."""
_TICK_S = 0.02
LATE_S = 0.02
"""If the timer runs later than planned by more than this time, the event loop was blocked."""


class Deadlines:
    """One timer for the earliest deadline of all waiting calls.

    A timer for each call would cost as much as sending the call. The timer also ticks between deadlines, to measure for
    how long the event loop is blocked while calls wait.

    Args:
        expire: a function that ends the calls whose deadline has passed. The function returns the time of the next
            check, or infinity if no check is needed.
    """

    def __init__(self, expire: Callable[[], float]) -> None:
        self._expire = expire
        self._timer: asyncio.Handle | None = None
        self._timer_s = 0.0
        """The time of the timer. (If that time has already passed, uvloop returns a timer without ``when()``.)"""
        self.next_s = math.inf
        """The time of the next check, by the event loop's clock; an earlier deadline brings the check forward."""
        self.stalled_s = 0.0
        """The total time for which the event loop was blocked."""

    def watch(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        """Check the deadlines at the time ``deadline`` of the event loop's clock."""
        self._note_stall(loop)
        self.next_s = deadline
        self._wait(loop)

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        now_s = loop.time()
        self._timer_s = min(max(self.next_s, now_s), now_s + _TICK_S)
        self._timer = loop.call_at(self._timer_s, self._run, loop)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        self._note_stall(loop)
        self._timer = None
        if loop.time() >= self.next_s:
            self.next_s = math.inf
            next_s = self._expire()
            if next_s < self.next_s:
                self.next_s = max(next_s, loop.time() + _APART_S)
        if self._timer is None and self.next_s < math.inf:
            self._wait(loop)

    def _note_stall(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None and (late_s := loop.time() - self._timer_s) > LATE_S:
            self.stalled_s += late_s

    def stop(self) -> None:
        """Stop the timer until the next :meth:`watch`."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self.next_s = None, math.inf
