"""Every panel on a real Prometheus that scrapes two live replicas."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ..api.processes import Service, serving
from ..conftest import Server, free_port
from ..helpers.tools import need
from ..helpers.waiting import wait_until
from .files import ALERTS, PROMETHEUS, panels, read_dashboard, read_yaml

pytestmark = pytest.mark.slow

SCRAPE_INTERVAL = "500ms"
CYCLES = 4
DASHBOARD = read_dashboard()


class Prometheus:
    """A real one, with the configuration of the stack and other targets."""

    def __init__(self, directory: Path, targets: list[str]) -> None:
        config = read_yaml(PROMETHEUS)
        config["global"].update(
            scrape_interval=SCRAPE_INTERVAL, scrape_timeout=SCRAPE_INTERVAL, evaluation_interval="1s"
        )
        config["rule_files"] = [str(ALERTS)]
        (backend, itself) = config["scrape_configs"]
        assert itself["job_name"] == "prometheus"
        backend["static_configs"] = [{"targets": targets}]
        config["scrape_configs"] = [backend]
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        address = f"127.0.0.1:{free_port()}"
        words = [need("prometheus"), f"--config.file={directory}/prometheus.yml", f"--web.listen-address={address}"]
        words += [f"--storage.tsdb.path={directory}/data", "--log.level=warn"]
        self._log = directory / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log)
        self._client = httpx.Client(base_url=f"http://{address}/api/v1", timeout=10)
        wait_until(lambda: self._ready(f"http://{address}/-/ready"), 20)

    def _ready(self, url: str) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            return self._client.get(url).is_success
        except httpx.TransportError:
            return False

    def end(self) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait(20)

    def ask(self, path: str, **parameters: Any) -> Any:
        answer = self._client.get(path, params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def value(self, expression: str) -> float | None:
        """What an expression of one sample is now."""
        found = self.ask("/query", query=expression)["result"]
        return float(found[0]["value"][1]) if found else None

    def series(self, expression: str, *, instant: bool, start: float, end: float) -> dict[str, list[float]]:
        """What a panel gets: the values of each series, by its labels."""
        if instant:
            found = self.ask("/query", query=expression, time=end)["result"]
            samples = [(one["metric"], [one["value"]]) for one in found]
        else:
            found = self.ask("/query_range", query=expression, start=start, end=end, step=0.5)["result"]
            samples = [(one["metric"], one["values"]) for one in found]
        return {
            ",".join(f"{name}={labels[name]}" for name in sorted(labels)): [float(value) for _, value in values]
            for labels, values in samples
        }


@dataclass
class Stack:
    """Two replicas that have worked, and the Prometheus that watched them."""

    prometheus: Prometheus
    replicas: list[Service]
    started_at: float
    ended_at: float

    def panel(self, title: str) -> list[dict[str, list[float]]]:
        """The series of each query of a panel."""
        (panel,) = (panel for panel in panels(DASHBOARD) if panel["title"] == title)
        return [self.query(target["expr"], instant=target["instant"]) for target in panel["targets"]]

    def query(self, expression: str, *, instant: bool) -> dict[str, list[float]]:
        return self.prometheus.series(
            self.filled(expression), instant=instant, start=self.started_at, end=self.ended_at
        )

    def filled(self, expression: str) -> str:
        """An expression with Grafana's own variables replaced, as that does it."""
        values = {"__range": f"{math.ceil(self.ended_at - self.started_at)}s", "__rate_interval": "10s"}
        for name, value in values.items():
            expression = expression.replace(f"${name}", value)
        assert "$" not in expression
        return expression


@pytest.fixture(scope="module")
def stack(start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    environment = {
        "KTRDR_REDIS_URL": start_server().url,
        "AGENT_PHASE_SECONDS": 0,
        # There it is noon: no day ends meanwhile.
        "AGENT_BUDGET_TIMEZONE": f"Etc/GMT{datetime.now(UTC).hour - 12:+d}",
    }
    with ExitStack() as ending:
        replicas = [ending.enter_context(serving(**environment)) for _ in range(2)]
        targets = [f"127.0.0.1:{replica.port}" for replica in replicas]
        prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), targets)
        ending.callback(prometheus.end)
        # It must have seen them at 0, or it cannot know of an increase.
        wait_until(lambda: (prometheus.value("sum(count_over_time(agent_tokens_total[1m]))") or 0) >= 8, 30)
        started_at = time.time()
        for replica in replicas * (CYCLES // 2):
            run_cycle(replica)
        assert replicas[0].post("/api/v1/reservations", {"amounts": {"agent": "1000"}}).status_code == 429
        wait_until(lambda: prometheus.value("sum(agent_cycles_total)") == CYCLES, 20)
        wait_until(lambda: prometheus.value('sum(ktrdr_budget_reservations_total{outcome="denied"})') == 1, 20)
        settled_at = time.time()
        wait_until(lambda: (prometheus.value("min(timestamp(up))") or 0) > settled_at + 1, 20)
        yield Stack(prometheus, replicas, started_at, settled_at + 1)


def run_cycle(replica: Service) -> None:
    """Starts a cycle at a replica, and waits for its end."""
    wait_until(lambda: replica.post("/api/v1/agent/trigger").status_code == 202, 10)
    wait_until(lambda: replica.get("/api/v1/agent/status").json()["status"] == "idle", 20)


@pytest.mark.parametrize("title", [panel["title"] for panel in panels(DASHBOARD)])
def test_every_query_of_a_panel_returns_data(stack, title):
    for series in stack.panel(title):
        values = [value for values in series.values() for value in values]
        assert values
        assert any(math.isfinite(value) for value in values), series


def test_panels_show_what_happened(stack):
    (cycles,) = stack.panel("Cycle Outcomes")
    assert set(cycles) == {"outcome=completed", "outcome=failed", "outcome=cancelled"}
    # Prometheus extends an increase to the ends of its range.
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


def test_money_on_the_dashboard_is_that_of_the_store(stack):
    budget = stack.replicas[1].get("/api/v1/budgets/agent").json()
    (remaining,), (limit,) = (series.values() for series in stack.panel("Daily Budget"))
    assert remaining[-1] == pytest.approx(float(budget["remaining"]))
    assert limit[-1] == pytest.approx(float(budget["limit"]))
    spent, counted, _ = (next(iter(series.values())) for series in stack.panel("Spend Against Limit"))
    assert spent[-1] == counted[-1] == pytest.approx(float(budget["spent"]))
    assert 0 < spent[-1] < 1
    assert max(counted) > spent[-1]  # the estimates that were held meanwhile
    held, unconfirmed = (next(iter(series.values())) for series in stack.panel("Held and Unconfirmed"))
    assert max(held) > 0 == max(unconfirmed)


def test_the_rules_run_on_what_the_replicas_say_and_no_alert_fires(stack):
    rules = [rule for group in stack.prometheus.ask("/rules")["groups"] for rule in group["rules"]]
    assert len(rules) == sum(len(group["rules"]) for group in read_yaml(ALERTS)["groups"])
    assert [rule for rule in rules if rule["health"] != "ok"] == []
    recorded = [rule["name"] for rule in rules if rule["type"] == "recording"]
    assert [name for name in recorded if stack.prometheus.value(f'{name}{{budget="agent"}}') is None] == []
    (annotation,) = DASHBOARD["annotations"]["list"]
    assert stack.query(annotation["expr"], instant=True) == {}
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []
