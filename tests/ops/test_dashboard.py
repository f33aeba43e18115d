"""The dashboard and its provisioning, checked without a Grafana."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import pytest
from grafana_foundation_sdk.models import units
from prometheus_client.parser import text_string_to_metric_families

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.telemetry.agent_metrics import MODEL_PHASES, PHASES, AgentMetrics
from ktrdr_budget.telemetry.agent_metrics import OUTCOMES as CYCLE_OUTCOMES
from ktrdr_budget.telemetry.audit import Audit
from ktrdr_budget.telemetry.metrics import LimiterMetrics
from ktrdr_budget.telemetry.outcomes import OUTCOMES

from ..helpers.grafana import faults
from .files import ALERTS, DASHBOARD, DATASOURCES, PROMETHEUS, PROVIDERS, panels, read_dashboard, read_yaml

DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
ROWS = {
    "Budget": (
        "Daily Budget",
        "Spend Against Limit",
        "Held and Unconfirmed",
        "Window Ends",
        "Spend per Hour",
        "Overruns per Hour",
    ),
    "Agent": ("Agent Budget", "Agent Spend per Hour"),
    "Cycles": ("Cycles per Hour", "Cycle Outcomes", "Average Cycle Duration"),
    "Phases, gates and tokens": ("Phase Durations", "Average Phase Duration", "Gate Pass Rate", "Token Usage"),
    "Store": (
        "Denials by Reason",
        "Store Latency",
        "Store and Ledger",
        "Reservations by Outcome",
        "Calls by Operation",
        "Losses and Repairs",
        "Lost Replies",
    ),
}
NOW = {"stat", "gauge", "bargauge", "piechart", "table"}
"""Panel types that reduce a query to one value per series."""
VARIABLE = {"type": "custom", "name": "phase", "query": "designing,training", "multi": True}
DEPRECATED = {"graph", "graph-old", "singlestat", "table-old", "piechart-old", "heatmap-old", "worldmap-panel"}


@pytest.fixture
def dashboard() -> dict[str, Any]:
    return read_dashboard()


def panel(dashboard: dict[str, Any], title: str) -> dict[str, Any]:
    return next(panel for panel in dashboard["panels"] if panel["title"] == title)


def put(document: Any, path: str, value: Any) -> None:
    """Set a nested value; ``None`` removes it."""
    *way, last = (int(word) if word.isdigit() else word for word in path.split("."))
    for word in way:
        document = document.setdefault(word, {}) if isinstance(document, dict) else document[word]
    if value is None:
        del document[last]
    else:
        document[last] = value


# -- Grafana's schema --------------------------------------------------------------------------------------------------


def test_the_dashboard_matches_the_schema_of_grafana(dashboard):
    assert faults(dashboard) == []


@pytest.mark.parametrize(
    ("path", "value", "expected"),
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
        ("annotations.list.0.titleFormat", 1, "dashboard.annotations.list[0].titleFormat: 1 is no str"),
        ("annotations.list.0.titelFormat", "x", "dashboard.annotations.list[0].titelFormat: unknown"),
    ],
)
def test_the_schema_check_detects_an_invalid_field(dashboard, path, value, expected):
    put(dashboard, path, value)
    assert any(expected in fault for fault in faults(dashboard)), faults(dashboard)


def test_the_values_of_series_overrides_match_the_schema(dashboard):
    """The schema allows any value in an override, so each value is checked as a default of its panel."""
    for shown in panels(dashboard):
        for override in shown["fieldConfig"]["overrides"]:
            changed = copy.deepcopy(dashboard)
            for change in override["properties"]:
                put(panel(changed, shown["title"])["fieldConfig"]["defaults"], change["id"], change["value"])
            assert faults(changed) == [], (shown["title"], override)


def test_each_override_matches_a_series_of_its_panel(dashboard):
    for shown in panels(dashboard):
        series = set().union(*(names_of(target["legendFormat"]) for target in shown["targets"]))
        for override in shown["fieldConfig"]["overrides"]:
            assert any(matches(override["matcher"], name) for name in series), (shown["title"], override["matcher"])


def names_of(legend: str) -> set[str]:
    """The names that series with this legend can have; the label in the legend decides."""
    values = {
        "outcome": {outcome for outcome, _ in OUTCOMES} | set(CYCLE_OUTCOMES),
        "phase": {*PHASES, *MODEL_PHASES},
        "reason": {reason for _, reason in OUTCOMES},
        "unit": {"usd", "tokens"},
    }
    label = re.search(r"{{(\w+)}}", legend)
    if label is None:
        return {legend}
    return {legend.replace(label[0], value) for value in values.get(label[1], {"x"})}


def matches(matcher: dict[str, Any], name: str) -> bool:
    """Whether a matcher of Grafana selects a series."""
    if matcher["id"] == "byName":
        return matcher["options"] == name
    assert matcher["id"] == "byRegexp"
    return re.search(matcher["options"].removeprefix("/").removesuffix("/"), name) is not None


# -- contents ----------------------------------------------------------------------------------------------------------


def test_the_dashboard_has_the_documented_panels(dashboard):
    assert (dashboard["uid"], dashboard["title"]) == ("agent-research", "Agent Research Cycles")
    assert panel(dashboard, "Phase Durations")["type"] == "heatmap"
    budget = panel(dashboard, "Daily Budget")
    assert budget["type"] == "gauge"
    assert dashboard["timepicker"]["hidden"] is False
    assert dashboard["time"] == {"from": "now-24h", "to": "now"}
    assert not any("timeFrom" in shown or "timeShift" in shown for shown in panels(dashboard))


def test_each_panel_has_a_description_and_a_valid_unit(dashboard):
    known = {value for name, value in vars(units).items() if name[0].isupper() and isinstance(value, str)}
    for shown in panels(dashboard):
        assert shown["type"] not in DEPRECATED
        assert len(shown["description"]) > 20
        options, defaults = shown["options"], shown["fieldConfig"]["defaults"]
        unit = options["yAxis"]["unit"] if shown["type"] == "heatmap" else defaults["unit"]
        assert unit in known, shown["title"]
        if "timestamp_seconds" in shown["targets"][0]["expr"]:
            assert unit == "dateTimeFromNow"
        elif "seconds" in shown["targets"][0]["expr"] and "seconds_count" not in shown["targets"][0]["expr"]:
            assert unit == "s"
        if "dollars" in shown["targets"][0]["expr"]:
            assert unit == "currencyUSD"
        if "{{unit}}" in shown["targets"][0]["legendFormat"]:
            counts = [one for one in shown["fieldConfig"]["overrides"] if matches(one["matcher"], "spent tokens")]
            assert unit == "currencyUSD"
            assert {"id": "unit", "value": "short"} in counts[-1]["properties"]
            assert not matches(counts[-1]["matcher"], "spent usd")
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
    found: dict[str, tuple[str, ...]] = {}
    for shown in dashboard["panels"]:
        if shown["type"] == "row":
            found[shown["title"]] = ()
        else:
            found[list(found)[-1]] += (shown["title"],)
    assert found == ROWS


def test_panels_sum_counters_over_replicas_but_take_the_minimum_or_maximum_of_gauges(dashboard):
    for expression in expressions(dashboard):
        for name in re.findall(r"(?:agent|ktrdr_budget)_\w+", expression):
            summed = r"sum( by \([\w, ]+\) )?\((increase|rate)\("
            if name.endswith(("_total", "_bucket", "_sum", "_count")):
                assert re.search(rf"{summed}{name}[{{\[]", expression), expression
            else:
                # Unresolved requests are counted per process.
                taken = "sum" if name == "ktrdr_budget_unresolved" else "min|max"
                assert re.search(rf"({taken})( by \(unit\) )?\({name}[){{]", expression), expression


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for shown in panels(dashboard) for target in shown["targets"]]


def test_the_scale_of_the_daily_budget_panel_ends_at_the_limit(dashboard):
    budget = panel(dashboard, "Daily Budget")
    legends = {target["refId"]: target["legendFormat"] for target in budget["targets"]}
    (change,) = budget["transformations"]
    assert change["id"] == "configFromData"
    assert change["options"]["applyTo"] == {"id": "byFrameRefID", "options": "A"}
    assert change["options"]["mappings"] == [
        {"fieldName": legends[change["options"]["configRefId"]], "handlerKey": "max"}
    ]


def test_a_panel_that_shows_one_value_uses_an_instant_query(dashboard):
    """The last value of a range stays for hours after the loss of the store or of all replicas."""
    for shown in panels(dashboard):
        for target in shown["targets"]:
            assert (target["instant"], target["range"]) == ((shown["type"] in NOW), (shown["type"] not in NOW))
        if shown["type"] in NOW:
            assert "timeseries" not in shown["options"]
        else:
            assert not {"last", "lastNotNull"} & set(shown["options"]["legend"].get("calcs", []))


def test_a_panel_of_current_figures_shows_unknown_if_a_figure_is_absent(dashboard):
    for shown in panels(dashboard):
        gauges = any(re.search(r"\b(min|max)\b", target["expr"]) for target in shown["targets"])
        if gauges and shown["type"] in NOW:
            assert shown["fieldConfig"]["defaults"]["noValue"] == "unknown", shown["title"]


def test_the_budget_panels_show_only_the_budget_selected_in_the_dashboard(dashboard):
    (variable,) = dashboard["templating"]["list"]
    assert (variable["name"], variable["type"]) == ("budget", "query")
    assert variable["query"]["query"] == "label_values(ktrdr_budget_spent, budget)"
    assert variable["current"]["value"] == "agent"
    # A single name, which Grafana inserts unchanged; for several it creates a regular expression.
    assert variable["multi"] is variable["includeAll"] is False
    for title in ROWS["Budget"]:
        for target in panel(dashboard, title)["targets"]:
            assert target["expr"].count("ktrdr_budget_") == target["expr"].count('{budget="$budget"}') > 0
    used = {name for text in expressions(dashboard) for name in re.findall(r"\$\{?(\w+)", text)}
    assert used == {"__range", "__rate_interval", "budget"}


def test_every_alert_is_annotated_on_the_dashboard_with_the_name_of_the_alert(dashboard):
    (annotation,) = dashboard["annotations"]["list"]
    assert annotation["titleFormat"] == "{{alertname}}"
    found = re.fullmatch(r'ALERTS{alertname=~"(.+)",alertstate="firing"}', annotation["expr"])
    assert found is not None
    alerts = [rule["alert"] for group in read_yaml(ALERTS)["groups"] for rule in group["rules"] if "alert" in rule]
    assert [name for name in alerts if not re.fullmatch(found[1], name)] == []


async def test_every_metric_and_every_label_is_in_a_panel(dashboard, server):
    metrics = LimiterMetrics()
    AgentMetrics(metrics.registry)
    audit = Audit()
    metrics.add(audit)
    async with AsyncBudgetLimiter(server.url, [Budget("agent", "5.00")], observer=metrics.observe) as limiter:
        metrics.watch(limiter)
        await audit.check(limiter)
        text = (await metrics.render())[0].decode()
    audit.close()
    exported = list(text_string_to_metric_families(text))
    assert {"agent_budget_spend", "ktrdr_budget_adds_up", "agent_phase_duration_seconds"} <= {
        family.name for family in exported
    }
    for family in exported:
        name = family.name + ("_total" if family.type == "counter" else "(_sum|_count|_bucket)?")
        asked = [text for text in expressions(dashboard) if re.search(rf"\b{name}\b", text)]
        assert asked, f"{family.name} is in no panel"
        # A bucket is not read alone, and a budget has one unit.
        for label in {label for sample in family.samples for label in sample.labels} - {"le", "unit"}:
            assert any(re.search(rf"\b{label}\b", text) for text in asked), f"{family.name} by {label} is in no panel"


# -- provisioning ------------------------------------------------------------------------------------------------------


def test_every_query_uses_a_provisioned_datasource(dashboard):
    provisioned = {source["uid"]: source for source in read_yaml(DATASOURCES)["datasources"]}
    assert {uid: source["type"] for uid, source in provisioned.items()} == {
        "prometheus": "prometheus",
        "jaeger": "jaeger",
    }
    for shown in panels(dashboard):
        assert shown["datasource"] == DATASOURCE
        assert all(target["datasource"] == DATASOURCE for target in shown["targets"])
    assert all(annotation["datasource"] == DATASOURCE for annotation in dashboard["annotations"]["list"])


def test_grafana_and_prometheus_have_the_same_scrape_interval():
    (prometheus,) = (source for source in read_yaml(DATASOURCES)["datasources"] if source["type"] == "prometheus")
    assert prometheus["jsonData"]["timeInterval"] == read_yaml(PROMETHEUS)["global"]["scrape_interval"]


def test_grafana_loads_the_dashboard_from_the_provisioned_folder():
    (provider,) = read_yaml(PROVIDERS)["providers"]
    assert provider["type"] == "file"
    assert provider["options"]["path"] == "/etc/grafana/dashboards"
    assert provider["allowUiUpdates"] is False
    assert [path.name for path in DASHBOARD.parent.iterdir()] == ["agent.json"]
