"""A store that went back in time is noticed, and told again what it has lost (P13).

Each replica tells what it remembers (:mod:`.memory`), by ids and totals, so that telling it twice changes nothing:
settlements first, its own and those of others that it was told of, then what they leave of its totals, then open holds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ktrdr_budget.engine.batching.background import UNANSWERED, Background, refuses_all
from ktrdr_budget.engine.batching.breaker import Breaker
from ktrdr_budget.engine.protocol import Op
from ktrdr_budget.engine.replica.journal import Repair
from ktrdr_budget.errors import StoreError

__all__ = ["Recovery"]

logger = logging.getLogger("ktrdr_budget")

PULSE_S = 1.0
"""How often a replica that has something to tell asks whether the store still knows it, if it has nothing else to ask.

The store grants nothing for RECOVERY_MS of prelude.lua after the first one has noticed: three times as long.
"""
_LOOK_PULSES, _LOOK_HOLDS = 2, 500
"""In each second pulse it asks of so many holds whether others have settled them."""
_UNTOLD_FIRST_S, _UNTOLD_MAX_S = 1.0, 5.0
"""When it tells again of a window that was begun and is not here."""
_BATCH_OPS = 128
_PAUSE_FIRST_S = 0.01
_PAUSE_MAX_S = 0.2


class Recovery:
    """Of one limiter.

    Args:
        watch_policy: reads the store's eviction policy.
        waited: is told now and then, with the last failure, while calls wait for a repair: some run out of time.
        resume: is told when calls may be sent again.
    """

    def __init__(
        self,
        background: Background,
        breaker: Breaker,
        *,
        watch_policy: Callable[[], None],
        waited: Callable[[Exception | None], None],
        resume: Callable[[], None],
    ) -> None:
        self._background = background
        self._session = background.session
        self._breaker = breaker
        self._watch_policy = watch_policy
        self._waited = waited
        self._resume = resume
        self.total = Repair()
        """What was told again so far."""
        self.reset()

    def reset(self) -> None:
        """Nothing is lost, as at the start."""
        self.active = False
        """The store has lost what it acknowledged; no call is sent before it was told again."""
        self._again = False
        """Something has come up that was not told with the rest."""
        self._told_losses = 0
        """Up to which of them all was told again; something may come up later."""
        self._asking = False
        self._looking = False
        self._pulses = 0
        self._untold_s = _UNTOLD_FIRST_S
        self._pulse_timer: asyncio.TimerHandle | None = None
        self._untold_timer: asyncio.TimerHandle | None = None

    # -- noticing ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """From now on, an idle replica asks whether the store still knows what it acknowledged."""
        self._pulse_timer = self._background.later(PULSE_S, self._pulse)

    def stop(self) -> None:
        """Asks no more."""
        for timer in (self._pulse_timer, self._untold_timer):
            if timer is not None:
                timer.cancel()

    def _pulse(self) -> None:
        self.start()
        if self._breaker.open:
            return
        if self._session.heard_s and not self._session.policy_watched:  # a limiter that was not started
            self._watch_policy()
        if not self._session.memory:
            return
        if self._session.silent_s >= PULSE_S / 2:
            self.suspect()
        self._pulses += 1
        if self._pulses % _LOOK_PULSES == 0 and not (self._looking or self.active or self._background.closed):
            self._looking = True
            self._background.spawn(self._look_for_settled())

    def suspect(self) -> None:
        """Asks the store, unless that is being done."""
        if self._background.loop is not None and not (self._asking or self.active or self._background.closed):
            self._asking = True
            self._background.spawn(self._ask())

    async def _ask(self) -> None:
        try:
            head, _ = await self._background.tell([], min(PULSE_S, self._background.timeout))
        except UNANSWERED:
            pass  # whoever calls next finds that out, or the next pulse
        else:
            if head.went_back:
                self.begin()
        finally:
            self._asking = False

    async def _look_for_settled(self) -> None:
        """Forgets holds that others have settled: told after a loss, they would be open again, if those forget them."""
        session = self._session
        ids = session.memory.unsettled(session.now_ms(), _LOOK_HOLDS)
        try:
            if ids:
                head, [stored] = await self._background.read(session.read("MGET", [*map(session.keys.hold, ids)]))
                for hold_id, record in zip(ids, stored, strict=True):
                    if record:
                        text = record.decode() if isinstance(record, bytes) else record
                        session.memory.seen(hold_id, text, head.now_us)
        except UNANSWERED:
            pass  # the next round asks again
        finally:
            self._looking = False

    # -- telling again -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Holds calls back until the store has been told, unless that is being done."""
        if not self.active and not self._background.closed:
            self.active = True
            self._background.spawn(self._tell_until_heard())

    def begin_again(self) -> None:
        """The same; what is being told already does not include all."""
        self._again = True
        self.begin()

    async def _tell_until_heard(self) -> None:
        pause_s = _PAUSE_FIRST_S
        trouble: Exception | None = None
        try:
            while not self._background.closed:
                if not self._breaker.open:
                    self._again = False
                    trouble = None
                    try:
                        if await self._tell_all() and not self._again:
                            return
                    except UNANSWERED as error:
                        trouble = error
                self._waited(trouble)
                await asyncio.sleep(pause_s)
                pause_s = min(_PAUSE_MAX_S, pause_s * 2)
        finally:
            self.active = False
            self._resume()

    async def _tell_all(self) -> bool:
        """Whether the store has heard all of it, and lost nothing meanwhile."""
        memory, session = self._session.memory, self._session
        done, first = Repair(), self._told_losses != session.losses
        if first:
            done.forgotten_settlements, done.forgotten_holds = memory.forgotten_settlements, memory.forgotten_holds
        now_ms = session.now_ms()
        settled = await self._tell(
            memory.limits(session.keys, now_ms)
            + memory.settlements(session.keys, now_ms)
            + memory.others(session.keys, now_ms)
        )
        if settled is None:
            return False
        if restored := [op.head.split(" ")[2] for op, line in settled if op.letter == "Q" and line == "g"]:
            logger.warning("limits set or cleared at run time restored: %s", ", ".join(restored))
        for op, line in settled:
            memory.told(op.id, line)
        shares = await self._tell(memory.shares(session.keys))
        holds = None if shares is None else await self._tell(memory.holds(session.keys))
        if shares is None or holds is None:
            return False
        done.settlements = sum(line[0] == "k" for _, line in settled)
        done.windows = sum(line[0] == "k" and line != "k - 0" for _, line in shares)
        done.holds = sum(line == "g" for _, line in holds)
        self._told_losses = session.losses
        self._report(done, first)
        self._tell_later([line[2:] for _, line in (*settled, *shares, *holds) if line[0] == "t"])
        return True

    def _tell_later(self, missing: list[str]) -> None:
        """What could not be told because its window is not here (its slot is half moved) is told once it is."""
        if not missing:
            self._untold_s = _UNTOLD_FIRST_S
        elif self._untold_timer is None:
            logger.warning("the windows %s are not here, and could not be told of again", ", ".join(sorted({*missing})))
            self._untold_timer = self._background.later(self._untold_s, self._begin_untold)
            self._untold_s = min(_UNTOLD_MAX_S, self._untold_s * 2)

    def _begin_untold(self) -> None:
        self._untold_timer = None
        self.begin()

    def _report(self, done: Repair, first: bool) -> None:
        self.total.add(done)
        shown = self._background.store.shown
        if done or (first and self._session.memory):
            logger.warning("told the store at %s again what it had lost: %s", shown, done)
        if done.forgotten_settlements or done.forgotten_holds:
            logger.error(
                "beyond the memory of replica %s, and not repaired: the ids of %d settlements, %d holds",
                self._session.replica_id, done.forgotten_settlements, done.forgotten_holds,
            )  # fmt: skip

    async def _tell(self, ops: list[Op]) -> list[tuple[Op, str]] | None:
        answers: list[tuple[Op, str]] = []
        for first in range(0, len(ops), _BATCH_OPS):
            batch = ops[first : first + _BATCH_OPS]
            lines = await self._lines(batch)
            if lines is None:
                return None
            answers += zip(batch, lines, strict=True)
            self._waited(None)
        return answers

    async def _lines(self, batch: list[Op]) -> list[str] | None:
        """What the store says to each; one that it cannot take (its window is no window any more) holds up no other."""
        try:
            head, lines = await self._background.tell(batch, repairs=True)
        except StoreError as error:
            if refuses_all(error):
                raise
            if len(batch) == 1:
                logger.error("what %s was could not be told again: %s", batch[0].id, error)
                return ["e"]
            middle = len(batch) // 2
            first, second = await self._lines(batch[:middle]), await self._lines(batch[middle:])
            return None if first is None or second is None else first + second
        if head.went_back:
            return None
        for op, line in zip(batch, lines, strict=True):
            if line[0] == "y":
                logger.error("replay of %s failed: %s", op.id, line[2:])
        return lines
