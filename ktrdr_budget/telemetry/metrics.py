"""Prometheus metrics of a limiter.

*Figures* (limit, spent, held, …) describe the store. They are read at scrape time. While a figure is unknown, it is
absent, because the value 0 would be wrong. *Counters* and *histograms* describe one replica. An observer of the limiter
updates them.

No metric is registered globally. If a replica has several processes on one port, set ``PROMETHEUS_MULTIPROC_DIR``
before the first import of ``prometheus_client``: the processes then share their counters through files
in that directory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, values
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from ktrdr_budget.errors import BudgetError
from ktrdr_budget.models import Settlement, Status
from ktrdr_budget.telemetry.outcomes import OUTCOMES, outcome_of

if TYPE_CHECKING:
    from ktrdr_budget.engine.batching.pending import Observation
    from ktrdr_budget.limiter import AsyncBudgetLimiter

__all__ = ["LimiterMetrics"]

BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
OPERATIONS = ("reserve", "commit", "release", "extend", "grow", "record", "status")
AGENT = "agent"
AGENT_FIGURES = {
    "limit": "The agent's limit in force today; absent when unknown or unlimited.",
    "spent": "The agent's spend today; absent when unknown.",
    "held": "Reserved by the agent's open holds today; absent when unknown.",
    "unconfirmed": "Charged today for holds of the agent that expired unsettled; absent when unknown.",
    "remaining": "The agent's remaining budget today; absent when unknown or unlimited.",
}
FIGURES = {
    "limit": "Limit in force; absent if the budget is unlimited.",
    "spent": "Confirmed spend in the current window.",
    "held": "Sum of the open holds in the current window.",
    "unconfirmed": "Charged in the current window for holds that expired unsettled.",
    "remaining": "Amount that can be reserved in the current window; absent if the budget is unlimited.",
}


class LimiterMetrics:
    """Metrics of a limiter.

    Pass :meth:`observe` to the limiter as an ``observer``, then pass the limiter to :meth:`watch`.

    Args:
        registry: a registry for the counters and histograms; by default a new one. :meth:`render` includes its
            metrics.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self.limiter: AsyncBudgetLimiter | None = None
        self._collectors: list[Collector] = []
        self._losses_seen = 0
        self._counted_before: dict[tuple[Counter, str], int] = {}
        self._reservations = Counter(
            "ktrdr_budget_reservations_total",
            "Reservations by outcome; the reason explains those not granted.",
            ("outcome", "reason"),
            registry=self.registry,
        )
        self._spend = Counter(
            "ktrdr_budget_spend_total",
            "Spend that this replica committed or recorded: dollars, or a count.",
            ("budget", "unit"),
            registry=self.registry,
        )
        self._overruns = Counter(
            "ktrdr_budget_overruns_total",
            "Commits by this replica above their reservation.",
            ("budget",),
            registry=self.registry,
        )
        self._losses = Counter(
            "ktrdr_budget_losses_total",
            "Data losses of the store that this replica detected: spend may be missing.",
            registry=self.registry,
        )
        self._repaired = Counter(
            "ktrdr_budget_repaired_total",
            "Data replayed by this replica after a loss: settlements, open holds, totals of windows.",
            ("what",),
            registry=self.registry,
        )
        self._forgotten = Counter(
            "ktrdr_budget_unrepaired_total",
            "Data that this replica could not replay: ids of settlements and holds that its journal had dropped.",
            ("what",),
            registry=self.registry,
        )
        self._resolved = Counter(
            "ktrdr_budget_resolved_total",
            "Requests of this replica whose reply was lost, by their outcome.",
            ("outcome",),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "ktrdr_budget_call_seconds",
            "Duration of the limiter's calls, including the wait for the store.",
            ("operation",),
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        # Children are cached, since labels() costs as much as the increment.
        self._by_outcome = {labels: self._reservations.labels(*labels) for labels in OUTCOMES}
        self._unexpected = self._by_outcome["error", "unexpected"]
        self._by_operation = {operation: self._seconds.labels(operation) for operation in OPERATIONS}

    def watch(self, limiter: AsyncBudgetLimiter) -> None:
        """Read figures from this limiter; initialise the counters of its budgets to 0."""
        self.limiter = limiter
        self._losses_seen = 0
        self._counted_before.clear()
        for budget in limiter.budgets.values():
            self._spend.labels(budget.name, budget.unit)
            self._overruns.labels(budget.name)

    def add(self, collector: Collector) -> None:
        """Include the metrics of a collector in :meth:`render`. The collector's metrics must describe the store.

        While the store does not reply, these metrics are absent.
        """
        self._collectors.append(collector)

    # -- counters of this replica --------------------------------------------------------------------------------------

    def observe(self, observation: Observation) -> None:
        """Count a finished call. Use this method as an ``observer`` of the limiter."""
        result, operation = observation.result, observation.operation
        if operation != "resolve":  # `resolve` completes an earlier call, and is no call of its own
            seconds = self._by_operation.get(operation)
            if seconds is None:
                seconds = self._by_operation[operation] = self._seconds.labels(operation)
            seconds.observe(observation.seconds)
        if operation == "reserve":
            self._by_outcome.get(outcome_of(result, observation.error), self._unexpected).inc()
        elif isinstance(result, Settlement) and not result.replayed:
            self._settled(result)
        self._count_losses()

    def _settled(self, settlement: Settlement) -> None:
        for name, amount in settlement.amounts.items():
            if amount:
                self._spend.labels(name, self._unit(name, amount)).inc(float(amount))
        for name in settlement.overruns:
            self._overruns.labels(name).inc()

    def _unit(self, name: str, amount: object) -> str:
        budget = None if self.limiter is None else self.limiter.budgets.get(name)
        if budget is not None:
            return budget.unit
        return "usd" if isinstance(amount, Decimal) else "count"

    def _count_losses(self) -> None:
        if self.limiter is not None and self.limiter.losses > self._losses_seen:
            self._losses.inc(self.limiter.losses - self._losses_seen)
            self._losses_seen = self.limiter.losses

    def _count_resolved(self) -> None:
        """Update, at scrape time, the counters of events that happen outside of calls."""
        limiter = self.limiter
        assert limiter is not None
        done = limiter.repaired
        for what in ("settlements", "holds", "windows"):
            self._raise_to(self._repaired, what, getattr(done, what))
        for what in ("settlements", "holds"):
            self._raise_to(self._forgotten, what, getattr(done, f"forgotten_{what}"))
        for outcome, count in limiter.resolved.items():
            self._raise_to(self._resolved, outcome, count)

    def _raise_to(self, counter: Counter, label: str, total: int) -> None:
        seen = self._counted_before.get((counter, label), 0)
        child = counter.labels(label)  # exported at 0 from the first scrape on, as rates need
        if total > seen:
            child.inc(total - seen)
            self._counted_before[counter, label] = total

    # -- figures of the store ------------------------------------------------------------------------------------------

    async def render(self, accept: str = "") -> tuple[bytes, str]:
        """Render a scrape; return the text and its media type, chosen by the ``Accept`` header."""
        statuses, store_up = await self._statuses()
        self._count_resolved()
        encode, media_type = choose_encoder(accept)
        # A collector keeps its last result, which no longer describes a store that does not reply.
        collected = [family for collector in self._collectors for family in collector.collect()] if store_up else []
        families = [*self._counted(), *collected, *_figures(statuses, store_up), self._unresolved()]
        return encode(_Families(families)), media_type

    def _unresolved(self) -> Metric:
        assert self.limiter is not None
        gauge = GaugeMetricFamily(
            "ktrdr_budget_unresolved",
            "Requests of this process whose reply was lost and whose outcome is still unknown.",
        )
        gauge.add_metric([], float(self.limiter.unresolved))
        return gauge

    async def _statuses(self) -> tuple[list[Status], bool]:
        """Return the status of every budget with known figures, and whether the store replied."""
        assert self.limiter is not None, "watch() a limiter first"
        try:
            return await self.limiter.statuses(complete=True), True
        except BudgetError:
            return [], False

    def _counted(self) -> Iterator[Metric]:
        # With several processes, the registry has the metrics of one; the files have those of all.
        several = getattr(values.ValueClass, "_multiprocess", False)
        counted = MultiProcessCollector(None) if several else self.registry  # type: ignore[no-untyped-call]
        for family in counted.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class _Families(Collector):
    """A collector of metrics that are already collected. The encoders accept only collectors."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _figures(statuses: Iterable[Status], store_up: bool) -> Iterator[Metric]:
    up = GaugeMetricFamily("ktrdr_budget_store_up", "Whether the store replied to this scrape.")
    up.add_metric([], float(store_up))
    yield up
    families = {
        name: GaugeMetricFamily(f"ktrdr_budget_{name}", text, labels=("budget", "unit"))
        for name, text in FIGURES.items()
    }
    agent = {
        name: GaugeMetricFamily(f"agent_budget_{name}_dollars", text, labels=()) for name, text in AGENT_FIGURES.items()
    }
    resets = GaugeMetricFamily(
        "ktrdr_budget_resets_timestamp_seconds",
        "End of the current window, as a Unix time; absent if it has none.",
        labels=("budget", "unit"),
    )
    for status in statuses:
        if status.resets_at is not None:
            resets.add_metric((status.budget, status.unit), status.resets_at.timestamp())
        is_agent = status.budget == AGENT and status.unit == "usd"
        for name, family in families.items():
            amount = getattr(status, name)
            if amount is None:
                continue
            family.add_metric((status.budget, status.unit), float(amount))
            if is_agent:
                agent[name].add_metric((), float(amount))
    yield from agent.values()
    yield from families.values()
    yield resets
