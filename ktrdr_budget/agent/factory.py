"""Puts an agent together from its settings."""

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
    """An agent on a limiter that has the budgets ``agent`` and ``agent:cycles``.

    Args:
        estimate: dollars that a cycle is expected to cost.
        measures: counts what happens.
        research: a backend's own phases; the bundled ones by default.

    Raises:
        InvalidArgument: the language model that the environment asks for cannot be had.
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
