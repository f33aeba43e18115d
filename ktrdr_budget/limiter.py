"""The asynchronous limiter: one spend cap, held by the store, for every replica."""

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
from ktrdr_budget.engine.calls import extend, limits, read, readiness, reserve, settle
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
    """Options and figures of the sync and the async limiter.

    Args:
        url: ``redis://``, ``rediss://``, ``unix://``, ``redis+cluster://`` or ``redis+sentinel://`` (all forms:
            :mod:`ktrdr_budget.engine.transport.urls`); ``None`` starts or joins the embedded server of ``data_dir``.
        budgets: the budgets of this replica, each with its configured limit.
        tenant: part of every key; budgets of different tenants are separate.
        timeout: the deadline of each call, in seconds.
        on_store_error: the policy for calls that cannot reach the store: ``deny`` (raise
            :class:`~ktrdr_budget.errors.StoreUnavailable`); ``allow``: admit without a check of the cap, and record the
            spend once the store replies; or ``lease``: draw holds from prepaid leases (``lease_slab``), so that the cap
            holds without the store. Such holds are known in this process only. The store records the spend of each
            chunk as one entry, and charges the whole chunk if this process dies.
        lease_slab: the prepaid amount under policy ``lease``, which shows as held: one amount for each budget in
            dollars, or a mapping of budgets to amounts.
        data_dir: the embedded server's data (default: ``AGENT_BUDGET_DIR`` or ``data/budget``).
        observer: called with an ``Observation`` of each finished call. If the spend of a failed call reaches the store
            later, it gets another one (operation ``resolve``). Exceptions of the observer are logged and ignored.
        trace_id: returns the current trace id, for the ledger.
        max_holds: how many holds, open and unconfirmed, the tenant may have; one more raises
            :class:`~ktrdr_budget.errors.TooManyHolds`.
        max_budgets: how many budgets this limiter, and the tenant in the store, may have.
        retention_days: how long the store keeps an ended window and its ledger, at least 2; a day is added for holds
            that were opened at the window's end.
        durability: where a reservation or spend must be stored before its call succeeds: in ``memory`` of the server,
            on a ``replica`` (``WAIT``), or on ``disk`` (``WAITAOF``, from Redis 7.2). Without that confirmation, the
            call raises :class:`~ktrdr_budget.errors.StoreUnavailable`, ``ambiguous``.
        credential_provider: a ``CredentialProvider`` of redis-py, or a callable that returns ``(username, password)``
            or a password: called at each connection, instead of a login in the URL. The login of sentinels stays in the
            URL.

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
        """The parts of this limiter; for the package and its tests."""
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
        """The store's URL, secrets included; ``None`` for an embedded server that has not been started."""
        return self.engine.store.address

    @property
    def store_credentials(self) -> Credentials | None:
        """The source of each connection's login; ``None`` without a ``credential_provider``."""
        return self.engine.store.credentials

    @property
    def keys(self) -> Keys:
        """The tenant's keys."""
        return self.engine.state.keys

    @property
    def replica_id(self) -> str:
        """The id of this limiter in the store; another one after a fork."""
        return self.engine.state.replica_id

    @property
    def losses(self) -> int:
        """How often this replica detected that the store had lost data (P13)."""
        return self.engine.state.losses

    @property
    def deferred(self) -> int:
        """Settlements to send once the store replies (policies ``allow`` and ``lease``)."""
        return self.engine.outbox.deferred

    @property
    def unresolved(self) -> int:
        """Requests whose reply was lost and whose outcome is still unknown; at most 10,000."""
        return self.engine.outbox.in_doubt

    @property
    def resolved(self) -> Mapping[str, int]:
        """Former :attr:`unresolved` requests, by outcome (:data:`ktrdr_budget.engine.replica.outbox.OUTCOMES`)."""
        return self.engine.outbox.outcomes

    @property
    def store_state(self) -> StoreState:
        """The circuit breaker: ``closed``: calls are sent; ``open``: the store does not reply, and calls fail fast."""
        return self.engine.dispatcher.breaker.state

    @property
    def repaired(self) -> Repair:
        """Counts of what this replica replayed after data losses, and of what its journal had already dropped (P13)."""
        return self.engine.dispatcher.repair.total

    @property
    def prepaid(self) -> Mapping[str, Amount]:
        """The amounts that policy ``lease`` could grant now without the store, per budget.

        Empty under other policies.
        """
        return self.engine.policy.remaining


class AsyncBudgetLimiter(LimiterBase):
    """One hard cap for every replica that uses the same store and tenant.

    Use it as ``async with AsyncBudgetLimiter(url, [Budget("agent", limit="5.00")]) as limiter``. It belongs to the
    event loop of its first use. Calls made during a round trip are sent together in the next one.
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
        """Connect. Succeeds even if the store is down; calls then fail until it is back.

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
        """Finish calls in flight, within twice the deadline, and disconnect."""
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
        """Reserve, heartbeat at a third of ``ttl`` while the block runs, and settle at its end.

        If the hold was settled inside the block, also by its id, the end does nothing. Normal exit: commits what was
        accrued, or the whole reservation if nothing was. Exception or cancellation: commits what was accrued, or
        releases if nothing was; ``on_error="charge"`` keeps the hold instead, and it expires. If metered calls inside
        the block are still in progress, the hold stays open, and the last of them settles it.

        Raises:
            As for :meth:`reserve` and :meth:`commit`.
        """
        check_on_error(on_error)
        hold = await self.reserve(budget, amount, id=id, ttl=ttl, on_expiry=on_expiry, operation=operation, owner=owner)
        async with self.keep(hold, on_error=on_error):
            yield hold

    @asynccontextmanager
    async def keep(self, hold: AsyncHold, *, on_error: OnError = "release") -> AsyncIterator[AsyncHold]:
        """Send heartbeats for a hold that was reserved before, and settle it at the end, as :meth:`hold` does."""
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
        """Prepay a part of a budget, to reserve from it without the store; use the result with ``async with``.

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
        return AsyncLease(self._runner, self.engine.lease_calls, budget, slab, **options)

    async def commit(self, id: str, amount: Amounts | None = None) -> Settlement:
        """Commit a hold of any process by its id; see :meth:`AsyncHold.commit`.

        Raises:
            UnknownHold: no such hold, or settled longer ago than ids are remembered.
        """
        return await self._runner.run(settle.settle_by_id(self.engine.context, id, amount), "commit")

    async def release(self, id: str, *, operator: bool = False) -> Settlement:
        """Release a hold of any process by its id: an open one for good, an unconfirmed one as an operator would.

        Args:
            operator: release it for a worker that seems dead. If the worker returns after all, its commit still counts.
        """
        flow = settle.settle_by_id(self.engine.context, id, None, released=True, by_operator=operator)
        return await self._runner.run(flow, "release")

    async def extend(self, id: str, ttl: float | None = None, *, accrued: Amounts | None = None) -> HoldView:
        """Send a heartbeat by id; ``accrued`` is the total so far. See :meth:`AsyncHold.extend`.

        Without a ``ttl``, the deadline becomes at least 900 seconds from now, and never becomes earlier.
        """
        return await self._runner.run(extend.extend_by_id(self.engine.context, id, ttl, accrued), "extend")

    async def grow(self, id: str, amounts: Mapping[str, AmountIn], *, ttl: float = TTL_DEFAULT_S) -> HoldView:
        """Raise a reservation to new totals by id, all budgets or none, so that a retry is harmless.

        ``ttl`` matters only if the hold had expired.
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
        """Record spend without a reservation; it is never refused for lack of budget.

        Raises:
            HoldConflict: the id is in use with other contents.
            StoreUnavailable: no reply within the deadline (policy ``deny``). A retry with the same id is safe.
        """
        return await self._runner.run(settle.record(self.engine.context, budget, amount, id, operation), "record")

    # -- reads ---------------------------------------------------------------------------------------------------------

    async def status(self, budget: str, *, complete: bool = False) -> Status:
        """Read a budget's current window.

        After a loss of data, ``recovering_until`` is set while other replicas may still replay their journals.

        Args:
            complete: wait for these replays; raise ``StoreUnavailable`` rather than return incomplete figures.

        Raises:
            UnknownBudget: this limiter does not have the budget.
            DefinitionConflict: the store has another unit, period, timezone or kind of the budget.
            StoreUnavailable: the figures are unknown; the budget may be exhausted.
        """
        return (await self._runner.run(read.status(self.engine.context, [budget], complete=complete), "status"))[0]

    async def statuses(self, *, complete: bool = False) -> Statuses:
        """Read all budgets of this limiter, at one instant; ``complete`` as for :meth:`status`.

        A budget whose figures are unknown is not in the list; the list's attribute ``unavailable`` has its error, by
        name.
        """
        return await self._runner.run(read.statuses(self.engine.context, complete=complete), "status")

    async def check(self) -> dict[str, str | None]:
        """Check whether the store can hold budgets safely; return the fault found by each check, or ``None``.

        ``store``: it replies, accepts the login, and can be written to. ``policy``: its ``maxmemory-policy`` is
        ``noeviction``. ``scripts``: they run; each command that the store refuses in them is named.
        """
        return await self._runner.run(readiness.check(self.engine.context), "check")

    async def get(self, id: str) -> HoldView:
        """Read a hold by id.

        Raises:
            UnknownHold: no such hold, or settled longer ago than ids are remembered.
        """
        return await self._runner.run(read.hold_view(self.engine.context, id), "get")

    async def holds(self, budget: str, *, limit: int = 100, cursor: str | None = None) -> Page[HoldView]:
        """Read the open, then the unconfirmed holds of a budget, the latest deadline first; ``limit`` 1 to 1000."""
        return await self._runner.run(read.holds(self.engine.context, budget, limit, cursor), "holds")

    async def ledger(
        self, budget: str, window: str | None = None, *, limit: int = 100, cursor: str | None = None
    ) -> Page[LedgerEntry]:
        """Read the ledger entries of a window (by default the current one), newest first; ``limit`` 1 to 1000."""
        return await self._runner.run(read.ledger(self.engine.context, budget, window, limit, cursor), "ledger")

    async def execute(self, command: Command, operation: str) -> Any:
        """Run a script or command on keys of the tenant that are not the limiter's own; for the agent.

        It is resent after a lost reply until the deadline, so that it may be executed twice.

        Raises:
            StoreUnavailable: no reply within the deadline.
        """
        return await self._runner.run(_execute(command), operation)

    # -- limits --------------------------------------------------------------------------------------------------------

    async def set_limit(self, budget: str, limit: AmountIn | None, until: datetime | str | None = None) -> Status:
        """Change a limit for all replicas: for good, ``until`` an aware datetime, or ``"window"`` (its end).

        A run-time limit overrides the configured one. ``None`` is uncapped.
        """
        return await self._runner.run(limits.set_limit(self.engine.context, budget, limit, until), "set_limit")

    async def clear_limit(self, budget: str) -> Status:
        """Return to the configured limit."""
        return await self._runner.run(limits.clear_limit(self.engine.context, budget), "clear_limit")

    # -- definitions ---------------------------------------------------------------------------------------------------

    async def migrate(self, budget: str) -> Migration:
        """Replace the registered definition of a budget (unit, kind, period, timezone) by this limiter's.

        All replicas obey with their next call: those with the same definition reserve and record at once, the others
        raise :class:`~ktrdr_budget.errors.DefinitionConflict`. Open holds are settled in the windows that admitted
        them, and spend under the former definition stays there: after a migration back, the old window continues. A
        run-time limit is kept, unless it is in another unit.

        Raises:
            UnknownBudget: this limiter was not given it.
            StoreUnavailable: no reply; the same call again is harmless.
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
