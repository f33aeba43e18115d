"""Prometheus metrics: figures of the store at scrape time, and counters of this replica."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from ktrdr_budget import (
    AsyncBudgetLimiter,
    Budget,
    BudgetError,
    BudgetExceeded,
    HoldConflict,
    StoreError,
    StoreUnavailable,
)
from ktrdr_budget.engine.batching.pending import Observation
from ktrdr_budget.engine.replica.outbox import OUTCOMES as RESOLVED
from ktrdr_budget.telemetry.audit import Audit
from ktrdr_budget.telemetry.metrics import BUCKETS_S, LimiterMetrics

from ..helpers.proxy import Proxy
from ..helpers.waiting import until

BUDGETS = (
    Budget("agent", "5.00"),
    Budget("tokens", 1000, unit="tokens", period="hour"),
    Budget("jobs", 2, kind="slots"),
    Budget("free", None),
)


@asynccontextmanager
async def watched(url: str, budgets: Any = BUDGETS, **options: Any) -> AsyncIterator[tuple[Any, LimiterMetrics]]:
    """A limiter and its metrics."""
    metrics = LimiterMetrics()
    async with AsyncBudgetLimiter(url, budgets, observer=metrics.observe, **options) as limiter:
        metrics.watch(limiter)
        yield limiter, metrics


async def scrape(metrics: LimiterMetrics) -> dict[tuple[str, ...], float]:
    """All samples, by name and by label values in the order of the label names."""
    text, media_type = await metrics.render()
    assert media_type.startswith("text/plain")
    samples = {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.documentation
        for sample in family.samples:
            key = (sample.name, *(sample.labels[name] for name in sorted(sample.labels)))
            assert key not in samples
            samples[key] = sample.value
    return samples


def named(samples: dict[tuple[str, ...], float], name: str) -> dict[tuple[str, ...], float]:
    return {key[1:]: value for key, value in samples.items() if key[0] == name}


async def test_the_gauges_match_the_figures_in_the_store(server):
    async with watched(server.url) as (limiter, metrics):
        await limiter.record({"agent": "0.15", "tokens": 10})
        await limiter.reserve({"agent": "1", "jobs": 1, "free": "2.50"})
        samples = await scrape(metrics)
    assert samples["agent_budget_remaining_dollars",] == 3.85
    assert samples["ktrdr_budget_store_up",] == 1
    assert named(samples, "ktrdr_budget_limit") == {
        ("agent", "usd"): 5,
        ("tokens", "tokens"): 1000,
        ("jobs", "slots"): 2,
    }
    assert named(samples, "ktrdr_budget_spent") == {
        ("agent", "usd"): 0.15,
        ("tokens", "tokens"): 10,
        ("jobs", "slots"): 0,
        ("free", "usd"): 0,
    }
    assert named(samples, "ktrdr_budget_held") == {
        ("agent", "usd"): 1,
        ("tokens", "tokens"): 0,
        ("jobs", "slots"): 1,
        ("free", "usd"): 2.5,
    }
    assert set(named(samples, "ktrdr_budget_unconfirmed").values()) == {0}
    assert named(samples, "ktrdr_budget_remaining") == {
        ("agent", "usd"): 3.85,
        ("tokens", "tokens"): 990,
        ("jobs", "slots"): 1,
    }


async def test_the_end_of_a_window_is_exported_unless_the_window_never_ends(server):
    budgets = [Budget("agent", "5.00", timezone="Europe/Berlin"), Budget("grant", "100", period="ever")]
    async with watched(server.url, budgets) as (limiter, metrics):
        samples = await scrape(metrics)
        ends = (await limiter.status("agent")).resets_at
    assert named(samples, "ktrdr_budget_resets_timestamp_seconds") == {("agent", "usd"): ends.timestamp()}


async def test_the_gauges_are_read_from_the_store_at_scrape_time(server):
    async with watched(server.url) as (_, metrics), AsyncBudgetLimiter(server.url, BUDGETS) as other:
        assert (await scrape(metrics))["agent_budget_remaining_dollars",] == 5
        await other.record("agent", "2")
        assert (await scrape(metrics))["agent_budget_remaining_dollars",] == 3


async def test_the_gauge_of_unconfirmed_amounts_includes_an_expired_hold(server):
    async with watched(server.url) as (limiter, metrics):
        await limiter.reserve("agent", "0.15", ttl=1)

        async def unconfirmed() -> bool:
            return (await scrape(metrics))["ktrdr_budget_unconfirmed", "agent", "usd"] == 0.15

        await until(unconfirmed)
        assert (await scrape(metrics))["ktrdr_budget_held", "agent", "usd"] == 0


async def test_budget_gauges_are_absent_during_an_outage_of_the_store(start_server):
    """#38087, #29937: the gauges showed the full budget, or +Inf, although the spend was unknown."""
    own = start_server()
    async with watched(own.url, timeout=0.1) as (limiter, metrics):
        await limiter.record("agent", "4")
        own.kill()
        samples = await scrape(metrics)
        assert samples["ktrdr_budget_store_up",] == 0
        assert samples["ktrdr_budget_spend_total", "agent", "usd"] == 4  # counters of this replica are still known
        names = {key[0] for key in samples}
        assert "agent_budget_remaining_dollars" not in names
        assert not names & {
            f"ktrdr_budget_{figure}" for figure in ("limit", "spent", "held", "unconfirmed", "remaining")
        }
        own.start()

        async def known() -> bool:
            return ("agent_budget_remaining_dollars",) in await scrape(metrics)

        await until(known)


async def test_the_audit_gauge_is_absent_during_an_outage_even_after_a_successful_audit(start_server):
    """The result of an earlier audit is not valid during an outage."""
    own, audit = start_server(), Audit()
    async with watched(own.url, timeout=0.5) as (limiter, metrics):
        metrics.add(audit)
        await audit.check(limiter)
        assert (await scrape(metrics))["ktrdr_budget_adds_up", "agent"] == 1
        own.kill()
        samples = await scrape(metrics)
        assert samples["ktrdr_budget_store_up",] == 0
        assert named(samples, "ktrdr_budget_adds_up") == {}
    audit.close()


async def test_an_unlimited_budget_has_no_limit_gauge_and_no_remaining_gauge(server):
    async with watched(server.url, [Budget("agent", None)]) as (_, metrics):
        samples = await scrape(metrics)
    assert ("agent_budget_remaining_dollars",) not in samples
    assert named(samples, "ktrdr_budget_limit") == named(samples, "ktrdr_budget_remaining") == {}
    assert named(samples, "ktrdr_budget_spent") == {("agent", "usd"): 0}


async def test_if_one_budget_has_a_conflicting_definition_the_other_budgets_are_still_exported(server):
    async with AsyncBudgetLimiter(server.url, [Budget("tokens", 5, unit="calls", period="hour")]) as other:
        await other.reserve("tokens", 1)
    async with watched(server.url) as (_, metrics):
        samples = await scrape(metrics)
    assert samples["agent_budget_remaining_dollars",] == 5
    assert ("ktrdr_budget_spent", "tokens", "tokens") not in samples
    assert samples["ktrdr_budget_store_up",] == 1


async def test_counters_start_at_zero(server):
    async with watched(server.url) as (_, metrics):
        samples = await scrape(metrics)
    outcomes = named(samples, "ktrdr_budget_reservations_total")
    assert set(outcomes.values()) == {0}
    assert {("granted", ""), ("replayed", ""), ("unchecked", "")} <= outcomes.keys()
    assert {("denied", reason) for reason in ("budget_exhausted", "budget_held", "exceeds_limit")} <= outcomes.keys()
    assert named(samples, "ktrdr_budget_spend_total") == {(budget.name, budget.unit): 0 for budget in BUDGETS}
    assert named(samples, "ktrdr_budget_resolved_total") == {(outcome,): 0 for outcome in RESOLVED}
    repaired = {("settlements",): 0, ("holds",): 0, ("windows",): 0}
    assert named(samples, "ktrdr_budget_repaired_total") == repaired
    assert named(samples, "ktrdr_budget_unrepaired_total") == {("settlements",): 0, ("holds",): 0}
    assert named(samples, "ktrdr_budget_overruns_total") == {(budget.name,): 0 for budget in BUDGETS}
    assert samples["ktrdr_budget_losses_total",] == 0
    assert samples["ktrdr_budget_call_seconds_count", "reserve"] == 0


async def test_reservations_are_counted_by_outcome_and_reason(server):
    async with watched(server.url) as (limiter, metrics):
        await limiter.reserve("agent", "5", id="op_1")
        await limiter.reserve("agent", "5", id="op_1")
        for amount in ("0.15", "6"):
            with pytest.raises(BudgetExceeded):
                await limiter.reserve("agent", amount)
        await limiter.commit("op_1", "5")
        with pytest.raises(BudgetExceeded):
            await limiter.reserve("agent", "0.15")
        for budget, amount, hold_id in (("agent", "4", "op_1"), ("unknown", "1", None), ("agent", "-1", None)):
            with pytest.raises(BudgetError):
                await limiter.reserve(budget, amount, id=hold_id)
        outcomes = named(await scrape(metrics), "ktrdr_budget_reservations_total")
    assert {labels: count for labels, count in outcomes.items() if count} == {
        ("granted", ""): 1,
        ("replayed", ""): 1,
        ("denied", "budget_held"): 1,
        ("denied", "exceeds_limit"): 1,
        ("denied", "budget_exhausted"): 1,
        ("error", "conflict"): 1,
        ("error", "unknown_budget"): 1,
        ("error", "invalid"): 1,
    }


async def test_reservations_during_an_outage_are_counted_by_outcome(start_server):
    own = start_server()
    async with (
        watched(own.url, timeout=0.1) as (denying, denied),
        watched(own.url, timeout=0.1, on_store_error="allow") as (allowing, allowed),
    ):
        own.kill()
        with pytest.raises(BudgetError):
            await denying.reserve("agent", "0.15")
        hold = await allowing.reserve("agent", "0.15")
        await hold.commit("0.07")
        samples = await scrape(denied)
        assert samples["ktrdr_budget_reservations_total", "unavailable", "no_answer"] == 1
        samples = await scrape(allowed)
        assert samples["ktrdr_budget_reservations_total", "unchecked", ""] == 1
        assert samples["ktrdr_budget_spend_total", "agent", "usd"] == 0.07
        own.start()
        await until(lambda: not allowing.deferred)


async def test_a_reservation_that_fails_with_a_store_error_is_counted_as_unavailable(server):
    async with watched(server.url) as (limiter, metrics):
        with server.client() as client:
            client.set("ktrdr:{default}:meta", "no hash")  # makes the script fail
        with pytest.raises(StoreError):
            await limiter.reserve("agent", "0.15")
        assert (await scrape(metrics))["ktrdr_budget_reservations_total", "unavailable", "refused"] == 1


async def test_spend_is_counted_once_if_a_commit_or_record_is_replayed(server):
    async with watched(server.url) as (limiter, metrics):
        await limiter.record({"agent": "0.02", "tokens": 7}, id="op_1")
        await limiter.record({"agent": "0.02", "tokens": 7}, id="op_1")
        hold = await limiter.reserve({"agent": "0.15", "jobs": 1})
        await hold.commit("0.07")
        await hold.commit("0.07")
        await (await limiter.reserve("agent", "1")).release()
        with pytest.raises(HoldConflict):
            await hold.commit("0.08")
        spend = named(await scrape(metrics), "ktrdr_budget_spend_total")
    assert spend == {
        ("agent", "usd"): pytest.approx(0.09),
        ("tokens", "tokens"): 7,
        ("jobs", "slots"): 0,
        ("free", "usd"): 0,
    }


async def test_spend_on_a_budget_that_the_limiter_does_not_define_is_counted(server):
    async with AsyncBudgetLimiter(server.url, [Budget("other", 9, unit="calls"), Budget("money", 9)]) as other:
        for amounts in ({"other": 1}, {"money": "1"}):
            await other.reserve(amounts, id=f"op_{next(iter(amounts))}")
    async with watched(server.url) as (limiter, metrics):
        await limiter.commit("op_other", {"other": 1})
        await limiter.commit("op_money", "1")
        spend = named(await scrape(metrics), "ktrdr_budget_spend_total")
    assert spend["other", "count"] == spend["money", "usd"] == 1


async def test_overruns_are_counted_per_budget(server):
    async with watched(server.url) as (limiter, metrics):
        hold = await limiter.reserve({"agent": "0.15", "tokens": 10})
        await hold.commit({"agent": "0.15", "tokens": 11})
        await limiter.reserve("agent", "0.15", id="op_1")
        await limiter.commit("op_1", "0.16")
        await limiter.commit("op_1", "0.16")
        assert named(await scrape(metrics), "ktrdr_budget_overruns_total") == {
            ("agent",): 1,
            ("tokens",): 1,
            ("jobs",): 0,
            ("free",): 0,
        }


async def test_data_losses_of_the_store_are_counted(server):
    async with watched(server.url) as (limiter, metrics):
        await limiter.record("agent", "1")
        with server.client() as client:
            client.flushall()
        await until(lambda: _recorded(limiter))
        assert limiter.losses == 1
        assert (await scrape(metrics))["ktrdr_budget_losses_total",] == 1


async def test_settlements_restored_by_a_repair_and_resolved_requests_are_counted(server, tmp_path_factory):
    async with (
        Proxy(server.socket_path, tmp_path_factory.mktemp("p") / "s") as proxy,
        watched(proxy.url, timeout=0.2) as (limiter, metrics),
    ):
        await limiter.record("agent", "1")
        proxy.lose_all("reply")
        with pytest.raises(StoreUnavailable):
            await limiter.record("agent", "0.10")
        assert (await scrape(metrics))["ktrdr_budget_unresolved",] == 1
        proxy.lose_all(None)
        await until(lambda: limiter.unresolved == 0)
        with server.client() as client:
            client.flushall()
        await until(lambda: limiter.repaired.settlements >= 2)
        samples = await scrape(metrics)
        assert samples["ktrdr_budget_unresolved",] == 0
        resolved = named(samples, "ktrdr_budget_resolved_total")
        assert {outcome for outcome, count in resolved.items() if count} == {("executed",)}
        assert resolved["executed",] == 1
        assert named(samples, "ktrdr_budget_repaired_total")["settlements",] == limiter.repaired.settlements
        assert named(await scrape(metrics), "ktrdr_budget_repaired_total")["settlements",] == 2


async def _recorded(limiter: AsyncBudgetLimiter) -> bool:
    await limiter.record("agent", "0.01")
    return limiter.losses > 0


async def test_the_duration_of_each_call_is_observed_in_a_histogram(server):
    async with watched(server.url) as (limiter, metrics):
        hold = await limiter.reserve("agent", "0.15")
        await hold.extend()
        await hold.commit("0.07")
        await limiter.status("agent")
        samples = await scrape(metrics)
    for operation in ("reserve", "extend", "commit"):
        assert samples["ktrdr_budget_call_seconds_count", operation] == 1
        assert 0 < samples["ktrdr_budget_call_seconds_sum", operation] < 5
        assert samples["ktrdr_budget_call_seconds_bucket", "+Inf", operation] == 1
    assert len(named(samples, "ktrdr_budget_call_seconds_bucket")) % (len(BUCKETS_S) + 1) == 0
    assert (BUCKETS_S[0], BUCKETS_S[-1]) == (0.0001, 1.0)


async def test_metrics_are_rendered_in_the_openmetrics_format_if_requested(server):
    async with watched(server.url) as (limiter, metrics):
        await limiter.record("agent", "0.15")
        text, media_type = await metrics.render("application/openmetrics-text; version=1.0.0")
    assert media_type.startswith("application/openmetrics-text")
    families = {family.name: family for family in openmetrics_families(text.decode())}
    assert families["ktrdr_budget_spend"].samples[0].value == 0.15
    assert not any(sample.name.endswith("_created") for family in families.values() for sample in family.samples)


async def test_additional_collectors_can_be_added(server):
    class AddsUp:
        def collect(self):
            family = GaugeMetricFamily("ktrdr_budget_adds_up", "Whether it adds up.", labels=("budget",))
            family.add_metric(["agent"], 1)
            yield family

    async with watched(server.url) as (_, metrics):
        metrics.add(AddsUp())
        assert (await scrape(metrics))["ktrdr_budget_adds_up", "agent"] == 1


async def test_two_limiters_in_one_process_have_separate_metrics(server):
    async with watched(server.url) as (limiter, metrics), watched(server.url) as (_, others):
        await limiter.record("agent", "0.15")
        assert (await scrape(others))["ktrdr_budget_spend_total", "agent", "usd"] == 0
        assert (await scrape(metrics))["ktrdr_budget_spend_total", "agent", "usd"] == 0.15


async def test_an_application_can_pass_a_registry_for_the_metrics(server):
    registry = CollectorRegistry()
    metrics = LimiterMetrics(registry)
    async with AsyncBudgetLimiter(server.url, BUDGETS, observer=metrics.observe) as limiter:
        metrics.watch(limiter)
        await limiter.record("agent", "0.15")
    assert registry.get_sample_value("ktrdr_budget_spend_total", {"budget": "agent", "unit": "usd"}) == 0.15


def test_an_unexpected_error_is_counted_with_the_reason_unexpected():
    metrics = LimiterMetrics()
    metrics.observe(Observation("reserve", None, RuntimeError("?"), 0.001, copy_context()))
    labels = {"outcome": "error", "reason": "unexpected"}
    assert metrics.registry.get_sample_value("ktrdr_budget_reservations_total", labels) == 1


def test_a_scrape_includes_the_counters_of_earlier_processes(server, tmp_path: Path):
    """A scrape of a third process includes the counters of two earlier ones."""
    work = """
import asyncio, sys
from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.telemetry.metrics import LimiterMetrics

async def main():
    metrics = LimiterMetrics()
    async with AsyncBudgetLimiter(sys.argv[1], [Budget("agent", "5.00")], observer=metrics.observe) as limiter:
        metrics.watch(limiter)
        await limiter.record("agent", "0.15")
        print((await metrics.render())[0].decode())

asyncio.run(main())
"""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for number in (1, 2, 3):
        done = subprocess.run(
            [sys.executable, "-c", work, server.url], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        samples = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(done.stdout)
            for sample in family.samples
        }
        assert samples["ktrdr_budget_spend_total", "agent", "usd"] == pytest.approx(0.15 * number)
        assert samples["ktrdr_budget_call_seconds_count", "record"] == number
        assert samples["ktrdr_budget_spent", "agent", "usd"] == pytest.approx(0.15 * number)
        assert samples["ktrdr_budget_store_up",] == 1
        assert samples["ktrdr_budget_reservations_total", "granted", ""] == 0
