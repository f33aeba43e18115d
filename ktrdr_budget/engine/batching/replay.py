"""Sends, once the store answers again, what it has missed: spend that policy ``allow`` deferred, requests whose reply
was lost, and facts whose caller is gone (:mod:`.unresolved`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ktrdr_budget.engine.batching.background import UNANSWERED, Background, refuses_all
from ktrdr_budget.engine.batching.breaker import Breaker
from ktrdr_budget.engine.batching.loss_repair import Recovery
from ktrdr_budget.engine.calls.flows import Core
from ktrdr_budget.engine.outage.prepaid import SlabLeft
from ktrdr_budget.engine.protocol import REPORT, Command, Head, Op, Read, Record, give_back, given_up, parse_record
from ktrdr_budget.engine.replica.in_doubt import FACTS, Doubt, Kind
from ktrdr_budget.engine.replica.journal import AGE_MAX_MS
from ktrdr_budget.errors import StoreError

__all__ = ["Backlog"]

logger = logging.getLogger("ktrdr_budget")

_RETRY_FIRST_S = 0.05
_RETRY_MAX_S = 0.5
_BATCH_OPS = 128
_SETTLEMENTS = frozenset("DKLMN")
"""The letters of what settles a hold, or records spend."""


class Backlog:
    """Of one limiter: sends what :attr:`Core.deferred` and :attr:`Core.unresolved` hold, until nothing is left.

    Args:
        settled: called with each commit or record in doubt that this replica has made, and with the store's reply.
    """

    def __init__(
        self,
        core: Core,
        background: Background,
        breaker: Breaker,
        recovery: Recovery,
        settled: Callable[[Op, str], None],
    ) -> None:
        self._core = core
        self._unresolved = core.unresolved
        self._background = background
        self._breaker = breaker
        self._recovery = recovery
        self._settled = settled
        self.reset()

    def reset(self) -> None:
        """Has nothing under way."""
        self._timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._ended = False
        self._telling = asyncio.Lock()
        """Held by the one that tells: two would tell the same, and take each other's for told."""
        self._pause_s = _RETRY_FIRST_S

    def __bool__(self) -> bool:
        return bool(self._core.deferred or self._unresolved.count)

    # -- what is taken up ----------------------------------------------------------------------------------------------

    def doubt(self, op: Op) -> None:
        """Resolve a request whose reply was lost, and whose caller knows that."""
        if op.letter in _SETTLEMENTS:
            self._keep_fact(op)
        elif op.letter == "R":
            self._add(Doubt(op, "look up", self._now_us))
        # Else they are totals, which the caller's next request corrects.

    def take_over(self, request: Op | Read | Command, *, sent: bool) -> None:
        """Own a request that has failed and whose caller is gone: a fact is sent until the store has it; a grant is
        released if it was made to this very request, and not made any more.

        Args:
            sent: it may have been executed.
        """
        if not isinstance(request, Op):
            if isinstance(request, Read) and (prepared := request.prepares) is not None:
                self._add(Doubt(prepared.op, "by id", self._now_us, prepared))
        elif request.letter in _SETTLEMENTS or (request.letter == "E" and request.is_fact):
            self._keep_fact(request)
        elif request.letter == "R" and sent:
            op = give_back(request.id, request.key, [window for window, _ in request.parts], request.request)
            self._add(Doubt(op, "give back", self._now_us))

    @property
    def _now_us(self) -> int:
        return self._background.session.now_ms() * 1000

    def _keep_fact(self, op: Op) -> None:
        if op.head.startswith(f"N {op.id} 0 "):  # whenever it arrives: into the window in which it was spent
            op = Op(op.id, op.key, op.head.replace(" 0 ", " 1 ", 1), op.parts)
        elif op.letter == "E":  # the hold of a caller that is gone is not prolonged
            op = Op(op.id, op.key, f"{op.head[:-1]}{REPORT}", op.parts)
        self._add(Doubt(op, _kind_of(op), self._now_us))

    def _add(self, doubt: Doubt) -> None:
        if dropped := self._unresolved.add(doubt):
            logger.error("too many requests of unknown outcome: that of %s stays unknown", dropped.op.id)

    def schedule(self) -> None:
        """Sees to it that what there is will be told, soon."""
        # A repair, and a store that does not answer, tell when they are over.
        busy = self._draining or self._recovery.active or self._breaker.open
        if self._timer is None and not (busy or self._ended):
            assert self._background.loop is not None
            self._timer = self._background.loop.call_later(self._pause_s, self._begin)

    def hasten(self) -> None:
        """The store answers again."""
        self.stop()
        self._pause_s = _RETRY_FIRST_S
        if self._core.prepaid is not None:
            self._core.prepaid.hand_over()
        if self and not (self._draining or self._ended or self._background.closed):
            self._begin()

    def stop(self) -> None:
        """Tells nothing more by itself."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def end(self) -> None:
        """The same for good: only who drains this tells the rest."""
        self._ended = True
        self.stop()

    # -- telling -------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._timer = None
        self._draining = True
        self._background.spawn(self._drain())

    async def _drain(self) -> None:
        try:
            await self.drain()
        finally:
            self._draining = False
            if self and not self._background.closed:
                self._pause_s = min(_RETRY_MAX_S, self._pause_s * 2)
                self.schedule()
            else:
                self._pause_s = _RETRY_FIRST_S

    async def drain(self) -> None:
        """Tells the store all of it once, as far as it answers; what is being told already comes first."""
        async with self._telling:
            try:
                if self._unresolved.count:
                    await self._resolve()
                if self._core.deferred:
                    await self._tell_deferred()
            except UNANSWERED as error:
                logger.debug("the store was not told what it has missed: %s", error)

    async def _tell(self, ops: list[Op]) -> tuple[Head, list[str]] | None:
        """``None`` if something is lost, which comes first."""
        if self._recovery.active:
            return None
        head, lines = await self._background.tell(ops)
        if head.went_back:
            self._recovery.begin()
            return None
        return head, lines

    async def _tell_deferred(self) -> None:
        """Oldest first, once (the ids see to that). What the store does not take stays, with what comes after it
        for the same slab, and holds up nothing else.
        """
        self._drop_doubtful()
        core, together, kept = self._core, _BATCH_OPS, 0
        dropped = core.deferred_lost
        refused: set[str] = set()
        while True:
            # The oldest may be dropped meanwhile, for want of memory.
            kept, dropped = max(0, kept - (core.deferred_lost - dropped)), core.deferred_lost
            kept, ops = self._next_deferred(kept, together, refused)
            if not ops:
                return
            try:
                answer = await self._tell(ops)
            except StoreError as error:
                if refuses_all(error):
                    raise
                if len(ops) == 1:
                    refused.add(ops[0].id)
                together = 1 if len(ops) > 1 else _BATCH_OPS
                continue
            if answer is None:
                return
            self._heard(max(0, kept - (core.deferred_lost - dropped)), refused, ops, *answer)

    def _drop_doubtful(self) -> None:
        """Drops what the store may have been told so long ago that it may have forgotten its id."""
        core, oldest_ms = self._core, self._background.session.now_ms() - AGE_MAX_MS
        old = {hold_id for hold_id, since_ms in core.deferred_doubts.items() if since_ms < oldest_ms}
        if old:
            dropped = [op for op in core.deferred if op.id in old]
            kept = [op for op in core.deferred if op.id not in old]
            core.deferred.clear()
            core.deferred.extend(kept)
            core.deferred_lost += len(dropped)
            for op in dropped:
                logger.error("whether spend of %s during an outage was recorded stays unknown", op.id)
            for hold_id in old:
                del core.deferred_doubts[hold_id]

    def _next_deferred(self, kept: int, together: int, refused: set[str]) -> tuple[int, list[Op]]:
        """How many of the oldest are to be left, and the next that are to be told."""
        deferred, ops = self._core.deferred, list[Op]()
        for i in range(kept, len(deferred)):
            op = deferred[i]
            if len(ops) == together:
                break
            if op.id not in refused and (not isinstance(op, SlabLeft) or op.after not in refused):
                ops.append(op)
            elif ops:
                break
            else:
                refused.add(op.id)
                kept += 1
        return kept, ops

    def _heard(self, kept: int, refused: set[str], ops: list[Op], head: Head, lines: list[str]) -> None:
        """Takes out what was told; what is to be told otherwise, or later, stays in its place."""
        deferred = self._core.deferred
        deferred.rotate(-kept)
        left: list[Op] = []
        for op, line in zip(ops, lines, strict=True):
            if not deferred or deferred[0] is not op:
                continue  # it was dropped
            deferred.popleft()
            if line[0] in "lty":  # its hold is not replayed yet; its window is not here, or another key
                refused.add(op.id)
                left.append(op)
            else:
                self._recorded(op, line, head)
        deferred.extendleft(reversed(left))
        deferred.rotate(kept)

    def _recorded(self, op: Op, line: str, head: Head) -> None:
        self._core.deferred_doubts.pop(op.id, None)
        if self._core.prepaid is not None and op.letter in "HP":
            self._core.prepaid.told(op, line)
        elif line[0] in "kp":
            self._background.session.settled(op, line, head.now_us // 1000)
        elif op.letter != "L":
            logger.error("spend of %s during an outage was not recorded: %s", op.id, line[:200])

    async def _resolve(self) -> None:
        oldest_us = (self._background.session.now_ms() - AGE_MAX_MS) * 1000
        await self._prepare([doubt for doubt in self._unresolved if doubt.kind == "by id"])
        told: list[Doubt] = []
        asked: list[Doubt] = []
        for doubt in self._unresolved:
            if doubt.at_us < oldest_us:  # the store may have forgotten its id: it could be charged twice
                self._unresolved.end(doubt, "dropped")
                logger.error("what became of %s (%s) stays unknown", doubt.op.id, doubt.kind)
            else:
                if doubt.kind != "by id":  # else it was added meanwhile
                    (asked if doubt.kind == "look up" else told).append(doubt)
        for first in range(0, len(told), _BATCH_OPS):
            await self._send(told[first : first + _BATCH_OPS])
        for first in range(0, len(asked), _BATCH_OPS):
            await self._look_up(asked[first : first + _BATCH_OPS])

    async def _prepare(self, doubts: list[Doubt]) -> None:
        """Read the holds of facts by id, which are settlements and reports from then on."""
        for first in range(0, len(doubts), _BATCH_OPS):
            some = doubts[first : first + _BATCH_OPS]
            for doubt, record in await self._read(some):
                assert doubt.prepared is not None
                if record is None:
                    logger.error("spend of %s was not recorded: the store does not know this hold", doubt.op.id)
                    self._unresolved.end(doubt, "absent")
                else:
                    op = doubt.prepared.complete(record)
                    self._unresolved.replace(doubt, op, _kind_of(op))

    async def _read(self, doubts: list[Doubt]) -> list[tuple[Doubt, Record | None]]:
        """Each with the record of its hold; without those that replicas may have yet to replay."""
        read = self._background.session.read("MGET", [doubt.op.key for doubt in doubts])
        head, [stored] = await self._background.read(read)
        if self._recovery.active:
            return []
        texts = [value.decode() if isinstance(value, bytes) else value for value in stored]
        records = [None if not text or given_up(text) else parse_record(text) for text in texts]
        found = zip(doubts, records, strict=True)
        return [each for each in found if each[1] is not None or not head.recovering_until_ms]

    async def _send(self, doubts: list[Doubt]) -> None:
        try:
            answer = await self._tell([doubt.op for doubt in doubts])
        except StoreError:
            if len(doubts) == 1:
                return
            for doubt in doubts:  # one that the store refuses holds up no other
                await self._send([doubt])
            return
        if answer is not None:
            head, lines = answer
            for doubt, line in zip(doubts, lines, strict=True):
                self._told(doubt, line, head)

    def _told(self, doubt: Doubt, line: str, head: Head) -> None:
        op, settles = doubt.op, doubt.kind in FACTS
        if line[0] in "lty":  # its hold is not replayed yet; its window is not here, or another key
            return
        if line[0] in "kp":
            self._background.session.settled(op, line, head.now_us // 1000)
            outcome = ("sent_again" if line[0] == "k" else "executed") if settles else "released"
        elif line[0] == "e":  # a report
            outcome = "sent_again"
        else:
            outcome = {"c": "superseded", "u": "absent"}.get(line[0], "refused")
        if outcome == "refused" or (outcome == "absent" and settles and op.letter != "L"):
            logger.error("what %s spent was not recorded: %s", op.id, line[:200])
        else:
            logger.info("what became of %s, whose reply was lost: %s", op.id, outcome)
        ended = self._unresolved.end(doubt, outcome)
        if ended and doubt.kind == "settlement" and op.letter != "L" and self._is_own(line):
            self._settled(op, line)

    def _is_own(self, line: str) -> bool:
        """Whether this replica has made a settlement: a replay says in whose share it is."""
        return line[0] == "k" or (line[0] == "p" and line.split(" ")[3:4] == [self._background.session.replica_id])

    async def _look_up(self, doubts: list[Doubt]) -> None:
        for doubt, record in await self._read(doubts):
            outcome = "absent"
            if record is not None:
                # What was granted to another request, or is settled, is known to a caller.
                lost = record.state in "ox" and record.request == doubt.op.request
                outcome = "granted" if lost else "superseded"
            if outcome == "granted":
                logger.warning("hold %s is open, and the reply that granted it may be lost: unless its id is used "
                               "again, it is left to its deadline", doubt.op.id)  # fmt: skip
            self._unresolved.end(doubt, outcome)


def _kind_of(op: Op) -> Kind:
    return "report" if op.letter == "E" else "settlement"
