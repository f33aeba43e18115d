"""The dashboard and its provisioning, as far as they can be judged without a Grafana."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import pytest
from grafana_foundation_sdk.models import units

from ..helpers.grafana import faults
from .files import DASHBOARD, DATASOURCES, PROMETHEUS, PROVIDERS, panels, read_dashboard, read_yaml

DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
TITLES = (
    "Daily Budget",
    "Spend Against Limit",
    "Held and Unconfirmed",
    "Cycles per Hour",
    "Cycle Outcomes",
    "Average Cycle Duration",
    "Phase Durations",
    "Gate Pass Rate",
    "Token Usage",
    "Denials by Reason",
    "Store Latency",
    "Store and Ledger",
)
VARIABLE = {"type": "custom", "name": "phase", "query": "designing,training", "multi": True}
DEPRECATED = {"graph", "graph-old", "singlestat", "table-old", "piechart-old", "heatmap-old", "worldmap-panel"}


@pytest.fixture
def dashboard() -> dict[str, Any]:
    return read_dashboard()


def panel(dashboard: dict[str, Any], title: str) -> dict[str, Any]:
    return next(panel for panel in dashboard["panels"] if panel["title"] == title)


def put(document: Any, path: str, value: Any) -> None:
    """Sets a value deep inside; ``None`` removes it."""
    *way, last = (int(word) if word.isdigit() else word for word in path.split("."))
    for word in way:
        document = document.setdefault(word, {}) if isinstance(document, dict) else document[word]
    if value is None:
        del document[last]
    else:
        document[last] = value


# -- Grafana's schema --------------------------------------------------------------------------------------------------


def test_the_dashboard_fits_the_schema_of_grafana(dashboard):
    assert faults(dashboard) == []


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("titel", "x", "dashboard.titel: unknown"),
        ("refresh", 30, "dashboard.refresh: 30"),
        ("time.from", 0, "dashboard.time.from_val: 0 is no str"),
        ("graphTooltip", 5, "dashboard.graph_tooltip: 5 is none of"),
        ("panels.1.type", "speedometer", "'speedometer'"),
        ("panels.1.gridPos.w", "wide", "dashboard.panels[1].grid_pos.w: 'wide' is no int"),
        ("panels.1.targets.0.expression", "up", "dashboard.panels[1].targets[0].expression: unknown"),
        ("panels.1.targets.0.format", "matrix", "dashboard.panels[1].targets[0].format_val: 'matrix' is none of"),
        ("panels.1.datasource.type", "influx", "a query of a datasource that is not known"),
        ("panels.1.options.reduceOptions.calcs", "last", "dashboard.panels[1].options.reduce_options.calcs: 'last'"),
        ("panels.1.fieldConfig.defaults.thresholds.mode", "relative", "thresholds.mode: 'relative' is none of"),
        ("panels.1.transformations.0.name", "x", "dashboard.panels[1].transformations[0].name: unknown"),
        ("panels.2.fieldConfig.defaults.custom.drawStyle", "wave", "custom.draw_style: 'wave' is none of"),
        ("panels.2.options.legend.displayMode", "rows", "options.legend.display_mode: 'rows' is none of"),
        ("templating.list", [VARIABLE | {"type": "choice"}], "templating.list_val[0].type_val: 'choice' is none of"),
        ("templating.list", [VARIABLE | {"multi": "yes"}], "templating.list_val[0].multi: 'yes' is no bool"),
    ],
)
def test_a_broken_field_is_noticed(dashboard, path, value, told):
    put(dashboard, path, value)
    assert any(told in fault for fault in faults(dashboard)), faults(dashboard)


def test_what_a_series_overrides_fits_the_schema_too(dashboard):
    """The schema leaves an override's value open: it is put where it goes."""
    for shown in panels(dashboard):
        for override in shown["fieldConfig"]["overrides"]:
            changed = copy.deepcopy(dashboard)
            for change in override["properties"]:
                put(panel(changed, shown["title"])["fieldConfig"]["defaults"], change["id"], change["value"])
            assert faults(changed) == [], (shown["title"], override)


def test_an_override_names_a_series_of_its_panel(dashboard):
    labels = {"{{outcome}}": {"completed", "failed", "cancelled"}, "{{phase}}": {"design", "assessment"}}
    labels["{{reason}}"] = {"budget_exhausted", "budget_held", "exceeds_limit"}
    for shown in panels(dashboard):
        legends = [target["legendFormat"] for target in shown["targets"]]
        series = set().union(*(labels.get(legend, {legend}) for legend in legends))
        named = [override["matcher"] for override in shown["fieldConfig"]["overrides"]]
        assert all(matcher["id"] == "byName" and matcher["options"] in series for matcher in named), shown["title"]


# -- what it shows -----------------------------------------------------------------------------------------------------


def test_the_dashboard_is_the_one_that_was_agreed_on(dashboard):
    assert (dashboard["uid"], dashboard["title"]) == ("agent-research", "Agent Research Cycles")
    assert tuple(shown["title"] for shown in panels(dashboard)) == TITLES
    assert panel(dashboard, "Phase Durations")["type"] == "heatmap"
    budget = panel(dashboard, "Daily Budget")
    assert budget["type"] == "gauge"
    assert budget["targets"][0]["expr"] == "min(agent_budget_remaining_dollars)"
    assert dashboard["timepicker"]["hidden"] is False
    assert dashboard["time"] == {"from": "now-24h", "to": "now"}
    assert not any("timeFrom" in shown or "timeShift" in shown for shown in panels(dashboard))


def test_a_panel_says_what_it_shows_in_units_that_grafana_knows(dashboard):
    known = {value for name, value in vars(units).items() if name[0].isupper() and isinstance(value, str)}
    for shown in panels(dashboard):
        assert shown["type"] not in DEPRECATED
        assert len(shown["description"]) > 20
        options, defaults = shown["options"], shown["fieldConfig"]["defaults"]
        unit = options["yAxis"]["unit"] if shown["type"] == "heatmap" else defaults["unit"]
        assert unit in known, shown["title"]
        if "seconds" in shown["targets"][0]["expr"]:
            assert unit == "s"
        if "dollars" in shown["targets"][0]["expr"]:
            assert unit == "currencyUSD"
        assert all(target["legendFormat"] for target in shown["targets"])


def test_panels_fill_the_grid_row_by_row_and_do_not_overlap(dashboard):
    assert len({shown["id"] for shown in dashboard["panels"]}) == len(dashboard["panels"])
    cells: set[tuple[int, int]] = set()
    for shown in dashboard["panels"]:
        place = shown["gridPos"]
        taken = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert not cells & taken, shown["title"]
        cells |= taken
    height = max(y for _, y in cells) + 1
    assert cells == set(itertools.product(range(24), range(height)))
    assert [shown["title"] for shown in dashboard["panels"] if shown["type"] == "row"] == [
        "Budget",
        "Cycles",
        "Phases, gates and tokens",
        "Store",
    ]


def test_gauges_are_taken_once_and_counters_of_all_replicas_are_summed(dashboard):
    for expression in expressions(dashboard):
        for name in re.findall(r"(?:agent|ktrdr_budget)_\w+", expression):
            summed = r"sum( by \([\w, ]+\) )?\((increase|rate)\("
            if name.endswith(("_total", "_bucket", "_sum", "_count")):
                assert re.search(rf"{summed}{name}[{{\[]", expression), expression
            else:
                assert re.search(rf"(min|max)\({name}[){{]", expression), expression


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for shown in panels(dashboard) for target in shown["targets"]]


def test_the_scale_of_the_budget_ends_at_its_limit(dashboard):
    budget = panel(dashboard, "Daily Budget")
    legends = {target["refId"]: target["legendFormat"] for target in budget["targets"]}
    (change,) = budget["transformations"]
    assert change["id"] == "configFromData"
    assert change["options"]["applyTo"] == {"id": "byName", "options": legends["A"]}
    assert change["options"]["mappings"] == [
        {"fieldName": legends[change["options"]["configRefId"]], "handlerKey": "max"}
    ]


def test_queries_need_no_variables_but_grafanas_own(dashboard):
    """Whoever sends a panel's query to Prometheus, without a Grafana, gets its data."""
    used = {name for text in expressions(dashboard) for name in re.findall(r"\$\{?(\w+)", text)}
    assert used <= {"__range", "__rate_interval"}
    assert dashboard["templating"]["list"] == []


# -- provisioning ------------------------------------------------------------------------------------------------------


def test_every_query_asks_a_datasource_that_is_provisioned(dashboard):
    provisioned = {source["uid"]: source for source in read_yaml(DATASOURCES)["datasources"]}
    assert {uid: source["type"] for uid, source in provisioned.items()} == {
        "prometheus": "prometheus",
        "jaeger": "jaeger",
    }
    for shown in panels(dashboard):
        assert shown["datasource"] == DATASOURCE
        assert all(target["datasource"] == DATASOURCE for target in shown["targets"])
    assert all(annotation["datasource"] == DATASOURCE for annotation in dashboard["annotations"]["list"])


def test_grafana_knows_how_often_prometheus_scrapes():
    (prometheus,) = (source for source in read_yaml(DATASOURCES)["datasources"] if source["type"] == "prometheus")
    assert prometheus["jsonData"]["timeInterval"] == read_yaml(PROMETHEUS)["global"]["scrape_interval"]


def test_the_dashboard_is_provisioned_from_the_folder_where_it_lies():
    (provider,) = read_yaml(PROVIDERS)["providers"]
    assert provider["type"] == "file"
    assert provider["options"]["path"] == "/etc/grafana/dashboards"
    assert provider["allowUiUpdates"] is False
    assert [path.name for path in DASHBOARD.parent.iterdir()] == ["agent.json"]
