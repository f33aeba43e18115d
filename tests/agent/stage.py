"""An agent whose phases are controlled by the test."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from decimal import Decimal

from ktrdr_budget import AsyncBudgetLimiter
from ktrdr_budget.agent.cycle import CycleDependencies
from ktrdr_budget.agent.cycle_store import CycleStore, CycleView
from ktrdr_budget.agent.gates import Thresholds
from ktrdr_budget.agent.llm import LLM, Completion
from ktrdr_budget.agent.phases import Assessment, Backtest, Design, Training
from ktrdr_budget.agent.service import AgentService
from ktrdr_budget.engine.replica.hold import current_hold
from ktrdr_budget.metering.usage import Usage

from ..helpers.waiting import until

PHASES = ("designing", "training", "backtesting", "assessing")


class Script:
    """Phases that wait or fail on demand, and a language model with a set price."""

    provider = "test"
    model = "test-1"

    def __init__(self) -> None:
        self.price = Decimal("0.02")
        self.wait_in: str | None = None
        self.entered: Counter[str] = Counter()
        self.go_on = asyncio.Event()
        self.fail_in: str | None = None
        self.closed = False
        self.training = Training(accuracy=0.6, initial_loss=0.7, final_loss=0.5)
        self.backtest_result = Backtest(win_rate=0.5, max_drawdown=0.1, sharpe_ratio=1.0, trades=20)

    async def complete(self, prompt: str, *, system: str = "", max_tokens: int = 1024) -> Completion:
        hold = current_hold.get()
        assert hold is not None
        missing = hold.accrued["agent"] + self.price - hold.amounts["agent"]
        if missing > 0:
            await hold.grow({"agent": missing})
        hold.accrue({"agent": self.price})
        return Completion("{}", Usage(1000, 67), self.model)

    async def close(self) -> None:
        self.closed = True

    async def _phase(self, name: str, context) -> None:
        self.entered[name] += 1
        if name in ("designing", "assessing"):
            await context.ask(name)
        if self.fail_in == name:
            raise RuntimeError(f"{name} went wrong with redis://:secret@host")
        if self.wait_in == name:
            await self.go_on.wait()

    async def design(self, context) -> Design:
        await self._phase("designing", context)
        return Design("momentum")

    async def train(self, context, design) -> Training:
        await self._phase("training", context)
        return self.training

    async def backtest(self, context, design, training) -> Backtest:
        await self._phase("backtesting", context)
        return self.backtest_result

    async def assess(self, context, design, training, backtest) -> Assessment:
        await self._phase("assessing", context)
        return Assessment("promising", "It works.")


class Tally:
    """Counters of a cycle's metrics."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.phases: Counter[str] = Counter()
        self.gates: Counter[tuple[str, bool]] = Counter()
        self.token_counts: Counter[str] = Counter()

    def cycle_ended(self, outcome: str, seconds: float) -> None:
        assert seconds >= 0
        self.outcomes[outcome] += 1

    def phase_ended(self, phase: str, seconds: float) -> None:
        assert seconds >= 0
        self.phases[phase] += 1

    def gate(self, gate: str, passed: bool) -> None:
        self.gates[gate, passed] += 1

    def tokens(self, phase: str, count: int) -> None:
        self.token_counts[phase] += count


class Stage:
    """One replica; its language model is the script's unless ``make_llm`` is given."""

    def __init__(
        self,
        limiter: AsyncBudgetLimiter,
        *,
        estimate: str = "0.15",
        ttl_s: float = 30,
        make_llm: Callable[[AsyncBudgetLimiter], LLM] | None = None,
    ) -> None:
        self.limiter = limiter
        self.cycle_store = CycleStore(limiter)
        self.script = Script()
        self.tally = Tally()
        self.estimate = Decimal(estimate)
        llm = self.script if make_llm is None else make_llm(limiter)
        dependencies = CycleDependencies(
            limiter, self.cycle_store, self.script, llm, Thresholds(), self.tally, ttl_s=ttl_s
        )
        self.agent = AgentService(dependencies, self.estimate)

    async def view(self, operation_id: str) -> CycleView:
        found = await self.cycle_store.get(operation_id)
        assert found is not None
        return found

    async def ended(self, operation_id: str) -> CycleView:
        """Wait until the cycle has ended; return it."""

        async def when_ended() -> CycleView | None:
            cycle = await self.view(operation_id)
            return None if cycle.active else cycle

        return await until(when_ended)

    async def reaches(self, phase: str) -> None:
        await until(lambda: self.script.entered[phase])

    async def figures(self) -> tuple[Decimal, Decimal, Decimal, int]:
        """Dollars spent, held and unconfirmed, and slots in use."""
        agent, slots = await self.limiter.statuses()
        return agent.spent, agent.held, agent.unconfirmed, slots.held
