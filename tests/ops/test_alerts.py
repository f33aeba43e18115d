"""The alert rules, tested with Prometheus's own tool."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ..helpers.tools import need
from .files import ALERTS, ALERTS_TEST, DOCKER, DOCUMENT, PROMETHEUS, read_yaml

RULES = [rule for group in read_yaml(ALERTS)["groups"] for rule in group["rules"]]
ALERT_RULES = [rule for rule in RULES if "alert" in rule]


def promtool(*words: object) -> subprocess.CompletedProcess[str]:
    command = [need("promtool", "prometheus"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_the_prometheus_configuration_and_the_alert_rules_are_valid():
    for words in (("check", "config", PROMETHEUS), ("check", "rules", ALERTS)):
        checked = promtool(*words)
        assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
def test_each_alert_fires_if_and_only_if_its_condition_is_met():
    tested = promtool("test", "rules", ALERTS_TEST)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("budget:used:ratio >= 1\n", "budget:used:ratio > 1\n"),
        ("(ktrdr_budget_limit) > 0", "(ktrdr_budget_limit)"),
        (" > 0 < budget:reset:seconds", " > 0"),
    ],
)
def test_the_alert_tests_fail_if_a_rule_is_wrong(tmp_path, right, wrong):
    text = ALERTS.read_text(encoding="utf-8")
    assert text.count(right) == 1
    (tmp_path / ALERTS.name).write_text(text.replace(right, wrong))
    shutil.copy(ALERTS_TEST, tmp_path)
    tested = promtool("test", "rules", tmp_path / ALERTS_TEST.name)
    assert tested.returncode == 1
    assert "FAILED" in tested.stdout + tested.stderr


def test_the_alert_tests_cover_each_alert_both_firing_and_not_firing():
    expected: dict[str, set[bool]] = {}
    for case in read_yaml(ALERTS_TEST)["tests"]:
        for check in case["alert_rule_test"]:
            expected.setdefault(check["alertname"], set()).add(bool(check["exp_alerts"]))
    assert set(expected) == {rule["alert"] for rule in ALERT_RULES}
    assert all(ways == {True, False} for ways in expected.values()), expected


@pytest.mark.parametrize("rule", ALERT_RULES, ids=lambda rule: rule["alert"])
def test_each_alert_has_a_severity_and_a_runbook(rule):
    assert rule["labels"]["severity"] in {"info", "warning", "critical"}
    assert {"summary", "description", "runbook"} <= rule["annotations"].keys()
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert Path(page) == DOCUMENT.relative_to(DOCKER.parent)
    headings = re.findall(r"^#+ (.+)$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert anchor in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_alert_rules_take_the_sum_of_counters_but_the_minimum_or_maximum_of_gauges():
    for rule in RULES:
        for name in re.findall(r"ktrdr_budget_\w+", rule["expr"]):
            if name == "ktrdr_budget_store_up":  # per replica, to name the replica that cannot reach the store
                continue
            if name.endswith("_total"):
                assert re.search(rf"sum( by \([\w, ]+\) )?\((rate|increase)\({name}({{[^}}]+}})?\[", rule["expr"]), rule
            else:
                assert re.search(rf"(min|max) by \([\w, ]+\) \({name}\)", rule["expr"]), rule
