"""Heartbeats: extend a hold while the ``with`` block that owns the hold runs."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from typing import Any

from ktrdr_budget.engine.batching.dispatcher import Dispatcher
from ktrdr_budget.engine.calls.extend import extend
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.errors import HoldConflict, UnknownHold
from ktrdr_budget.models import TTL_MAX_S

__all__ = ["Heartbeat"]

logger = logging.getLogger("ktrdr_budget")


class Heartbeat:
    """Extends a hold each time a third of its ttl has passed.

    The heartbeats end with :meth:`stop`, when the hold is settled, or when the store does not know the hold.
    """

    __slots__ = ("_dispatcher", "_hold", "in_flight", "timer")

    def __init__(self, dispatcher: Dispatcher, hold: HoldBase) -> None:
        self._dispatcher = dispatcher
        self._hold = hold
        self.timer: asyncio.Handle | None = None
        """The timer of the next heartbeat."""
        self.in_flight: asyncio.Future[Any] | None = None
        """The future of the heartbeat in flight."""
        if not hold.settled:
            self._schedule()

    def _schedule(self) -> None:
        # In an empty context, so that an instrumentation does not add spans of heartbeats to the block's trace.
        delay_s, empty = min(self._hold.ttl, TTL_MAX_S) / 3, contextvars.Context()
        self.timer = self._dispatcher.bind().call_later(delay_s, self.send, context=empty)

    def send(self) -> None:
        """Send a heartbeat now."""
        self.timer = None
        if not self._hold.settled:
            self.in_flight = self._dispatcher.submit(extend(self._dispatcher.context, self._hold, None), "heartbeat")
            self.in_flight.add_done_callback(self._sent)

    def _sent(self, future: Any) -> None:
        stopped, self.in_flight = self.in_flight is not future, None
        error = None if future.cancelled() else future.exception()
        ended = isinstance(error, (HoldConflict, UnknownHold))
        if error is not None and not stopped:  # after a stop, the settlement may have come first
            event = "heartbeats of hold %s stopped: %s" if ended else "heartbeat of hold %s failed: %s"
            logger.warning(event, self._hold.id, error)
        if not stopped and not ended:
            self._schedule()

    def stop(self) -> None:
        """Send no further heartbeat.

        A heartbeat in flight is not cancelled. If the hold is settled before the heartbeat arrives, the heartbeat does
        not reopen the hold.
        """
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.in_flight = None
