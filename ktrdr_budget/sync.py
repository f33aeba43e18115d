"""The synchronous limiter. Derived from the asynchronous one by ``scripts/generate_sync.py``: do not edit.

A test checks that it is up to date.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from types import TracebackType
from typing import Any

from ktrdr_budget.engine.calls import extend, limits, read, readiness, reserve, settle
from ktrdr_budget.engine.calls import extend as extensions
from ktrdr_budget.engine.leases.chunks import Grant
from ktrdr_budget.engine.leases.lease import IDLE_DEFAULT_S, LEASE_TTL_DEFAULT_S, LeaseBase
from ktrdr_budget.engine.portal import SyncRunner
from ktrdr_budget.engine.protocol.amounts import Amounts
from ktrdr_budget.engine.protocol.requests import Command
from ktrdr_budget.engine.replica.hold import HoldBase, OnError, check_on_error, current_hold, restore_hold
from ktrdr_budget.errors import BudgetError, StoreError, StoreUnavailable
from ktrdr_budget.limiter import LimiterBase, _execute, logger
from ktrdr_budget.models import (
    TTL_DEFAULT_S,
    HoldView,
    LedgerEntry,
    Migration,
    OnExpiry,
    Page,
    Settlement,
    Status,
    Statuses,
)
from ktrdr_budget.money import AmountIn

__all__ = ["BudgetLimiter", "Hold", "Lease"]


class Hold(HoldBase):
    """An open reservation. Settle it with :meth:`commit` or :meth:`release`; move its deadline with :meth:`extend`."""

    __slots__ = ()

    @property
    def _runner(self) -> SyncRunner:
        return self.engine.runner  # type: ignore[no-any-return]

    def extend(self, ttl: float | None = None) -> None:
        """Send a heartbeat: a new deadline ``ttl`` seconds from now (as reserved, by default), and what was accrued.

        Reopens an expired hold, but not one that an operator has released. No hold stays open for longer than 24 h
        after its grant.

        Raises:
            BudgetExceeded: the hold had expired and returned money, and the budget has no room for it any more.
            HoldConflict: the hold is settled, or an operator has released it (``released_by_operator``).
            UnknownHold: the store does not have it.
            StoreUnavailable: no reply within the deadline.
        """
        self._runner.run(extensions.extend(self.engine.context, self, ttl), "extend")

    def grow(self, amount: Amounts) -> None:
        """Add to the reservation, in all budgets or in none. Concurrent additions by others are added as well.

        After an ambiguous ``StoreUnavailable``, growing by the same amount is a retry, and adds it once.

        Raises:
            BudgetExceeded: a budget has no room; nothing changed.
            HoldConflict, UnknownHold, StoreUnavailable: as for :meth:`extend`.
        """
        self._runner.run(extensions.grow(self.engine.context, self, amount), "grow")

    def commit(self, amount: Amounts | None = None) -> Settlement:
        """Record the actual cost. A commit is never refused for lack of budget, lateness, or exceeding the reservation.

        Args:
            amount: a scalar for every ``usd`` budget (counts then commit their reservation), or a mapping (omitted
                budgets commit 0); by default the accrued amount.

        Raises:
            HoldConflict: the hold was settled differently before, or metered calls inside it are in progress.
            StoreUnavailable: no reply within the deadline. A retry is safe.
        """
        return self._runner.run(settle.commit(self.engine.context, self, amount), "commit")

    def release(self) -> Settlement:
        """Return the whole amount. Errors as for :meth:`commit`."""
        return self._runner.run(settle.release(self.engine.context, self), "release")


class Lease(LeaseBase):
    """A prepaid part of a budget that this process spends by itself: ``with limiter.lease(...) as lease``.

    :meth:`spend` and :meth:`reserve` decide at once; :meth:`acquire` waits for another slab if needed. On leaving, the
    spend is committed and the rest released; an open grant keeps its slab until it is settled. Entering raises no error
    if the store has no room or does not reply; the first decision raises it.
    """

    def __init__(self, runner: SyncRunner, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._runner = runner

    def __enter__(self) -> Lease:
        self._runner.open_lease(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.close_lease(self)

    def acquire(self, amount: AmountIn) -> Grant:
        """Reserve as :meth:`reserve` does, but wait for the next slab if needed, at most for the limiter's deadline.

        Raises:
            BudgetExceeded: neither the lease nor the store has room.
            StoreUnavailable: the lease has no room, and the store does not reply.
            InvalidAmount: not an amount above 0.
        """
        units = self.to_units(amount, positive=True)
        if not self._waiters and (grant := self.try_reserve(units)) is not None:
            return grant
        return self._runner.acquire(self, units)


class BudgetLimiter(LimiterBase):
    """One hard cap for every replica that uses the same store and tenant.

    Use it as ``with BudgetLimiter(url, [Budget("agent", limit="5.00")]) as limiter``. Threads may
    share it. Calls made during a round trip are sent together in the next one.
    """

    _hold_class = Hold
    _runner_class = SyncRunner

    @property
    def _runner(self) -> SyncRunner:
        return self.engine.runner  # type: ignore[no-any-return]

    def __enter__(self) -> BudgetLimiter:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Connect. Succeeds even if the store is down; calls then fail until it is back.

        Raises:
            StoreError: the embedded server does not start, or the store refuses this user.
        """
        self._runner.open()
        try:
            self._runner.run(readiness.begin(self.engine.context, self.store_url), "start")
        except StoreError:
            raise
        except StoreUnavailable as error:
            logger.warning("starting without the store: %s", error)

    def close(self) -> None:
        """Finish calls in flight, within twice the deadline, and disconnect."""
        self._runner.close()

    # -- reserve and settle --------------------------------------------------------------------------------------------

    def reserve(
        self,
        budget: str | Mapping[str, AmountIn],
        amount: AmountIn | None = None,
        *,
        id: str | None = None,
        ttl: float = TTL_DEFAULT_S,
        on_expiry: OnExpiry = "charge",
        operation: str = "",
        owner: str = "",
    ) -> Hold:
        """Hold an estimate before the work; all budgets of a mapping or none.

        Args:
            budget: a name with ``amount``, or a mapping of names to amounts; a denial names the first budget without
                room.
            id: idempotency key; the same id and contents return the same hold, marked ``replayed``. Default: generated.
            ttl: seconds, 1 to 86400, until the hold expires unless it is extended.
            on_expiry: the charge of an expired hold: ``charge`` all, ``accrued`` the reported use, ``release`` nothing.
            operation: a label for the ledger.
            owner: may settle the hold once it is unconfirmed (used by the HTTP service).

        Raises:
            BudgetExceeded: no room; nothing was written.
            TooManyHolds, TooManyBudgets: the tenant has the maximum; nothing was written.
            HoldConflict: the id is in use with other contents.
            DefinitionConflict: the store has another unit, period, timezone or kind of a budget; nothing was written.
            InvalidArgument, UnknownBudget: refused before anything is sent.
            StoreUnavailable: no reply within the deadline (policy ``deny``).
        """
        context = self.engine.context
        flow = reserve.reserve(context, budget, amount, id, ttl, on_expiry, operation, owner)
        hold: Hold = self._runner.run(flow, "reserve")
        return hold

    @contextmanager
    def hold(
        self,
        budget: str | Mapping[str, AmountIn],
        amount: AmountIn | None = None,
        *,
        id: str | None = None,
        ttl: float = TTL_DEFAULT_S,
        on_expiry: OnExpiry = "charge",
        on_error: OnError = "release",
        operation: str = "",
        owner: str = "",
    ) -> Iterator[Hold]:
        """Reserve, heartbeat at a third of ``ttl`` while the block runs, and settle at its end.

        If the hold was settled inside the block, also by its id, the end does nothing. Normal exit: commits what was
        accrued, or the whole reservation if nothing was. Exception or cancellation: commits what was accrued, or
        releases if nothing was; ``on_error="charge"`` keeps the hold instead, and it expires. If metered calls inside
        the block are still in progress, the hold stays open, and the last of them settles it.

        Raises:
            As for :meth:`reserve` and :meth:`commit`.
        """
        check_on_error(on_error)
        hold = self.reserve(budget, amount, id=id, ttl=ttl, on_expiry=on_expiry, operation=operation, owner=owner)
        with self.keep(hold, on_error=on_error):
            yield hold

    @contextmanager
    def keep(self, hold: Hold, *, on_error: OnError = "release") -> Iterator[Hold]:
        """Send heartbeats for a hold that was reserved before, and settle it at the end, as :meth:`hold` does."""
        check_on_error(on_error)
        stop_heartbeat = self._runner.start_heartbeat(hold)
        outer = current_hold.set(hold)
        try:
            yield hold
        except BaseException:
            self.leave(hold, True, on_error, stop_heartbeat)
            raise
        else:
            self.leave(hold, False, on_error, stop_heartbeat)
        finally:
            restore_hold(outer)

    def leave(self, hold: HoldBase, failed: bool, on_error: OnError, stop: Callable[[], object]) -> None:
        """Settle a hold whose block has ended, as :meth:`hold` describes; for guards.

        Args:
            failed: the block raised.
            stop: stops the heartbeats.
        """
        if hold.leave_to_calls(failed, on_error, stop):
            return
        stop()
        flow = settle.leave(self.engine.context, hold, failed, on_error)
        if flow is None:
            return
        try:
            self._runner.settle(flow, "settle")
        except BudgetError as error:
            if not failed:
                raise
            logger.warning("settlement of hold %s failed: %s", hold.id, error)  # the block raises its own error

    def lease(
        self,
        budget: str,
        slab: AmountIn,
        *,
        low_water: AmountIn | None = None,
        ttl: float = LEASE_TTL_DEFAULT_S,
        idle: float | None = IDLE_DEFAULT_S,
        operation: str = "lease",
    ) -> Lease:
        """Prepay a part of a budget, to reserve from it without the store; use the result with ``with``.

        Slabs show as held, and are charged if this process dies. The sum of all replicas stays below the cap.

        Args:
            slab: the amount that is prepaid at a time; less if the budget has less.
            low_water: if less is left, the next slab is requested; half of a slab by default.
            ttl: seconds after which the store charges a slab of a process that is silent.
            idle: seconds without use after which slabs are released; ``None``: never.
            operation: the label of the slabs, in lists of holds and in the ledger.

        Raises:
            InvalidArgument, UnknownBudget: an option is not usable, or the budget is one of ``slots``.
        """
        options = {"low_water": low_water, "ttl": ttl, "idle": idle, "operation": operation}
        return Lease(self._runner, self.engine.lease_calls, budget, slab, **options)

    def commit(self, id: str, amount: Amounts | None = None) -> Settlement:
        """Commit a hold of any process by its id; see :meth:`Hold.commit`.

        Raises:
            UnknownHold: no such hold, or settled longer ago than ids are remembered.
        """
        return self._runner.run(settle.settle_by_id(self.engine.context, id, amount), "commit")

    def release(self, id: str, *, operator: bool = False) -> Settlement:
        """Release a hold of any process by its id: an open one for good, an unconfirmed one as an operator would.

        Args:
            operator: release it for a worker that seems dead. If the worker returns after all, its commit still counts.
        """
        flow = settle.settle_by_id(self.engine.context, id, None, released=True, by_operator=operator)
        return self._runner.run(flow, "release")

    def extend(self, id: str, ttl: float | None = None, *, accrued: Amounts | None = None) -> HoldView:
        """Send a heartbeat by id; ``accrued`` is the total so far. See :meth:`Hold.extend`.

        Without a ``ttl``, the deadline becomes at least 900 seconds from now, and never becomes earlier.
        """
        return self._runner.run(extend.extend_by_id(self.engine.context, id, ttl, accrued), "extend")

    def grow(self, id: str, amounts: Mapping[str, AmountIn], *, ttl: float = TTL_DEFAULT_S) -> HoldView:
        """Raise a reservation to new totals by id, all budgets or none, so that a retry is harmless.

        ``ttl`` matters only if the hold had expired.
        """
        return self._runner.run(extend.grow_by_id(self.engine.context, id, amounts, ttl), "grow")

    def record(
        self,
        budget: str | Mapping[str, AmountIn],
        amount: AmountIn | None = None,
        *,
        id: str | None = None,
        operation: str = "",
    ) -> Settlement:
        """Record spend without a reservation; it is never refused for lack of budget.

        Raises:
            HoldConflict: the id is in use with other contents.
            StoreUnavailable: no reply within the deadline (policy ``deny``). A retry with the same id is safe.
        """
        return self._runner.run(settle.record(self.engine.context, budget, amount, id, operation), "record")

    # -- reads ---------------------------------------------------------------------------------------------------------

    def status(self, budget: str, *, complete: bool = False) -> Status:
        """Read a budget's current window.

        After a loss of data, ``recovering_until`` is set while other replicas may still replay their journals.

        Args:
            complete: wait for these replays; raise ``StoreUnavailable`` rather than return incomplete figures.

        Raises:
            UnknownBudget: this limiter does not have the budget.
            DefinitionConflict: the store has another unit, period, timezone or kind of the budget.
            StoreUnavailable: the figures are unknown; the budget may be exhausted.
        """
        return self._runner.run(read.status(self.engine.context, [budget], complete=complete), "status")[0]

    def statuses(self, *, complete: bool = False) -> Statuses:
        """Read all budgets of this limiter, at one instant; ``complete`` as for :meth:`status`.

        A budget whose figures are unknown is not in the list; the list's attribute ``unavailable`` has its error, by
        name.
        """
        return self._runner.run(read.statuses(self.engine.context, complete=complete), "status")

    def check(self) -> dict[str, str | None]:
        """Check whether the store can hold budgets safely; return the fault found by each check, or ``None``.

        ``store``: it replies, accepts the login, and can be written to. ``policy``: its ``maxmemory-policy`` is
        ``noeviction``. ``scripts``: they run; each command that the store refuses in them is named.
        """
        return self._runner.run(readiness.check(self.engine.context), "check")

    def get(self, id: str) -> HoldView:
        """Read a hold by id.

        Raises:
            UnknownHold: no such hold, or settled longer ago than ids are remembered.
        """
        return self._runner.run(read.hold_view(self.engine.context, id), "get")

    def holds(self, budget: str, *, limit: int = 100, cursor: str | None = None) -> Page[HoldView]:
        """Read the open, then the unconfirmed holds of a budget, the latest deadline first; ``limit`` 1 to 1000."""
        return self._runner.run(read.holds(self.engine.context, budget, limit, cursor), "holds")

    def ledger(
        self, budget: str, window: str | None = None, *, limit: int = 100, cursor: str | None = None
    ) -> Page[LedgerEntry]:
        """Read the ledger entries of a window (by default the current one), newest first; ``limit`` 1 to 1000."""
        return self._runner.run(read.ledger(self.engine.context, budget, window, limit, cursor), "ledger")

    def execute(self, command: Command, operation: str) -> Any:
        """Run a script or command on keys of the tenant that are not the limiter's own; for the agent.

        It is resent after a lost reply until the deadline, so that it may be executed twice.

        Raises:
            StoreUnavailable: no reply within the deadline.
        """
        return self._runner.run(_execute(command), operation)

    # -- limits --------------------------------------------------------------------------------------------------------

    def set_limit(self, budget: str, limit: AmountIn | None, until: datetime | str | None = None) -> Status:
        """Change a limit for all replicas: for good, ``until`` an aware datetime, or ``"window"`` (its end).

        A run-time limit overrides the configured one. ``None`` is uncapped.
        """
        return self._runner.run(limits.set_limit(self.engine.context, budget, limit, until), "set_limit")

    def clear_limit(self, budget: str) -> Status:
        """Return to the configured limit."""
        return self._runner.run(limits.clear_limit(self.engine.context, budget), "clear_limit")

    # -- definitions ---------------------------------------------------------------------------------------------------

    def migrate(self, budget: str) -> Migration:
        """Replace the registered definition of a budget (unit, kind, period, timezone) by this limiter's.

        All replicas obey with their next call: those with the same definition reserve and record at once, the others
        raise :class:`~ktrdr_budget.errors.DefinitionConflict`. Open holds are settled in the windows that admitted
        them, and spend under the former definition stays there: after a migration back, the old window continues. A
        run-time limit is kept, unless it is in another unit.

        Raises:
            UnknownBudget: this limiter was not given it.
            StoreUnavailable: no reply; the same call again is harmless.
        """
        return self._runner.run(limits.migrate(self.engine.context, budget), "migrate")
