"""Leases: a lease requests chunks from the store, sends heartbeats for them, and settles them after use.

A chunk is an ordinary hold in the store. If the process dies, the store charges the chunk. The decisions to grant and
to spend are in :mod:`.chunks` and run on any thread; everything else runs on the event loop of the limiter.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import weakref
from collections import deque
from collections.abc import Callable, Generator
from contextvars import Context
from typing import Any, Final, NamedTuple, Protocol

from ktrdr_budget.engine.leases.chunks import NEVER, Chunk, Chunks, Grant
from ktrdr_budget.engine.protocol.codes import SLOTS
from ktrdr_budget.engine.protocol.hold_record import HoldRecord
from ktrdr_budget.engine.protocol.operations import LONGEST_HOLD_MS
from ktrdr_budget.engine.protocol.window import flag_of
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.engine.replica.state import ReplicaState
from ktrdr_budget.errors import (
    BudgetExceeded,
    HoldConflict,
    InvalidArgument,
    StoreError,
    StoreUnavailable,
    UnknownHold,
    shown,
)
from ktrdr_budget.models import check_ttl_ms
from ktrdr_budget.money import AmountIn, to_units

__all__ = ["IDLE_DEFAULT_S", "LEASE_TTL_DEFAULT_S", "ChunkCalls", "LeaseBase"]

logger = logging.getLogger("ktrdr_budget")

LEASE_TTL_DEFAULT_S: Final = 60
IDLE_DEFAULT_S: Final = 5.0
_ROLL_MS: Final = LONGEST_HOLD_MS * 5 // 6
"""Age at which a chunk of a long window is replaced, before its hold reaches the maximum age of holds."""
_ROUNDS_MAX = 8
_PAUSE_S = 0.1
"""The pause after a request that brought less than a whole chunk. While a caller waits for room, there is no pause."""
_TICK_MIN_S = 0.05
_FORKED = "this lease belongs to the process that opened it: open another in the child"
_CLOSED = "this lease is closed"


class ChunkCalls(Protocol):
    """The calls that the limiter provides to its leases."""

    state: ReplicaState
    open_leases: set[LeaseBase]
    timeout_s: float

    def bind(self) -> asyncio.AbstractEventLoop:
        """The event loop of the limiter."""

    def submit(self, call: Generator[Any, Any, Any]) -> asyncio.Future[Any]:
        """Start a call. Raises ``RuntimeError`` if the limiter is closed."""

    def reserve(self, budget: str, units: int, ttl_s: float, operation: str) -> Generator[Any, Any, HoldBase]:
        """Reserve a chunk in the store. The outage policy grants no chunk."""

    def extend(self, hold: HoldBase, accrued: int, ttl_ms: int) -> Generator[Any, Any, HoldRecord]:
        """Send a heartbeat of a chunk, with the whole units that were spent from the chunk."""

    def grow(self, hold: HoldBase, total: int, ttl_ms: int) -> Generator[Any, Any, HoldRecord]:
        """Raise the reservation of a chunk to a total of whole units."""

    def settle(self, hold: HoldBase, spent: int) -> Generator[Any, Any, None]:
        """Commit the whole units that were spent from a chunk. Release the chunk if nothing was spent."""

    def settle_later(self, hold: HoldBase, spent: int) -> None:
        """Settle a chunk once the store replies again."""

    def record_later(self, hold: HoldBase, spent: int, operation: str) -> None:
        """Record the spend of a released chunk once the store replies. The spend is charged to the chunk's window."""


class _Waiter(NamedTuple):
    """A caller that waits for room."""

    units: int
    until_s: float
    future: Any
    since_attempt: int
    """The number of the last request for a chunk before this caller began to wait."""


class LeaseBase(Chunks):
    """Base class of sync and async leases. The subclasses add only the methods that wait.

    Args:
        budget: the name of a budget whose kind is not ``slots``.
        slab: the amount of one chunk.
        low_water: if less than this amount is left, the next chunk is requested; by default half of a chunk.
        ttl: seconds without a heartbeat after which the store charges a chunk.
        idle: seconds without use after which chunks are released; if ``None``, idle chunks are kept.
        operation: the label of the chunks in lists of holds and in the ledger.
        eager: if true, the first chunk of each window is requested in advance; if false, when a caller needs room.

    Raises:
        InvalidArgument, UnknownBudget: an option is not usable.
    """

    def __init__(
        self,
        calls: ChunkCalls,
        budget: str,
        slab: AmountIn,
        *,
        low_water: AmountIn | None = None,
        ttl: float = LEASE_TTL_DEFAULT_S,
        idle: float | None = IDLE_DEFAULT_S,
        operation: str = "lease",
        eager: bool = False,
    ) -> None:
        definition = calls.state.budget(budget)
        if flag_of(definition) == SLOTS:
            raise InvalidArgument(f"{budget!r} is of kind 'slots': a slot cannot be spent in parts")
        size = to_units(slab, definition.unit, positive=True)
        low = size // 2 if low_water is None else to_units(low_water, definition.unit)
        if low > size:
            raise InvalidArgument(f"low_water must not be above the slab, {shown(slab)}, but is {shown(low_water)}")
        if idle is not None and (isinstance(idle, bool) or not isinstance(idle, (int, float)) or not idle > 0):
            raise InvalidArgument(f"idle must be more than 0 seconds, or None, not {shown(idle)}")
        super().__init__(definition.name, definition.unit, size, low, calls.state.now_ms)
        self._calls = calls
        self._ttl_s = ttl
        self._ttl_ms = check_ttl_ms(ttl)
        self._heartbeat_s = self._ttl_ms / 3000
        self._idle_s = idle
        self._operation = operation
        self._eager = eager
        self._loop: asyncio.AbstractEventLoop | None = None
        self._alerted = False
        self._refilling = False
        self._requested = 0
        self._pause_until_s = 0.0
        self._attempt = 0
        """The number of chunks requested so far."""
        self._waiters: deque[_Waiter] = deque()
        self._ends: list[asyncio.Future[None]] = []
        self._used: tuple[int, int] = (0, 0)
        self._used_at_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.closed_reason or f'{self.show(self.room())} left'}>"

    @property
    def belongs_here(self) -> bool:
        """Whether this process opened the lease; false in a forked child."""
        return self.closed_reason != _FORKED

    # -- opening and closing, on the event loop ------------------------------------------------------------------------

    def begin(self) -> None:
        """Open the lease, without waiting for the first chunk."""
        self._loop = self._calls.bind()
        self._calls.open_leases.add(self)
        self._used_at_s = self._loop.time()
        _leases.add(self)
        Context().run(self._tick)  # here and below: background work belongs to no caller's context

    async def opened(self) -> None:
        """Open the lease, and wait until the store has granted or refused the first chunk.

        Raises:
            StoreError, InvalidArgument: the store refuses for another reason than a lack of room.
        """
        if self._loop is not None:
            raise RuntimeError("this lease was opened before: a lease can be opened only once")
        self.begin()
        assert self._loop is not None
        self._refill(0)
        try:
            while self._refilling:
                await self._next_end()
        except BaseException:
            self.shut()
            raise
        if isinstance(self.last_refill_error, (StoreError, InvalidArgument)):
            self.shut()
            raise self.last_refill_error

    def shut(self) -> None:
        """Close the lease without waiting. Each chunk is settled as soon as it has no open grants."""
        self.stop(_CLOSED)
        self._serve()
        self._attend()

    async def closed(self, *, all_grants: bool = False) -> None:
        """Close the lease, and wait until each chunk without open grants is settled.

        If the store does not reply, the settlement of a chunk is deferred until the store replies.

        Args:
            all_grants: if true, open grants are charged in full now; if false, each chunk waits for its grants.
        """
        if self._loop is None or self.closed_reason == _FORKED:
            self.stop(_CLOSED)
            return
        if all_grants:
            self.stop(_CLOSED)
            with self.lock:
                for chunk in self.retired:
                    chunk.open = chunk.granted = 0
                    chunk.is_settled = True
        self.shut()
        while self._refilling or any(chunk.is_settling for chunk in self.retired):
            await self._next_end()
        if all_grants:
            self._end()

    def _end_if_done(self) -> bool:
        done = self.closed_reason is not None and not self.retired and not self._refilling
        if done:
            self._end()
        return done

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._calls.open_leases.discard(self)

    def after_fork(self) -> None:
        """Drop the chunks in a forked child, because they belong to the parent."""
        super().__init__(self.name, self.unit, self.size, self.low, self._now_ms)
        self.closed_reason = _FORKED
        self._waiters.clear()
        self._ends.clear()
        self._timer = None

    # -- what is to be done --------------------------------------------------------------------------------------------

    def alert(self) -> None:
        """Schedule maintenance of the chunks on the event loop, unless it is scheduled already."""
        if not self._alerted and self._loop is not None and self.closed_reason != _FORKED:
            self._alerted = True
            with contextlib.suppress(RuntimeError):  # the event loop has ended: the store will charge the chunk
                self._loop.call_soon_threadsafe(self._attend, context=Context())

    def _attend(self) -> None:
        """Settle retired chunks, and request a chunk if one is needed."""
        self._alerted = False
        assert self._loop is not None
        with self.lock:
            self.leave_ended(self._now_ms())
            if self.chunk.hold is not None and self.chunk.left < 0:  # an overrun must reach the store
                self.retire()
            due = [chunk for chunk in self.retired if not chunk.open and not chunk.is_settling]
            wanted = self._wanted()
            may_request = self.chunk.hold is not None and self.next_chunk is None and not self._refilling
            paused = self._loop.time() < self._pause_until_s
            self.alarm = self.low if may_request and wanted is None and not paused else NEVER
        for chunk in due:
            self._settle(chunk)
        if wanted is not None and not self._refilling:
            self._refill(wanted)

    def _wanted(self) -> int | None:
        """The minimum units of a chunk to request now; ``None`` if no chunk is needed."""
        assert self._loop is not None
        if self.closed_reason is not None:
            return None
        if self._waiters:
            return self._waiters[0].units
        if self._loop.time() < self._pause_until_s:
            return None
        if self.needed > max(self.chunk.left, 0 if self.next_chunk is None else self.next_chunk.left):
            return self.needed
        if self.next_chunk is not None or (self.chunk.hold is None and not self._eager):
            return None
        return 0 if self.chunk.left < self.low else None

    def _tick(self) -> None:
        """Periodically send heartbeats, release idle chunks, and retry failed calls."""
        self._timer = None
        assert self._loop is not None
        now_s = self._loop.time()
        self._give_back_idle(now_s)
        with self.lock:
            due = [chunk for chunk in self.chunks() if chunk.heartbeat_at_s <= now_s and not chunk.is_settling]
        for chunk in due:
            self._send_heartbeat(chunk)
        self._attend()
        if self._end_if_done():
            return
        pause_s = min(self._heartbeat_s, 1.0, (self._idle_s or 1.0) / 2)
        self._timer = self._loop.call_later(max(_TICK_MIN_S, pause_s), self._tick, context=Context())

    def _give_back_idle(self, now_s: float) -> None:
        with self.lock:
            used = self._spent_before + sum(chunk.spent for chunk in self.chunks()), self.uses
            if used != self._used or any(chunk.granted for chunk in self.chunks()) or self._waiters:
                self._used, self._used_at_s = used, now_s
            elif self._idle_s is not None and now_s - self._used_at_s >= self._idle_s:
                self.retire()
                self.retire()

    def _submit(self, call: Generator[Any, Any, Any], done: Callable[[BaseException | None], None]) -> None:
        def on_end(future: asyncio.Future[Any]) -> None:
            done(asyncio.CancelledError() if future.cancelled() else future.exception())

        try:
            self._calls.submit(call).add_done_callback(on_end)
        except RuntimeError as error:  # the limiter is closed
            call.close()
            done(error)

    def _next_end(self) -> asyncio.Future[None]:
        """A future that completes when the next request for a chunk, or the next settlement, succeeds or fails."""
        assert self._loop is not None
        future: asyncio.Future[None] = self._loop.create_future()
        self._ends.append(future)
        return future

    def _wake_ends(self) -> None:
        ends, self._ends = self._ends, []
        for future in ends:
            if not future.done():
                future.set_result(None)

    # -- another chunk -------------------------------------------------------------------------------------------------

    def _refill(self, need: int) -> None:
        self._refilling, self._requested = True, need
        self._attempt += 1
        with self.lock:
            self.needed, self.alarm = 0, NEVER
        self._submit(self._refill_call(need), self._refilled)

    def _refill_call(self, need: int) -> Generator[Any, Any, None]:
        """Request a whole chunk, or all that the budget has left if that is less.

        What the budget has left is added to the current chunk, or becomes a new chunk if there is no current chunk. The
        call is refused if the lease could still not grant ``need`` units.
        """
        size = max(self.size, need)
        refused: BudgetExceeded | None = None
        for _ in range(_ROUNDS_MAX):
            try:
                yield from self._reserve_call(size)
                return
            except BudgetExceeded as denied:
                refused = denied
            fits = min(to_units(refused.fits, self.unit), max(self.size, need))
            with self.lock:
                chunk = self.chunk if self.chunk.hold is not None else None
            if not fits or (chunk.left if chunk else 0) + fits < need:
                break
            if chunk is None:
                size = fits
                continue
            try:
                yield from self._grow_call(chunk, fits)
                return
            except BudgetExceeded as denied:
                refused = denied  # another client was faster; what the budget has left now may suffice
            except (HoldConflict, UnknownHold) as error:
                self._lose(chunk, error)
        assert refused is not None
        raise refused

    def _reserve_call(self, size: int) -> Generator[Any, Any, None]:
        hold = yield from self._calls.reserve(self.name, size, self._ttl_s, self._operation)
        [(window, reserved)] = hold.parts
        end_ms, roll_ms = window.span.end_ms, self._now_ms() + _ROLL_MS
        chunk = Chunk(hold, reserved, roll_ms if end_ms is None else min(end_ms, roll_ms))
        assert self._loop is not None
        self._used_at_s = self._loop.time()
        chunk.heartbeat_at_s = self._used_at_s + self._heartbeat_s
        self.add(chunk)

    def _grow_call(self, chunk: Chunk, more: int) -> Generator[Any, Any, None]:
        """Add the last units of a budget to the current chunk, so that one grant can use all units of the lease."""
        hold = chunk.hold
        assert hold is not None
        record = yield from self._calls.grow(hold, chunk.reserved + more, self._ttl_ms)
        with self.lock:
            grown = record.segments[0].reserved - chunk.reserved
            chunk.reserved += grown
            chunk.left += grown

    def _refilled(self, error: BaseException | None) -> None:
        assert self._loop is not None
        self._refilling = False
        expected = error is None or isinstance(error, (BudgetExceeded, StoreUnavailable))
        if not expected and not isinstance(error, RuntimeError):
            logger.error("no chunk for the lease of %s: %s", self.name, error)
        self.last_refill_error = error if isinstance(error, Exception) else None
        with self.lock:
            whole = error is None and (self.next_chunk or self.chunk).left >= self.low
        if not whole:
            self._pause_until_s = self._loop.time() + _PAUSE_S
        self._serve(0 if not isinstance(error, BudgetExceeded) else self._requested, failed=error is not None)
        self._attend()
        self._wake_ends()

    # -- waiting -------------------------------------------------------------------------------------------------------

    def wait(self, units: int, future: Any) -> None:
        """Resolve the future with a grant once there is room, or with an error. Waiters are served in order."""
        assert self._loop is not None
        timeout_s = self._calls.timeout_s
        self._waiters.append(_Waiter(units, self._loop.time() + timeout_s, future, self._attempt))
        self._loop.call_later(timeout_s, self._expire_waiters)
        if len(self._waiters) == 1:
            self._serve()
            self._attend()

    def _serve(self, failed_from: int = 0, *, failed: bool = False) -> None:
        """Grant to waiters while there is room. After a failed request for a chunk, refuse its waiters."""
        waiters, self._waiters = self._waiters, deque()
        while waiters:
            waiter = waiters.popleft()
            if waiter.future.cancelled():
                continue
            try:
                grant = None if self._waiters else self.try_reserve(waiter.units)
            except RuntimeError as closed:
                _refuse(waiter.future, closed)
                continue
            if grant is not None:
                self._deliver(waiter.future, grant)
            elif failed and waiter.units >= failed_from and waiter.since_attempt < self._attempt:
                self._refuse_waiter(waiter)
            else:
                self._waiters.append(waiter)

    def _refuse_waiter(self, waiter: _Waiter) -> None:
        with self.lock:
            refused = self.refusal(waiter.units)
        _refuse(waiter.future, refused)

    def _deliver(self, future: Any, grant: Grant) -> None:
        try:
            future.set_result(grant)
        except Exception:  # the waiter was cancelled at this moment
            grant.release()

    def _expire_waiters(self) -> None:
        assert self._loop is not None
        now_s = self._loop.time()
        while self._waiters and (self._waiters[0].until_s <= now_s + 0.001 or self._waiters[0].future.cancelled()):
            waiter = self._waiters.popleft()
            if self._refilling and self.last_refill_error is None:
                timeout_s = self._calls.timeout_s
                _refuse(
                    waiter.future,
                    StoreUnavailable(f"the lease of {self.name!r} has too little left: no reply in {timeout_s:g} s"),
                )
            else:
                self._refuse_waiter(waiter)

    # -- heartbeats, and the end of a chunk ----------------------------------------------------------------------------

    def _send_heartbeat(self, chunk: Chunk) -> None:
        assert self._loop is not None and chunk.hold is not None
        chunk.heartbeat_at_s = self._loop.time() + self._heartbeat_s

        def on_end(error: BaseException | None) -> None:
            ended = isinstance(error, (BudgetExceeded, HoldConflict, UnknownHold))
            if error is not None and ended and not (chunk.is_settling or chunk.is_settled):
                self._lose(chunk, error)
            elif error is not None:
                logger.warning("heartbeat of the lease of %s failed: %s", self.name, error)
            else:
                self.heartbeat_acknowledged()

        self._submit(self._calls.extend(chunk.hold, max(0, chunk.spent), self._ttl_ms), on_end)

    def heartbeat_acknowledged(self) -> None:
        """Handle the store's reply to the heartbeat of a chunk."""

    def _lose(self, chunk: Chunk, error: BaseException) -> None:
        """Retire a chunk whose hold was settled by another client, or lost by the store."""
        hold_id = "" if chunk.hold is None else chunk.hold.id
        logger.warning("chunk %s of the lease of %s lost: %s", hold_id, self.name, error)
        self.leave(chunk)
        self._attend()

    def _settle(self, chunk: Chunk) -> None:
        chunk.is_settling = True

        def on_end(error: BaseException | None) -> None:
            chunk.is_settling = False
            if isinstance(error, StoreUnavailable):  # the next tick tries again
                logger.warning("lease of %s: commit of a chunk postponed: %s", self.name, error)
            else:
                if error is not None:
                    logger.error("lease of %s: commit of a chunk failed: %s", self.name, error)
                self.forget(chunk)
                self._end_if_done()
            self._wake_ends()

        self._submit(self._settle_call(chunk), on_end)

    def _settle_call(self, chunk: Chunk) -> Generator[Any, Any, None]:
        hold, spent = chunk.hold, chunk.spent
        assert hold is not None
        try:
            yield from self._calls.settle(hold, spent)
        except UnknownHold:
            if spent:
                raise
        except HoldConflict as conflict:
            # If another client has released the chunk, the spend must still be recorded. Else the chunk was committed.
            if not spent or conflict.state != "released":
                raise
            self._calls.record_later(hold, spent, self._operation)
        except StoreError:
            raise
        except StoreUnavailable:
            self._calls.settle_later(hold, spent)


def _refuse(future: Any, error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


_leases: weakref.WeakSet[LeaseBase] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for lease in list(_leases):
        lease.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
