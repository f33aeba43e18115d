"""Group commit: while one round trip is under way, further calls of the event loop queue up, and leave together.

No timer is involved: an idle limiter sends at once. The coalescer, not a caller, owns what is under way, so that a
cancelled caller affects no other. It owns the outcome, too, until the caller has received it (:meth:`Coalescer.run`): a
request that was not sent leaves nothing, a grant that was not received is released, a settlement or a report that was
begun completes (P14).
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

from ktrdr_budget.engine.batching import fork as forks
from ktrdr_budget.engine.batching.background import Background, Unrepaired
from ktrdr_budget.engine.batching.breaker import Breaker
from ktrdr_budget.engine.batching.call import Call, Observation, Observer
from ktrdr_budget.engine.batching.deadlines import LATE_S, Deadlines
from ktrdr_budget.engine.batching.loss_repair import Recovery
from ktrdr_budget.engine.batching.queues import Queues
from ktrdr_budget.engine.batching.replay import Backlog
from ktrdr_budget.engine.calls.flows import Core
from ktrdr_budget.engine.calls.reads import Flow
from ktrdr_budget.engine.calls.results import told_amounts
from ktrdr_budget.engine.protocol import Command, Head, Header, Op, Read, encode_batch, parse_batch
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.engine.transport.store import NoScript, Store, Transient, unavailable
from ktrdr_budget.errors import BudgetError, StoreError, StoreUnavailable
from ktrdr_budget.models import Settlement

__all__ = ["Coalescer", "Observation", "Observer"]

logger = logging.getLogger("ktrdr_budget")

_LANES = 2
_SECOND_LANE_FROM = 16
_BATCH_OPS = 128
_BATCH_WINDOWS = 768
_BACKOFF_FIRST_S = 0.01
_BACKOFF_MAX_S = 0.2
_MISSING_S = 0.05
"""How long a call waits for a window that is not here, before it asks again."""
_REPAIRED = "it lost writes and is being repaired"
_STALLED = "the event loop stood still"
_LEFT_S = 0.002
"""A call with less time left than this has none."""
_ANSWER_S = 0.1
"""What has waited for the store to be ready is sent again only with so much time left for its answer."""


class Coalescer:
    """Drives flows over one store, on one event loop."""

    def __init__(self, core: Core, store: Store, timeout: float, observer: Observer | None) -> None:
        self._core = core
        self._session = core.session
        self._store = store
        self._timeout = timeout
        self._observer = observer
        self._background = Background(core.session, store, timeout)
        self.breaker = Breaker(self._background, self._store_answers)
        self.recovery = Recovery(
            self._background,
            self.breaker,
            watch_policy=self._watch_policy,
            waited=self._repair_goes_on,
            resume=self._store_is_repaired,
        )
        self._backlog = Backlog(core, self._background, self.breaker, self.recovery, self._settled_late)
        core.session.on_suspicion = self.recovery.suspect
        core.session.on_late = self.recovery.begin_again
        self._reset()
        forks.watch(self)

    def _reset(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        """In which it ran at the first call."""
        self._queues = Queues()
        self._parked: dict[Call, asyncio.TimerHandle] = {}
        """What asks for money while replicas tell the store what it has lost, or touches a window that is not here."""
        self._deadlines = Deadlines(self._look)
        self._lanes = 0
        self._idle: asyncio.Future[None] | None = None
        """Done when no lane is left, once somebody has asked for it."""
        self._backoff_s = 0.0
        self._trouble: Exception | None = None
        self._retiring = False
        self._closed = False

    def after_fork(self) -> None:
        """In the child: new connections, an empty queue, a new replica; the parent keeps what was under way."""
        forks.keep((self._loop, self._background.tasks, self._store.forget()))
        self._core.deferred.clear()
        self._core.handed.clear()
        self._core.deferred_doubts.clear()
        self._core.unresolved.clear()
        for part in (self._background, self.breaker, self.recovery, self._backlog):
            part.reset()
        self._reset()
        self._session.renew()

    # -- calls ---------------------------------------------------------------------------------------------------------

    def bind(self) -> asyncio.AbstractEventLoop:
        """The event loop that this belongs to, from its first use on."""
        loop = self._loop
        # Of a thread, one loop runs at a time. (To ask asyncio is a system call, up to Python 3.11.)
        if loop is not None and threading.get_ident() == self._thread and loop.is_running() and not self._closed:
            return loop
        running = asyncio.get_running_loop()
        if self._closed:
            raise RuntimeError("this limiter is closed")
        if self._loop is None:
            self._loop, self._thread = running, threading.get_ident()
            self._background.bind(running)
            self.recovery.start()
        elif self._loop is not running:
            raise RuntimeError("this limiter belongs to another event loop; make one for each")
        return running

    def begin(self, flow: Flow[Any], operation: str, future: Any = None, *, kept: bool = False) -> Call:
        """Starts a flow; its result comes by the call's future (of asyncio, or of a waiting thread)."""
        loop = self.bind()
        future = loop.create_future() if future is None else future
        # An event loop may know the time to a millisecond only, too coarse for what a hook is told.
        deadline, stalled_max_s = loop.time() + self._timeout, self._stalled_max_s
        call = Call(flow, future, operation, time.monotonic(), deadline, stalled_max_s, kept=kept)
        self._resume(call, None)
        return call

    def submit(self, flow: Flow[Any], operation: str) -> Any:
        """Start a flow for a part of the limiter, which takes the result from the future by a callback."""
        return self.begin(flow, operation).future

    async def run(self, flow: Flow[Any], operation: str, *, kept: bool = False) -> Any:
        """Start a flow for a caller, and await its result; what the caller does not receive stays the limiter's."""
        call = self.begin(flow, operation, kept=kept)
        try:
            return await call.future
        except BaseException as error:
            self.leave(call, error)
            raise

    def leave(self, call: Call, error: BaseException) -> None:
        """The caller stops waiting with this error: unless it is the call's own, the outcome is the limiter's.

        A caller may be cancelled in the turn of the event loop in which the outcome arrives, and never receive it.
        """
        future = call.future
        if future.cancel() or future.cancelled():
            return  # the call has ended without its caller, or will
        failure = future.exception()
        if failure is not error:
            self._disown(call, future.result() if failure is None else None, failure)

    def _resume(self, call: Call, answer: Any) -> None:
        try:
            request = call.flow.send(answer)
        except StopIteration as stop:
            self._finish(call, stop.value, None)
        except BaseException as error:
            self._finish(call, None, error)
        else:
            self._enqueue(call, request)

    def _throw(self, call: Call, error: Exception) -> None:
        try:
            request = call.flow.throw(error)
        except StopIteration as stop:
            self._finish(call, stop.value, None)
        except BaseException as raised:
            self._finish(call, None, raised)
        else:
            self._enqueue(call, request)

    def _finish(self, call: Call, result: Any, error: BaseException | None) -> None:
        future = call.future
        gone = future.cancelled()
        if not gone:
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        if gone or (call.kept and error is not None):
            self._disown(call, result, error)
        elif isinstance(error, StoreUnavailable) and error.ambiguous and isinstance(call.request, Op):
            self._backlog.doubt(call.request)
        known = Settlement if gone else (HoldBase, Settlement)
        first_reply_lost = call.unacknowledged
        if error is None and self._core.unresolved.count and isinstance(result, known):
            first_reply_lost |= self._core.unresolved.retried(result.id, settled=isinstance(result, Settlement))
        if self._observer is not None:
            if first_reply_lost and isinstance(result, Settlement):
                result = replace(result, replayed=False)  # no observer has seen it yet
            seconds = time.monotonic() - call.started
            self._observe(Observation(call.operation, result, error, seconds, call.context))
        if self._core.deferred or self._core.unresolved.count:
            self._backlog.schedule()

    def _disown(self, call: Call, result: Any, error: BaseException | None) -> None:
        """Take over the outcome of a call whose caller is gone: release the grant, keep sending the settlement."""
        if error is None:
            call.context.copy().run(self._give_back, result)
        elif isinstance(error, StoreUnavailable):
            self._backlog.take_over(call.request, sent=error.ambiguous)
            self._backlog.schedule()

    def _give_back(self, result: Any) -> None:
        """A grant that was not received is released; a replay belongs to the caller that was granted it first."""
        if not isinstance(result, HoldBase) or result.replayed or self._closed:
            return
        if result.id in self._core.unguarded and result.state == "open":
            # The store may be granting it now, or later.
            self._backlog.take_over(self._core.give_up(result), sent=True)
            self._backlog.schedule()
        else:
            self.submit(self._core.give_back(result), "release").add_done_callback(_forget)

    def _settled_late(self, op: Op, line: str) -> None:
        """Observe a commit or a record that was acknowledged after its call had ended."""
        if self._observer is None:
            return
        _, flags, told = line.split(" ")[:3]
        overrun = "o" in flags
        result = Settlement(
            id=op.id,
            state="recorded" if op.letter == "N" else "committed",
            amounts=told_amounts(op.parts, told),
            overrun=overrun,
            overruns=(op.parts[0][0].budget,) if overrun and len(op.parts) == 1 else (),  # else it is not known which
            late="l" in flags,
        )
        self._observe(Observation("resolve", result, None, 0.0, contextvars.Context()))

    def _observe(self, observation: Observation) -> None:
        assert self._observer is not None
        try:
            self._observer(observation)
        except Exception:
            logger.exception("a hook failed; the budget is not affected")

    # -- queue and lanes -----------------------------------------------------------------------------------------------

    def _enqueue(self, call: Call, request: Op | Read | Command) -> None:
        call.request = request
        assert self._loop is not None
        if self.breaker.open:
            self.breaker.consult(partial(self._consulted, call))
            return
        if call.deadline < self._deadlines.next_s:
            self._deadlines.watch(self._loop, call.deadline)
        if not isinstance(request, Op):
            self._spawn(self._command(call, request), call)
            return
        self._queues.put(call)
        lanes = self._lanes
        if lanes == 0 or (lanes < _LANES and len(self._queues) >= _SECOND_LANE_FROM):
            self._lanes += 1
            self._loop.call_soon(self._next)  # what else this turn of the event loop asks for travels along

    def _consulted(self, call: Call) -> None:
        """The breaker knows more, or knows that it will not soon."""
        if self.breaker.open:
            self._throw(call, self.breaker.refusal(ambiguous=call.sent))
        else:
            self._enqueue(call, call.request)

    def _spawn(self, work: Any, caller: Call) -> None:
        """Starts a task on behalf of a caller."""
        # A copy: the work of another attempt for the same call may be in its context still.
        self._background.spawn(work, caller.context.copy())

    def _next(self) -> None:
        """A lane's next step: it sends a batch, at once if a connection is ready and else by a task; or it ends."""
        if not self._lanes:
            return  # this process is a fork of the one that opened the lane
        batch: list[Call] = []
        try:
            batch = self._take()
            if batch and not self._begin(batch):
                self._spawn(self._exchange(batch, None), batch[0])
        except BaseException as error:
            self._break(batch, error)
            raise
        if not batch:
            self._end_lane()

    def _end_lane(self) -> None:
        self._lanes -= 1
        if not self._lanes and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _break(self, batch: list[Call], failure: BaseException) -> None:
        """Ends a lane that has failed, and the calls of its batch; leaves the rest to another."""
        for call in batch:
            self._fail(call, failure)
        self._end_lane()
        self._open_lane()

    def _open_lane(self) -> None:
        if not self._lanes and not self._closed and self._queues:
            assert self._loop is not None
            self._lanes += 1
            self._loop.call_soon(self._next)

    def _fail(self, call: Call, failure: BaseException) -> None:
        """Ends a call that a bug, or the end of the event loop, has stopped."""
        if not call.future.done():
            call.future.set_exception(BudgetError(f"unexpected failure: {type(failure).__name__}: {failure}"))

    def _take(self) -> list[Call]:
        """The next batch, bounded so that the store is never busy with it for more than a few milliseconds."""
        if self.recovery.active:
            return []
        # Two lanes share what waits, so that the store works on one half while the other is being sent.
        ops_max = min(_BATCH_OPS, max(_SECOND_LANE_FROM, -(-len(self._queues) // self._lanes)))
        return self._queues.take(ops_max, _BATCH_WINDOWS)

    def _begin(self, batch: list[Call]) -> bool:
        """One round trip without a task, if a connection is ready; the answer goes to :meth:`_told`."""
        session, store = self._session, self._store
        deadline = min([call.deadline for call in batch])
        assert self._loop is not None
        if not store.ready or deadline <= self._loop.time():
            return False
        header = session.header
        ops = [call.request for call in batch]
        name, keys, args = encode_batch(session.keys, header, ops, simple=session.goes_simply())
        told, resent = partial(self._told, batch, header), partial(self._resend, batch)
        return store.begin(name, keys, args, deadline, told, resent)

    def _told(self, batch: list[Call], header: Header, answer: Any) -> None:
        if isinstance(answer, Exception):
            if self._closed:
                self._break(batch, answer)
            else:
                self._spawn(self._exchange(batch, answer), batch[0])
            return
        try:
            self._answered(batch, header, answer)
        except BaseException as error:
            self._break(batch, error)
            raise
        self._next()

    async def _exchange(self, batch: list[Call], failed: Exception | None) -> None:
        """One round trip, of a batch that has not been sent, or whose first attempt ``failed``."""
        try:
            await self._attempt(batch, failed)
        except BaseException as error:
            self._break(batch, error)
            raise
        self._next()

    async def _attempt(self, batch: list[Call], failed: Exception | None) -> None:
        session, store = self._session, self._store
        deadline = min(call.deadline for call in batch)
        assert self._loop is not None
        if failed is None and self.recovery.active:
            self._queues.put_back(batch)
            return
        if failed is None and deadline <= self._loop.time():
            if not (batch := self._expire(batch, self._trouble, in_turn=True)):
                return
            deadline = min(call.deadline for call in batch)
        header = session.header
        ops = [call.request for call in batch]
        name, keys, args = encode_batch(session.keys, header, ops, simple=session.goes_simply())
        try:
            if isinstance(failed, TimeoutError):
                raise failed
            if failed is not None and not isinstance(failure := store.failure(failed), NoScript):
                raise failure
            await store.open()
            answer = await store.apply(name, keys, args, deadline, partial(self._resend, batch))
        except (Transient, TimeoutError) as error:
            await self._again(batch, error)
        except (StoreUnavailable, OSError) as error:
            for call in batch:  # what is refused now, may have been executed by an attempt whose answer was lost
                lost = call.sent and isinstance(error, StoreError)
                self._throw(call, StoreError(str(error), ambiguous=True) if lost else error)
        else:
            self._answered(batch, header, answer)

    def _answered(self, batch: list[Call], header: Header, answer: Any) -> None:
        self._backoff_s, self._trouble = 0.0, None
        head, lines = parse_batch(answer)
        self._session.absorb(head, header)
        if head.went_back:  # it did nothing else: first it is told what it has lost
            self._queues.put_back(batch)
            self.recovery.begin()
            return
        if head.due and not self._retiring:
            self._retire(head.due)
        for call, line in zip(batch, lines, strict=True):
            if line[0] in "lt":
                self._park(call, line, head)
            elif line == "s":
                self._session.was_not_simple()
                call.request.brief = None
                self._enqueue(call, call.request)
            else:
                self._resume(call, (line, head))

    def _retire(self, due: tuple[str, ...]) -> None:
        """Makes due holds unconfirmed, on the way; whoever fails at it leaves it to the next."""
        self._retiring = True
        self.submit(self._core.retire(due), "retire").add_done_callback(self._retired)

    def _retired(self, future: asyncio.Future[None]) -> None:
        self._retiring = False
        _ = future.cancelled() or future.exception()

    async def _again(self, batch: list[Call], error: Exception) -> None:
        """Calls that have time left are sent again: the same id makes that harmless."""
        self._backoff_s = min(_BACKOFF_MAX_S, self._backoff_s * 2 or _BACKOFF_FIRST_S)
        if isinstance(error, Transient) or self._trouble is None:  # else it says more than that time was over
            self._trouble = error
        if not isinstance(error, Transient) or error.sent:
            self._resend(batch)
        self._queues.put_back(self._expire(batch, self._trouble))
        if self.breaker.open:
            self._refuse_waiting()
        if self._queues:
            assert self._loop is not None
            await asyncio.sleep(max(0.0, min(self._backoff_s, self._queues.next_s - self._loop.time())))

    def _expire(self, calls: list[Call], error: Exception | None, *, in_turn: bool = False) -> list[Call]:
        """Ends the calls whose deadline has come; returns the others.

        A call that was never sent, and that nothing else is known to keep from being sent, has its time once more.

        Args:
            in_turn: they would be sent now.
        """
        assert self._loop is not None
        now = self._loop.time()
        left, paid = list[Call](), list[Call]()
        unhindered = error is None and not self.recovery.active
        for call in calls:
            if call.deadline - now > _LEFT_S:
                left.append(call)
                continue
            unsent = unhindered and not call.sent and (in_turn or now - call.deadline > LATE_S)
            (left if self._renew(call, unsent) else paid).append(call)
        fair = [call.started for call in paid if not self._stood_still(call)]
        if fair and error is not None:
            self.breaker.paid(max(fair), error)
        waited = _REPAIRED if self.recovery.active else ""
        for call in paid:
            cause, why = (None, _STALLED) if self._stood_still(call) else (error, waited)
            self._throw(call, unavailable(cause, self._store.shown, self._timeout, ambiguous=call.sent, waited=why))
        return left

    @property
    def _stalled_max_s(self) -> float:
        return self._deadlines.stalled_s + self._timeout / 2

    def _stood_still(self, call: Call) -> bool:
        """Whether the event loop stood still for half of a call's time, or more: a connection that was not made, or a
        reply that was not read, says nothing of the store then."""
        return self._deadlines.stalled_s >= call.stalled_max_s

    def _renew(self, call: Call, unsent: bool = False) -> bool:
        """Give a call its time once more, but once only."""
        assert self._loop is not None
        if call.delayed or not (unsent or self._stood_still(call)):
            return False
        call.delayed, call.deadline = True, self._loop.time() + self._timeout
        call.stalled_max_s = self._stalled_max_s
        return True

    def _refuse_waiting(self) -> None:
        """Ends what waits for a store that does not answer."""
        for call in self._queues.clear():
            self._throw(call, self.breaker.refusal(ambiguous=call.sent))

    def _repair_goes_on(self, trouble: Exception | None) -> None:
        """Nothing is sent meanwhile; with a trouble, the store does not answer."""
        self._trouble = trouble
        self._expire_waiting()

    def _expire_waiting(self) -> None:
        """Ends calls whose deadline comes while nothing is sent."""
        self._queues.put_back(self._expire(self._queues.clear(), self._trouble))
        if self.breaker.open:
            self._refuse_waiting()

    def _look(self) -> float:
        self._expire_waiting()
        assert self._loop is not None
        # What is under way ends in time by itself.
        last_s = self._loop.time() + self._timeout if self._lanes or self._background.tasks else math.inf
        return min([call.deadline for call in self._queues], default=last_s)

    async def _command(self, call: Call, command: Read | Command) -> None:
        """A read, tried until its deadline."""
        assert self._loop is not None
        pause: float = _BACKOFF_FIRST_S
        error: Exception | None = None
        if call.deadline <= self._loop.time():  # the event loop stood still
            call.deadline = self._loop.time() + self._timeout
        while True:
            try:
                self._resume(call, await self._answer(command, call.deadline))
                return
            except Unrepaired as lost:
                error = lost
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
            if call.deadline - self._loop.time() <= pause and not self._renew(call):
                if isinstance(error, Unrepaired):
                    self._throw(call, StoreUnavailable(str(error), reached=True))
                    return
                stalled = self._stood_still(call)
                if not stalled:
                    self.breaker.paid(call.started, error)
                cause = None if stalled else error
                self._throw(call, unavailable(cause, self._store.shown, self._timeout, waited=_STALLED))
                return
            await asyncio.sleep(pause)
            pause = min(_BACKOFF_MAX_S, pause * 2)

    async def _answer(self, command: Read | Command, deadline: float) -> Any:
        """The reply, once; that of a read only if the store has lost nothing, or this replica has repaired it."""
        if not isinstance(command, Read):
            return await self._run(command, deadline)
        if self.recovery.active:
            raise self._background.unrepaired()
        header = self._session.header
        answer = self._background.checked(command, header, await self._run(command, deadline))
        if self.recovery.active:  # a repair has begun meanwhile
            raise self._background.unrepaired()
        return answer

    async def _run(self, command: Read | Command, deadline: float) -> Any:
        await self._store.open()
        answer = await self._store.run(command, deadline)
        self.breaker.heard_s = time.monotonic()
        return answer

    def _resend(self, batch: list[Call]) -> None:
        """Mark calls whose request is sent a second time: an attempt whose reply is lost may have been executed."""
        for call in batch:
            call.sent = True
            call.unacknowledged = not self._session.memory.has_settled(call.request.id)
            call.request.again()

    # -- a store that was away, or went back in time -------------------------------------------------------------------

    def _store_answers(self, went_back: bool) -> None:
        """The breaker has closed."""
        if went_back:
            self.recovery.begin()
        self._backlog.hasten()

    def _watch_policy(self) -> None:
        reading = contextvars.Context().run(self.submit, self._core.watch_policy(), "check")
        reading.add_done_callback(lambda future: future.cancelled() or future.exception())

    def _store_is_repaired(self) -> None:
        if not self._closed:
            if self._core.prepaid is not None:
                self._core.prepaid.tell_left()
            self._open_lane()
            self._backlog.hasten()

    def _park(self, call: Call, line: str, head: Head) -> None:
        """Wait for a store that answers "not now": to what asks for money while it is repaired, and to what touches a
        window that is not here. At the deadline that is denied, whatever the policy, for the store is there."""
        assert self._loop is not None
        if line[0] == "t":
            if call.request.letter == "X":  # a due hold, which others may wait for: left to whoever meets it next
                self._resume(call, (line, head))
                return
            wait_s = _MISSING_S
            why = f"the window {line[2:]} was begun and is not here: its slot is half moved, or it was deleted"
        else:
            wait_s = (int(line[2:]) - head.now_us // 1000) / 1000
            why = f"{_REPAIRED}; try again in {wait_s:.1f} s"
        left_s = call.deadline - self._loop.time()
        if wait_s > left_s - min(_ANSWER_S, self._timeout / 4):
            ambiguous = call.sent and line[0] == "t"  # else it was granted nowhere
            refusal = StoreUnavailable(f"store at {self._store.shown}: {why}", ambiguous=ambiguous, reached=True)
            self._parked[call] = self._loop.call_later(max(0.0, left_s - _LEFT_S), self._unpark, call, refusal)
        else:
            self._parked[call] = self._loop.call_later(wait_s, self._unpark, call, None)

    def _unpark(self, call: Call, refusal: StoreUnavailable | None) -> None:
        del self._parked[call]
        if refusal is None:
            self._enqueue(call, call.request)
        else:
            self._throw(call, refusal)

    # -- the end -------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Lets what was begun finish, within the deadline, and closes the store."""
        if self._loop is None:
            await self._store.close()
            return
        self.recovery.stop()
        self.breaker.stop()
        closing = StoreUnavailable(f"store at {self._store.shown}: the limiter was closed", reached=True)
        self._refuse_parked(closing)
        ends, tasks = time.monotonic() + 2 * self._timeout, self._background.tasks
        while (tasks or self._lanes) and time.monotonic() < ends:
            self._idle = self._loop.create_future()
            waited = {*tasks, self._idle} if self._lanes else tasks
            await asyncio.wait(waited, timeout=max(0.0, ends - time.monotonic()))
        self._closed = True
        self._deadlines.stop()
        self._backlog.end()
        try:
            if self._backlog and not self.breaker.open:
                await self._backlog.drain()
        finally:
            await self._background.end()
            self._refuse_rest(closing)
            await self._store.close()
        if self._core.deferred:
            logger.error("closing with %d settlements that the store was never told", len(self._core.deferred))
        if count := self._core.unresolved.count:
            logger.error("closing with %d requests whose outcome stays unknown", count)

    def _refuse_parked(self, closing: StoreUnavailable) -> None:
        while self._parked:
            call, timer = self._parked.popitem()
            timer.cancel()
            self._throw(call, closing)

    def _refuse_rest(self, closing: StoreUnavailable) -> None:
        """Whoever still waits, for nothing is sent any more, is told so."""
        self.breaker.stop()
        while self._parked or self._queues:
            self._refuse_parked(closing)
            for call in self._queues.clear():
                self._throw(call, StoreUnavailable(str(closing), ambiguous=call.sent, reached=True))


def _forget(future: asyncio.Future[Any]) -> None:
    """Takes note of a result that nobody asks for."""
    if not future.cancelled() and (error := future.exception()) is not None:
        logger.warning("an abandoned hold could not be released, it will expire: %s", error)
