"""The agent of a replica. It triggers, lists and cancels cycles, and runs the cycles that it triggered."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ktrdr_budget.agent.cycle import OPERATION_TYPE, Cycle, CycleDependencies, Plan
from ktrdr_budget.agent.cycle_store import CyclesPage
from ktrdr_budget.agent.llm import UnusableModel
from ktrdr_budget.agent.logs import log_cycle_lost, log_cycle_started
from ktrdr_budget.agent.options import CycleOptions, UnusableOption
from ktrdr_budget.agent.phases import KnowsStrategies
from ktrdr_budget.environment import AGENT
from ktrdr_budget.errors import BudgetError, BudgetExceeded, DefinitionConflict, HoldConflict, InvalidArgument
from ktrdr_budget.events import log_exhausted
from ktrdr_budget.limiter import AsyncHold
from ktrdr_budget.models import Budget, Denial, Status
from ktrdr_budget.money import Amount, from_units
from ktrdr_budget.periods import from_ms
from ktrdr_budget.telemetry.budget_log import CALLER_LOGS
from ktrdr_budget.telemetry.spans import current_link, mark_operation, operation_scope, suppressed

__all__ = [
    "SLOTS",
    "AgentService",
    "AgentStatus",
    "CycleActive",
    "CycleEnded",
    "MoneyDenied",
    "Started",
    "UnknownCycle",
    "slots",
]

logger = logging.getLogger("ktrdr_budget")

SLOTS = "agent:cycles"
"""The budget of kind ``slots`` that limits concurrent cycles."""
CANCEL_WAIT_S = 2.0
CLOSE_WAIT_S = 5.0
_POLL_S = 0.05


def slots(limit: int) -> Budget:
    """Return the budget that limits concurrent cycles."""
    return Budget(SLOTS, limit, kind="slots")


class MoneyDenied(BudgetError):
    """The daily budget does not cover another cycle."""

    def __init__(self, denial: Denial, retry_after: int | None) -> None:
        self.summary = replace(denial, reason="budget_exhausted").summary
        super().__init__(f"Daily budget exhausted: {self.summary}")
        self.denial = denial
        """The denial. Its ``reason`` is more specific than the reason in ``summary``."""
        self.retry_after = retry_after
        """Seconds until a retry may succeed. If a cycle costs more than the daily limit, seconds until the next day."""


class CycleActive(BudgetError):
    """No slot is free: the maximum number of concurrent cycles are running."""

    def __init__(self, operation_ids: list[str]) -> None:
        running = ", ".join(operation_ids) or "a cycle"
        super().__init__(f"Active cycle exists: {running}")
        self.operation_ids = operation_ids


class UnknownCycle(BudgetError):
    """No cycle with this id is recorded."""


class CycleEnded(BudgetError):
    """The cycle has already ended and cannot be cancelled."""

    def __init__(self, operation_id: str, status: str) -> None:
        super().__init__(f"cycle {operation_id} is {status}; it cannot be cancelled")
        self.operation_id = operation_id
        self.status = status


@dataclass(frozen=True)
class Started:
    """The result of a trigger."""

    operation_id: str
    model: str
    """The language model of the cycle."""
    replayed: bool = False
    """Whether an earlier request with the same id and options began the cycle."""


@dataclass(frozen=True)
class AgentStatus:
    """The active cycles, the cycle that ended last, the remaining budget and the free slots."""

    cycles: CyclesPage
    budget: Status | None
    """The budget's figures, or ``None`` if another definition of the budget is registered."""
    capacity: Status | None


class AgentService:
    """The agent of one replica.

    Args:
        dependencies: the parts that all cycles share. The limiter must have the budgets ``agent`` and :data:`SLOTS`.
        estimate: the expected cost of a cycle, in dollars.
    """

    def __init__(self, dependencies: CycleDependencies, estimate: Amount) -> None:
        self._dependencies = dependencies
        self._limiter = dependencies.limiter
        self._cycle_store = dependencies.cycle_store
        self._estimate = estimate
        self._running: dict[asyncio.Task[Any], Cycle] = {}
        self._beginning: dict[str, asyncio.Future[Started]] = {}
        dependencies.cycle_store.on_lost = self._count_lost

    @property
    def running(self) -> Sequence[Cycle]:
        """The cycles that run on this replica."""
        return tuple(self._running.values())

    async def close(self) -> None:
        """Stop the cycles of this replica, then close the language model. Each stopped cycle commits its spend."""
        running = dict(self._running)
        for cycle in running.values():
            cycle.stop("shutdown")
        if running:
            _, late = await asyncio.wait(running, timeout=CLOSE_WAIT_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._dependencies.llm.close()

    # -- trigger -------------------------------------------------------------------------------------------------------

    async def trigger(
        self,
        operation_id: str | None = None,
        *,
        strategy: str | None = None,
        brief: str | None = None,
        model: str | None = None,
        bypass_gates: bool = False,
    ) -> Started:
        """Reserve the estimate and a slot together, and begin the cycle. If either is denied, neither is reserved.

        Args:
            operation_id: the id of the cycle, and an idempotency key. A retry with the same id and options returns the
                same cycle.
            strategy, brief, model, bypass_gates: see :class:`~ktrdr_budget.agent.options.CycleOptions`.

        Raises:
            UnusableOption: an option is invalid.
            MoneyDenied: the daily budget does not cover the estimate.
            CycleActive: the daily budget covers the estimate, but no slot is free.
            HoldConflict: the id was used before: for a request with other options, for a cycle that did not begin, or
                for a cycle whose hold the store no longer keeps.
            StoreUnavailable: the store is unreachable, and no cycle began.
        """
        plan = self._planned(CycleOptions(strategy, brief, model, bypass_gates))
        operation_id = operation_id or f"op_{secrets.token_hex(8)}"
        mark_operation(operation_id, OPERATION_TYPE)
        with operation_scope(operation_id, OPERATION_TYPE):
            return await self._trigger(operation_id, plan)

    def _planned(self, options: CycleOptions) -> Plan:
        llm, design = self._dependencies.llm, None
        if options.strategy is not None:
            if options.brief is not None:
                raise UnusableOption(
                    "brief", "a strategy replaces the design phase, which a brief guides; give only one of them"
                )
            research = self._dependencies.research
            if not isinstance(research, KnowsStrategies):
                raise UnusableOption("strategy", "this agent's research has no strategies by name")
            try:
                design = research.known_design(options.strategy)
            except InvalidArgument as error:
                raise UnusableOption("strategy", str(error)) from None
        if options.model is not None:
            try:
                llm = llm.using(options.model)
            except UnusableModel as error:
                raise UnusableOption("model", str(error)) from None
        return Plan(options, llm, design)

    async def _trigger(self, operation_id: str, plan: Plan) -> Started:
        outer = CALLER_LOGS.set(AGENT)
        try:
            hold = await self._limiter.reserve(
                {SLOTS: 1, AGENT: self._estimate},
                id=operation_id,
                ttl=self._dependencies.ttl_s,
                operation=OPERATION_TYPE,
            )
        except BudgetExceeded as denied:
            raise await self._refusal(operation_id, denied.denial) from None
        finally:
            CALLER_LOGS.reset(outer)
        if hold.replayed:
            if await self._has_begun(hold, plan):
                return Started(operation_id, plan.llm.model, replayed=True)
            if hold.state != "open":
                raise HoldConflict(f"{operation_id!r} was used before, and its cycle did not begin: use another id")
        # From here on, the cycle continues even if the client of the trigger disconnects.
        beginning = self._beginning.get(operation_id)
        if beginning is None:
            beginning = self._beginning[operation_id] = asyncio.ensure_future(self._begin(hold, plan))
            beginning.add_done_callback(lambda _: self._beginning.pop(operation_id))
        return await asyncio.shield(beginning)

    async def _begin(self, hold: AsyncHold, plan: Plan) -> Started:
        if self._runs(hold.id) is not None:  # the same request, sent twice
            return Started(hold.id, plan.llm.model, replayed=True)
        cycle = Cycle(self._dependencies, hold, plan, current_link())
        try:
            begun = await cycle.begin()
            if not begun and not await self._has_begun(hold, plan):
                raise HoldConflict(f"{hold.id!r} was the id of an earlier cycle: use another id")
        except BaseException:
            await self._release(hold)
            raise
        if not begun:  # another replica has begun the cycle
            return Started(hold.id, plan.llm.model, replayed=True)
        log_cycle_started(hold.id, hold.amounts[AGENT], cycle.progress)
        task = asyncio.create_task(cycle.run(), name=f"cycle {hold.id}")
        self._running[task] = cycle
        task.add_done_callback(self._ended)
        return Started(hold.id, plan.llm.model)

    async def _has_begun(self, hold: AsyncHold, plan: Plan) -> bool:
        """Whether a cycle has begun on this hold.

        A cycle of an earlier hold with the same id does not count: the store keeps cycles longer than holds.

        Raises:
            HoldConflict: a cycle has begun on this hold, but with other options.
        """
        cycle = await self._cycle_store.get(hold.id)
        granted_ms = hold.created_us // 1000 if hold.created_us else hold.deadline_ms - round(hold.ttl * 1000)
        if cycle is None or cycle.started_at < from_ms(granted_ms):
            return False
        request = cycle.progress.get("request")  # absent in records of earlier versions
        if request and request != asdict(plan.options):
            raise HoldConflict(f"{hold.id!r} was triggered before with other options: use another id")
        return True

    def _runs(self, operation_id: str) -> Cycle | None:
        """Return the cycle with this id, or ``None`` if the cycle does not run on this replica."""
        return next((cycle for cycle in self.running if cycle.operation_id == operation_id), None)

    async def _release(self, hold: AsyncHold) -> None:
        try:
            await hold.release()
        except BudgetError as error:
            logger.warning("release of hold %s failed; the hold will expire: %s", hold.id, error)

    def _ended(self, task: asyncio.Task[None]) -> None:
        cycle = self._running.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("cycle %s failed with an internal error", cycle.operation_id, exc_info=error)

    def _count_lost(self, operation_id: str, elapsed_s: float) -> None:
        """Count a cycle that a call of this replica has marked as lost. A dead worker cannot count its own cycle."""
        if (cycle := self._runs(operation_id)) is not None:
            cycle.lost_here = True  # the cycle is alive and counts its own end
        else:
            log_cycle_lost(operation_id, elapsed_s)
            self._dependencies.measures.cycle_ended("failed", elapsed_s)

    # -- denials -------------------------------------------------------------------------------------------------------

    async def _refusal(self, operation_id: str, denial: Denial) -> BudgetError:
        status = await self._limiter.status(AGENT)
        if denial.budget == SLOTS:
            money = self._denied_by_spend(status)
            if money is None:
                return CycleActive([hold.id for hold in await self._limiter.holds(SLOTS) if hold.state == "open"])
            denial = money
        until_reset = None if status.resets_at is None else math.ceil((status.resets_at - status.as_of).total_seconds())
        denied = MoneyDenied(denial, denial.retry_after or until_reset)
        log_exhausted(operation_id, denial, denied.summary)
        return denied

    def _denied_by_spend(self, status: Status) -> Denial | None:
        """Return a denial if spent and unconfirmed amounts leave no room, else ``None``. Open holds do not count."""
        if status.limit is None or status.spent + status.unconfirmed + self._estimate <= status.limit:
            return None
        remaining = status.remaining if status.remaining is not None else from_units(0, status.unit)
        return Denial(
            budget=AGENT,
            reason="exceeds_limit" if self._estimate > status.limit else "budget_exhausted",
            limit=status.limit,
            spent=status.spent,
            held=status.held,
            unconfirmed=status.unconfirmed,
            remaining=remaining,
            requested=self._estimate,
            fits=remaining,
            retry_after=None,
        )

    # -- reading and cancelling ----------------------------------------------------------------------------------------

    async def cycles(self, count: int = 0, after: str = "") -> CyclesPage:
        """Return the active cycles of all replicas, and a page of at most ``count`` ended cycles.

        The call also expires overdue holds of lost workers, which frees their slots.
        """
        page = await self._cycle_store.list(count, after)
        await self._status(SLOTS)
        return page

    async def status(self) -> AgentStatus:
        """Return the active cycles, the cycle that ended last, the remaining budget and the free slots."""
        page = await self._cycle_store.list(0)
        budget, capacity = await asyncio.gather(self._status(AGENT), self._status(SLOTS))
        return AgentStatus(page, budget, capacity)

    async def _status(self, name: str) -> Status | None:
        try:
            return await self._limiter.status(name)
        except DefinitionConflict:  # a conflict of definitions must not hide the cycles
            return None

    async def cancel(self, operation_id: str) -> str:
        """Cancel a cycle of any replica.

        Return ``cancelled``, or ``cancelling`` if the cycle has not ended within 2 s.

        Raises:
            UnknownCycle: no cycle with this id is recorded.
            CycleEnded: the cycle has already ended.
        """
        mark_operation(operation_id, OPERATION_TYPE)
        with operation_scope(operation_id, OPERATION_TYPE):
            return await self._cancel(operation_id)

    async def _cancel(self, operation_id: str) -> str:
        status = await self._cycle_store.cancel(operation_id)
        if not status:
            raise UnknownCycle(f"unknown cycle {operation_id!r}")
        if status != "cancelling":
            raise CycleEnded(operation_id, status)
        if (cycle := self._runs(operation_id)) is not None:
            cycle.stop("cancelled")
        return await self._await_end(operation_id)

    async def _await_end(self, operation_id: str) -> str:
        ends = asyncio.get_running_loop().time() + CANCEL_WAIT_S
        while True:
            with suppressed():
                cycle = await self._cycle_store.get(operation_id)
            if cycle is not None and cycle.status != "cancelling":
                if cycle.status != "cancelled":
                    raise CycleEnded(operation_id, cycle.status)
                return cycle.status
            if asyncio.get_running_loop().time() >= ends:
                return "cancelling"
            await asyncio.sleep(_POLL_S)
