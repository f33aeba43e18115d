"""The synchronous limiter. Derived from the asynchronous one by ``scripts/generate_sync.py``: do not edit.

A test checks that it is up to date.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from types import TracebackType
from typing import Any

from ktrdr_budget.engine.calls import changes, extend, limits, read, readiness, reserve, settle
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
    Change,
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
        """Send a heartbeat: move the deadline, and report the accrued amount.

        A heartbeat reopens an expired hold, but not a hold that an operator has released. No hold stays open for longer
        than 24 h after its grant.

        Args:
            ttl: seconds from now to the new deadline; by default the ``ttl`` of the reservation.

        Raises:
            BudgetExceeded: the hold had expired and returned money, and the budget has no room for this money any more.
            HoldConflict: the hold is settled, or an operator has released it (``released_by_operator``).
            UnknownHold: the store does not have the hold.
            StoreUnavailable: the store did not reply within the deadline.
        """
        self._runner.run(extensions.extend(self.engine.context, self, ttl), "extend")

    def grow(self, amount: Amounts | None = None, **counts: AmountIn) -> None:
        """Add an amount to the reservation, in all budgets or in none.

        If others add at the same time, all amounts are added. After an ambiguous ``StoreUnavailable``, a call with the
        same amount is a retry: the amount is added only once.

        Args:
            amount: as for :meth:`accrue`.
            counts: as for :meth:`accrue`.

        Raises:
            BudgetExceeded: a budget has no room; nothing changed.
            HoldConflict, UnknownHold, StoreUnavailable: as for :meth:`extend`.
        """
        self._runner.run(extensions.grow(self.engine.context, self, amount, counts), "grow")

    def commit(self, amount: Amounts | None = None, **counts: AmountIn) -> Settlement:
        """Record the actual cost.

        A commit is never refused because the budget has no room, the commit is late, or the cost exceeds the
        reservation.

        Args:
            amount: one amount, or a mapping of budgets to amounts. By default, the accrued amount is committed.
                One amount applies to every ``usd`` budget; each budget that counts commits its reservation.
                A budget that a mapping omits commits 0.

                The amounts of a hold that was reserved by scope go by unit: one amount is in ``usd``, and a mapping is
                of units to amounts. In a unit without an amount, what was accrued is committed, else what was reserved.
                An amount in a unit that the hold does not have is ignored.
            counts: more amounts by unit, if the hold was reserved by scope: ``commit("0.07", tokens=1800)``.

        Raises:
            HoldConflict: the hold was settled differently before, or metered calls of the hold are in progress.
            StoreUnavailable: the store did not reply within the deadline. A retry is safe.
        """
        return self._runner.run(settle.commit(self.engine.context, self, amount, counts), "commit")

    def release(self) -> Settlement:
        """Return the whole reserved amount to the budgets. The errors are those of :meth:`commit`."""
        return self._runner.run(settle.release(self.engine.context, self), "release")


class Lease(LeaseBase):
    """A prepaid part of a budget, spent by this process without the store: ``with limiter.lease(...) as lease``.

    The lease prepays one chunk after the other; ``slab`` is the amount of a chunk. :meth:`spend` and :meth:`reserve`
    decide at once. :meth:`acquire` waits for the next chunk if necessary. If the budget has no room or the store does
    not reply, the first of these calls raises the error; the start of the block does not.

    At the end of the block, the spend is committed and the unspent amount is released. A chunk with an open grant is
    settled after that grant.
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
        """Reserve an amount as :meth:`reserve` does, but wait for the next chunk if necessary.

        The wait ends at the limiter's deadline.

        Raises:
            BudgetExceeded: neither the lease nor the store has room.
            StoreUnavailable: the lease has no room, and the store does not reply.
            InvalidAmount: the amount is not above 0.
        """
        units = self.to_units(amount, positive=True)
        if not self._waiters and (grant := self.try_reserve(units)) is not None:
            return grant
        return self._runner.acquire(self, units)


class BudgetLimiter(LimiterBase):
    """A limiter whose caps are shared by all replicas with the same store and tenant.

    Use it as ``with BudgetLimiter(url, [Budget("agent", limit="5.00")]) as limiter``. Threads may
    share it. Calls that are made during a round trip to the store share the next round trip.
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
        """Connect to the store. If the store is down, the start still succeeds, and calls fail until the store replies.

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
        """Wait for the calls in progress, for at most twice the ``timeout``, then disconnect."""
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
        """Reserve an estimated amount before the work.

        If a mapping is given, the amounts are reserved in all of its budgets, or in none.

        Args:
            budget: one name, together with ``amount``; or a mapping of names to amounts, without ``amount``. A denial
                names the first budget without room.
            id: the idempotency key: a second call with the same id and contents returns the same hold, marked
                ``replayed``. If not given, an id is generated.
            ttl: seconds, 1 to 86400, after which the hold expires if it is neither extended nor settled.
            on_expiry: the charge for the hold if it expires. ``charge``: the whole reservation; ``accrued``: the
                reported use; ``release``: nothing.
            operation: a label for the ledger.
            owner: the client for which the HTTP service reserves. In that service, no other client except an admin can
                settle the hold after its expiry.

        Raises:
            BudgetExceeded: a budget has no room; nothing was written.
            TooManyHolds, TooManyBudgets: the tenant has the maximum number of holds or budgets; nothing was written.
            HoldConflict: the id is in use with other contents.
            DefinitionConflict: the store has another unit, period, timezone or kind of a budget; nothing was written.
            InvalidArgument, UnknownBudget: an argument is invalid; nothing was sent.
            StoreUnavailable: the store did not reply within the deadline (policy ``deny``).
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
        """Reserve an amount for a ``with`` block, and settle the hold when the block ends.

        While the block runs, a heartbeat extends the hold at every third of ``ttl``. The end of the block settles the
        hold as follows:

        - If the block ends normally, the accrued amount is committed. If nothing was accrued, the whole reservation is
          committed; but if metered calls were made and cost nothing, the hold is released.
        - If the block raises or is cancelled, the accrued amount is committed. If nothing was accrued, the hold is
          released. With ``on_error="charge"``, the hold is left to expire instead; ``on_expiry`` sets its charge.
        - If the hold was settled inside the block, by the hold or by its id, that settlement stays.
        - If metered calls of the block are still in progress, the hold stays open until the last of them settles it.

        Raises:
            As for :meth:`reserve` and :meth:`commit`.
        """
        check_on_error(on_error)
        hold = self.reserve(budget, amount, id=id, ttl=ttl, on_expiry=on_expiry, operation=operation, owner=owner)
        with self.keep(hold, on_error=on_error):
            yield hold

    @contextmanager
    def keep(self, hold: Hold, *, on_error: OnError = "release") -> Iterator[Hold]:
        """Send heartbeats for an existing hold while a ``with`` block runs; then settle it as :meth:`hold` does."""
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
        """Settle a hold whose block has ended, as :meth:`hold` describes. Guards of LLM clients call this, too.

        Args:
            failed: whether the block raised.
            stop: a function that stops the heartbeats.
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
        """Prepay a part of a budget, so that reservations from this part need no store; use as ``with`` block.

        The part is prepaid in chunks. The store shows each chunk as held, and charges the chunk if this process dies.
        The sum of all replicas stays below the cap.

        Args:
            slab: the amount of a chunk. If the budget has less, the chunk is smaller.
            low_water: if less than this amount is left, the next chunk is requested; by default half of a chunk.
            ttl: seconds after which the store charges the chunks of a process that sends no heartbeat.
            idle: seconds without use after which chunks are released; if ``None``, unused chunks are kept.
            operation: the label of the chunks, in lists of holds and in the ledger.

        Raises:
            InvalidArgument, UnknownBudget: an option is not usable, or the budget is of kind ``slots``.
        """
        options = {"low_water": low_water, "ttl": ttl, "idle": idle, "operation": operation}
        return Lease(self._runner, self.engine.lease_calls, budget, slab, **options)

    def commit(self, id: str, amount: Amounts | None = None) -> Settlement:
        """Commit a hold by its id, whichever process reserved it; see :meth:`Hold.commit`.

        Raises:
            UnknownHold: the store has no hold of this id, or has forgotten it after its settlement.
        """
        return self._runner.run(settle.settle_by_id(self.engine.context, id, amount), "commit")

    def release(self, id: str, *, operator: bool = False) -> Settlement:
        """Release a hold by its id, whichever process reserved it.

        The release of an open hold is final. The release of an unconfirmed hold is not: a later commit by the worker
        still counts.

        Args:
            operator: release the hold for a worker that seems dead. A later commit by the worker then counts even if
                the hold was open.
        """
        flow = settle.settle_by_id(self.engine.context, id, None, released=True, by_operator=operator)
        return self._runner.run(flow, "release")

    def extend(self, id: str, ttl: float | None = None, *, accrued: Amounts | None = None) -> HoldView:
        """Send a heartbeat for a hold by its id, whichever process reserved it; see :meth:`Hold.extend`.

        Args:
            ttl: seconds from now to the new deadline. If ``None``, the new deadline is 900 seconds from now, unless the
                present deadline is later.
            accrued: the total use so far; if ``None``, no use is reported.
        """
        return self._runner.run(extend.extend_by_id(self.engine.context, id, ttl, accrued), "extend")

    def grow(self, id: str, amounts: Mapping[str, AmountIn], *, ttl: float = TTL_DEFAULT_S) -> HoldView:
        """Raise the reserved amounts of a hold, found by its id, to new totals. All totals are raised, or none.

        Since ``amounts`` are totals, a retry is harmless.

        Args:
            ttl: for an expired hold, the seconds from now to the new deadline. An open hold keeps its deadline.
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
        """Record spend that was not reserved. The store never refuses it for lack of budget.

        Raises:
            HoldConflict: the id is in use with other contents.
            StoreUnavailable: the store did not reply within the deadline (policy ``deny``). A retry with the same id is
                safe.
        """
        return self._runner.run(settle.record(self.engine.context, budget, amount, id, operation), "record")

    # -- reads ---------------------------------------------------------------------------------------------------------

    def status(self, budget: str, *, complete: bool = False) -> Status:
        """Read a budget's current window.

        After the store has lost data, the replicas replay what they know, and figures may be incomplete until the time
        ``recovering_until``.

        Args:
            complete: wait for these replays, and raise ``StoreUnavailable`` if they take too long. If false, incomplete
                figures may be returned.

        Raises:
            UnknownBudget: this limiter does not have the budget.
            DefinitionConflict: the store has another unit, period, timezone or kind of the budget.
            StoreUnavailable: the figures are unknown; the budget may be exhausted.
        """
        return self._runner.run(read.status(self.engine.context, [budget], complete=complete), "status")[0]

    def statuses(self, *, complete: bool = False) -> Statuses:
        """Read all budgets of this limiter, at one instant; ``complete`` as for :meth:`status`.

        The list omits a budget whose figures are unknown. The list's attribute ``unavailable`` maps the name of such a
        budget to the error.
        """
        return self._runner.run(read.statuses(self.engine.context, complete=complete), "status")

    def check(self) -> dict[str, str | None]:
        """Check whether the store can hold budgets safely; return each check's fault, or ``None`` if there is none.

        ``store``: the store replies, accepts the login, and can be written to. ``policy``: the store's
        ``maxmemory-policy`` is ``noeviction``. ``scripts``: the store runs the Lua scripts; the fault names each
        command that the store refuses.
        """
        return self._runner.run(readiness.check(self.engine.context), "check")

    def get(self, id: str) -> HoldView:
        """Read a hold by id.

        Raises:
            UnknownHold: the store has no hold of this id, or has forgotten it after its settlement.
        """
        return self._runner.run(read.hold_view(self.engine.context, id), "get")

    def holds(self, budget: str, *, limit: int = 100, cursor: str | None = None) -> Page[HoldView]:
        """Read the holds of a budget: first the open, then the unconfirmed ones, each with the latest deadline first.

        Args:
            limit: holds per page, 1 to 1000.
            cursor: ``next_cursor`` of the previous page; ``None`` for the first page.
        """
        return self._runner.run(read.holds(self.engine.context, budget, limit, cursor), "holds")

    def ledger(
        self, budget: str, window: str | None = None, *, limit: int = 100, cursor: str | None = None
    ) -> Page[LedgerEntry]:
        """Read the ledger entries of a window, newest first.

        Args:
            window: the window's name; by default the current window.
            limit: entries per page, 1 to 1000.
            cursor: ``next_cursor`` of the previous page; ``None`` for the first page.
        """
        return self._runner.run(read.ledger(self.engine.context, budget, window, limit, cursor), "ledger")

    def execute(self, command: Command, operation: str) -> Any:
        """Run a script or command on keys of the tenant that belong to no budget. The agent uses this method.

        If a reply is lost, the command is sent again until the deadline, so the store may execute the command twice.

        Raises:
            StoreUnavailable: the store did not reply within the deadline.
        """
        return self._runner.run(_execute(command), operation)

    # -- limits --------------------------------------------------------------------------------------------------------

    def set_limit(
        self,
        budget: str,
        limit: AmountIn | None,
        until: datetime | str | None = None,
        *,
        by: str = "",
        reason: str = "",
    ) -> Status:
        """Set a limit at run time, for all replicas. This limit overrides the configured limit.

        Args:
            limit: the new limit; ``None`` removes the cap.
            until: the end of the new limit: an aware datetime, or ``"window"`` for the end of the current window. If
                ``None``, the limit has no end.
            by: who sets the limit, for the log of :meth:`changes`.
            reason: why, for the same log.
        """
        flow = limits.set_limit(self.engine.context, budget, limit, until, by, reason)
        return self._runner.run(flow, "set_limit")

    def clear_limit(self, budget: str, *, by: str = "", reason: str = "") -> Status:
        """Remove the limit that was set at run time, so that the configured limit applies again.

        Args:
            by: who clears the limit, for the log of :meth:`changes`.
            reason: why, for the same log.
        """
        flow = limits.clear_limit(self.engine.context, budget, by, reason)
        return self._runner.run(flow, "clear_limit")

    def changes(self, limit: int = 100, cursor: str | None = None) -> Page[Change]:
        """Read the log of changes that were made at run time, newest first. The store keeps the last 10,000.

        After the store has lost data, the log may lack entries, because replicas do not replay it.

        Args:
            limit: entries per page, 1 to 1000.
            cursor: ``next_cursor`` of the previous page; ``None`` for the first page.
        """
        return self._runner.run(changes.changes(self.engine.context, limit, cursor), "changes")

    # -- definitions ---------------------------------------------------------------------------------------------------

    def migrate(self, budget: str) -> Migration:
        """Replace the definition of a budget (unit, kind, period, timezone) in the store by this limiter's definition.

        The new definition applies to the next call of every replica. Replicas with the new definition can reserve and
        record. The other replicas raise :class:`~ktrdr_budget.errors.DefinitionConflict`.

        Open holds are settled in the windows that admitted them. Spend under the former definition stays in its window,
        which continues if the budget is migrated back. A limit that was set at run time is kept if the unit is the
        same.

        Raises:
            UnknownBudget: this limiter has no budget of this name.
            StoreUnavailable: the store did not reply. A retry is harmless.
        """
        return self._runner.run(limits.migrate(self.engine.context, budget), "migrate")
