"""Group commit: while one round trip is under way, further calls of the event loop queue up, and leave together.

No timer is involved: an idle limiter sends at once. The coalescer, not a caller, owns what is under way, so that a
cancelled caller affects nobody else: one that was not sent leaves nothing, a grant that nobody awaits is released, a
settlement that was begun completes (P14).
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ktrdr_budget.engine.flows import Core
from ktrdr_budget.engine.holds import HoldBase
from ktrdr_budget.engine.protocol import Command, Header, Op, Reply, encode_batch, parse_batch
from ktrdr_budget.engine.reads import Flow
from ktrdr_budget.engine.store import NoScript, Store, Transient, unavailable
from ktrdr_budget.errors import BudgetError, StoreUnavailable

__all__ = ["Coalescer", "Observation", "Observer"]

logger = logging.getLogger("ktrdr_budget")

_LANES = 2
_SECOND_LANE_FROM = 16
_BATCH_OPS = 128
_BATCH_WINDOWS = 768
_BACKOFF_FIRST_S = 0.01
_BACKOFF_MAX_S = 0.2
_DEFERRED_RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class Observation:
    """What a hook is told of each finished call."""

    operation: str
    """``reserve``, ``commit``, ``release``, ``extend``, ``grow``, ``record``, ``status``, …"""
    result: Any
    error: BaseException | None
    seconds: float
    context: contextvars.Context
    """The caller's, as it was when it called."""


Observer = Callable[[Observation], None]


class _Call:
    __slots__ = ("context", "deadline", "flow", "future", "operation", "request", "sent", "started")

    def __init__(self, flow: Flow[Any], future: Any, operation: str, started: float, deadline: float) -> None:
        self.flow = flow
        self.future = future
        self.operation = operation
        self.started = started
        self.deadline = deadline
        self.context = contextvars.copy_context()
        self.request: Any = None
        self.sent = False
        """Whether an attempt that brought no answer may have been executed all the same."""


class Coalescer:
    """Drives flows over one store, on one event loop."""

    def __init__(self, core: Core, store: Store, timeout: float, observer: Observer | None) -> None:
        self._core = core
        self._session = core.session
        self._store = store
        self._timeout = timeout
        self._observer = observer
        self._reset()
        _coalescers.add(self)

    def _reset(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._first: deque[_Call] = deque()
        """Whatever may give money back; decided before…"""
        self._then: deque[_Call] = deque()
        """…what asks for money."""
        self._lanes = 0
        self._idle: asyncio.Future[None] | None = None
        """Done when no lane is left, once somebody has asked for it."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._backoff_s = 0.0
        self._trouble: Exception | None = None
        self._retiring = False
        self._deferred_timer: asyncio.TimerHandle | None = None
        self._closed = False

    def after_fork(self) -> None:
        """In the child: new connections, an empty queue, a new replica; the parent keeps what was under way."""
        # Kept for ever: a connection that is collected takes itself out of the epoll instance, the parent's too.
        _of_the_parent.append((self._loop, self._tasks, self._store.forget()))
        self._core.deferred.clear()
        self._reset()
        self._session.renew()

    # -- calls ---------------------------------------------------------------------------------------------------------

    def bind(self) -> asyncio.AbstractEventLoop:
        """The event loop that this belongs to, from its first use on."""
        running = asyncio.get_running_loop()
        if self._closed:
            raise RuntimeError("this limiter is closed")
        if self._loop is None:
            self._loop = running
        elif self._loop is not running:
            raise RuntimeError("this limiter belongs to another event loop; make one for each")
        return running

    def submit(self, flow: Flow[Any], operation: str, future: Any = None) -> Any:
        """Starts a flow; its result comes by the future (of asyncio, or of a waiting thread)."""
        loop = self.bind()
        if future is None:
            future = loop.create_future()
        # An event loop may know the time to a millisecond only, too coarse for what a hook is told.
        call = _Call(flow, future, operation, time.monotonic(), loop.time() + self._timeout)
        self._resume(call, None)
        return future

    def _resume(self, call: _Call, answer: Any) -> None:
        try:
            request = call.flow.send(answer)
        except StopIteration as stop:
            self._finish(call, stop.value, None)
        except BaseException as error:
            self._finish(call, None, error)
        else:
            self._enqueue(call, request)

    def _throw(self, call: _Call, error: Exception) -> None:
        try:
            request = call.flow.throw(error)
        except StopIteration as stop:
            self._finish(call, stop.value, None)
        except BaseException as raised:
            self._finish(call, None, raised)
        else:
            self._enqueue(call, request)

    def _finish(self, call: _Call, result: Any, error: BaseException | None) -> None:
        future = call.future
        if call.sent and isinstance(result, HoldBase) and result.replayed:
            # Granted to this very call, by an attempt whose answer got lost?
            result.replayed = result.created_us < self._called_us(call)
        if future.cancelled():
            call.context.copy().run(self._abandoned, result)
            unknown = isinstance(error, StoreUnavailable) or (isinstance(result, HoldBase) and not result.guarded)
            if unknown and call.sent and isinstance(call.request, Op) and call.request.letter == "R":
                self._core.reclaim(call.request, self._called_us(call))
        elif error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
        if self._observer is not None:
            self._observe(call, result, error)
        if self._core.deferred and self._deferred_timer is None:
            self._retry_deferred_later()

    def _called_us(self, call: _Call) -> int:
        """When a call was made, by the store's clock."""
        return int((self._session.now_ms() - (time.monotonic() - call.started) * 1000) * 1000)

    def abandon(self, future: Any) -> None:
        """Told when whoever awaited the future has gone, whether its result is there already or not."""
        if not future.cancel() and not future.cancelled() and future.exception() is None:
            self._abandoned(future.result())

    def _abandoned(self, result: Any) -> None:
        """A grant that nobody awaits any more is released; a replay belongs to whoever was granted it first."""
        if isinstance(result, HoldBase) and result.guarded and not result.replayed:
            self.submit(self._core.give_back(result), "release").add_done_callback(_forget)

    def _observe(self, call: _Call, result: Any, error: BaseException | None) -> None:
        assert self._loop is not None and self._observer is not None
        try:
            seconds = time.monotonic() - call.started
            self._observer(Observation(call.operation, result, error, seconds, call.context))
        except Exception:
            logger.exception("a hook failed; the budget is not affected")

    # -- queue and lanes -----------------------------------------------------------------------------------------------

    def _enqueue(self, call: _Call, request: Op | Command) -> None:
        call.request = request
        if isinstance(request, Command):
            self._spawn(self._command(call, request), call)
            return
        (self._then if request.grants else self._first).append(call)
        lanes = self._lanes
        if lanes == 0 or (lanes < _LANES and len(self._first) + len(self._then) >= _SECOND_LANE_FROM):
            self._lanes += 1
            assert self._loop is not None
            self._loop.call_soon(self._next)  # what else this turn of the event loop asks for travels along

    def _spawn(self, work: Any, caller: _Call | None = None) -> None:
        """Starts a task, on behalf of a caller or of nobody: an instrumentation of the driver sees whose it is."""
        assert self._loop is not None
        # A copy: the work of another attempt for the same call may be in its context still.
        context = contextvars.Context() if caller is None else caller.context.copy()
        task = self._loop.create_task(work, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _next(self) -> None:
        """A lane's next step: it sends a batch, at once if a connection is ready and else by a task; or it ends."""
        if not self._lanes:
            return  # this process is a fork of the one that opened the lane
        batch: list[_Call] = []
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

    def _break(self, batch: list[_Call], failure: BaseException) -> None:
        """Ends a lane that has failed, and the calls of its batch; leaves the rest to another."""
        for call in batch:
            self._fail(call, failure)
        self._end_lane()
        if not self._lanes and not self._closed and (self._first or self._then):
            assert self._loop is not None
            self._lanes += 1
            self._loop.call_soon(self._next)

    def _fail(self, call: _Call, failure: BaseException) -> None:
        """Ends a call that a bug, or the end of the event loop, has stopped."""
        if not call.future.done():
            call.future.set_exception(BudgetError(f"unexpected failure: {type(failure).__name__}: {failure}"))

    def _take(self) -> list[_Call]:
        """The next batch, bounded so that the store is never busy with it for more than a few milliseconds."""
        batch: list[_Call] = []
        windows = 0
        waiting = len(self._first) + len(self._then)
        # Two lanes share what waits, so that the store works on one half while the other is being sent.
        ops_max = min(_BATCH_OPS, max(_SECOND_LANE_FROM, -(-waiting // self._lanes)))
        for queue in (self._first, self._then):
            while queue and len(batch) < ops_max and windows < _BATCH_WINDOWS:
                call = queue.popleft()
                if call.request.grants and call.future.cancelled() and not call.sent:
                    call.flow.close()  # cancelled before it was sent: leaves nothing
                    continue
                windows += len(call.request.parts)
                batch.append(call)
        return batch

    def _begin(self, batch: list[_Call]) -> bool:
        """One round trip without a task, if a connection is ready; the answer goes to :meth:`_told`."""
        session, store = self._session, self._store
        deadline = min([call.deadline for call in batch])
        assert self._loop is not None
        if not store.ready or deadline <= self._loop.time():
            return False
        header = session.header
        name, keys, args = encode_batch(session.keys, header, [call.request for call in batch])
        return store.begin(name, keys, args, deadline, partial(self._told, batch, header))

    def _told(self, batch: list[_Call], header: Header, answer: Any) -> None:
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

    async def _exchange(self, batch: list[_Call], failed: Exception | None) -> None:
        """One round trip, of a batch that has not been sent, or whose first attempt ``failed``."""
        try:
            await self._attempt(batch, failed)
        except BaseException as error:
            self._break(batch, error)
            raise
        self._next()

    async def _attempt(self, batch: list[_Call], failed: Exception | None) -> None:
        session, store = self._session, self._store
        deadline = min(call.deadline for call in batch)
        assert self._loop is not None
        if failed is None and deadline <= self._loop.time():
            # Whose time is over is told so, and sends nothing any more.
            if not (batch := self._expire(batch, self._trouble)):
                return
            deadline = min(call.deadline for call in batch)
        header = session.header
        name, keys, args = encode_batch(session.keys, header, [call.request for call in batch])
        try:
            if isinstance(failed, TimeoutError):
                raise failed
            if failed is not None and not isinstance(failure := store.failure(failed), NoScript):
                raise failure
            await store.open()
            answer = await store.apply(name, keys, args, deadline)
        except (Transient, TimeoutError) as error:
            await self._again(batch, error)
        except (StoreUnavailable, OSError) as error:
            for call in batch:
                self._throw(call, error)
        else:
            self._answered(batch, header, answer)

    def _answered(self, batch: list[_Call], header: Header, answer: Any) -> None:
        self._backoff_s, self._trouble = 0.0, None
        head, lines = parse_batch(answer)
        self._session.absorb(head, header)
        if head.due and not self._retiring:
            self._retire(head.due)
        for call, line in zip(batch, lines, strict=True):
            self._resume(call, Reply(line, head))

    def _retire(self, due: tuple[str, ...]) -> None:
        """Makes due holds unconfirmed, on the way; whoever fails at it leaves it to the next."""
        self._retiring = True
        self.submit(self._core.retire(due), "retire").add_done_callback(self._retired)

    def _retired(self, future: asyncio.Future[None]) -> None:
        self._retiring = False
        if not future.cancelled():
            future.exception()

    async def _again(self, batch: list[_Call], error: Exception) -> None:
        """Calls that have time left are sent again: the same id makes that harmless."""
        self._backoff_s = min(_BACKOFF_MAX_S, self._backoff_s * 2 or _BACKOFF_FIRST_S)
        self._trouble = error
        if not isinstance(error, Transient) or error.sent:
            for call in batch:
                call.sent = True
        for call in reversed(self._expire(batch, error)):
            (self._then if call.request.grants else self._first).appendleft(call)
        waiting = [queue[0].deadline for queue in (self._first, self._then) if queue]
        if waiting:
            assert self._loop is not None
            await asyncio.sleep(max(0.0, min(self._backoff_s, min(waiting) - self._loop.time())))

    def _expire(self, calls: list[_Call], error: Exception | None) -> list[_Call]:
        """Ends the calls whose deadline has come; returns the others."""
        assert self._loop is not None
        now, left = self._loop.time(), []
        for call in calls:
            if call.deadline - now > 0.002:
                left.append(call)
            else:
                self._throw(call, unavailable(error, self._store.shown, self._timeout, ambiguous=call.sent))
        return left

    async def _command(self, call: _Call, command: Command) -> None:
        """A read, tried until its deadline."""
        assert self._loop is not None
        pause, error = _BACKOFF_FIRST_S, None
        while True:
            try:
                await self._store.open()
                async with asyncio.timeout_at(call.deadline):
                    answer = await self._store.run(command)
                self._resume(call, answer)
                return
            except Transient as passing:
                error = passing
            except TimeoutError:
                pass
            except (StoreUnavailable, OSError) as refused:
                self._throw(call, refused)
                return
            except BaseException as failure:
                self._fail(call, failure)
                raise
            if call.deadline - self._loop.time() <= pause:
                self._throw(call, unavailable(error, self._store.shown, self._timeout))
                return
            await asyncio.sleep(pause)
            pause = min(_BACKOFF_MAX_S, pause * 2)

    # -- what an unreachable store has yet to be told ------------------------------------------------------------------

    def _retry_deferred_later(self) -> None:
        assert self._loop is not None
        self._deferred_timer = self._loop.call_later(_DEFERRED_RETRY_S, self._retry_deferred)

    def _retry_deferred(self) -> None:
        self._spawn(self.drain_deferred())

    async def drain_deferred(self) -> None:
        """Tells the store what happened while it was away, oldest first, once (the ids see to that)."""
        deferred = self._core.deferred
        try:
            while deferred:
                ops = [deferred[i] for i in range(min(len(deferred), _BATCH_OPS))]
                header = self._session.header
                deadline = asyncio.get_running_loop().time() + self._timeout
                answer = await self._store.apply(*encode_batch(self._session.keys, header, ops), deadline)
                head, lines = parse_batch(answer)
                self._session.absorb(head, header)
                for op, line in zip(ops, lines, strict=True):
                    deferred.popleft()
                    if (instead := op.otherwise(line)) is not None:
                        deferred.append(instead)
                    elif line[0] not in "kpu" and op.letter != "L":
                        logger.error("spend of %s during an outage was not recorded: %s", op.id, line[:200])
        except (Transient, TimeoutError, StoreUnavailable, OSError):
            pass
        finally:
            self._deferred_timer = None
            if deferred and not self._closed:
                self._retry_deferred_later()

    # -- the end -------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Lets what was begun finish, within the deadline, and closes the store."""
        if self._loop is None:
            await self._store.close()
            return
        ends = time.monotonic() + 2 * self._timeout
        while (self._tasks or self._lanes) and time.monotonic() < ends:
            self._idle = self._loop.create_future()
            waited = {*self._tasks, self._idle} if self._lanes else self._tasks
            await asyncio.wait(waited, timeout=max(0.0, ends - time.monotonic()))
        if self._deferred_timer is not None:
            self._deferred_timer.cancel()
        self._closed = True
        if self._core.deferred:
            await self.drain_deferred()
        for task in list(self._tasks):
            task.cancel()
        await self._store.close()
        if self._core.deferred:
            logger.error("closing with %d settlements that the store was never told", len(self._core.deferred))


def _forget(future: asyncio.Future[Any]) -> None:
    """Takes note of a result that nobody asks for."""
    if not future.cancelled() and (error := future.exception()) is not None:
        logger.warning("an abandoned hold could not be released, it will expire: %s", error)


_coalescers: weakref.WeakSet[Coalescer] = weakref.WeakSet()
_of_the_parent: list[Any] = []


def _after_fork_in_child() -> None:
    for coalescer in list(_coalescers):
        coalescer.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
