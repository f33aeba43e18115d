"""The asynchronous limiter: the store enforces one spend cap for all replicas."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from types import TracebackType
from typing import Any, Literal

from ktrdr_budget.engine.batching.breaker import StoreState
from ktrdr_budget.engine.batching.pending import Observer
from ktrdr_budget.engine.calls import changes, extend, limits, read, readiness, reserve, settle
from ktrdr_budget.engine.calls.context import Flow
from ktrdr_budget.engine.engine import Engine
from ktrdr_budget.engine.leases.lease import IDLE_DEFAULT_S, LEASE_TTL_DEFAULT_S
from ktrdr_budget.engine.protocol.amounts import Amounts
from ktrdr_budget.engine.protocol.keys import Keys
from ktrdr_budget.engine.protocol.requests import Command
from ktrdr_budget.engine.replica.hold import HoldBase, OnError, check_on_error, current_hold, restore_hold
from ktrdr_budget.engine.replica.journal import Repair
from ktrdr_budget.engine.replica.state import MAX_BUDGETS, MAX_HOLDS, RETENTION_DAYS
from ktrdr_budget.engine.runner import AsyncRunner
from ktrdr_budget.engine.stores import store_for
from ktrdr_budget.engine.transport.credentials import Credentials, CredentialSource
from ktrdr_budget.engine.transport.durability import Durability, check_durability
from ktrdr_budget.errors import BudgetError, InvalidArgument, StoreError, StoreUnavailable, shown
from ktrdr_budget.hold import AsyncHold
from ktrdr_budget.lease import AsyncLease
from ktrdr_budget.models import (
    TTL_DEFAULT_S,
    Budget,
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
from ktrdr_budget.money import Amount, AmountIn

__all__ = ["AsyncBudgetLimiter", "AsyncHold"]

logger = logging.getLogger("ktrdr_budget")

OnStoreError = Literal["deny", "allow", "lease"]


class LimiterBase:
    """Base class of the sync and the async limiter: their options and figures.

    Args:
        url: the store: ``redis://``, ``rediss://``, ``unix://``, ``redis+cluster://`` or ``redis+sentinel://`` (all
            forms: :mod:`ktrdr_budget.engine.transport.urls`). If ``None``, the limiter uses the embedded server of
            ``data_dir``, and starts this server if it does not run.
        budgets: the budgets of this replica, each with its configured limit.
        tenant: a name that is part of every key. Budgets of different tenants are separate.
        timeout: the deadline of each call, in seconds.
        on_store_error: the policy for calls that cannot reach the store.
            ``deny``: raise :class:`~ktrdr_budget.errors.StoreUnavailable`.
            ``allow``: admit the call without a check of the cap, and record the spend once the store replies.
            ``lease``: take holds from chunks of money that the limiter has prepaid (``lease_slab``), so that the cap
            is kept. Only this process knows these holds. The store records the spend of each chunk as one entry, and
            charges the whole chunk if this process dies.
        lease_slab: the amount of a prepaid chunk, for policy ``lease`` only: one amount for all budgets in dollars, or
            a mapping of budgets to amounts. Prepaid money is shown as held.
        data_dir: the data directory of the embedded server (default: ``AGENT_BUDGET_DIR`` or ``data/budget``).
        observer: a function that is called with an ``Observation`` of each finished call. If the spend of a failed call
            reaches the store later, the observer is called again (operation ``resolve``). Exceptions of the observer
            are logged and ignored.
        trace_id: a function that returns the current trace id, for the ledger.
        max_holds: the maximum number of open and unconfirmed holds of the tenant. A further reservation raises
            :class:`~ktrdr_budget.errors.TooManyHolds`.
        max_budgets: the maximum number of budgets of this limiter, and of the tenant in the store.
        retention_days: for how many days, at least 2, the store keeps a window and its ledger after the window's end. A
            day is added, because a hold that is opened just before that end can stay open for a day.
        durability: where a reservation or spend must be stored before its call succeeds: in ``memory`` of the server,
            on a ``replica`` of the server (``WAIT``), or on ``disk`` (``WAITAOF``, from Redis 7.2). If the server does
            not confirm this, the call raises :class:`~ktrdr_budget.errors.StoreUnavailable` with ``ambiguous`` set.
        credential_provider: the source of the login for each new connection: a ``CredentialProvider`` of redis-py, or a
            callable that returns ``(username, password)`` or a password. If ``None``, the login is that of the URL. The
            login for sentinels is always that of the URL.

    Raises:
        InvalidArgument: an option is not usable.
    """

    _hold_class: type[HoldBase]
    _runner_class: Callable[[Engine], Any]
    _new_store = staticmethod(store_for)

    def __init__(
        self,
        url: str | None = None,
        budgets: Iterable[Budget] = (),
        *,
        tenant: str = "default",
        timeout: float = 1.0,
        on_store_error: OnStoreError = "deny",
        lease_slab: AmountIn | Mapping[str, AmountIn] | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        observer: Observer | None = None,
        trace_id: Callable[[], str] | None = None,
        max_holds: int = MAX_HOLDS,
        max_budgets: int = MAX_BUDGETS,
        retention_days: int = RETENTION_DAYS,
        durability: Durability = "memory",
        credential_provider: CredentialSource | None = None,
    ) -> None:
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= 3600:
            raise InvalidArgument(f"timeout must be more than 0 and at most 3600 seconds, not {shown(timeout)}")
        check_durability(durability)
        directory = _directory(data_dir)
        self.engine = Engine(
            tenant,
            budgets,
            lambda state: self._new_store(url, directory, state.keys.meta, credential_provider),
            self._hold_class,
            timeout_s=float(timeout),
            on_store_error=on_store_error,
            lease_slab=lease_slab,
            observer=observer,
            trace_id=trace_id,
            max_holds=max_holds,
            max_budgets=max_budgets,
            retention_days=retention_days,
        )
        """The implementation of this limiter. Only the package and its tests may use it."""
        self.engine.store.durability = durability
        self.engine.runner = self._runner_class(self.engine)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} tenant={self.tenant!r} store={self.store_url!r} budgets={list(self.budgets)}>"

    @property
    def tenant(self) -> str:
        """The tenant that the budgets belong to."""
        return self.engine.state.tenant

    @property
    def budgets(self) -> Mapping[str, Budget]:
        """The configured budgets, by name."""
        return self.engine.state.budgets

    @property
    def store_url(self) -> str:
        """The store's URL, without secrets."""
        return self.engine.store.shown

    @property
    def store_address(self) -> str | None:
        """The store's URL, including secrets; ``None`` if the embedded server has not been started."""
        return self.engine.store.address

    @property
    def store_credentials(self) -> Credentials | None:
        """The source of each connection's login; ``None`` if no ``credential_provider`` was given."""
        return self.engine.store.credentials

    @property
    def keys(self) -> Keys:
        """The names of the tenant's keys in the store."""
        return self.engine.state.keys

    @property
    def replica_id(self) -> str:
        """The id of this limiter in the store. In a forked child, the limiter has a new id."""
        return self.engine.state.replica_id

    @property
    def losses(self) -> int:
        """How often this replica detected that the store had lost data (P13)."""
        return self.engine.state.losses

    @property
    def deferred(self) -> int:
        """How many settlements wait until the store replies again (policies ``allow`` and ``lease``)."""
        return self.engine.outbox.deferred

    @property
    def unresolved(self) -> int:
        """How many requests have an unknown outcome, because their reply was lost; at most 10,000."""
        return self.engine.outbox.in_doubt

    @property
    def resolved(self) -> Mapping[str, int]:
        """How many :attr:`unresolved` requests have ended, by outcome.

        The outcomes are :data:`ktrdr_budget.engine.replica.outbox.OUTCOMES`.
        """
        return self.engine.outbox.outcomes

    @property
    def store_state(self) -> StoreState:
        """The state of the circuit breaker.

        ``closed``: calls are sent. ``open``: the store does not reply, and calls fail at once.
        """
        return self.engine.dispatcher.breaker.state

    @property
    def repaired(self) -> Repair:
        """Counts of what this replica has replayed after data losses, and of what could not be replayed (P13)."""
        return self.engine.dispatcher.repair.total

    @property
    def prepaid(self) -> Mapping[str, Amount]:
        """The amount of each budget that this process could reserve now without the store, under policy ``lease``.

        Empty under the other policies.
        """
        return self.engine.policy.remaining


class AsyncBudgetLimiter(LimiterBase):
    """A limiter whose caps are shared by all replicas with the same store and tenant.

    Use it as ``async with AsyncBudgetLimiter(url, [Budget("agent", limit="5.00")]) as limiter``. It belongs to the
    event loop of its first use. Calls that are made during a round trip to the store share the next round trip.
    """

    _hold_class = AsyncHold
    _runner_class = AsyncRunner

    @property
    def _runner(self) -> AsyncRunner:
        return self.engine.runner  # type: ignore[no-any-return]

    async def __aenter__(self) -> AsyncBudgetLimiter:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Connect to the store. If the store is down, the start still succeeds, and calls fail until the store replies.

        Raises:
            StoreError: the embedded server does not start, or the store refuses this user.
        """
        await self._runner.open()
        try:
            await self._runner.run(readiness.begin(self.engine.context, self.store_url), "start")
        except StoreError:
            raise
        except StoreUnavailable as error:
            logger.warning("starting without the store: %s", error)

    async def close(self) -> None:
        """Wait for the calls in progress, for at most twice the ``timeout``, then disconnect."""
        await self._runner.close()

    # -- reserve and settle --------------------------------------------------------------------------------------------

    async def reserve(
        self,
        budget: str | Mapping[str, AmountIn],
        amount: AmountIn | None = None,
        *,
        id: str | None = None,
        ttl: float = TTL_DEFAULT_S,
        on_expiry: OnExpiry = "charge",
        operation: str = "",
        owner: str = "",
    ) -> AsyncHold:
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
        hold: AsyncHold = await self._runner.run(flow, "reserve")
        return hold

    @asynccontextmanager
    async def hold(
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
    ) -> AsyncIterator[AsyncHold]:
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
        hold = await self.reserve(budget, amount, id=id, ttl=ttl, on_expiry=on_expiry, operation=operation, owner=owner)
        async with self.keep(hold, on_error=on_error):
            yield hold

    @asynccontextmanager
    async def keep(self, hold: AsyncHold, *, on_error: OnError = "release") -> AsyncIterator[AsyncHold]:
        """Send heartbeats for an existing hold while a ``with`` block runs; then settle it as :meth:`hold` does."""
        check_on_error(on_error)
        stop_heartbeat = self._runner.start_heartbeat(hold)
        outer = current_hold.set(hold)
        try:
            yield hold
        except BaseException:
            await self.leave(hold, True, on_error, stop_heartbeat)
            raise
        else:
            await self.leave(hold, False, on_error, stop_heartbeat)
        finally:
            restore_hold(outer)

    async def leave(self, hold: HoldBase, failed: bool, on_error: OnError, stop: Callable[[], object]) -> None:
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
            await self._runner.settle(flow, "settle")
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
    ) -> AsyncLease:
        """Prepay a part of a budget, so that reservations from this part need no store; use as ``async with`` block.

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
        return AsyncLease(self._runner, self.engine.lease_calls, budget, slab, **options)

    async def commit(self, id: str, amount: Amounts | None = None) -> Settlement:
        """Commit a hold by its id, whichever process reserved it; see :meth:`AsyncHold.commit`.

        Raises:
            UnknownHold: the store has no hold of this id, or has forgotten it after its settlement.
        """
        return await self._runner.run(settle.settle_by_id(self.engine.context, id, amount), "commit")

    async def release(self, id: str, *, operator: bool = False) -> Settlement:
        """Release a hold by its id, whichever process reserved it.

        The release of an open hold is final. The release of an unconfirmed hold is not: a later commit by the worker
        still counts.

        Args:
            operator: release the hold for a worker that seems dead. A later commit by the worker then counts even if
                the hold was open.
        """
        flow = settle.settle_by_id(self.engine.context, id, None, released=True, by_operator=operator)
        return await self._runner.run(flow, "release")

    async def extend(self, id: str, ttl: float | None = None, *, accrued: Amounts | None = None) -> HoldView:
        """Send a heartbeat for a hold by its id, whichever process reserved it; see :meth:`AsyncHold.extend`.

        Args:
            ttl: seconds from now to the new deadline. If ``None``, the new deadline is 900 seconds from now, unless the
                present deadline is later.
            accrued: the total use so far; if ``None``, no use is reported.
        """
        return await self._runner.run(extend.extend_by_id(self.engine.context, id, ttl, accrued), "extend")

    async def grow(self, id: str, amounts: Mapping[str, AmountIn], *, ttl: float = TTL_DEFAULT_S) -> HoldView:
        """Raise the reserved amounts of a hold, found by its id, to new totals. All totals are raised, or none.

        Since ``amounts`` are totals, a retry is harmless.

        Args:
            ttl: for an expired hold, the seconds from now to the new deadline. An open hold keeps its deadline.
        """
        return await self._runner.run(extend.grow_by_id(self.engine.context, id, amounts, ttl), "grow")

    async def record(
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
        return await self._runner.run(settle.record(self.engine.context, budget, amount, id, operation), "record")

    # -- reads ---------------------------------------------------------------------------------------------------------

    async def status(self, budget: str, *, complete: bool = False) -> Status:
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
        return (await self._runner.run(read.status(self.engine.context, [budget], complete=complete), "status"))[0]

    async def statuses(self, *, complete: bool = False) -> Statuses:
        """Read all budgets of this limiter, at one instant; ``complete`` as for :meth:`status`.

        The list omits a budget whose figures are unknown. The list's attribute ``unavailable`` maps the name of such a
        budget to the error.
        """
        return await self._runner.run(read.statuses(self.engine.context, complete=complete), "status")

    async def check(self) -> dict[str, str | None]:
        """Check whether the store can hold budgets safely; return each check's fault, or ``None`` if there is none.

        ``store``: the store replies, accepts the login, and can be written to. ``policy``: the store's
        ``maxmemory-policy`` is ``noeviction``. ``scripts``: the store runs the Lua scripts; the fault names each
        command that the store refuses.
        """
        return await self._runner.run(readiness.check(self.engine.context), "check")

    async def get(self, id: str) -> HoldView:
        """Read a hold by id.

        Raises:
            UnknownHold: the store has no hold of this id, or has forgotten it after its settlement.
        """
        return await self._runner.run(read.hold_view(self.engine.context, id), "get")

    async def holds(self, budget: str, *, limit: int = 100, cursor: str | None = None) -> Page[HoldView]:
        """Read the holds of a budget: first the open, then the unconfirmed ones, each with the latest deadline first.

        Args:
            limit: holds per page, 1 to 1000.
            cursor: ``next_cursor`` of the previous page; ``None`` for the first page.
        """
        return await self._runner.run(read.holds(self.engine.context, budget, limit, cursor), "holds")

    async def ledger(
        self, budget: str, window: str | None = None, *, limit: int = 100, cursor: str | None = None
    ) -> Page[LedgerEntry]:
        """Read the ledger entries of a window, newest first.

        Args:
            window: the window's name; by default the current window.
            limit: entries per page, 1 to 1000.
            cursor: ``next_cursor`` of the previous page; ``None`` for the first page.
        """
        return await self._runner.run(read.ledger(self.engine.context, budget, window, limit, cursor), "ledger")

    async def execute(self, command: Command, operation: str) -> Any:
        """Run a script or command on keys of the tenant that belong to no budget. The agent uses this method.

        If a reply is lost, the command is sent again until the deadline, so the store may execute the command twice.

        Raises:
            StoreUnavailable: the store did not reply within the deadline.
        """
        return await self._runner.run(_execute(command), operation)

    # -- limits --------------------------------------------------------------------------------------------------------

    async def set_limit(
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
        return await self._runner.run(flow, "set_limit")

    async def clear_limit(self, budget: str, *, by: str = "", reason: str = "") -> Status:
        """Remove the limit that was set at run time, so that the configured limit applies again.

        Args:
            by: who clears the limit, for the log of :meth:`changes`.
            reason: why, for the same log.
        """
        flow = limits.clear_limit(self.engine.context, budget, by, reason)
        return await self._runner.run(flow, "clear_limit")

    async def changes(self, limit: int = 100, cursor: str | None = None) -> Page[Change]:
        """Read the log of changes that were made at run time, newest first. The store keeps the last 10,000.

        After the store has lost data, the log may lack entries, because replicas do not replay it.

        Args:
            limit: entries per page, 1 to 1000.
            cursor: ``next_cursor`` of the previous page; ``None`` for the first page.
        """
        return await self._runner.run(changes.changes(self.engine.context, limit, cursor), "changes")

    # -- definitions ---------------------------------------------------------------------------------------------------

    async def migrate(self, budget: str) -> Migration:
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
        return await self._runner.run(limits.migrate(self.engine.context, budget), "migrate")


def _directory(data_dir: object) -> str | None:
    if data_dir is None or isinstance(data_dir, str):
        return data_dir
    if isinstance(data_dir, os.PathLike) and isinstance(path := os.fspath(data_dir), str):
        return path
    raise InvalidArgument(f"data_dir must be the path of a directory, not {shown(data_dir)}")


def _execute(command: Command) -> Flow[Any]:
    return (yield command)
