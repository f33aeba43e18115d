"""Detect that the store has lost data, and replay the journal of this replica to the store (P13).

The entries of the journal have ids or totals, so that a second replay changes nothing. The order of the replay is:
limits, settlements, subtotals, open holds. Settlements by other replicas are replayed if this journal has them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from ktrdr_budget.engine.batching.background import NO_REPLY, Background, refuses_everything
from ktrdr_budget.engine.batching.breaker import Breaker
from ktrdr_budget.engine.protocol.operations import Operation, ReplayLimit
from ktrdr_budget.engine.protocol.replies import MissingWindow, Reply, Restored, Settled, UnexpectedReply, Unreadable
from ktrdr_budget.engine.protocol.requests import parse_hold_texts, records_read
from ktrdr_budget.engine.replica.journal import Repair
from ktrdr_budget.errors import StoreError

__all__ = ["LossRepair"]

logger = logging.getLogger("ktrdr_budget")

PULSE_S = 1.0
"""How often an idle replica that has a journal probes the store for data loss.

After the first detection, the store grants nothing for three times as long (RECOVERY_MS in prelude.lua).
"""
_CHECK_PULSES, _CHECK_HOLDS = 2, 500
"""At every other run of the probe timer, up to 500 holds are checked, because other replicas may have settled them."""
_REPLAY_AGAIN_FIRST_S, _REPLAY_AGAIN_MAX_S = 1.0, 5.0
"""The first and the longest delay before another replay, if windows were missing."""
_BATCH_OPS = 128
_PAUSE_FIRST_S = 0.01
_PAUSE_MAX_S = 0.2

_Replies = list[tuple[Operation, Reply]]


class LossRepair:
    """The detection and repair of data losses by one limiter.

    Args:
        check_policy: a function that reads the store's eviction policy.
        on_wait: a function that is called at intervals while calls wait for a repair, to end the calls whose deadline
            has passed. The argument is the last failure of the repair, or ``None``.
        on_end: a function that is called when calls may be sent again.
    """

    def __init__(
        self,
        background: Background,
        breaker: Breaker,
        *,
        check_policy: Callable[[], None],
        on_wait: Callable[[Exception | None], None],
        on_end: Callable[[], None],
    ) -> None:
        self._background = background
        self._state = background.state
        self._breaker = breaker
        self._check_policy = check_policy
        self._on_wait = on_wait
        self._on_end = on_end
        self.total = Repair()
        """Counts of everything replayed so far."""
        self.reset()

    def reset(self) -> None:
        """Reset to the state without a data loss, as at the start."""
        self.active = False
        """Whether the store has lost writes and the replay is not complete. Until it is complete, no call is sent."""
        self._again = False
        """Whether the replay must be repeated, because another data loss was detected during the replay."""
        self._replayed_losses = 0
        """How many data losses had been detected when the whole journal was last replayed."""
        self._probing = False
        self._checking = False
        self.pulses = 0
        """How often the probe timer has run so far. Runs with an open breaker or an empty journal do not count."""
        self._replay_again_s = _REPLAY_AGAIN_FIRST_S
        self._pulse_timer: asyncio.TimerHandle | None = None
        self._replay_timer: asyncio.TimerHandle | None = None

    # -- detection -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """From now on, probe the store at intervals while this replica is idle."""
        self._pulse_timer = self._background.later(PULSE_S, self._pulse)

    def stop(self) -> None:
        """Stop the probes, and cancel a postponed replay."""
        for timer in (self._pulse_timer, self._replay_timer):
            if timer is not None:
                timer.cancel()

    def _pulse(self) -> None:
        self.start()
        if self._breaker.open:
            return
        if self._state.last_reply_s and not self._state.policy_checked:  # a limiter that was not started
            self._check_policy()
        if not self._state.journal:
            return
        if self._state.silent_s >= PULSE_S / 2:
            self.suspect()
        self.pulses += 1
        if self.pulses % _CHECK_PULSES == 0 and not (self._checking or self.active or self._background.closed):
            self._checking = True
            self._background.spawn(self.check_holds())

    def suspect(self) -> None:
        """Send a probe that detects a data loss, if no probe is in flight and no repair is running."""
        if self._background.loop is not None and not (self._probing or self.active or self._background.closed):
            self._probing = True
            self._background.spawn(self._probe())

    async def _probe(self) -> None:
        try:
            head, _ = await self._background.send([], min(PULSE_S, self._background.timeout_s))
        except NO_REPLY:
            pass  # the next call or pulse detects the outage
        else:
            if head.data_loss:
                self.begin()
        finally:
            self._probing = False

    async def check_holds(self) -> None:
        """Remove from the journal the holds that other replicas have settled: a later replay could reopen them."""
        state = self._state
        ids = state.journal.holds_to_check(state.now_ms(), _CHECK_HOLDS)
        try:
            if ids:
                head, items = await self._background.read(records_read(state.keys, state.replica_id, ids))
                for hold_id, text in zip(ids, parse_hold_texts(items), strict=True):
                    if text is not None:
                        state.journal.seen(hold_id, text, head.now_us)
        except NO_REPLY:
            pass  # the next pulses try again
        finally:
            self._checking = False

    # -- replay --------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a repair if none is running. Calls wait until the journal is replayed."""
        if not self.active and not self._background.closed:
            self.active = True
            self._background.spawn(self._replay_until_done())

    def begin_again(self) -> None:
        """Start a repair; if a repair is running, repeat the replay at its end.

        A replay does not always restore what the store loses during the replay.
        """
        self._again = True
        self.begin()

    async def _replay_until_done(self) -> None:
        pause_s = _PAUSE_FIRST_S
        try:
            while not self._background.closed:
                error: Exception | None = None
                if not self._breaker.open:
                    self._again = False
                    try:
                        if await self._replay() and not self._again:
                            return
                    except NO_REPLY as failure:
                        error = failure
                self._on_wait(error)
                await asyncio.sleep(pause_s)
                pause_s = min(_PAUSE_MAX_S, pause_s * 2)
        finally:
            self.active = False
            self._on_end()

    async def _replay(self) -> bool:
        """Replay the whole journal; return false if the store lost data meanwhile."""
        state, journal = self._state, self._state.journal
        done, is_first = Repair(), self._replayed_losses != state.losses
        if is_first:
            done.forgotten_settlements, done.forgotten_holds = journal.forgotten_settlements, journal.forgotten_holds
        now_ms = state.now_ms()
        settled = await self._send(journal.limits(state.keys, now_ms) + journal.settlements(state.keys, now_ms))
        if settled is None:
            return False
        restored = [op.budget for op, reply in settled if isinstance(op, ReplayLimit) and reply == Restored(True)]
        if restored:
            logger.warning("restored the limits that were set or cleared at run time: %s", ", ".join(restored))
        for op, reply in settled:
            journal.replayed(op.hold_id, reply)
        totals = await self._send(journal.totals(state.keys))
        holds = None if totals is None else await self._send(journal.holds(state.keys))
        if totals is None or holds is None:
            return False
        done.settlements = sum(isinstance(reply, Settled) and not reply.replayed for _, reply in settled)
        done.windows = sum(isinstance(reply, Settled) and any(reply.units) for _, reply in totals)
        done.holds = sum(reply == Restored(True) for _, reply in holds)
        self._replayed_losses = state.losses
        self._report(done, is_first)
        replies = (*settled, *totals, *holds)
        self._replay_again([reply.window for _, reply in replies if isinstance(reply, MissingWindow)])
        return True

    def _replay_again(self, missing: list[str]) -> None:
        """Replay the journal again later if windows are missing, for example while their slot is being migrated.

        Args:
            missing: the names of the missing windows. If there are none, the delay is reset to its first value.
        """
        if not missing:
            self._replay_again_s = _REPLAY_AGAIN_FIRST_S
        elif self._replay_timer is None:
            logger.warning("replay postponed, windows missing: %s", ", ".join(sorted({*missing})))
            self._replay_timer = self._background.later(self._replay_again_s, self._begin_postponed)
            self._replay_again_s = min(_REPLAY_AGAIN_MAX_S, self._replay_again_s * 2)

    def _begin_postponed(self) -> None:
        self._replay_timer = None
        self.begin()

    def _report(self, done: Repair, is_first: bool) -> None:
        self.total.add(done)
        if done or (is_first and self._state.journal):
            logger.warning("journal replayed to the store at %s: %s", self._background.store.shown, done)
        if done.forgotten_settlements or done.forgotten_holds:
            logger.error(
                "not repaired: the journal of replica %s had dropped %d holds, and the ids of %d settlements",
                self._state.replica_id,
                done.forgotten_holds,
                done.forgotten_settlements,
            )

    async def _send(self, ops: Sequence[Operation]) -> _Replies | None:
        """Send operations in batches, and return each with its reply; ``None`` if the store has lost data again."""
        answered: _Replies = []
        for first in range(0, len(ops), _BATCH_OPS):
            batch = ops[first : first + _BATCH_OPS]
            replies = await self._replies(batch)
            if replies is None:
                return None
            answered += zip(batch, replies, strict=True)
            self._on_wait(None)
        return answered

    async def _replies(self, batch: Sequence[Operation]) -> list[Reply] | None:
        """Send a batch, and return the replies; ``None`` if the store has lost data again.

        An operation that the store cannot execute does not stop the other operations: a refused batch is halved, and
        the halves are sent.
        """
        try:
            head, replies = await self._background.send(batch, repairs=True)
        except StoreError as error:
            if refuses_everything(error):
                raise
            if len(batch) == 1:
                logger.error("replay of %s failed: %s", batch[0].hold_id, error)
                return [UnexpectedReply(str(error))]
            middle = len(batch) // 2
            first, second = await self._replies(batch[:middle]), await self._replies(batch[middle:])
            return None if first is None or second is None else first + second
        if head.data_loss:
            return None
        for op, reply in zip(batch, replies, strict=True):
            if isinstance(reply, Unreadable):
                logger.error("replay of %s failed: %s", op.hold_id, reply.error)
        return replies
