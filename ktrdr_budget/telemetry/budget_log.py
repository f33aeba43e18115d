"""Logging of a limiter's denials and of its spend on the agent's budget."""

from __future__ import annotations

import asyncio
import contextvars
import time
from typing import TYPE_CHECKING

from ktrdr_budget.environment import AGENT
from ktrdr_budget.errors import BudgetError, BudgetExceeded
from ktrdr_budget.events import log_denial, log_spend, logs_spend
from ktrdr_budget.models import Denial, Settlement
from ktrdr_budget.money import Amount
from ktrdr_budget.periods import window_at

if TYPE_CHECKING:
    from ktrdr_budget.engine.batching.pending import Observation
    from ktrdr_budget.limiter import AsyncBudgetLimiter

__all__ = ["CALLER_LOGS", "BudgetLog"]

CALLER_LOGS: contextvars.ContextVar[str] = contextvars.ContextVar("caller_logs", default="")
"""The budget whose denials are logged by the caller, and not by :class:`BudgetLog`; empty if there is none."""


class BudgetLog:
    """Logs a limiter's spend on the agent's budget, and the first denial of each budget in a window.

    Pass :meth:`observe` to the limiter as an ``observer``, then pass the limiter to :meth:`watch`.

    A log line about spend also shows the status of the window. This status is read just after the spend. If several
    lines are waiting, they share one read. The reads belong to no trace.
    """

    def __init__(self) -> None:
        self._limiter: AsyncBudgetLimiter | None = None
        self._spent: list[tuple[Amount, str]] = []
        self._writing: asyncio.Task[None] | None = None
        self._silent_until_ms: dict[str, int | None] = {}
        """For each budget with a logged denial: the end of the window, or ``None`` if the window never ends. Before
        that end, no further denial by this budget is logged."""

    def watch(self, limiter: AsyncBudgetLimiter) -> None:
        """Use this limiter to read statuses."""
        self._limiter = limiter

    async def drain(self) -> None:
        """Wait until all spend is logged; call it before the limiter is closed."""
        if self._writing is not None:
            await self._writing

    def observe(self, observation: Observation) -> None:
        """Log a finished call if the call spent money or was denied."""
        result, error = observation.result, observation.error
        if isinstance(error, BudgetExceeded):
            if error.budget != observation.context.get(CALLER_LOGS):
                self._denied(error.denial)
        elif isinstance(result, Settlement) and not result.replayed and (amount := result.amounts.get(AGENT)):
            self._spend(amount, result.id)

    def _spend(self, amount: Amount, operation_id: str) -> None:
        if self._limiter is None or not logs_spend():
            return
        self._spent.append((amount, operation_id))
        if self._writing is None:
            empty = contextvars.Context()
            self._writing = asyncio.get_running_loop().create_task(self._write(self._limiter), context=empty)

    async def _write(self, limiter: AsyncBudgetLimiter) -> None:
        try:
            while self._spent:
                spent, self._spent = self._spent, []
                try:
                    status = await limiter.status(AGENT, complete=True)
                # The spend is recorded in any case; a closing limiter, too, cannot read the total.
                except (BudgetError, RuntimeError):
                    status = None
                for amount, operation_id in spent:
                    log_spend(amount, operation_id, status)
        finally:
            self._writing = None

    def _denied(self, denial: Denial) -> None:
        budget = None if self._limiter is None else self._limiter.budgets.get(denial.budget)
        if budget is None:
            return
        now_ms = time.time_ns() // 1_000_000
        if denial.budget in self._silent_until_ms:
            until_ms = self._silent_until_ms[denial.budget]
            if until_ms is None or now_ms < until_ms:
                return
        window = window_at("ever" if budget.kind == "slots" else budget.period, budget.timezone, now_ms)
        self._silent_until_ms[denial.budget] = window.end_ms
        log_denial(denial, window.name)
