"""Every panel on a real Prometheus that scrapes two live replicas."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest

from ..api.processes import ServiceProcess, serving
from ..conftest import Server
from ..helpers.waiting import wait_until
from .files import ALERTS, panels, read_dashboard, read_yaml
from .prometheus import Prometheus

pytestmark = pytest.mark.slow

CYCLES = 4
DASHBOARD = read_dashboard()


@dataclass
class Stack:
    """Two replicas with some activity, and the Prometheus that scrapes them."""

    prometheus: Prometheus
    replicas: list[ServiceProcess]
    started_at: float
    ended_at: float

    def panel(self, title: str) -> list[dict[str, list[float]]]:
        """Return the series of each query of a panel."""
        (panel,) = (panel for panel in panels(DASHBOARD) if panel["title"] == title)
        return [self.query(target["expr"], instant=target["instant"]) for target in panel["targets"]]

    def query(self, expression: str, *, instant: bool) -> dict[str, list[float]]:
        return self.prometheus.series(
            self.filled(expression), instant=instant, start=self.started_at, end=self.ended_at
        )

    def filled(self, expression: str) -> str:
        """Replace Grafana's own variables in an expression."""
        values = {
            "__range": f"{math.ceil(self.ended_at - self.started_at)}s",
            "__rate_interval": "10s",
            "budget": "agent",
        }
        for name, value in values.items():
            expression = expression.replace(f"${name}", value)
        assert "$" not in expression
        return expression


@pytest.fixture(scope="module")
def stack(start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    environment = {
        "KTRDR_REDIS_URL": start_server().url,
        "AGENT_PHASE_SECONDS": 0,
        # The server's clock is at noon: no day ends during the test.
        "AGENT_BUDGET_TIMEZONE": f"Etc/GMT{datetime.now(UTC).hour - 12:+d}",
    }
    with ExitStack() as ending:
        replicas = [ending.enter_context(serving(**environment)) for _ in range(2)]
        targets = [f"127.0.0.1:{replica.port}" for replica in replicas]
        prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), targets)
        ending.callback(prometheus.end)
        # Counters must be scraped at 0 first, or no increase is visible.
        wait_until(lambda: (prometheus.value("sum(count_over_time(agent_tokens_total[1m]))") or 0) >= 8)
        started_at = time.time()
        for replica in replicas * (CYCLES // 2):
            run_cycle(replica)
        assert replicas[0].post("/api/v1/reservations", {"amounts": {"agent": "1000"}}).status_code == 429
        wait_until(lambda: prometheus.value("sum(agent_cycles_total)") == CYCLES)
        wait_until(lambda: prometheus.value('sum(ktrdr_budget_reservations_total{outcome="denied"})') == 1)
        settled_at = time.time()
        wait_until(lambda: (prometheus.value("min(timestamp(up))") or 0) > settled_at + 1)
        yield Stack(prometheus, replicas, started_at, settled_at + 1)


def run_cycle(replica: ServiceProcess) -> None:
    """Trigger a cycle at a replica, and wait for its end."""
    wait_until(lambda: replica.post("/api/v1/agent/trigger").status_code == 202)
    wait_until(lambda: replica.get("/api/v1/agent/status").json()["status"] == "idle")


@pytest.mark.parametrize("title", [panel["title"] for panel in panels(DASHBOARD)])
def test_every_query_of_a_panel_returns_data(stack, title):
    for series in stack.panel(title):
        values = [value for values in series.values() for value in values]
        assert values
        assert any(math.isfinite(value) for value in values), series


def test_the_panels_show_the_figures_of_the_cycles_that_have_run(stack):
    (cycles,) = stack.panel("Cycle Outcomes")
    assert set(cycles) == {"outcome=completed", "outcome=failed", "outcome=cancelled"}
    # Prometheus extrapolates an increase to the ends of its range.
    assert sum(value for (value,) in cycles.values()) == pytest.approx(CYCLES, rel=0.3)
    (hourly,) = stack.panel("Cycles per Hour")
    assert sum(values[-1] for values in hourly.values()) == pytest.approx(CYCLES, rel=0.3)
    (phases,) = stack.panel("Phase Durations")
    assert set(phases) == {f"le={bucket}" for bucket in ("10.0", "30.0", "60.0", "120.0", "300.0", "600.0", "+Inf")}
    assert max(phases["le=+Inf"]) > 0
    (gates,) = stack.panel("Gate Pass Rate")
    assert all(0 <= value <= 1 for values in gates.values() for value in values)
    assert "gate=training" in gates
    (tokens,) = stack.panel("Token Usage")
    assert set(tokens) == {"phase=design", "phase=assessment"}
    assert tokens["phase=design"][-1] > 0
    for (latency,) in (series.values() for series in stack.panel("Store Latency")):
        assert max(value for value in latency if math.isfinite(value)) > 0
    (denials,) = stack.panel("Denials by Reason")
    assert max(denials["reason=exceeds_limit"]) > 0


def test_amounts_on_the_dashboard_match_the_amounts_in_the_store(stack):
    budget = stack.replicas[1].get("/api/v1/budgets/agent").json()
    (remaining,), (limit,) = (series.values() for series in stack.panel("Daily Budget"))
    assert remaining[-1] == pytest.approx(float(budget["remaining"]))
    assert limit[-1] == pytest.approx(float(budget["limit"]))
    spent, counted, _ = (next(iter(series.values())) for series in stack.panel("Spend Against Limit"))
    assert spent[-1] == counted[-1] == pytest.approx(float(budget["spent"]))
    assert 0 < spent[-1] < 1
    assert max(counted) > spent[-1]  # includes the estimates held at the time
    held, unconfirmed = (next(iter(series.values())) for series in stack.panel("Held and Unconfirmed"))
    assert max(held) > 0 == max(unconfirmed)


def test_alert_rules_can_be_evaluated_on_real_metrics_and_no_alert_fires(stack):
    rules = [rule for group in stack.prometheus.ask("/rules")["groups"] for rule in group["rules"]]
    assert len(rules) == sum(len(group["rules"]) for group in read_yaml(ALERTS)["groups"])
    assert [rule for rule in rules if rule["health"] != "ok"] == []
    recorded = [rule["name"] for rule in rules if rule["type"] == "recording"]
    assert [name for name in recorded if stack.prometheus.value(f'{name}{{budget="agent"}}') is None] == []
    (annotation,) = DASHBOARD["annotations"]["list"]
    assert stack.query(annotation["expr"], instant=True) == {}
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []
