"""The benchmark suite runs, and also writes its figures as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MARKERS = ("<!-- benchmarks: begin -->", "<!-- benchmarks: end -->")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)  # the suite is no part of the package


MEASURES = {
    "latency": {"reserve_latency_to_empty_evalsha"},
    "server": {"server_time_1_budget_batched", "server_time_6_budgets_single"},
    "memory": {"memory_open_hold_valkey", "memory_settled_operation_valkey", "memory_window_valkey"},
    "cli": {"import_s", "cli_agent_budget_s"},
    "guards": {
        "guard_overhead_anthropic_messages_create",
        "guard_overhead_openai_chat_completions_create_streamed",
    },
    "lease": {"lease_spend_str", "lease_acquire_commit"},
    "cluster": {
        "cluster_three_shards_to_one",
        "cluster_busiest_server_one_to_three",
        "cluster_reserve_to_server",
    },
}
"""Some of the measures of each benchmark group."""


@pytest.mark.slow
@pytest.mark.parametrize("group", MEASURES)
def test_a_quick_run_of_a_benchmark_group_writes_the_measures_as_json(tmp_path: Path, group: str) -> None:
    file = tmp_path / "figures.json"
    # Without a deadline of its own: how long it takes is a property of the machine.
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--rounds", "1", "--json", str(file), "--only", group],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    assert written["quick"] is True
    assert written["machine"]["cores"] >= 1
    assert {"python", "redis", "valkey-server"} <= written["versions"].keys()
    measures = {measure["name"]: measure for measure in written["measures"]}
    assert MEASURES[group] <= measures.keys()
    for measure in measures.values():
        assert 0 < measure["min"] <= measure["median"] <= measure["max"]
        limit, reached = measure["target"]["figure"], measure["median"]
        at_least = measure["target"]["side"] == "at least"
        assert measure["met"] == (reached >= limit if at_least else reached <= limit)
        assert measure["title"] in done.stdout
    assert done.stdout.count("missed") == sum(not measure["met"] for measure in measures.values())


def test_a_run_measures_nothing_and_names_the_compared_libraries_that_are_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import __main__ as benchmarks

    monkeypatch.setattr(benchmarks.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(benchmarks, "GROUPS", dict.fromkeys(benchmarks.GROUPS))
    written = "benchmarks: limits and throttled-py not installed: `make bench` installs them\n"
    for words in (["--only", "concurrency"], ["--only", "lease"], []):
        assert benchmarks.main(words) == 2
        assert capsys.readouterr() == ("", written)


def _measures():
    from benchmarks.measures import Measure, at_least, at_most

    return [
        Measure("fast", "a fast thing", "x", (5.0, 4.5, 6.0), at_least(4)),
        Measure("slow", "a slow thing", "µs", (13.0, 12.5, 11.0), at_most(12), detail="of 3"),
    ]


def _about():
    from benchmarks.measures import Settings
    from benchmarks.report import circumstances

    return circumstances(Settings(quick=True), 1.0)


def test_the_table_shows_whether_each_measure_met_the_target() -> None:
    from benchmarks.report import table

    fast, slow = table(_measures()).splitlines()[1:]
    assert "5.00 x" in fast and "met" in fast and "missed" not in fast
    assert "12.5 µs" in slow and "11.0 … 13.0" in slow and "≤ 12 µs" in slow and "missed" in slow


def test_the_new_table_replaces_the_text_between_the_markers_of_the_page(tmp_path: Path) -> None:
    from benchmarks.report import rewrite

    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    rewrite(page, _measures(), _about())
    rewrite(page, _measures(), _about())
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("a slow thing") == 1 and "**missed**" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1


def test_a_page_without_markers_is_not_changed(tmp_path: Path) -> None:
    from benchmarks.report import rewrite

    page = tmp_path / "page.md"
    page.write_text("nothing here\n")
    with pytest.raises(ValueError, match="benchmarks: begin"):
        rewrite(page, _measures(), _about())
    assert page.read_text() == "nothing here\n"


def test_the_page_about_benchmarks_has_each_marker_once() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert [text.count(marker) for marker in MARKERS] == [1, 1]
