"""Prometheus metrics of research cycles: names, labels and buckets match the contract."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.telemetry.agent_metrics import AgentMetrics
from ktrdr_budget.telemetry.metrics import LimiterMetrics
from ktrdr_budget.telemetry.outcomes import combined

from ..conftest import free_port

BUDGETS = (Budget("agent", "5.00"), Budget("other", "5.00"), Budget("cycles", 1, unit="cycles", kind="slots"))
Samples = dict[tuple[str, ...], float]


@asynccontextmanager
async def agent(url: str, budgets: Any = BUDGETS) -> AsyncIterator[tuple[AsyncBudgetLimiter, AgentMetrics, Any]]:
    """A limiter, the agent's metrics, and a function that scrapes them."""
    metrics = LimiterMetrics()
    counted = AgentMetrics(metrics.registry)

    async def scrape() -> Samples:
        return samples_of((await metrics.render())[0].decode())

    observer = combined(metrics.observe, counted.observe)
    async with AsyncBudgetLimiter(url, budgets, timeout=0.2, observer=observer) as limiter:
        metrics.watch(limiter)
        yield limiter, counted, scrape


def samples_of(text: str, families: Any = text_string_to_metric_families) -> Samples:
    """The agent's samples, by name and by label values in the order of the label names."""
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in families(text)
        for sample in family.samples
        if sample.name.startswith("agent_")
    }


def at_zero() -> Samples:
    """The counters of the agent, all 0; the figures of the store are not included."""
    found: Samples = {("agent_budget_spend_total",): 0}
    found |= {("agent_cycles_total", outcome): 0 for outcome in ("completed", "failed", "cancelled")}
    found |= {
        ("agent_gate_results_total", gate, result): 0
        for gate in ("training", "backtest")
        for result in ("pass", "fail")
    }
    found |= {("agent_tokens_total", phase): 0 for phase in ("design", "assessment")}
    cycle_bounds = ("60.0", "300.0", "600.0", "900.0", "1200.0", "1800.0", "3600.0", "+Inf")
    found |= {("agent_cycle_duration_seconds_bucket", bound): 0 for bound in cycle_bounds}
    found |= {("agent_cycle_duration_seconds_count",): 0, ("agent_cycle_duration_seconds_sum",): 0}
    for phase in ("designing", "training", "backtesting", "assessing"):
        bounds = ("10.0", "30.0", "60.0", "120.0", "300.0", "600.0", "+Inf")
        found |= {("agent_phase_duration_seconds_bucket", bound, phase): 0 for bound in bounds}
        found |= {("agent_phase_duration_seconds_count", phase): 0, ("agent_phase_duration_seconds_sum", phase): 0}
    return found


def figures(limit: float | None, spent: float, held: float, unconfirmed: float) -> Samples:
    """The figures of the store."""
    found: Samples = {
        ("agent_budget_spent_dollars",): spent,
        ("agent_budget_held_dollars",): held,
        ("agent_budget_unconfirmed_dollars",): unconfirmed,
    }
    if limit is not None:
        found["agent_budget_limit_dollars",] = limit
        found["agent_budget_remaining_dollars",] = pytest.approx(limit - spent - held - unconfirmed)
    return found


async def test_every_counter_starts_at_zero(server):
    async with agent(server.url) as (_, _, scrape):
        assert await scrape() == at_zero() | figures(5, 0, 0, 0)


async def test_the_metrics_count_cycles_phases_gate_results_and_tokens(server):
    async with agent(server.url) as (_, counted, scrape):
        before = await scrape()
        counted.cycle_ended("completed", 61.5)
        counted.cycle_ended("failed", 3)
        counted.phase_ended("designing", 10.0)
        counted.phase_ended("assessing", 700)
        counted.gate("training", True)
        counted.gate("backtest", False)
        counted.tokens("design", 1234)
        counted.tokens("design", 6)
        counted.tokens("assessment", 0)
        after = await scrape()
    changed = {key: value for key, value in after.items() if before[key] != value and "+Inf" not in key}
    assert changed == {
        ("agent_cycles_total", "completed"): 1,
        ("agent_cycles_total", "failed"): 1,
        ("agent_cycle_duration_seconds_bucket", "60.0"): 1,
        **{
            ("agent_cycle_duration_seconds_bucket", bound): 2
            for bound in ("300.0", "600.0", "900.0", "1200.0", "1800.0", "3600.0")
        },
        ("agent_cycle_duration_seconds_count",): 2,
        ("agent_cycle_duration_seconds_sum",): 64.5,
        **{
            ("agent_phase_duration_seconds_bucket", bound, "designing"): 1
            for bound in ("10.0", "30.0", "60.0", "120.0", "300.0", "600.0")
        },
        ("agent_phase_duration_seconds_count", "designing"): 1,
        ("agent_phase_duration_seconds_sum", "designing"): 10,
        ("agent_phase_duration_seconds_count", "assessing"): 1,
        ("agent_phase_duration_seconds_sum", "assessing"): 700,
        ("agent_gate_results_total", "training", "pass"): 1,
        ("agent_gate_results_total", "backtest", "fail"): 1,
        ("agent_tokens_total", "design"): 1240,
    }


def test_an_unknown_label_is_rejected():
    counted = AgentMetrics(LimiterMetrics().registry)
    for report in (
        lambda: counted.cycle_ended("finished", 1),
        lambda: counted.phase_ended("design", 1),
        lambda: counted.gate("assessment", True),
        lambda: counted.tokens("designing", 1),
    ):
        with pytest.raises(ValueError, match="unknown label"):
            report()


async def test_the_spend_counter_matches_the_ledger(server):
    async with agent(server.url) as (limiter, _, scrape):
        async with limiter.hold({"agent": "0.15", "cycles": 1}) as hold:
            hold.accrue({"agent": "0.031"})
        second = await limiter.reserve("agent", "0.10", id="h-2")
        await second.commit("0.25")  # an overrun counts in full
        await limiter.commit("h-2", "0.25")  # a replay does not count
        third = await limiter.reserve("agent", "0.10")
        await third.release()
        await limiter.record({"agent": "0.01", "other": "1.00"})
        await limiter.reserve("agent", "0.15")  # held, not spent
        samples = await scrape()
        ledger = sum((entry.amount for entry in (await limiter.ledger("agent")).items), Decimal(0))
    assert samples["agent_budget_spend_total",] == pytest.approx(float(ledger)) == pytest.approx(0.291)
    assert {key: samples[key] for key in figures(5, 0, 0, 0)} == figures(5, 0.291, 0.15, 0)


async def test_spend_of_a_different_limiter_changes_the_gauges_but_not_the_spend_counter(server):
    async with agent(server.url) as (_, _, scrape), AsyncBudgetLimiter(server.url, BUDGETS) as other:
        await other.record("agent", "0.50")
        samples = await scrape()
    assert samples["agent_budget_spend_total",] == 0
    assert samples["agent_budget_spent_dollars",] == 0.5


async def test_an_unlimited_agent_budget_has_no_limit_gauge_and_no_remaining_gauge(server):
    async with agent(server.url, [Budget("agent", None)]) as (limiter, _, scrape):
        await limiter.record("agent", "0.50")
        samples = await scrape()
    assert samples == at_zero() | {("agent_budget_spend_total",): 0.5} | figures(None, 0.5, 0, 0)


async def test_gauges_are_absent_while_the_store_is_unreachable():
    async with agent(f"redis://127.0.0.1:{free_port()}") as (_, counted, scrape):
        counted.gate("training", True)
        assert await scrape() == at_zero() | {("agent_gate_results_total", "training", "pass"): 1}


async def test_a_limiter_without_the_agent_budget_exports_no_agent_gauges(server):
    async with agent(server.url, [Budget("other", "5.00")]) as (limiter, _, scrape):
        await limiter.record("other", "0.50")
        assert await scrape() == at_zero()


async def test_the_openmetrics_format_and_the_text_format_have_the_same_samples(server):
    metrics = LimiterMetrics()
    counted = AgentMetrics(metrics.registry)
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        metrics.watch(limiter)
        counted.cycle_ended("cancelled", 5)
        text, media_type = await metrics.render("application/openmetrics-text; version=1.0.0")
        plain, _ = await metrics.render()
    assert media_type.startswith("application/openmetrics-text")
    assert samples_of(text.decode(), openmetrics_families) == samples_of(plain.decode())


WORK = """
import asyncio, sys
from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.telemetry.agent_metrics import AgentMetrics
from ktrdr_budget.telemetry.metrics import LimiterMetrics
from ktrdr_budget.telemetry.outcomes import combined

async def main(url, number):
    metrics = LimiterMetrics()
    agent = AgentMetrics(metrics.registry)
    observer = combined(metrics.observe, agent.observe)
    async with AsyncBudgetLimiter(url, [Budget("agent", "5.00")], observer=observer) as limiter:
        metrics.watch(limiter)
        if number:
            await limiter.record("agent", "0.15")
            agent.cycle_ended("completed", 70)
            agent.phase_ended("training", 20)
            agent.gate("training", number == 1)
            agent.tokens("design", 100 * number)
        print((await metrics.render())[0].decode())

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def test_a_scrape_includes_the_counters_of_earlier_processes(server, tmp_path: Path):
    """Three processes run one after another; the last scrape includes the counters of all three."""
    seen = []
    for number in range(3):
        done = subprocess.run(
            [sys.executable, "-c", WORK, server.url, str(number)],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        seen.append(samples_of(done.stdout))
    assert seen[0] == at_zero() | figures(5, 0, 0, 0)
    expected = {
        ("agent_budget_spend_total",): pytest.approx(0.30),
        ("agent_cycles_total", "completed"): 2,
        ("agent_cycles_total", "failed"): 0,
        ("agent_cycle_duration_seconds_bucket", "60.0"): 0,
        ("agent_cycle_duration_seconds_bucket", "300.0"): 2,
        ("agent_phase_duration_seconds_sum", "training"): 40,
        ("agent_gate_results_total", "training", "pass"): 1,
        ("agent_gate_results_total", "training", "fail"): 1,
        ("agent_tokens_total", "design"): 300,
        **figures(5, 0.30, 0, 0),
    }
    assert {key: seen[2][key] for key in expected} == expected
    assert seen[2].keys() == seen[0].keys()
