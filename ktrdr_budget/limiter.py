"""The asynchronous limiter: one spend cap, held by the store, for every replica."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from types import TracebackType
from typing import Any, Literal

from ktrdr_budget.engine.batching.breaker import StoreState
from ktrdr_budget.engine.batching.dispatcher import Coalescer, Observer
from ktrdr_budget.engine.batching.heartbeat import Heartbeat
from ktrdr_budget.engine.calls.flows import Core
from ktrdr_budget.engine.calls.reads import Flow
from ktrdr_budget.engine.outage.prepaid import Prepaid, check_slabs
from ktrdr_budget.engine.protocol import Command
from ktrdr_budget.engine.protocol.amounts import Amounts
from ktrdr_budget.engine.protocol.keys import Keys
from ktrdr_budget.engine.replica.hold import AsyncHold, HoldBase, OnError, check_on_error, current_hold, restore_hold
from ktrdr_budget.engine.replica.journal import Repair
from ktrdr_budget.engine.replica.state import MAX_BUDGETS, MAX_HOLDS, RETENTION_DAYS, Session
from ktrdr_budget.engine.stores import store_for
from ktrdr_budget.engine.transport.credentials import Credentials, CredentialSource
from ktrdr_budget.engine.transport.durability import Durability, check_durability
from ktrdr_budget.errors import BudgetError, InvalidArgument, StoreError, StoreUnavailable, shown
from ktrdr_budget.lease import IDLE_DEFAULT_S, LEASE_TTL_DEFAULT_S, AsyncLease
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
    """What the sync and the async limiter are made of.

    Args:
        url: ``redis://``, ``rediss://``, ``unix://``, ``redis+cluster://`` or ``redis+sentinel://`` (all forms:
            :mod:`ktrdr_budget.engine.transport.urls`); ``None`` starts or joins the embedded server of ``data_dir``.
        budgets: the budgets of this replica, each with its configured limit.
        tenant: names the slot that all keys live in.
        timeout: seconds within which each call ends.
        on_store_error: ``deny`` (raise :class:`~ktrdr_budget.errors.StoreUnavailable`), or ``allow``: admit unchecked,
            and record the spend when the store is back; or ``lease``: admit only what was prepaid (``lease_slab``), so
            that the cap holds without the store, too.
        lease_slab: under that policy, how much is kept prepaid (and shows as held): an amount for each budget in
            dollars, or a mapping of budgets to amounts.
        data_dir: the embedded server's data (default: ``AGENT_BUDGET_DIR`` or ``data/budget``).
        observer: called with an ``Observation`` of each finished call, and of spend whose call has failed, once the
            store has it (operation ``resolve``); what it raises is logged and changes nothing.
        trace_id: tells the current trace id, for the ledger.
        max_holds: how many holds, open and unconfirmed, the tenant may have; one more raises
            :class:`~ktrdr_budget.errors.TooManyHolds`.
        max_budgets: how many budgets this limiter, and the tenant in the store, may have.
        retention_days: how long the store keeps an ended window and its ledger, at least 2; a day is added for holds
            that were opened at the window's end.
        durability: where what is admitted and spent must be before a call is answered: ``memory`` of the server,
            a ``replica`` (``WAIT``), or its ``disk`` (``WAITAOF``, from Redis 7.2). What is not there in time ends as
            :class:`~ktrdr_budget.errors.StoreUnavailable`, ``ambiguous``.
        credential_provider: a ``CredentialProvider`` of redis-py, or a callable that returns ``(username, password)``
            or a password: asked at each connection, instead of a login in the URL. Sentinels keep theirs in the URL.

    Raises:
        InvalidArgument: an option is not usable.
    """

    _hold_class: type[HoldBase]

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
        if on_store_error not in ("deny", "allow", "lease"):
            raise InvalidArgument(f"on_store_error must be 'deny', 'allow' or 'lease', not {shown(on_store_error)}")
        self._session = Session(
            tenant, budgets, max_holds=max_holds, max_budgets=max_budgets, retention_days=retention_days
        )
        self._session.on_loss = self._report_loss
        self._session.on_policy = self._report_policy
        self._core = Core(self._session, self._hold_class, allow=on_store_error == "allow", trace_id=trace_id)
        if on_store_error == "lease":
            self._core.prepaid = Prepaid(self._core, check_slabs(self._core, lease_slab))
        elif lease_slab is not None:
            raise InvalidArgument(f"lease_slab is for on_store_error='lease', not {on_store_error!r}")
        self._store = store_for(url, _directory(data_dir), self._session.keys.meta, credential_provider)
        check_durability(durability)
        self._store.durability = durability
        self._timeout = float(timeout)
        self._coalescer = Coalescer(self._core, self._store, self._timeout, observer)
        self._core.driver = self._coalescer

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} tenant={self.tenant!r} store={self._store.shown!r} budgets={list(self.budgets)}>"
        )

    @property
    def tenant(self) -> str:
        """Whose budgets these are."""
        return self._session.tenant

    @property
    def budgets(self) -> Mapping[str, Budget]:
        """The configured budgets, by name."""
        return self._session.budgets

    @property
    def store_url(self) -> str:
        """Where the store is, without secrets."""
        return self._store.shown

    @property
    def store_address(self) -> str | None:
        """Where the store is, secrets included; ``None`` for an embedded server that has not been started."""
        return self._store.address

    @property
    def store_credentials(self) -> Credentials | None:
        """What each connection to the store asks for its login; ``None`` without a ``credential_provider``."""
        return self._store.credentials

    @property
    def keys(self) -> Keys:
        """Spells the tenant's keys."""
        return self._session.keys

    @property
    def replica_id(self) -> str:
        """What the store knows this limiter by; another one after a fork."""
        return self._session.replica_id

    @property
    def losses(self) -> int:
        """How often this replica saw that the store had gone back in time (P13)."""
        return self._session.losses

    @property
    def deferred(self) -> int:
        """Spend that an unreachable store has yet to be told (policy ``allow``)."""
        return len(self._core.deferred)

    @property
    def unresolved(self) -> int:
        """Requests whose reply was lost, and of which it is not known yet what became of them; at most 10,000."""
        return self._core.unresolved.count

    @property
    def resolved(self) -> Mapping[str, int]:
        """How many such requests have ended how; the words are those of :mod:`ktrdr_budget.engine.replica.in_doubt`."""
        return self._core.unresolved.outcomes

    @property
    def store_state(self) -> StoreState:
        """``closed``, as a circuit is: calls are sent; ``open``: it does not answer, and they end at once."""
        return self._coalescer.breaker.state

    @property
    def repaired(self) -> Repair:
        """What this replica told the store again after losses, and what was beyond its memory (P13)."""
        return self._coalescer.recovery.total

    @property
    def prepaid(self) -> Mapping[str, Amount]:
        """What could be granted now if the store were away (policy ``lease``), per budget; empty under another."""
        return {} if self._core.prepaid is None else self._core.prepaid.remaining

    def _report_policy(self, fault: str) -> None:
        logger.warning("store at %s: %s", self._store.shown, fault)

    def _report_loss(self) -> None:
        logger.error(
            "the store at %s went back in time and lost writes: replica %s (tenant %s) tells it again what it knows",
            self._store.shown,
            self._session.replica_id,
            self.tenant,
        )


class AsyncBudgetLimiter(LimiterBase):
    """One hard cap for every replica that uses the same store and tenant.

    Use it as ``async with AsyncBudgetLimiter(url, [Budget("agent", limit="5.00")]) as limiter``. It belongs to the
    event loop of its first use; calls that are made there while a round trip is under way travel together in the next.
    """

    _hold_class = AsyncHold

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
        """Connects. A store that is down does not hinder a start: calls say so, and recover by themselves.

        Raises:
            StoreError: the embedded server does not start, or the store refuses this user.
        """
        await self._store.open()
        try:
            await self._coalescer.run(self._core.begin(), "start")
        except StoreError:
            raise
        except StoreUnavailable as error:
            logger.warning("starting without the store: %s", error)

    async def close(self) -> None:
        """Finish what was begun, within twice the deadline, and disconnect; a caller that is cancelled waits for it."""
        closing = asyncio.get_running_loop().create_task(self._close())
        cancelled: asyncio.CancelledError | None = None
        while not closing.done():
            try:
                await asyncio.wait({closing})
            except asyncio.CancelledError as error:  # perhaps at each await: what was begun completes all the same
                cancelled = error
        closing.result()
        if cancelled is not None:
            raise cancelled

    async def _close(self) -> None:
        for lease in list(self._core.leases):
            await lease.closed(all_grants=True)
        await self._coalescer.close()

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
        """Holds an estimate before the work; all budgets of a mapping or none.

        Args:
            budget: a name with ``amount``, or a mapping of names to amounts; the order decides which denial is told.
            id: makes a retry harmless: the same id and contents return the same hold, marked ``replayed``.
            ttl: seconds, 1 to 86400, until the hold expires unless it is extended.
            on_expiry: what an expired hold counts: ``charge`` all, ``accrued`` what was reported, ``release`` nothing.
            operation: a label for the ledger.
            owner: who may settle it once it is unconfirmed (used by the HTTP service).

        Raises:
            BudgetExceeded: no room; nothing was written.
            TooManyHolds, TooManyBudgets: the tenant has as many as it may; nothing was written.
            HoldConflict: the id is in use with other contents.
            DefinitionConflict: the store has another unit, period, timezone or kind of a budget; nothing was written.
            InvalidArgument, UnknownBudget: refused before anything is sent.
            StoreUnavailable: no answer within the deadline (policy ``deny``).
        """
        flow = self._core.reserve(budget, amount, id, ttl, on_expiry, operation, owner)
        return await self._coalescer.run(flow, "reserve")  # type: ignore[no-any-return]

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
        """Reserves, heartbeats at a third of ``ttl`` while the block runs, and settles on leaving.

        Settled inside, also by its id: leaving does nothing. Normal exit: commits what was accrued, or all that was
        reserved if nothing was. Exception or cancellation: commits what was accrued, or releases if nothing was;
        ``on_error="charge"`` keeps the hold instead, and it comes due. If metered calls inside are still under way, the
        hold stays open, and the last of them settles it.

        Raises:
            As for :meth:`reserve` and :meth:`commit`.
        """
        check_on_error(on_error)
        hold = await self.reserve(budget, amount, id=id, ttl=ttl, on_expiry=on_expiry, operation=operation, owner=owner)
        async with self.keep(hold, on_error=on_error):
            yield hold

    @asynccontextmanager
    async def keep(self, hold: AsyncHold, *, on_error: OnError = "release") -> AsyncIterator[AsyncHold]:
        """What :meth:`hold` does with a hold that was reserved before: heartbeats, and settles on leaving."""
        check_on_error(on_error)
        heartbeat = Heartbeat(self._coalescer, hold)
        outer = current_hold.set(hold)
        try:
            yield hold
        except BaseException:
            await self._leave(hold, True, on_error, heartbeat.stop)
            raise
        else:
            await self._leave(hold, False, on_error, heartbeat.stop)
        finally:
            restore_hold(outer)

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
        """Prepays part of a budget, and decides about it without the store: ``async with`` what this returns.

        Slabs show as held, and are charged if this process dies. The sum of all replicas stays below the cap.

        Args:
            slab: how much is prepaid at a time; what fits of it where the budget has less.
            low_water: when less is left, the next slab is asked for; half of a slab by default.
            ttl: seconds after which the store charges a slab of a process that is silent.
            idle: seconds without use after which slabs are given back; ``None``: never.
            operation: the label of the slabs, in lists of holds and in the ledger.

        Raises:
            InvalidArgument, UnknownBudget: an option is not usable, or the budget is one of ``slots``.
        """
        return AsyncLease(
            self._core,
            budget,
            slab,
            timeout=self._timeout,
            low_water=low_water,
            ttl=ttl,
            idle=idle,
            operation=operation,
        )

    async def _leave(self, hold: HoldBase, failed: bool, on_error: OnError, stop: Callable[[], object]) -> None:
        if hold.leave_to_calls(failed, on_error, stop):
            return
        stop()
        flow = hold.exit_flow(failed, on_error)
        if flow is None:
            return
        try:
            await self._conclude(flow, "settle")
        except BudgetError as error:
            if not failed:
                raise
            logger.warning("hold %s could not be settled: %s", hold.id, error)  # the block raises its own error

    async def _conclude(self, flow: Flow[Any], operation: str) -> Any:
        """Settle for a caller that cannot retry: what the store does not answer is sent again once it does."""
        return await self._coalescer.run(flow, operation, kept=True)

    async def commit(self, id: str, amount: Amounts | None = None) -> Settlement:
        """Commits a hold of any process by its id; see :meth:`AsyncHold.commit`.

        Raises:
            UnknownHold: no such hold, or settled longer ago than ids are remembered.
        """
        return await self._coalescer.run(self._core.settle_id(id, amount), "commit")  # type: ignore[no-any-return]

    async def release(self, id: str, *, operator: bool = False) -> Settlement:
        """Releases a hold of any process by its id: an open one for good, an unconfirmed one as if done by hand.

        Args:
            operator: done by hand for a worker that seems dead. If it comes back after all, its commit still counts.
        """
        flow = self._core.settle_id(id, None, release=True, operator=operator)
        return await self._coalescer.run(flow, "release")  # type: ignore[no-any-return]

    async def extend(self, id: str, ttl: float | None = None, *, accrued: Amounts | None = None) -> HoldView:
        """Heartbeat by id; ``accrued`` is the total so far. See :meth:`AsyncHold.extend`.

        Without a ``ttl``, the deadline becomes at least 900 seconds from now, and no hold is cut short.
        """
        return await self._coalescer.run(self._core.extend_id(id, ttl, accrued), "extend")  # type: ignore[no-any-return]

    async def grow(self, id: str, amounts: Mapping[str, AmountIn], *, ttl: float = TTL_DEFAULT_S) -> HoldView:
        """Raises a reservation to new totals by id, all budgets or none, so that a retry is harmless.

        ``ttl`` matters only if the hold had expired.
        """
        return await self._coalescer.run(self._core.grow_id(id, amounts, ttl), "grow")  # type: ignore[no-any-return]

    async def record(
        self,
        budget: str | Mapping[str, AmountIn],
        amount: AmountIn | None = None,
        *,
        id: str | None = None,
        operation: str = "",
    ) -> Settlement:
        """Spend without a reservation: a fact, so never refused for lack of budget.

        Raises:
            HoldConflict: the id is in use with other contents.
            StoreUnavailable: no answer within the deadline (policy ``deny``). Trying again with the same id is safe.
        """
        flow = self._core.record(budget, amount, id, operation)
        return await self._coalescer.run(flow, "record")  # type: ignore[no-any-return]

    # -- reads ---------------------------------------------------------------------------------------------------------

    async def status(self, budget: str, *, complete: bool = False) -> Status:
        """A budget's window now.

        After a loss of data, ``recovering_until`` is set while other replicas may still replay what they know.

        Args:
            complete: wait for them, and raise ``StoreUnavailable`` rather than return figures that may lack something.

        Raises:
            UnknownBudget: this limiter was not given it.
            DefinitionConflict: the store has another unit, period, timezone or kind of it.
            StoreUnavailable: unknown is not "all remaining".
        """
        flow = self._core.status([budget], complete=complete)
        return (await self._coalescer.run(flow, "status"))[0]  # type: ignore[no-any-return]

    async def statuses(self, *, complete: bool = False) -> Statuses:
        """All budgets of this limiter, at one instant; ``complete`` as for :meth:`status`.

        One whose figures are unknown is not in the list: ``unavailable`` of the list has the error, by name.
        """
        return await self._coalescer.run(self._core.statuses(complete=complete), "status")  # type: ignore[no-any-return]

    async def check(self) -> dict[str, str | None]:
        """Whether the store can be relied on now: per check what is wrong, or ``None``.

        ``store``: it answers, takes the login, and can be written to. ``policy``: its ``maxmemory-policy`` is
        ``noeviction``. ``scripts``: they run; each command that the store refuses in them is named.
        """
        return await self._coalescer.run(self._core.check(), "check")  # type: ignore[no-any-return]

    async def get(self, id: str) -> HoldView:
        """A hold by id.

        Raises:
            UnknownHold: no such hold, or settled longer ago than ids are remembered.
        """
        return await self._coalescer.run(self._core.hold_view(id), "get")  # type: ignore[no-any-return]

    async def holds(self, budget: str, *, limit: int = 100, cursor: str | None = None) -> Page[HoldView]:
        """Open, then unconfirmed holds of a budget, newest deadline first; ``limit`` 1 to 1000."""
        return await self._coalescer.run(self._core.holds(budget, limit, cursor), "holds")  # type: ignore[no-any-return]

    async def ledger(
        self, budget: str, window: str | None = None, *, limit: int = 100, cursor: str | None = None
    ) -> Page[LedgerEntry]:
        """The entries of a window (the current one by default), newest first; ``limit`` 1 to 1000."""
        flow = self._core.ledger(budget, window, limit, cursor)
        return await self._coalescer.run(flow, "ledger")  # type: ignore[no-any-return]

    async def ask(self, command: Command, operation: str) -> Any:
        """Runs a script or command on keys of the tenant that are not the limiter's own, as its own reads are run.

        It is tried until the deadline, so that it may be executed twice.

        Raises:
            StoreUnavailable: no answer within the deadline.
        """
        return await self._coalescer.run(_asked(command), operation)

    # -- limits --------------------------------------------------------------------------------------------------------

    async def set_limit(self, budget: str, limit: AmountIn | None, until: datetime | str | None = None) -> Status:
        """Changes a limit for all replicas: for good, ``until`` an aware datetime, or ``"window"`` (its end).

        A run-time limit wins over configuration. ``None`` is uncapped.
        """
        return await self._coalescer.run(self._core.set_limit(budget, limit, until), "set_limit")  # type: ignore[no-any-return]

    async def clear_limit(self, budget: str) -> Status:
        """Returns to the configured limit."""
        return await self._coalescer.run(self._core.clear_limit(budget), "clear_limit")  # type: ignore[no-any-return]

    # -- definitions ---------------------------------------------------------------------------------------------------

    async def migrate(self, budget: str) -> Migration:
        """Replaces the registered definition of a budget (unit, kind, period, timezone) by this limiter's.

        All replicas obey with their next call: those that define it as this one does reserve and record at once, the
        others raise :class:`~ktrdr_budget.errors.DefinitionConflict`. Holds that are open are settled in the windows
        that admitted them, and what was spent under the former definition stays there: a definition that is migrated
        back goes on in its old window. A limit that was set at run time stays, unless it is an amount of another unit.

        Raises:
            UnknownBudget: this limiter was not given it.
            StoreUnavailable: the store does not reply; the same call again is harmless.
        """
        return await self._coalescer.run(self._core.migrate(budget), "migrate")  # type: ignore[no-any-return]


def _directory(data_dir: object) -> str | None:
    if data_dir is None or isinstance(data_dir, str):
        return data_dir
    if isinstance(data_dir, os.PathLike) and isinstance(path := os.fspath(data_dir), str):
        return path
    raise InvalidArgument(f"data_dir must be the path of a directory, not {shown(data_dir)}")


def _asked(command: Command) -> Flow[Any]:
    return (yield command)
