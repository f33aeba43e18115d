"""Group commit: during a round trip, new calls wait; then they are sent together as the next batch.

No timer is involved: an idle limiter sends at once. A lane sends one batch after another; at most two lanes are active.

The dispatcher, not a caller, owns calls in flight, so that a cancelled caller does not affect others. The dispatcher
also owns the outcome of a call until the caller has received the outcome (:meth:`Dispatcher.leave`). If the caller is
cancelled, a request that was not sent is dropped, a grant is released, and a settlement or report is completed (P14).
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import threading
import time
from dataclasses import replace
from functools import partial
from typing import Any

from ktrdr_budget.engine.batching import fork
from ktrdr_budget.engine.batching.background import Background, DataLossPending
from ktrdr_budget.engine.batching.breaker import Breaker
from ktrdr_budget.engine.batching.deadlines import LATE_S, Deadlines
from ktrdr_budget.engine.batching.loss_repair import LossRepair
from ktrdr_budget.engine.batching.pending import Observation, Observer, PendingCall
from ktrdr_budget.engine.batching.queues import Queues
from ktrdr_budget.engine.batching.replay import Replayer
from ktrdr_budget.engine.calls.context import CallContext, Flow
from ktrdr_budget.engine.calls.readiness import warn_of_eviction
from ktrdr_budget.engine.calls.reserve import release_grant
from ktrdr_budget.engine.calls.results import amounts_of
from ktrdr_budget.engine.protocol.batch import BatchHead, EncodedBatch, Header, encode_batch, parse_batch
from ktrdr_budget.engine.protocol.operations import Operation, RecordSpend, SettlingOperation
from ktrdr_budget.engine.protocol.replies import MissingWindow, NotFast, Recovering, Settled
from ktrdr_budget.engine.protocol.requests import Command, Read
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.engine.transport.errors import NoScript, Transient, unavailable
from ktrdr_budget.engine.transport.store import Store
from ktrdr_budget.errors import BudgetError, StoreError, StoreUnavailable
from ktrdr_budget.models import Settlement

__all__ = ["Dispatcher"]

logger = logging.getLogger("ktrdr_budget")

_LANES = 2
_SECOND_LANE_FROM = 16
_BATCH_OPS = 128
_BATCH_WINDOWS = 768
_BACKOFF_FIRST_S = 0.01
_BACKOFF_MAX_S = 0.2
_MISSING_WINDOW_S = 0.05
"""The delay before a call is sent again because the key of a window is missing, for example while its slot migrates."""
_UNDER_REPAIR = "it lost writes and is being repaired"
_LOOP_BLOCKED = "the event loop was blocked"
_TIME_LEFT_MIN_S = 0.002
"""A call with less time left than this is not sent again."""
_REPLY_S = 0.1
"""The time that must be left for the reply when a delayed call is sent again; at most a quarter of the timeout."""


class Dispatcher:
    """Drives calls over one store, on one event loop.

    Args:
        timeout_s: the time from the start of a call to its deadline, in seconds.
        observer: a function that receives an :class:`Observation` of each finished call; ``None``: no observations.
    """

    def __init__(self, context: CallContext, store: Store, timeout_s: float, observer: Observer | None) -> None:
        self.context = context
        self.state = context.state
        self.store = store
        self.timeout_s = timeout_s
        self._observer = observer
        self.background = Background(context.state, store, timeout_s)
        self.breaker = Breaker(self.background, self._on_close)
        self.repair = LossRepair(
            self.background,
            self.breaker,
            check_policy=self._check_policy,
            on_wait=self._repair_continues,
            on_end=self._repaired,
        )
        self.replayer = Replayer(context, self.background, self.breaker, self.repair, self._settled_late)
        context.state.on_suspicion = self.repair.suspect
        context.state.on_late_reply = self.repair.begin_again
        self._reset()
        fork.watch(self)

    def _reset(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        """The thread of the first call."""
        self._queues = Queues()
        self.delayed: dict[PendingCall, asyncio.TimerHandle] = {}
        """Delayed calls: reservations and growth during a repair of the store, and calls whose window is missing."""
        self.deadlines = Deadlines(self._expire_queued)
        self._lanes = 0
        self._idle: asyncio.Future[None] | None = None
        """A future on which :meth:`close` waits, and which completes when the last lane has ended."""
        self._backoff_s = 0.0
        self._last_error: Exception | None = None
        self._retiring = False
        self._closed = False

    def after_fork(self) -> None:
        """Reset the limiter in a forked child.

        The child gets new connections, empty queues and a new replica. The parent keeps the calls in flight.
        """
        fork.keep((self._loop, self.background.tasks, self.store.forget()))
        self.context.outbox.clear()
        self.context.policy.clear()
        for part in (self.background, self.breaker, self.repair, self.replayer):
            part.reset()
        self._reset()
        self.state.renew()

    # -- calls ---------------------------------------------------------------------------------------------------------

    def bind(self) -> asyncio.AbstractEventLoop:
        """Return the event loop of the dispatcher.

        The first use binds the dispatcher to the running event loop.
        """
        loop = self._loop
        # A thread runs one loop at a time. (Up to Python 3.11, asyncio makes a system call to find the running loop.)
        if loop is not None and threading.get_ident() == self._thread and loop.is_running() and not self._closed:
            return loop
        running = asyncio.get_running_loop()
        if self._closed:
            raise RuntimeError("this limiter is closed")
        if self._loop is None:
            self._loop, self._thread = running, threading.get_ident()
            self.background.bind(running)
            self.repair.start()
        elif self._loop is not running:
            raise RuntimeError("this limiter belongs to another event loop; create a limiter for each event loop")
        return running

    def begin(self, flow: Flow[Any], operation: str, future: Any = None, kept: bool = False) -> PendingCall:
        """Start a call whose future receives the result.

        Args:
            future: the future of a waiting thread; ``None``: the event loop creates a future.
            kept: whether the limiter resends a failed settlement. Set if the caller will not retry.
        """
        loop = self.bind()
        if future is None:
            future = loop.create_future()
        # An event loop's clock may be as coarse as a millisecond, too coarse for an observation.
        deadline_s = loop.time() + self.timeout_s
        call = PendingCall(flow, future, operation, time.monotonic(), deadline_s, self._stalled_max_s, kept)
        self._resume(call, None)
        return call

    def submit(self, flow: Flow[Any], operation: str) -> Any:
        """Start a call that the limiter itself makes; return the future that receives the result."""
        return self.begin(flow, operation).future

    def leave(self, call: PendingCall, error: BaseException) -> None:
        """Take over the outcome of a call if the caller stops waiting before it has received the outcome.

        A caller that is cancelled in the turn of the event loop in which the outcome arrives does not receive it.

        Args:
            error: why the caller stops waiting. If the call itself failed with this error, nothing is left to do.
        """
        future = call.future
        if future.cancel() or future.cancelled():
            return  # when the call ends, _finish takes over the outcome
        failure = future.exception()
        if failure is not error:
            self._disown(call, future.result() if failure is None else None, failure)

    def _resume(self, call: PendingCall, answer: Any) -> None:
        try:
            request = call.flow.send(answer)
        except StopIteration as stop:
            self._finish(call, stop.value, None)
        except BaseException as error:
            self._finish(call, None, error)
        else:
            self._enqueue(call, request)

    def _throw(self, call: PendingCall, error: Exception) -> None:
        try:
            request = call.flow.throw(error)
        except StopIteration as stop:
            self._finish(call, stop.value, None)
        except BaseException as raised:
            self._finish(call, None, raised)
        else:
            self._enqueue(call, request)

    def _finish(self, call: PendingCall, result: Any, error: BaseException | None) -> None:
        future, outbox = call.future, self.context.outbox
        if future.cancelled():
            self._disown(call, result, error)
        elif error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
            if call.kept:
                self._disown(call, result, error)
            elif isinstance(error, StoreUnavailable) and error.ambiguous and isinstance(call.request, Operation):
                self.replayer.resolve_later(call.request)
        first_reply_lost = call.unacknowledged
        if outbox.in_doubt and error is None:
            resolved = Settlement if future.cancelled() else (HoldBase, Settlement)
            if isinstance(result, resolved) and not self.context.policy.owns(result.id):
                first_reply_lost |= outbox.retried(result.id, settled=isinstance(result, Settlement))
        if self._observer is not None:
            if first_reply_lost and isinstance(result, Settlement):
                result = replace(result, replayed=False)  # no observer has seen it yet
            seconds = time.monotonic() - call.started_s
            self._observe(Observation(call.operation, result, error, seconds, call.context))
        if len(outbox):
            self.replayer.schedule()

    def _disown(self, call: PendingCall, result: Any, error: BaseException | None) -> None:
        """Take over the outcome of a call whose caller is gone: release a grant, or resend a settlement."""
        if error is None:
            call.context.copy().run(self._release_unreceived, result)
        elif isinstance(error, StoreUnavailable):
            self.replayer.take_over(call.request, maybe_executed=error.ambiguous)
            self.replayer.schedule()

    def _release_unreceived(self, result: Any) -> None:
        """Release a grant that the caller did not receive.

        A replayed grant is kept, because it belongs to an earlier caller.
        """
        if not isinstance(result, HoldBase) or result.replayed or self._closed:
            return
        if result.offline is not None and result.state == "open":
            self.context.policy.give_up(result)
            # The store may still receive the reservation, and grant it.
            self.context.release_later(result.id, result.window_list, result.request)
            self.replayer.schedule()
        else:
            self.submit(release_grant(self.context, result), "release").add_done_callback(_log_failed_release)

    def _settled_late(self, op: SettlingOperation, settled: Settled) -> None:
        """Observe a commit or a record that was acknowledged after its call had ended."""
        if self._observer is None:
            return
        result = Settlement(
            id=op.hold_id,
            state="recorded" if isinstance(op, RecordSpend) else "committed",
            amounts=amounts_of(self.state.windows_of(op, settled), settled.units),
            overrun=settled.overrun,
            # With several windows, it is unknown which of them has the overrun.
            overruns=(op.windows[0].budget,) if settled.overrun and len(op.windows) == 1 else (),
            late=settled.late,
        )
        self._observe(Observation("resolve", result, None, 0.0, contextvars.Context()))

    def _observe(self, observation: Observation) -> None:
        assert self._observer is not None
        try:
            self._observer(observation)
        except Exception:
            logger.exception("observer failed; the budget is not affected")

    # -- queue and lanes -----------------------------------------------------------------------------------------------

    def _enqueue(self, call: PendingCall, request: Operation | Read | Command) -> None:
        call.request = request
        assert self._loop is not None
        if self.breaker.open:
            self.breaker.consult(partial(self._consulted, call))
            return
        if call.deadline_s < self.deadlines.next_s:
            self.deadlines.watch(self._loop, call.deadline_s)
        if not isinstance(request, Operation):
            self._spawn(self._read(call, request), call)
            return
        self._queues.put(call)
        lanes = self._lanes
        if lanes == 0 or (lanes < _LANES and len(self._queues) >= _SECOND_LANE_FROM):
            self._lanes += 1
            self._loop.call_soon(self._next_batch)  # calls made later in this turn join the batch

    def _consulted(self, call: PendingCall) -> None:
        """Refuse a call if the breaker is still open after the wait for a probe; otherwise, send the call."""
        if self.breaker.open:
            self._throw(call, self.breaker.refusal(ambiguous=call.was_resent))
        else:
            self._enqueue(call, call.request)

    def _spawn(self, work: Any, caller: PendingCall) -> None:
        """Start a task on behalf of a caller."""
        # A copy, because a task of an earlier attempt of the call may still run in the context.
        self.background.spawn(work, caller.context.copy())

    def _next_batch(self) -> None:
        """Send the next batch of a lane; if there is none, end the lane.

        The batch is sent at once if a connection is ready, and in a task if not.
        """
        if not self._lanes:
            return  # the parent of this forked process opened the lane
        batch: list[PendingCall] = []
        try:
            batch = self._take_batch()
            if batch and not self._send_at_once(batch):
                self._spawn(self._exchange(batch, None), batch[0])
        except BaseException as error:
            self._fail_lane(batch, error)
            raise
        if not batch:
            self._end_lane()

    def _end_lane(self) -> None:
        self._lanes -= 1
        if not self._lanes and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _fail_lane(self, batch: list[PendingCall], failure: BaseException) -> None:
        """End a failed lane, and the calls of its batch; another lane sends the waiting calls."""
        for call in batch:
            self._fail(call, failure)
        self._end_lane()
        self.open_lane()

    def open_lane(self) -> None:
        """Start a lane for the waiting calls if no lane is active."""
        if not self._lanes and not self._closed and self._queues:
            assert self._loop is not None
            self._lanes += 1
            self._loop.call_soon(self._next_batch)

    def _fail(self, call: PendingCall, failure: BaseException) -> None:
        """End a call that was stopped by a bug or by the end of the event loop."""
        if not call.future.done():
            call.future.set_exception(BudgetError(f"unexpected failure: {type(failure).__name__}: {failure}"))

    def _take_batch(self) -> list[PendingCall]:
        """Take the next batch from the queues; it is empty if no call waits or a repair runs.

        The size of a batch is bounded, so that a batch occupies the store for a few milliseconds at most.
        """
        if self.repair.active:
            return []
        # Two lanes share the waiting calls, so that the store works on one half while the other is being sent.
        ops_max = min(_BATCH_OPS, max(_SECOND_LANE_FROM, -(-len(self._queues) // self._lanes)))
        return self._queues.take(ops_max, _BATCH_WINDOWS)

    def _encode(self, batch: list[PendingCall], header: Header) -> EncodedBatch:
        ops = [call.request for call in batch]
        return encode_batch(self.state.keys, header, ops, use_fast_path=self.state.use_fast_path())

    def _send_at_once(self, batch: list[PendingCall]) -> bool:
        """Send a batch without a task if a connection is ready; return whether the batch was sent.

        :meth:`_on_reply` receives the reply.
        """
        deadline_s = min([call.deadline_s for call in batch])
        assert self._loop is not None
        if not self.store.ready or deadline_s <= self._loop.time():
            return False
        header = self.state.header
        encoded = self._encode(batch, header)
        on_reply, on_resend = partial(self._on_reply, batch, header), partial(self._on_resend, batch)
        return self.store.begin(*encoded, deadline_s, on_reply, on_resend)

    def _on_reply(self, batch: list[PendingCall], header: Header, reply: Any) -> None:
        if isinstance(reply, Exception):
            if self._closed:
                self._fail_lane(batch, reply)
            else:
                self._spawn(self._exchange(batch, reply), batch[0])
            return
        try:
            self.deliver(batch, header, reply)
        except BaseException as error:
            self._fail_lane(batch, error)
            raise
        self._next_batch()

    async def _exchange(self, batch: list[PendingCall], failed: Exception | None) -> None:
        """Make one round trip with a batch, then start the next batch of the lane.

        Args:
            failed: the error of the first attempt; ``None`` if the batch was not sent yet.
        """
        try:
            await self._attempt(batch, failed)
        except BaseException as error:
            self._fail_lane(batch, error)
            raise
        self._next_batch()

    async def _attempt(self, batch: list[PendingCall], failed: Exception | None) -> None:
        store = self.store
        deadline_s = min(call.deadline_s for call in batch)
        assert self._loop is not None
        if failed is None and self.repair.active:
            self._queues.put_back(batch)
            return
        if failed is None and deadline_s <= self._loop.time():
            if not (batch := self._expire(batch, self._last_error, in_turn=True)):
                return
            deadline_s = min(call.deadline_s for call in batch)
        header = self.state.header
        encoded = self._encode(batch, header)
        try:
            if isinstance(failed, TimeoutError):
                raise failed
            if failed is not None and not isinstance(failure := store.failure(failed), NoScript):
                raise failure
            await store.open()
            reply = await store.apply(*encoded, deadline_s, partial(self._on_resend, batch))
        except (Transient, TimeoutError) as error:
            await self._retry(batch, error)
        except (StoreUnavailable, OSError) as error:
            for call in batch:  # an earlier attempt may have been executed, and its reply lost
                lost = call.was_resent and isinstance(error, StoreError)
                self._throw(call, StoreError(str(error), ambiguous=True) if lost else error)
        else:
            self.deliver(batch, header, reply)

    def deliver(self, batch: list[PendingCall], header: Header, reply: Any) -> None:
        """Deliver each reply of a batch to its call."""
        self._backoff_s, self._last_error = 0.0, None
        head, replies = parse_batch(reply, [call.request for call in batch])
        self.state.absorb(head, header)
        if head.data_loss:  # the store has executed nothing: a repair comes first
            self._queues.put_back(batch)
            self.repair.begin()
            return
        if head.due and not self._retiring:
            self._retire(head.due)
        for call, each in zip(batch, replies, strict=True):
            if isinstance(each, (Recovering, MissingWindow)):
                self._delay(call, each, head)
            elif isinstance(each, NotFast):
                self.state.fast_path_missed()
                call.request.uses_fast_path = False
                self._enqueue(call, call.request)
            else:
                self._resume(call, (each, head))

    def _retire(self, due: tuple[str, ...]) -> None:
        """Retire holds in the background: make them unconfirmed, because their deadline has passed.

        If that fails, the next reply of the store lists the holds again.

        Args:
            due: the ids of the holds.
        """
        self._retiring = True
        self.submit(self.context.retire(due), "retire").add_done_callback(self._retired)

    def _retired(self, future: asyncio.Future[None]) -> None:
        self._retiring = False
        _ = future.cancelled() or future.exception()

    async def _retry(self, batch: list[PendingCall], error: Exception) -> None:
        """Queue the calls of a failed batch again if they have time left, then pause.

        To send a call twice is harmless, because the id of its hold stays the same.
        """
        self._backoff_s = min(_BACKOFF_MAX_S, self._backoff_s * 2 or _BACKOFF_FIRST_S)
        if isinstance(error, Transient) or self._last_error is None:  # a timeout explains less than an earlier error
            self._last_error = error
        if not isinstance(error, Transient) or error.sent:
            self._on_resend(batch)
        self._queues.put_back(self._expire(batch, self._last_error))
        if self.breaker.open:
            self._refuse_queued()
        if self._queues:
            assert self._loop is not None
            left_s = self._queues.next_deadline_s - self._loop.time()
            await asyncio.sleep(max(0.0, min(self._backoff_s, left_s)))

    # -- deadlines -----------------------------------------------------------------------------------------------------

    def _expire(self, calls: list[PendingCall], error: Exception | None, *, in_turn: bool = False) -> list[PendingCall]:
        """End the calls whose deadline has passed; return the others.

        If a call was not sent, and the only reason is that the event loop was blocked, the call gets a new deadline.

        Args:
            error: the last error of an attempt; ``None`` if there was none.
            in_turn: whether the calls are about to be sent. If not, a deadline that passed less than :data:`LATE_S` ago
                does not show that the event loop was blocked.
        """
        assert self._loop is not None
        now_s = self._loop.time()
        left, expired = list[PendingCall](), list[PendingCall]()
        unhindered = error is None and not self.repair.active
        for call in calls:
            if call.deadline_s - now_s > _TIME_LEFT_MIN_S:
                left.append(call)
                continue
            unsent = unhindered and not call.was_resent and (in_turn or now_s - call.deadline_s > LATE_S)
            (left if self._renew(call, unsent) else expired).append(call)
        fair = [call.started_s for call in expired if not self._was_stalled(call)]
        if fair and error is not None:
            self.breaker.deadline_missed(max(fair), error)
        waited = _UNDER_REPAIR if self.repair.active else ""
        for call in expired:
            cause, why = (None, _LOOP_BLOCKED) if self._was_stalled(call) else (error, waited)
            ambiguous = call.was_resent
            self._throw(call, unavailable(cause, self.store.shown, self.timeout_s, ambiguous=ambiguous, waited=why))
        return left

    @property
    def _stalled_max_s(self) -> float:
        """The ``stalled_max_s`` of a call whose deadline is set now. (The timeout may change before the deadline.)"""
        return self.deadlines.stalled_s + self.timeout_s / 2

    def _was_stalled(self, call: PendingCall) -> bool:
        """Whether the event loop was blocked for at least half of a call's time.

        In that case a missing connection or reply does not indicate that the store is down.
        """
        return self.deadlines.stalled_s >= call.stalled_max_s

    def _renew(self, call: PendingCall, unsent: bool = False) -> bool:
        """Set a new deadline if the event loop was blocked; return whether the deadline was set.

        The deadline of a call is renewed at most once.

        Args:
            unsent: whether the call was not sent, and the only reason is that the event loop was blocked.
        """
        assert self._loop is not None
        if call.was_renewed or not (unsent or self._was_stalled(call)):
            return False
        call.was_renewed, call.deadline_s = True, self._loop.time() + self.timeout_s
        call.stalled_max_s = self._stalled_max_s
        return True

    def _refuse_queued(self) -> None:
        """End the waiting calls, because the store does not reply."""
        for call in self._queues.clear():
            self._throw(call, self.breaker.refusal(ambiguous=call.was_resent))

    def _expire_waiting(self) -> None:
        """End the waiting calls whose deadline has passed; if the breaker is open, end all waiting calls."""
        self._queues.put_back(self._expire(self._queues.clear(), self._last_error))
        if self.breaker.open:
            self._refuse_queued()

    def _expire_queued(self) -> float:
        self._expire_waiting()
        assert self._loop is not None
        # A batch in flight ends by its own deadline.
        last_s = self._loop.time() + self.timeout_s if self._lanes or self.background.tasks else math.inf
        return min([call.deadline_s for call in self._queues], default=last_s)

    # -- reads ---------------------------------------------------------------------------------------------------------

    async def _read(self, call: PendingCall, command: Read | Command) -> None:
        """Send a read or a command repeatedly until the store replies or the deadline of the call has passed."""
        assert self._loop is not None
        pause_s: float = _BACKOFF_FIRST_S
        error: Exception | None = None
        if call.deadline_s <= self._loop.time():  # the event loop was blocked
            call.deadline_s = self._loop.time() + self.timeout_s
        while True:
            try:
                self._resume(call, await self._reply_to(command, call.deadline_s))
                return
            except DataLossPending as pending:
                error = pending
            except (Transient, TimeoutError) as passing:
                error = passing if isinstance(passing, Transient) or not isinstance(error, Transient) else error
            except (StoreUnavailable, OSError) as refused:
                self._throw(call, refused)
                return
            except BaseException as failure:
                self._fail(call, failure)
                raise
            if self.breaker.open:
                self._throw(call, self.breaker.refusal(ambiguous=False))
                return
            if call.deadline_s - self._loop.time() <= pause_s and not self._renew(call):
                if isinstance(error, DataLossPending):
                    self._throw(call, StoreUnavailable(str(error), reached=True))
                    return
                stalled = self._was_stalled(call)
                if not stalled:
                    self.breaker.deadline_missed(call.started_s, error)
                cause = None if stalled else error
                self._throw(call, unavailable(cause, self.store.shown, self.timeout_s, waited=_LOOP_BLOCKED))
                return
            await asyncio.sleep(pause_s)
            pause_s = min(_BACKOFF_MAX_S, pause_s * 2)

    async def _reply_to(self, command: Read | Command, deadline_s: float) -> Any:
        """Send a read or a command, and return the reply.

        Raises:
            DataLossPending: the store has lost data that is not repaired, so the reply to a read cannot be used.
        """
        if not isinstance(command, Read):
            return await self._run(command, deadline_s)
        if self.repair.active:
            raise self.background.data_loss_pending()
        header = self.state.header
        answer = self.background.checked(command, header, await self._run(command, deadline_s))
        if self.repair.active:  # a repair has begun meanwhile
            raise self.background.data_loss_pending()
        return answer

    async def _run(self, command: Read | Command, deadline_s: float) -> Any:
        await self.store.open()
        reply = await self.store.run(command, deadline_s)
        self.breaker.last_reply_s = time.monotonic()
        return reply

    def _on_resend(self, batch: list[PendingCall]) -> None:
        """Mark the calls of a batch as resent, because the first attempt may have been executed."""
        for call in batch:
            call.was_resent = True
            call.unacknowledged = not self.state.journal.has_settled(call.request.hold_id)
            call.request.mark_resent()

    # -- a store that was unreachable, or lost data --------------------------------------------------------------------

    def _on_close(self, data_loss: bool) -> None:
        """Send the outbox, because the breaker has closed.

        Args:
            data_loss: whether the store has lost writes. If so, a repair is started first.
        """
        if data_loss:
            self.repair.begin()
        self.replayer.hasten()

    def _check_policy(self) -> None:
        checking = contextvars.Context().run(self.submit, warn_of_eviction(self.context, self.store.shown), "check")
        checking.add_done_callback(lambda future: future.cancelled() or future.exception())

    def _repair_continues(self, error: Exception | None) -> None:
        """End the calls whose deadline has passed while a repair runs.

        Args:
            error: the last failure of the repair; ``None`` if the repair has not failed.
        """
        self._last_error = error
        self._expire_waiting()

    def _repaired(self) -> None:
        if not self._closed:
            self.open_lane()
            self.replayer.hasten()

    def _delay(self, call: PendingCall, reply: Recovering | MissingWindow, head: BatchHead) -> None:
        """Delay a call that the store cannot execute yet, then send the call again.

        If too little time is left for that, the call is refused at its deadline. The outage policy is not applied,
        because the store was reached.
        """
        assert self._loop is not None
        if isinstance(reply, MissingWindow):
            if call.request.is_retire:  # other calls may wait for this one, and the next call retries
                self._resume(call, (reply, head))
                return
            wait_s = _MISSING_WINDOW_S
            why = (
                f"window {reply.window} exists in the metadata but its key is missing: slot migration in progress, or "
                "the key was deleted"
            )
        else:
            wait_s = (reply.until_ms - head.now_us // 1000) / 1000
            why = f"{_UNDER_REPAIR}; try again in {wait_s:.1f} s"
        left_s = call.deadline_s - self._loop.time()
        if wait_s > left_s - min(_REPLY_S, self.timeout_s / 4):
            ambiguous = call.was_resent and isinstance(reply, MissingWindow)  # otherwise no attempt was granted
            refusal = StoreUnavailable(f"store at {self.store.shown}: {why}", ambiguous=ambiguous, reached=True)
            timer = self._loop.call_later(max(0.0, left_s - _TIME_LEFT_MIN_S), self._end_delay, call, refusal)
        else:
            timer = self._loop.call_later(wait_s, self._end_delay, call, None)
        self.delayed[call] = timer

    def _end_delay(self, call: PendingCall, refusal: StoreUnavailable | None) -> None:
        del self.delayed[call]
        if refusal is None:
            self._enqueue(call, call.request)
        else:
            self._throw(call, refusal)

    # -- the end -------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Finish the calls in flight, send the outbox, and close the store.

        Calls in flight have twice the timeout to finish; calls that still wait after this time are refused. Delayed
        calls are refused at once. The outbox is sent only if the breaker is closed.
        """
        if self._loop is None:
            await self.store.close()
            return
        self.repair.stop()
        self.breaker.stop()
        closing = StoreUnavailable(f"store at {self.store.shown}: the limiter was closed", reached=True)
        self._refuse_delayed(closing)
        ends_s, tasks = time.monotonic() + 2 * self.timeout_s, self.background.tasks
        while (tasks or self._lanes) and time.monotonic() < ends_s:
            self._idle = self._loop.create_future()
            waited = {*tasks, self._idle} if self._lanes else tasks
            await asyncio.wait(waited, timeout=max(0.0, ends_s - time.monotonic()))
        self._closed = True
        self.deadlines.stop()
        self.replayer.end()
        outbox = self.context.outbox
        try:
            if len(outbox) and not self.breaker.open:
                await self.replayer.drain()
        finally:
            await self.background.end()
            self._refuse_rest(closing)
            await self.store.close()
        if outbox.deferred:
            logger.error("closed with %d deferred settlements that were never sent", outbox.deferred)
        if outbox.in_doubt:
            logger.error("closed with %d requests of unknown outcome", outbox.in_doubt)

    def _refuse_delayed(self, closing: StoreUnavailable) -> None:
        while self.delayed:
            call, timer = self.delayed.popitem()
            timer.cancel()
            self._throw(call, closing)

    def _refuse_rest(self, closing: StoreUnavailable) -> None:
        """Refuse the calls that still wait, because the limiter sends nothing any more."""
        self.breaker.stop()
        while self.delayed or self._queues:
            self._refuse_delayed(closing)
            for call in self._queues.clear():
                self._throw(call, StoreUnavailable(str(closing), ambiguous=call.was_resent, reached=True))


def _log_failed_release(future: asyncio.Future[Any]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        logger.warning("release of an abandoned hold failed; the hold will expire: %s", error)
