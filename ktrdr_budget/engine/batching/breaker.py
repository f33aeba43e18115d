"""The circuit breaker: a store that is down costs one call its deadline, and not each call again (P12).

Closed, calls are sent. Once a call has paid its whole deadline without the store being heard at all, it opens: one
probe at a time asks the store, at growing intervals and for whoever calls, and calls wait for it, but not long. The
first answer closes it, so that a call that is made after the store has returned is served.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Literal

from ktrdr_budget.engine.batching.background import UNANSWERED, Background
from ktrdr_budget.engine.protocol import Op
from ktrdr_budget.engine.transport.errors import answered
from ktrdr_budget.errors import StoreError, StoreUnavailable

__all__ = ["Breaker", "StoreState"]

logger = logging.getLogger("ktrdr_budget")

StoreState = Literal["closed", "open"]

PROBE_FIRST_S = 0.05
PROBE_MAX_S = 1.0
"""The longest time between two probes, and for which one waits; less if the limiter's timeout is."""
PATIENCE_S = 0.05
"""How long calls wait for a probe, from its beginning: a server that is gone refuses at once, one that hangs does not
answer at all."""


class Breaker:
    """Of one limiter. What asks whether it is open reads an attribute: the good path pays nothing else.

    Args:
        on_close: is told when the store has answered again, and whether it has lost writes meanwhile.
    """

    def __init__(self, background: Background, on_close: Callable[[bool], None]) -> None:
        self._background = background
        self._on_close = on_close
        self.reset()

    def reset(self) -> None:
        """Closed, as at the start."""
        self.open = False
        self.openings = 0
        """How often it has opened."""
        self.heard_s = 0.0
        """When the store last answered a read, in seconds of the monotonic clock."""
        self._since_s = 0.0
        self._trouble = ""
        self._answered = False
        """Whether the store is there, and answers that it is not ready."""
        self._pause_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._probe_began_s: float | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._waiting: list[Callable[[], None]] = []

    @property
    def state(self) -> StoreState:
        """``closed``: calls are sent; ``open``: they end at once."""
        return "open" if self.open else "closed"

    def paid(self, called_s: float, error: Exception) -> None:
        """A call that was made then has paid its whole deadline: opens, unless the store was heard meanwhile."""
        heard_s = max(self.heard_s, self._background.session.heard_s)
        if self.open or self._background.closed or heard_s >= called_s:
            return
        self.open = True
        self.openings += 1
        self._since_s = max(heard_s, called_s)
        self._trouble = str(error) or f"no reply from {self._background.store.shown}"
        self._answered = answered(error)
        logger.error("%s", self._state_words)
        self._pause_s = PROBE_FIRST_S
        self._probe_later()

    @property
    def silent_s(self) -> float:
        """Seconds since the store was last known to be there, or missed for the first time."""
        return time.monotonic() - self._since_s

    def refusal(self, *, ambiguous: bool) -> StoreUnavailable:
        """What a call gets while this is open."""
        return StoreUnavailable(self._state_words, ambiguous=ambiguous, reached=self._answered)

    @property
    def _state_words(self) -> str:
        return f"{self._trouble} for {self.silent_s:.1f} s; failing fast until it is back"

    def consult(self, told: Callable[[], None]) -> None:
        """Calls back soon; by then it may be closed. Makes a probe, unless one is under way."""
        began_s, background = self._probe_began_s, self._background
        if began_s is None:
            self._waiting.append(told)
            self._begin_probe()
        elif background.time() - began_s < self._patience_s:
            self._waiting.append(told)
        else:
            background.soon(told)  # not now: whoever insists without a pause would keep the answer from being heard

    def stop(self) -> None:
        """No further probe."""
        self._cancel_timers()
        self._tell_waiting()

    # -- probes --------------------------------------------------------------------------------------------------------

    @property
    def _patience_s(self) -> float:
        return min(PATIENCE_S, self._background.timeout / 4)

    def _cancel_timers(self) -> None:
        for timer in (self._timer, self._patience):
            if timer is not None:
                timer.cancel()
        self._timer = self._patience = None

    def _tell_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for told in waiting:
            told()

    def _probe_later(self) -> None:
        self._timer = self._background.later(self._pause_s, self._begin_planned_probe)

    def _begin_planned_probe(self) -> None:
        self._pause_s = min(self._longest_s, self._pause_s * 2)
        self._begin_probe()

    def _begin_probe(self) -> None:
        self._cancel_timers()
        if self.open and not self._background.closed:
            self._probe_began_s = self._background.time()
            self._patience = self._background.later(self._patience_s, self._tell_waiting)
            self._background.spawn(self._probe())

    async def _probe(self) -> None:
        try:
            went_back = await self._ask()
        finally:
            self._probe_began_s = None
            self._cancel_timers()
        if went_back is None:
            self._probe_later()
        else:
            logger.warning("store at %s answers again, after %.1f s", self._background.store.shown, self.silent_s)
            self.open = False
            self._on_close(went_back)
        self._tell_waiting()

    @property
    def _longest_s(self) -> float:
        return min(PROBE_MAX_S, self._background.timeout)

    async def _ask(self) -> bool | None:
        """A write that changes nothing: a store that can only be read admits nothing either.

        Returns whether the store has lost writes; ``None`` if it does not answer.
        """
        try:
            keys = self._background.session.keys
            head, _ = await self._background.tell([Op("-", keys.hold("-"), "X -", [])], self._longest_s)
        except StoreError:
            return False  # an answer: calls are told it
        except UNANSWERED as error:
            self._trouble = str(error) or self._trouble
            self._answered = answered(error)
            return None
        return head.went_back
