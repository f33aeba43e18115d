"""Prometheus metrics of the agent's research cycles.

Counters and histograms describe one replica; dashboards add up all replicas. The gauges ``agent_budget_*_dollars``
describe the store and are read at scrape time by :mod:`~ktrdr_budget.telemetry.metrics`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram

from ktrdr_budget.models import Settlement

if TYPE_CHECKING:
    from ktrdr_budget.engine.batching.pending import Observation

__all__ = ["AgentMetrics"]

AGENT = "agent"
OUTCOMES = ("completed", "failed", "cancelled")
PHASES = ("designing", "training", "backtesting", "assessing")
GATES = ("training", "backtest")
RESULTS = ("pass", "fail")
MODEL_PHASES = ("design", "assessment")
CYCLE_BUCKETS_S = (60, 300, 600, 900, 1200, 1800, 3600)
PHASE_BUCKETS_S = (10, 30, 60, 120, 300, 600)


class AgentMetrics:
    """Metrics of an agent. Pass :meth:`observe` to its limiter as an ``observer``. The agent calls the other methods.

    Args:
        registry: the registry of :class:`~ktrdr_budget.telemetry.metrics.LimiterMetrics`, whose :meth:`render` includes
            these metrics.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._cycles = Counter("agent_cycles_total", "Research cycles that ended.", ("outcome",), registry=registry)
        self._cycle_seconds = Histogram(
            "agent_cycle_duration_seconds",
            "Duration of research cycles, from trigger to end.",
            buckets=CYCLE_BUCKETS_S,
            registry=registry,
        )
        self._phase_seconds = Histogram(
            "agent_phase_duration_seconds",
            "Duration of a cycle's phases.",
            ("phase",),
            buckets=PHASE_BUCKETS_S,
            registry=registry,
        )
        self._gates = Counter(
            "agent_gate_results_total", "Decisions of gates, by result.", ("gate", "result"), registry=registry
        )
        self._tokens = Counter(
            "agent_tokens_total", "Input and output tokens of language models.", ("phase",), registry=registry
        )
        self._spend = Counter(
            "agent_budget_spend_total",
            "Dollars that this replica committed or recorded on the agent's budget.",
            registry=registry,
        )
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        """Export every counter at 0. If a counter first appeared with its first event, a rate would miss that event."""
        for outcome in OUTCOMES:
            self._cycles.labels(outcome)
        for phase in PHASES:
            self._phase_seconds.labels(phase)
        for gate in GATES:
            for result in RESULTS:
                self._gates.labels(gate, result)
        for phase in MODEL_PHASES:
            self._tokens.labels(phase)

    def cycle_ended(self, outcome: str, seconds: float) -> None:
        """Count a cycle that ended as ``completed``, ``failed`` or ``cancelled``."""
        self._cycles.labels(_known(outcome, OUTCOMES)).inc()
        self._cycle_seconds.observe(seconds)

    def phase_ended(self, phase: str, seconds: float) -> None:
        """Count a phase that ended, successfully or not."""
        self._phase_seconds.labels(_known(phase, PHASES)).observe(seconds)

    def gate(self, gate: str, passed: bool) -> None:
        """Count one decision of the ``training`` gate or the ``backtest`` gate."""
        self._gates.labels(_known(gate, GATES), "pass" if passed else "fail").inc()

    def tokens(self, phase: str, count: int) -> None:
        """Add the input and output tokens of a model call in the phase ``design`` or ``assessment``."""
        self._tokens.labels(_known(phase, MODEL_PHASES)).inc(count)

    def observe(self, observation: Observation) -> None:
        """Count the spend of a finished call. Use this method as an ``observer`` of the limiter."""
        settlement = observation.result
        if isinstance(settlement, Settlement) and not settlement.replayed:
            self._spend.inc(float(settlement.amounts.get(AGENT, 0)))


def _known(label: str, known: tuple[str, ...]) -> str:
    if label not in known:
        raise ValueError(f"unknown label {label!r}; known: {', '.join(known)}")
    return label
