"""Keeps a hold alive while the block that owns it runs."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from typing import TYPE_CHECKING, Any

from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.errors import HoldConflict, UnknownHold
from ktrdr_budget.models import TTL_MAX_S

if TYPE_CHECKING:
    from ktrdr_budget.engine.batching.dispatcher import Coalescer

__all__ = ["Heartbeat"]

logger = logging.getLogger("ktrdr_budget")


class Heartbeat:
    """Extends a hold at a third of its ttl, until stopped or until there is nothing left to extend."""

    __slots__ = ("_coalescer", "_hold", "_timer")

    def __init__(self, coalescer: Coalescer, hold: HoldBase) -> None:
        self._coalescer = coalescer
        self._hold = hold
        self._timer: asyncio.TimerHandle | None = None
        if not hold.settled:
            self._schedule()

    def _schedule(self) -> None:
        # In an empty context: an instrumentation would put the spans of each heartbeat into the block's trace.
        delay_s, empty = min(self._hold.ttl, TTL_MAX_S) / 3, contextvars.Context()
        self._timer = self._coalescer.bind().call_later(delay_s, self._beat, context=empty)

    def _beat(self) -> None:
        self._timer = None
        if not self._hold.settled:
            future = self._coalescer.submit(self._hold.extend_flow(None), "heartbeat")
            future.add_done_callback(self._beaten)
            self._timer = future

    def _beaten(self, future: Any) -> None:
        stopped, self._timer = self._timer is not future, None
        error = None if future.cancelled() else future.exception()
        ended = isinstance(error, (HoldConflict, UnknownHold))
        if error is not None and not stopped:  # one that was stopped may come after what settles the hold
            event = "heartbeats of hold %s stopped: %s" if ended else "heartbeat of hold %s failed: %s"
            logger.warning(event, self._hold.id, error)
        if not stopped and not ended:
            self._schedule()

    def stop(self) -> None:
        """No further heartbeat. One that is under way finishes before what is sent next, or is harmless after it."""
        timer, self._timer = self._timer, None
        if isinstance(timer, asyncio.TimerHandle):
            timer.cancel()
