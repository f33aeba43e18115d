"""Triggers, shows and cancels cycles; runs those that were triggered here."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ktrdr_budget.agent.cycle import OPERATION_TYPE, Cycle, Workplace
from ktrdr_budget.agent.operations import CyclesPage
from ktrdr_budget.environment import AGENT
from ktrdr_budget.errors import BudgetError, BudgetExceeded, DefinitionConflict, HoldConflict
from ktrdr_budget.limiter import AsyncHold
from ktrdr_budget.models import Budget, Denial, Status
from ktrdr_budget.money import Amount, from_units
from ktrdr_budget.periods import from_ms
from ktrdr_budget.telemetry.spans import current_link, suppressed

__all__ = ["SLOTS", "AgentService", "CycleActive", "CycleEnded", "MoneyDenied", "Started", "UnknownCycle", "slots"]

logger = logging.getLogger("ktrdr_budget")

SLOTS = "agent:cycles"
"""The budget of kind ``slots`` that bounds how many cycles run at once."""
CANCEL_WAIT_S = 2.0
CLOSE_WAIT_S = 5.0
_POLL_S = 0.05


def slots(limit: int) -> Budget:
    """The budget of concurrent cycles."""
    return Budget(SLOTS, limit, kind="slots")


class MoneyDenied(BudgetError):
    """There is no money for a cycle."""

    def __init__(self, denial: Denial, retry_after: int | None) -> None:
        told = replace(denial, reason="budget_exhausted").summary
        super().__init__(f"Daily budget exhausted: {told}")
        self.denial = denial
        """Its reason is the finer one."""
        self.retry_after = retry_after
        """Seconds until another answer is possible; where a cycle costs more than a day may, until the next day."""


class CycleActive(BudgetError):
    """As many cycles as may run at once are running."""

    def __init__(self, operation_ids: list[str]) -> None:
        running = ", ".join(operation_ids) or "a cycle"
        super().__init__(f"Active cycle exists: {running}")
        self.operation_ids = operation_ids


class UnknownCycle(BudgetError):
    """No cycle of this id is remembered."""


class CycleEnded(BudgetError):
    """It has ended already, so that it cannot be cancelled."""

    def __init__(self, operation_id: str, status: str) -> None:
        super().__init__(f"cycle {operation_id} is {status}; it cannot be cancelled")
        self.operation_id = operation_id
        self.status = status


@dataclass(frozen=True)
class Started:
    """A cycle that was begun."""

    operation_id: str
    replayed: bool = False
    """It had been begun by the same request before."""


class AgentService:
    """The agent of one replica.

    Args:
        workplace: its limiter has the budgets ``agent`` and :data:`SLOTS`.
        estimate: dollars that a cycle is expected to cost.
    """

    def __init__(self, workplace: Workplace, estimate: Amount) -> None:
        self._workplace = workplace
        self._limiter = workplace.limiter
        self._operations = workplace.operations
        self._estimate = estimate
        self._running: dict[asyncio.Task[Any], Cycle] = {}
        self._beginning: dict[str, asyncio.Future[Started]] = {}
        workplace.operations.on_lost = self._count_lost

    async def close(self) -> None:
        """Stops the cycles that run here, each of which commits what it has used, and closes the language model."""
        running = dict(self._running)
        for cycle in running.values():
            cycle.stop("shutdown")
        if running:
            _, late = await asyncio.wait(running, timeout=CLOSE_WAIT_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._workplace.llm.close()

    # -- trigger -------------------------------------------------------------------------------------------------------

    async def trigger(self, operation_id: str | None = None) -> Started:
        """Reserves a cycle's estimate and a slot, all or none, and begins it.

        Args:
            operation_id: makes a retry harmless: the same id returns the same cycle.

        Raises:
            MoneyDenied: no money.
            CycleActive: no slot; told only if money alone does not deny.
            HoldConflict: the id is in use otherwise, or was used before for a cycle that did not begin, or that is only
                remembered.
            StoreUnavailable: nothing was begun.
        """
        operation_id = operation_id or f"op_{secrets.token_hex(8)}"
        try:
            hold = await self._limiter.reserve(
                {SLOTS: 1, AGENT: self._estimate},
                id=operation_id,
                ttl=self._workplace.ttl_s,
                operation=OPERATION_TYPE,
            )
        except BudgetExceeded as denied:
            raise await self._refusal(denied.denial) from None
        if hold.replayed:
            if await self._has_begun(hold):
                return Started(operation_id, replayed=True)
            if hold.state != "open":
                raise HoldConflict(f"{operation_id!r} was used before, and its cycle did not begin: use another id")
        # From here on the cycle goes its way, also if whoever triggered it has gone.
        beginning = self._beginning.get(operation_id)
        if beginning is None:
            beginning = self._beginning[operation_id] = asyncio.ensure_future(self._begin(hold))
            beginning.add_done_callback(lambda _: self._beginning.pop(operation_id))
        return await asyncio.shield(beginning)

    async def _begin(self, hold: AsyncHold) -> Started:
        if self._runs(hold.id) is not None:  # for the same request, sent twice
            return Started(hold.id, replayed=True)
        cycle = Cycle(self._workplace, hold, current_link())
        try:
            begun = await cycle.begin()
            if not begun and not await self._has_begun(hold):
                raise HoldConflict(f"{hold.id!r} was the id of an earlier cycle: use another id")
        except BaseException:
            await self._give_back(hold)
            raise
        if not begun:  # another replica was faster with the same id
            return Started(hold.id, replayed=True)
        task = asyncio.create_task(cycle.run(), name=f"cycle {hold.id}")
        self._running[task] = cycle
        task.add_done_callback(self._ended)
        return Started(hold.id)

    async def _has_begun(self, hold: AsyncHold) -> bool:
        """Whether there is a cycle on this very hold: ids of cycles are remembered for longer than those of holds."""
        cycle = await self._operations.get(hold.id)
        granted_ms = hold.created_us // 1000 if hold.created_us else hold.deadline_ms - round(hold.ttl * 1000)
        return cycle is not None and cycle.started_at >= from_ms(granted_ms)

    def _runs(self, operation_id: str) -> Cycle | None:
        """The cycle, if it runs here."""
        return next((cycle for cycle in self._running.values() if cycle.operation_id == operation_id), None)

    async def _give_back(self, hold: AsyncHold) -> None:
        try:
            await hold.release()
        except BudgetError as error:
            logger.warning("hold %s could not be released, it will expire: %s", hold.id, error)

    def _ended(self, task: asyncio.Task[None]) -> None:
        cycle = self._running.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("cycle %s broke off", cycle.operation_id, exc_info=error)

    def _count_lost(self, operation_id: str, elapsed_s: float) -> None:
        """The worker of a cycle is lost, and cannot count its end: who finds out does."""
        if (cycle := self._runs(operation_id)) is not None:
            cycle.lost_here = True  # it lives, and will count what becomes of it
        else:
            self._workplace.measures.cycle_ended("failed", elapsed_s)

    # -- why not -------------------------------------------------------------------------------------------------------

    async def _refusal(self, denial: Denial) -> BudgetError:
        status = await self._limiter.status(AGENT)
        if denial.budget == SLOTS:
            money = self._denied_by_spend(status)
            if money is None:
                return CycleActive([hold.id for hold in await self._limiter.holds(SLOTS) if hold.state == "open"])
            denial = money
        until_reset = None if status.resets_at is None else math.ceil((status.resets_at - status.as_of).total_seconds())
        return MoneyDenied(denial, denial.retry_after or until_reset)

    def _denied_by_spend(self, status: Status) -> Denial | None:
        """The denial that would be left if every open hold were returned."""
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

    # -- what there is -------------------------------------------------------------------------------------------------

    async def cycles(self, count: int = 0, after: str = "") -> CyclesPage:
        """The active cycles and ``count`` ended ones, as every replica sees them.

        The hold of one whose worker was lost is retired on the way, so that its slot is free.
        """
        page = await self._operations.list(count, after)
        with suppress(DefinitionConflict):  # the cycles are known all the same
            await self._limiter.status(SLOTS)
        return page

    async def cancel(self, operation_id: str) -> str:
        """Stops a cycle wherever it runs; returns ``cancelled``, or ``cancelling`` if that takes longer than 2 s.

        Raises:
            UnknownCycle, CycleEnded: there is nothing to cancel.
        """
        status = await self._operations.cancel(operation_id)
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
                cycle = await self._operations.get(operation_id)
            if cycle is not None and cycle.status != "cancelling":
                if cycle.status != "cancelled":
                    raise CycleEnded(operation_id, cycle.status)
                return cycle.status
            if asyncio.get_running_loop().time() >= ends:
                return "cancelling"
            await asyncio.sleep(_POLL_S)
