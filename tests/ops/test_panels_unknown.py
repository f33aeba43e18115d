"""Panels of current values show the figure, or that the figure is unknown (P10)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ..api.processes import ServiceProcess, serving
from ..conftest import Server
from ..helpers.waiting import wait_until
from .files import ALERTS, COMPOSE, panels, read_dashboard, read_yaml
from .prometheus import Prometheus
from .reading import PACKAGE, Grafana

pytestmark = pytest.mark.timeout(1200)  # the first test may install packages

DASHBOARD = read_dashboard()
PANELS = {panel["title"]: panel for panel in panels(DASHBOARD)}
FIGURES = ("Daily Budget", "Store and Ledger", "Agent Budget", "Window Ends")
BUDGETS = """
[[budgets]]
name = "team:quant/month.v1"
limit = "20.00"
period = "month"

[[budgets]]
name = "tokens"
limit = 1000
unit = "tokens"

[[budgets]]
name = "grant"
limit = "unlimited"
period = "ever"
"""


@dataclass
class Watched:
    """Two replicas of one store, the Prometheus that scrapes them, and Grafana's library."""

    store: Server
    replicas: list[ServiceProcess]
    prometheus: Prometheus
    grafana: Grafana

    def read(self, title: str, budget: str = "agent") -> dict[str, str]:
        return self.grafana.read(PANELS[title], budget)

    def all(self) -> dict[str, dict[str, str]]:
        return {title: self.read(title) for title in FIGURES}

    def firing(self) -> set[str]:
        """Return the names of the alerts that the annotations show now."""
        (annotation,) = DASHBOARD["annotations"]["list"]
        return self.grafana.titles(annotation)

    def wait_scraped(self, expression: str, value: float) -> None:
        """Wait until the expression has this value in Prometheus."""
        wait_until(lambda: self.prometheus.value(expression) == value)


@contextmanager
def watching(store: Server, directory: Path) -> Iterator[Watched]:
    rules = read_yaml(ALERTS)
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule.pop("for", None)  # fires without delay
    (directory / "alerts.yml").write_text(yaml.safe_dump(rules))
    (directory / "budgets.toml").write_text(BUDGETS)
    # A scrape ends within its interval even if the store does not reply.
    variables = {
        "KTRDR_REDIS_URL": store.url,
        "KTRDR_TIMEOUT": 1,
        "KTRDR_BUDGETS_FILE": directory / "budgets.toml",
        "AGENT_DAILY_BUDGET": "5.00",
    }
    with ExitStack() as ending:
        replicas = [ending.enter_context(serving(**variables)) for _ in range(2)]
        targets = [f"127.0.0.1:{replica.port}" for replica in replicas]
        prometheus = Prometheus(directory, targets, interval=2, rules=directory / "alerts.yml")
        ending.callback(prometheus.end)
        yield Watched(store, replicas, prometheus, Grafana(prometheus))


@pytest.fixture
def watched(start_server: Callable[..., Server], tmp_path: Path) -> Iterator[Watched]:
    with watching(start_server(None, "--appendonly", "yes", "--appendfsync", "always"), tmp_path) as stack:
        assert stack.replicas[0].post("/api/v1/spend", {"amounts": {"agent": "0.07"}}).status_code == 201
        stack.wait_scraped('count(ktrdr_budget_spent{budget="agent"} == 0.07)', 2)
        stack.wait_scraped('count(ktrdr_budget_adds_up{budget="agent"})', 2)
        yield stack


def test_the_panel_library_has_the_same_version_as_the_deployed_grafana():
    _, _, version = read_yaml(COMPOSE)["services"]["grafana"]["image"].partition(":")
    assert json.loads(PACKAGE.read_text())["dependencies"]["@grafana/data"] == version


@pytest.mark.slow
def test_panels_show_figures_before_an_outage_and_unknown_during_the_outage(watched):
    known = watched.all()
    assert known.pop("Window Ends")["window ends"].startswith("in ")
    assert known == {
        "Daily Budget": {"remaining usd": "$4.93"},
        "Store and Ledger": {"store": "good", "ledger": "good"},
        "Agent Budget": {
            "limit": "$5.00",
            "spent": "$0.07",
            "held": "$0.00",
            "unconfirmed": "$0.00",
            "remaining": "$4.93",
        },
    }

    watched.store.kill()
    watched.wait_scraped("sum(ktrdr_budget_store_up)", 0)
    without_store = watched.all()
    assert without_store.pop("Store and Ledger") == {"store": "fault", "ledger": "unknown"}
    assert {text for shown in without_store.values() for text in shown.values()} == {"unknown"}
    wait_until(lambda: "BudgetStoreDown" in watched.firing())

    watched.store.start()
    watched.wait_scraped('count(ktrdr_budget_spent{budget="agent"} == 0.07)', 2)
    assert watched.read("Daily Budget") == {"remaining usd": "$4.93"}

    for replica in watched.replicas:
        replica.process.kill()
    watched.wait_scraped("count(up == 0)", 2)
    without_replicas = watched.all()
    assert without_replicas.pop("Store and Ledger") == {"store": "unknown", "ledger": "unknown"}
    assert {text for shown in without_replicas.values() for text in shown.values()} == {"unknown"}
    wait_until(lambda: "BackendDown" in watched.firing())


@pytest.mark.slow
def test_the_panels_show_the_selected_budget_in_the_unit_of_the_budget(watched):
    (variable,) = DASHBOARD["templating"]["list"]
    metric, label = variable["query"]["query"].removeprefix("label_values(").removesuffix(")").split(", ")
    names = watched.prometheus.ask(f"/label/{label}/values", **{"match[]": metric})
    assert names == sorted(["agent", "agent:cycles", "grant", "team:quant/month.v1", "tokens"])
    assert {name: watched.read("Daily Budget", name) for name in names} == {
        "agent": {"remaining usd": "$4.93"},
        "agent:cycles": {"remaining slots": "1"},
        "grant": {"remaining usd": "unlimited"},
        "team:quant/month.v1": {"remaining usd": "$20.00"},
        "tokens": {"remaining tokens": "1 K"},
    }
    assert watched.read("Window Ends", "grant") == {"window ends": "never"}
    assert watched.read("Daily Budget", "no-such-budget") == {"No data": "unknown"}
