"""Construction of an agent from its settings."""

from __future__ import annotations

from ktrdr_budget.agent.cycle import CycleDependencies, Measures
from ktrdr_budget.agent.cycle_store import CycleStore
from ktrdr_budget.agent.phases import Research
from ktrdr_budget.agent.providers import make_llm
from ktrdr_budget.agent.research import ExampleResearch
from ktrdr_budget.agent.service import AgentService
from ktrdr_budget.agent.settings import AgentSettings
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.money import Amount

__all__ = ["make_agent"]


def make_agent(
    limiter: AsyncBudgetLimiter,
    settings: AgentSettings,
    estimate: Amount,
    measures: Measures,
    research: Research | None = None,
) -> AgentService:
    """Create an agent on a limiter that has the budgets ``agent`` and ``agent:cycles``.

    Args:
        estimate: the expected cost of a cycle, in dollars.
        measures: the metrics.
        research: the phases. Default: the bundled phases.

    Raises:
        InvalidArgument: the configured language model is unavailable.
    """
    dependencies = CycleDependencies(
        limiter=limiter,
        cycle_store=CycleStore(limiter),
        research=research or ExampleResearch(phase_seconds=settings.phase_seconds),
        llm=make_llm(limiter),
        thresholds=settings.thresholds,
        measures=measures,
        ttl_s=settings.cycle_ttl,
    )
    return AgentService(dependencies, estimate)
