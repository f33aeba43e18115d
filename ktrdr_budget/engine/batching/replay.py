"""Send the outbox once the store replies again.

The outbox (:mod:`..replica.outbox`) holds deferred settlements, and requests in doubt, whose outcome is unknown. A pass
is one attempt to send the whole outbox.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator

from ktrdr_budget.engine.batching.background import NO_REPLY, Background, refuses_everything
from ktrdr_budget.engine.batching.breaker import Breaker
from ktrdr_budget.engine.batching.loss_repair import LossRepair
from ktrdr_budget.engine.calls.context import CallContext
from ktrdr_budget.engine.outage.policy import release_unreceived
from ktrdr_budget.engine.protocol.codes import OPEN, UNCONFIRMED
from ktrdr_budget.engine.protocol.hold_record import HoldRecord
from ktrdr_budget.engine.protocol.operations import Extend, Operation, RecordSpend, Reserve, SettlingOperation
from ktrdr_budget.engine.protocol.replies import (
    Conflict,
    Extended,
    MissingWindow,
    Recovering,
    Reply,
    Settled,
    UnknownHoldReply,
    Unreadable,
)
from ktrdr_budget.engine.protocol.requests import Command, PreparedFact, Read, parse_hold_records, records_read
from ktrdr_budget.engine.replica.journal import AGE_MAX_MS
from ktrdr_budget.engine.replica.outbox import FACTS, Entry, Kind
from ktrdr_budget.engine.transport.errors import Transient
from ktrdr_budget.errors import StoreError

__all__ = ["Replayer"]

logger = logging.getLogger("ktrdr_budget")

RETRY_FIRST_S = 0.05
RETRY_MAX_S = 0.5
_BATCH_OPS = 128


class Replayer:
    """Sends the outbox of one limiter until it is empty.

    Args:
        on_settled: a function that is called when this replica has completed a commit, or a record of spend, that was
            in doubt. The arguments are the operation and the reply of the store.
    """

    def __init__(
        self,
        context: CallContext,
        background: Background,
        breaker: Breaker,
        repair: LossRepair,
        on_settled: Callable[[SettlingOperation, Settled], None],
    ) -> None:
        self._context = context
        self._outbox = context.outbox
        self._background = background
        self._breaker = breaker
        self._repair = repair
        self._on_settled = on_settled
        self.reset()

    def reset(self) -> None:
        """Reset to the state in which nothing is being sent."""
        self._timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._ended = False
        self._lock = asyncio.Lock()
        """Held while the outbox is sent: two concurrent passes would send the same requests twice."""
        self._pause_s = RETRY_FIRST_S

    # -- what is added -------------------------------------------------------------------------------------------------

    def resolve_later(self, op: Operation) -> None:
        """Queue a request whose reply was lost and whose caller received ``StoreUnavailable``."""
        if isinstance(op, SettlingOperation):
            self._keep_fact(op)
        elif isinstance(op, Reserve):
            self._outbox.add(Entry(op, "look up", self._now_us))
        # Other requests carry totals, which the caller's next request corrects.

    def take_over(self, request: Operation | Read | Command, *, maybe_executed: bool) -> None:
        """Queue a failed request whose caller is gone.

        A settlement or report is sent until the store has executed it. For a reservation, a release is sent: it gives
        back what the store has granted to this request, and makes the store refuse the request if it arrives later.

        Args:
            maybe_executed: whether the store may have executed the request. If not, a reservation needs no release.
        """
        if isinstance(request, Read):
            if request.prepares is not None:
                self._outbox.add(Entry(request.prepares, "by id", self._now_us))
        elif isinstance(request, SettlingOperation) or (isinstance(request, Extend) and request.is_fact):
            self._keep_fact(request)
        elif isinstance(request, Reserve) and maybe_executed:
            op = release_unreceived(request.hold_id, request.key, request.windows, request.request)
            self._outbox.add(Entry(op, "release", self._now_us))

    @property
    def _now_us(self) -> int:
        return self._background.state.now_ms() * 1000

    def _keep_fact(self, op: SettlingOperation | Extend) -> None:
        if isinstance(op, RecordSpend):  # even if late, it counts in the window of the spend
            op = op.as_late()
        elif isinstance(op, Extend):  # the hold of a caller that is gone is not prolonged
            op = op.as_report()
        self._outbox.add(Entry(op, _kind_of(op), self._now_us))

    # -- when ----------------------------------------------------------------------------------------------------------

    def schedule(self) -> None:
        """Plan a pass after a pause, if no pass is running or planned."""
        # The end of a repair, and the first reply after an outage, start a pass themselves.
        busy = self._draining or self._repair.active or self._breaker.open
        if self._timer is None and not (busy or self._ended):
            assert self._background.loop is not None
            self._timer = self._background.loop.call_later(self._pause_s, self._begin)

    def hasten(self) -> None:
        """Send the outbox now, because the store replies again."""
        self.stop()
        self._pause_s = RETRY_FIRST_S
        self._context.policy.store_replies()
        if len(self._outbox) and not (self._draining or self._ended or self._background.closed):
            self._begin()

    def stop(self) -> None:
        """Cancel the planned pass, until the next :meth:`schedule`."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def end(self) -> None:
        """Plan no further pass. From now on, the outbox is sent only by a direct call of :meth:`drain`."""
        self._ended = True
        self.stop()

    def _begin(self) -> None:
        self._timer = None
        self._draining = True
        self._background.spawn(self._drain())

    async def _drain(self) -> None:
        try:
            await self.drain()
        finally:
            self._draining = False
            if len(self._outbox) and not self._background.closed:
                self._pause_s = min(RETRY_MAX_S, self._pause_s * 2)
                self.schedule()
            else:
                self._pause_s = RETRY_FIRST_S

    # -- sending -------------------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Send the whole outbox once; stop if the store does not reply."""
        async with self._lock:
            try:
                for batch in self._batches(lambda entry: entry.kind == "by id"):
                    await self._read_holds(batch)
                for batch in self._batches(lambda entry: entry.kind not in ("by id", "look up")):
                    await self._send(batch)
                for batch in self._batches(lambda entry: entry.kind == "look up"):
                    await self._look_up(batch)
            except NO_REPLY as error:
                logger.debug("outbox not drained: %s", error)

    def _batches(self, wanted: Callable[[Entry], bool]) -> Iterator[list[Entry]]:
        """Yield the entries for which ``wanted`` returns true, in batches.

        Entries that were removed from the outbox meanwhile are left out. Requests that are too old to be resent safely
        are dropped, because the store may have dropped their ids.
        """
        batch: list[Entry] = []
        for entry in self._outbox:
            if not wanted(entry):
                continue
            oldest_us = self._now_us - AGE_MAX_MS * 1000
            if entry.maybe_executed_us is not None and entry.maybe_executed_us < oldest_us:
                self._outbox.end(entry, "dropped")
                logger.error(
                    "dropped a request with id %s (%s): too old to resend safely; its outcome is unknown",
                    entry.hold_id,
                    entry.kind,
                )
                continue
            batch.append(entry)
            if len(batch) == _BATCH_OPS:
                yield [each for each in batch if each in self._outbox]
                batch = []
        yield [each for each in batch if each in self._outbox]

    async def _read_holds(self, entries: list[Entry]) -> None:
        """Read the holds to which settlements and reports by id refer, and turn these entries into operations."""
        for entry, record in await self._records(entries):
            assert isinstance(entry.request, PreparedFact)
            if record is None:
                logger.error("spend of %s not recorded: unknown hold", entry.hold_id)
                self._outbox.end(entry, "absent")
            else:
                entry.request = entry.request.complete(record)
                entry.kind = _kind_of(entry.request)

    async def _records(self, entries: list[Entry]) -> list[tuple[Entry, HoldRecord | None]]:
        """Read the record of each entry's hold.

        While replicas may still replay lost data, entries without a record are left out, because the hold may reappear.
        """
        if not entries:
            return []
        state = self._background.state
        read = records_read(state.keys, state.replica_id, [entry.hold_id for entry in entries])
        head, items = await self._background.read(read)
        if self._repair.active:
            return []
        found = zip(entries, parse_hold_records(items), strict=True)
        return [each for each in found if each[1] is not None or not head.recovering_until_ms]

    async def _send(self, entries: list[Entry]) -> None:
        if not entries or self._repair.active:  # a repair comes first
            return
        ops = [entry.request for entry in entries]
        sent_us = self._now_us
        try:
            head, replies = await self._background.send(ops)  # type: ignore[arg-type]  # holds were read before
        except StoreError as error:
            if refuses_everything(error):
                raise
            if len(entries) > 1:
                for entry in entries:  # an entry that the store refuses does not stop the others
                    await self._send([entry] if entry in self._outbox else [])
            return
        except NO_REPLY as error:
            if not isinstance(error, Transient) or error.sent:
                for entry in entries:  # the store drops an id a day after the first attempt
                    entry.maybe_executed_us = entry.maybe_executed_us or sent_us
            raise
        if head.data_loss:
            self._repair.begin()
            return
        for entry, reply in zip(entries, replies, strict=True):
            # Otherwise not executed: the hold is not replayed yet, or the window is missing or unreadable.
            if not isinstance(reply, (Recovering, MissingWindow, Unreadable)):
                self._on_reply(entry, reply, head.now_us)

    def _on_reply(self, entry: Entry, reply: Reply, now_us: int) -> None:
        op, is_fact = entry.request, entry.kind in FACTS
        if isinstance(reply, Settled):
            assert isinstance(op, SettlingOperation)
            self._background.state.journal_settlement(op, reply, now_us // 1000)
            outcome = ("executed" if reply.replayed else "sent_again") if is_fact else "released"
        elif isinstance(reply, Extended):  # a report
            outcome = "sent_again"
        else:
            outcome = "refused"
            if isinstance(reply, Conflict):
                outcome = "superseded"
            elif isinstance(reply, UnknownHoldReply):
                outcome = "absent"
        releases = isinstance(op, SettlingOperation) and op.is_release
        if entry.kind == "deferred":
            if not isinstance(reply, Settled) and not releases:
                logger.error("deferred spend of %s not recorded: %s", op.hold_id, _shown(reply))
        elif outcome == "refused" or (outcome == "absent" and is_fact and not releases):
            logger.error("spend of %s not recorded: %s", op.hold_id, _shown(reply))
        else:
            logger.info("outcome of %s, whose reply was lost: %s", op.hold_id, outcome)
        ended = self._outbox.end(entry, outcome)
        if ended and entry.kind == "settlement" and not releases and isinstance(reply, Settled):
            assert isinstance(op, SettlingOperation)
            if self._background.state.journal.counts_here(reply):
                self._on_settled(op, reply)

    async def _look_up(self, entries: list[Entry]) -> None:
        for entry, record in await self._records(entries):
            outcome = "absent"
            if record is not None:
                # A hold that was granted to another request, or is settled, has a caller.
                request = getattr(entry.request, "request", "")
                lost = record.state in (OPEN, UNCONFIRMED) and record.request == request
                outcome = "granted" if lost else "superseded"
            if outcome == "granted":
                logger.warning(
                    "hold %s is open, but the reply that granted it was lost; it expires unless its id is used again",
                    entry.hold_id,
                )
            self._outbox.end(entry, outcome)


def _kind_of(op: Operation) -> Kind:
    return "report" if isinstance(op, Extend) else "settlement"


def _shown(reply: Reply) -> str:
    return str(reply)[:200]
