"""Leases: keep prepaid slabs filled while they are used, told to the store while they are open, and settled after.

A slab is an ordinary hold, charged if its process dies. Everything here runs on the event loop of the limiter, but for
the decisions themselves (:mod:`.slabs`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import weakref
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ktrdr_budget.engine.leases.chunks import NEVER, Grant, Slab, Slabs
from ktrdr_budget.engine.protocol import LONGEST_HOLD_MS
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

if TYPE_CHECKING:
    from ktrdr_budget.engine.calls.flows import Core
    from ktrdr_budget.engine.calls.reads import Flow

__all__ = ["IDLE_DEFAULT_S", "LEASE_TTL_DEFAULT_S", "LeaseBase"]

logger = logging.getLogger("ktrdr_budget")

LEASE_TTL_DEFAULT_S: Final = 60
IDLE_DEFAULT_S: Final = 5.0
_ROLL_MS: Final = LONGEST_HOLD_MS * 5 // 6
"""A slab of a long window is left for another before its hold has lived for as long as holds may."""
_ROUNDS = 8
_PAUSE_S = 0.1
"""How long an attempt that did not bring a whole slab keeps the next from being made, unless somebody waits for it."""
_TICK_MIN_S = 0.05
_FORKED = "this lease belongs to the process that opened it: open another in the child"
_CLOSED = "this lease is closed"


class _Waiter(NamedTuple):
    """Whoever waits for room."""

    units: int
    until_s: float
    future: Any
    since_attempt: int
    """What that attempt, and those before it, were told, was said before this one asked."""


class LeaseBase(Slabs):
    """What the leases of the sync and the async limiter share: all but the waiting.

    Args:
        budget: its name; any but one of kind ``slots``.
        slab: how much is prepaid at a time.
        low_water: when less is left, the next slab is asked for; half of a slab by default.
        ttl: seconds after which the store charges a slab whose process is silent.
        idle: seconds without use after which slabs are given back; ``None``: never.
        operation: the label of the slabs in lists of holds and in the ledger.
        eager: take the first slab, and the first of each window, before anybody asks for it.

    Raises:
        InvalidArgument, UnknownBudget: an option is not usable.
    """

    def __init__(
        self,
        core: Core,
        budget: str,
        slab: AmountIn,
        *,
        timeout: float = 1.0,
        low_water: AmountIn | None = None,
        ttl: float = LEASE_TTL_DEFAULT_S,
        idle: float | None = IDLE_DEFAULT_S,
        operation: str = "lease",
        eager: bool = False,
    ) -> None:
        definition = core.session.budget(budget)
        if definition.kind == "slots":
            raise InvalidArgument(f"{budget!r} is of kind 'slots': a slot cannot be spent in parts")
        size = to_units(slab, definition.unit, positive=True)
        low = size // 2 if low_water is None else to_units(low_water, definition.unit)
        if low > size:
            raise InvalidArgument(f"low_water must not be above the slab, {shown(slab)}, but is {shown(low_water)}")
        if idle is not None and (isinstance(idle, bool) or not isinstance(idle, (int, float)) or not idle > 0):
            raise InvalidArgument(f"idle must be more than 0 seconds, or None, not {shown(idle)}")
        super().__init__(definition.name, definition.unit, size, low, core.session.now_ms)
        self._core = core
        self._ttl_s = ttl
        self._beat_s = check_ttl_ms(ttl) / 3000
        self._idle_s = idle
        self._operation = operation
        self._eager = eager
        self._timeout = timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._called = False
        self._refilling = False
        self._asked = 0
        self._pause_until_s = 0.0
        self._attempt = 0
        """How often a slab was asked for."""
        self._waiters: deque[_Waiter] = deque()
        self._ends: list[asyncio.Future[None]] = []
        self._used: tuple[int, int] = (0, 0)
        self._used_at_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.over or f'{self.show(self.room())} left'}>"

    @property
    def belongs_here(self) -> bool:
        """False in a fork of the process that opened it."""
        return self.over != _FORKED

    # -- opening and closing, on the event loop ------------------------------------------------------------------------

    def begin(self) -> None:
        """Opens, without waiting for the first slab."""
        self._loop = self._core.driver.bind()
        self._core.leases.add(self)
        self._used_at_s = self._loop.time()
        _leases.add(self)
        Context().run(self._tick)  # here and below: what is done in the background is on behalf of no caller

    async def opened(self) -> None:
        """Opens with a first slab, if the store has room for one.

        Raises:
            StoreError, InvalidArgument: the store refuses for another reason than want of room.
        """
        if self._loop is not None:
            raise RuntimeError("a lease is opened once")
        self.begin()
        assert self._loop is not None
        self._refill(0)
        try:
            while self._refilling:
                await self._next_end()
        except BaseException:
            self.shut()
            raise
        if isinstance(self.trouble, (StoreError, InvalidArgument)):
            self.shut()
            raise self.trouble

    def shut(self) -> None:
        """Grants nothing more. What was spent is committed, of a slab with open grants once those are settled."""
        self.stop(_CLOSED)
        self._serve()
        self._attend()

    async def closed(self, *, all_grants: bool = False) -> None:
        """Shuts, and waits until the slabs without open grants are settled, or cannot be for now.

        Args:
            all_grants: charge the grants that are still open, in full.
        """
        if self._loop is None or self.over == _FORKED:
            self.stop(_CLOSED)
            return
        if all_grants:
            self.stop(_CLOSED)
            with self.lock:
                for slab in self.retired:
                    slab.open = slab.promised = 0
                    slab.settled = True
        self.shut()
        while self._refilling or any(slab.settling for slab in self.retired):
            await self._next_end()
        if all_grants:
            self._end()

    def _end_if_done(self) -> bool:
        done = self.over is not None and not self.retired and not self._refilling
        if done:
            self._end()
        return done

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._core.leases.discard(self)

    def after_fork(self) -> None:
        """In the child, which must not spend what the parent has prepaid."""
        super().__init__(self.name, self.unit, self.size, self.low, self._now_ms)
        self.over = _FORKED
        self._waiters.clear()
        self._ends.clear()
        self._timer = None

    # -- what is to be done --------------------------------------------------------------------------------------------

    def alert(self) -> None:
        """Has the event loop look after the slabs, once."""
        if not self._called and self._loop is not None and self.over != _FORKED:
            self._called = True
            with contextlib.suppress(RuntimeError):  # the event loop has ended: the store will charge the slab
                self._loop.call_soon_threadsafe(self._attend, context=Context())

    def _attend(self) -> None:
        """Settles what is to be settled, and asks for a slab if one is wanted."""
        self._called = False
        assert self._loop is not None
        with self.lock:
            self.leave_ended(self._now_ms())
            if self.slab.hold is not None and self.slab.left < 0:  # overrun: the store is to know
                self.retire()
            due = [slab for slab in self.retired if not slab.open and not slab.settling]
            wanted = self._wanted()
            calls = self.slab.hold is not None and self.spare is None and not self._refilling and wanted is None
            self.alarm = self.low if calls and self._loop.time() >= self._pause_until_s else NEVER
        for slab in due:
            self._settle(slab)
        if wanted is not None and not self._refilling:
            self._refill(wanted)

    def _wanted(self) -> int | None:
        """How much room the next slab must bring at least; ``None`` if none is to be asked for now."""
        assert self._loop is not None
        if self.over is not None:
            return None
        if self._waiters:
            return self._waiters[0].units
        if self._loop.time() < self._pause_until_s:
            return None
        if self.needed > max(self.slab.left, 0 if self.spare is None else self.spare.left):
            return self.needed
        if self.spare is not None or (self.slab.hold is None and not self._eager):
            return None
        return 0 if self.slab.left < self.low else None

    def _tick(self) -> None:
        """Now and then: heartbeats, what is idle, and what could not be done before."""
        self._timer = None
        assert self._loop is not None
        now_s = self._loop.time()
        self._give_back_idle(now_s)
        with self.lock:
            due = [slab for slab in self.slabs() if slab.beat_at_s <= now_s and not slab.settling]
        for slab in due:
            self._beat(slab)
        self._attend()
        if self._end_if_done():
            return
        pause_s = min(self._beat_s, 1.0, (self._idle_s or 1.0) / 2)
        self._timer = self._loop.call_later(max(_TICK_MIN_S, pause_s), self._tick, context=Context())

    def _give_back_idle(self, now_s: float) -> None:
        with self.lock:
            used = self._spent_before + sum(slab.spent for slab in self.slabs()), self.uses
            if used != self._used or any(slab.promised for slab in self.slabs()) or self._waiters:
                self._used, self._used_at_s = used, now_s
            elif self._idle_s is not None and now_s - self._used_at_s >= self._idle_s:
                self.retire()
                self.retire()

    def _submit(self, flow: Flow[Any], done: Callable[[BaseException | None], None]) -> None:
        def told(future: asyncio.Future[Any]) -> None:
            done(asyncio.CancelledError() if future.cancelled() else future.exception())

        try:
            self._core.driver.submit(flow, "lease").add_done_callback(told)
        except RuntimeError as error:  # the limiter is closed
            flow.close()
            done(error)

    def _next_end(self) -> asyncio.Future[None]:
        """Done when something that was under way has ended."""
        assert self._loop is not None
        future: asyncio.Future[None] = self._loop.create_future()
        self._ends.append(future)
        return future

    def _wake_ends(self) -> None:
        ends, self._ends = self._ends, []
        for future in ends:
            if not future.done():
                future.set_result(None)

    # -- another slab --------------------------------------------------------------------------------------------------

    def _refill(self, need: int) -> None:
        self._refilling, self._asked = True, need
        self._attempt += 1
        with self.lock:
            self.needed, self.alarm = 0, NEVER
        self._submit(self._refill_flow(need), self._refilled)

    def _refill_flow(self, need: int) -> Flow[None]:
        """A whole slab; else what fits, down to ``need``: as a hold, or added to the one that is there."""
        size = max(self.size, need)
        refused: BudgetExceeded | None = None
        for _ in range(_ROUNDS):
            try:
                yield from self._reserve_flow(size)
                return
            except BudgetExceeded as denied:
                refused = denied
            fits = min(to_units(refused.fits, self.unit), max(self.size, need))
            with self.lock:
                slab = self.slab if self.slab.hold is not None else None
            if not fits or (slab.left if slab else 0) + fits < need:
                break
            if slab is None:
                size = fits
                continue
            try:
                yield from self._grow_flow(slab, fits)
                return
            except BudgetExceeded as denied:
                refused = denied  # others were faster; what fits now may do
            except (HoldConflict, UnknownHold) as error:
                self._lose(slab, error)
        assert refused is not None
        raise refused

    def _reserve_flow(self, size: int) -> Flow[None]:
        core = self._core
        hold = yield from core.reserve(
            self.name, self.out(size), None, self._ttl_s, "charge", self._operation, "", prepaying=True
        )
        [(window, reserved)] = hold.parts
        end_ms, roll_ms = window.span.end_ms, core.session.now_ms() + _ROLL_MS
        slab = Slab(hold, reserved, roll_ms if end_ms is None else min(end_ms, roll_ms))
        assert self._loop is not None
        slab.beat_at_s = self._used_at_s = self._loop.time()
        slab.beat_at_s += self._beat_s
        self.add(slab)

    def _grow_flow(self, slab: Slab, more: int) -> Flow[None]:
        """The last of a budget comes in parts: added to the slab that is there, so that none of it is out of use."""
        hold = slab.hold
        assert hold is not None
        [(window, _)] = hold.parts
        record = yield from self._core.extend(
            hold.id, [(window, 0, slab.reserved + more)], int(self._ttl_s * 1000), keep=True
        )
        with self.lock:
            grown = record.segments[0].reserved - slab.reserved
            slab.reserved += grown
            slab.left += grown

    def _refilled(self, error: BaseException | None) -> None:
        assert self._loop is not None
        self._refilling = False
        expected = error is None or isinstance(error, (BudgetExceeded, StoreUnavailable))
        if not expected and not isinstance(error, RuntimeError):
            logger.error("no slab for the lease of %s: %s", self.name, error)
        self.trouble = error if isinstance(error, Exception) else None
        with self.lock:
            whole = error is None and (self.spare or self.slab).left >= self.low
        if not whole:
            self._pause_until_s = self._loop.time() + _PAUSE_S
        self._serve(0 if not isinstance(error, BudgetExceeded) else self._asked, failed=error is not None)
        self._attend()
        self._wake_ends()

    # -- waiting -------------------------------------------------------------------------------------------------------

    def wait(self, units: int, future: Any) -> None:
        """Gives the future a grant as soon as there is room, or the reason why there is none. In order of arrival."""
        assert self._loop is not None
        self._waiters.append(_Waiter(units, self._loop.time() + self._timeout, future, self._attempt))
        self._loop.call_later(self._timeout, self._expire_waiters)
        if len(self._waiters) == 1:
            self._serve()
            self._attend()

    def _serve(self, failed_from: int = 0, *, failed: bool = False) -> None:
        """Those for whom there is room now. An attempt that failed refuses who waited for as much when it was made."""
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
                self._hand_over(waiter.future, grant)
            elif failed and waiter.units >= failed_from and waiter.since_attempt < self._attempt:
                self._refuse_waiter(waiter)
            else:
                self._waiters.append(waiter)

    def _refuse_waiter(self, waiter: _Waiter) -> None:
        with self.lock:
            refused = self.refusal(waiter.units)
        _refuse(waiter.future, refused)

    def _hand_over(self, future: Any, grant: Grant) -> None:
        try:
            future.set_result(grant)
        except Exception:  # whoever waited has gone in this moment
            grant.release()

    def _expire_waiters(self) -> None:
        assert self._loop is not None
        now_s = self._loop.time()
        while self._waiters and (self._waiters[0].until_s <= now_s + 0.001 or self._waiters[0].future.cancelled()):
            waiter = self._waiters.popleft()
            if self._refilling and self.trouble is None:
                words = f"the lease of {self.name!r} has too little left: no answer of the store in {self._timeout:g} s"
                _refuse(waiter.future, StoreUnavailable(words))
            else:
                self._refuse_waiter(waiter)

    # -- heartbeats, and the end of a slab -----------------------------------------------------------------------------

    def _beat(self, slab: Slab) -> None:
        assert self._loop is not None and slab.hold is not None
        slab.beat_at_s = self._loop.time() + self._beat_s
        [(window, _)] = slab.hold.parts
        used = [(window, max(0, slab.spent), 0)]
        flow = self._core.extend(slab.hold.id, used, int(self._ttl_s * 1000))

        def beaten(error: BaseException | None) -> None:
            if isinstance(error, (BudgetExceeded, HoldConflict, UnknownHold)) and not (slab.settling or slab.settled):
                self._lose(slab, error)
            elif error is not None:
                logger.warning("heartbeat of the lease of %s failed: %s", self.name, error)

        self._submit(flow, beaten)

    def _lose(self, slab: Slab, error: BaseException) -> None:
        """Somebody else has settled the slab, or the store has lost it: what is left of it cannot be relied on."""
        hold_id = "" if slab.hold is None else slab.hold.id
        logger.warning("the lease of %s grants no more from slab %s: %s", self.name, hold_id, error)
        self.leave(slab)
        self._attend()

    def _settle(self, slab: Slab) -> None:
        slab.settling = True

        def settled(error: BaseException | None) -> None:
            if isinstance(error, StoreUnavailable):
                slab.settling = False  # the next tick tries again
                logger.warning("a slab of the lease of %s could not be committed yet: %s", self.name, error)
            else:
                if error is not None:
                    logger.error("a slab of the lease of %s was not committed: %s", self.name, error)
                slab.settling = False
                self.forget(slab)
                self._end_if_done()
            self._wake_ends()

        self._submit(self._settle_flow(slab), settled)

    def _settle_flow(self, slab: Slab) -> Flow[None]:
        hold, spent = slab.hold, slab.spent
        assert hold is not None
        amounts = [("x", spent)] if spent else None
        try:
            yield from self._core.settle_hold(hold, amounts)
        except UnknownHold:
            if spent:
                raise
        except HoldConflict as conflict:
            # Somebody else has released it, for good; what was spent is a fact all the same. Else he committed it.
            if not spent or conflict.state != "released":
                raise
            self._core.record_later(f"{hold.id}:spent", hold.parts[0][0], spent, self._operation)
        except StoreError:
            raise
        except StoreUnavailable:
            self._core.defer_settlement(hold, amounts)


def _refuse(future: Any, error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


_leases: weakref.WeakSet[LeaseBase] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for lease in list(_leases):
        lease.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
