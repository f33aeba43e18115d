"""The circuit breaker: during an outage, only the first call waits for its deadline, and later calls fail fast (P12).

While the breaker is closed, calls are sent. The breaker opens when a call misses its deadline and the store has sent no
reply since the call began. While the breaker is open, probes are sent: at growing intervals, and for each new call if
no probe is in flight. A call waits briefly for the reply to the probe. The first reply closes the breaker, so that the
next call is served.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Literal

from ktrdr_budget.engine.batching.background import NO_REPLY, Background
from ktrdr_budget.engine.protocol.operations import Retire
from ktrdr_budget.engine.transport.errors import answered
from ktrdr_budget.errors import StoreError, StoreUnavailable

__all__ = ["Breaker", "StoreState"]

logger = logging.getLogger("ktrdr_budget")

StoreState = Literal["closed", "open"]

PROBE_FIRST_S = 0.05
PROBE_MAX_S = 1.0
"""The longest time between two probes, and the longest wait for the reply to a probe.

If the timeout of the limiter is shorter, the timeout applies instead.
"""
PATIENCE_S = 0.05
"""How long after the start of a probe calls wait for the reply.

A server that is down refuses at once, and a server that hangs does not reply, so a longer wait is useless.
"""


class Breaker:
    """The circuit breaker of one limiter. While the breaker is closed, its only cost to a call is to read :attr:`open`.

    Args:
        on_close: a function that is called when the store replies again. The argument is whether the store has lost
            writes.
    """

    def __init__(self, background: Background, on_close: Callable[[bool], None]) -> None:
        self._background = background
        self._on_close = on_close
        self.reset()

    def reset(self) -> None:
        """Set the initial state, in which the breaker is closed."""
        self.open = False
        self.openings = 0
        """How often the breaker has opened."""
        self.last_reply_s = 0.0
        """When the store last replied to a read, in seconds of the monotonic clock."""
        self._since_s = 0.0
        self._cause = ""
        self._answered = False
        """Whether the store replies, but is not ready."""
        self._pause_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._probe_began_s: float | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._waiting: list[Callable[[], None]] = []

    @property
    def state(self) -> StoreState:
        """``closed``: calls are sent; ``open``: the outage policy decides each call at once."""
        return "open" if self.open else "closed"

    def deadline_missed(self, called_s: float, error: Exception) -> None:
        """Handle a call that missed its deadline: open the breaker if the store has not replied since the call began.

        Args:
            called_s: when the call began, by the monotonic clock.
            error: the last error of the call.
        """
        last_reply_s = max(self.last_reply_s, self._background.state.last_reply_s)
        if self.open or self._background.closed or last_reply_s >= called_s:
            return
        self.open = True
        self.openings += 1
        self._since_s = max(last_reply_s, called_s)
        self._cause = str(error) or f"no reply from {self._background.store.shown}"
        self._answered = answered(error)
        logger.error("circuit breaker opened: %s", self._state_words)
        self._pause_s = PROBE_FIRST_S
        self._probe_later()

    @property
    def silent_s(self) -> float:
        """Seconds since the beginning of the call that opened the breaker."""
        return time.monotonic() - self._since_s

    def refusal(self, *, ambiguous: bool) -> StoreUnavailable:
        """The error that a call raises while the breaker is open.

        Args:
            ambiguous: whether an earlier attempt of the call may have been executed.
        """
        return StoreUnavailable(self._state_words, ambiguous=ambiguous, reached=self._answered)

    @property
    def _state_words(self) -> str:
        return f"{self._cause} for {self.silent_s:.1f} s; failing fast until it replies"

    def consult(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once the breaker closes or the wait for a probe is over.

        If no probe is in flight, one is sent. If the wait for the probe in flight is over, the callback runs in the
        next turn of the event loop.
        """
        began_s, background = self._probe_began_s, self._background
        if began_s is None:
            self._waiting.append(callback)
            self._begin_probe()
        elif background.time() - began_s < self._patience_s:
            self._waiting.append(callback)
        else:
            background.soon(callback)  # not now: calls in a tight loop would keep the event loop from the reply

    def stop(self) -> None:
        """Send no further probe. Calls stop waiting for a probe."""
        self._cancel_timers()
        self._resume_waiting()

    # -- probes --------------------------------------------------------------------------------------------------------

    @property
    def _patience_s(self) -> float:
        return min(PATIENCE_S, self._background.timeout_s / 4)

    def _cancel_timers(self) -> None:
        for timer in (self._timer, self._patience):
            if timer is not None:
                timer.cancel()
        self._timer = self._patience = None

    def _resume_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback()

    def _probe_later(self) -> None:
        self._timer = self._background.later(self._pause_s, self._begin_planned_probe)

    def _begin_planned_probe(self) -> None:
        self._pause_s = min(self._longest_s, self._pause_s * 2)
        self._begin_probe()

    def _begin_probe(self) -> None:
        self._cancel_timers()
        if self.open and not self._background.closed:
            self._probe_began_s = self._background.time()
            self._patience = self._background.later(self._patience_s, self._resume_waiting)
            self._background.spawn(self._probe())

    async def _probe(self) -> None:
        try:
            data_loss = await self._data_loss()
        finally:
            self._probe_began_s = None
            self._cancel_timers()
        if data_loss is None:
            self._probe_later()
        else:
            shown, silent_s = self._background.store.shown, self.silent_s
            logger.warning("circuit breaker closed: store at %s replies after %.1f s", shown, silent_s)
            self.open = False
            self._on_close(data_loss)
        self._resume_waiting()

    @property
    def _longest_s(self) -> float:
        return min(PROBE_MAX_S, self._background.timeout_s)

    async def _data_loss(self) -> bool | None:
        """Probe the store with an empty write, because a read-only store replies to reads but cannot admit calls.

        Returns:
            Whether the store has lost writes; ``None`` if the store does not reply.
        """
        try:
            keys = self._background.state.keys
            head, _ = await self._background.send([Retire.nothing(keys.hold("-"))], self._longest_s)
        except StoreError:
            return False  # a reply: calls receive it
        except NO_REPLY as error:
            self._cause = str(error) or self._cause
            self._answered = answered(error)
            return None
        return head.data_loss
