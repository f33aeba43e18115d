"""The metric of the periodic audit."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.telemetry.audit import Audit

from ..helpers.keyspace import window_key


def shown(audit: Audit) -> str:
    registry = CollectorRegistry()
    registry.register(audit)
    return generate_latest(registry).decode()


async def test_the_audit_gauge_is_1_for_correct_sums_and_0_for_wrong_sums(server):
    audit = Audit()
    async with AsyncBudgetLimiter(server.url, [Budget("agent", "1"), Budget("other", "1")]) as limiter:
        assert "ktrdr_budget_adds_up{" not in shown(audit)
        await (await limiter.reserve("agent", "0.15")).commit("0.07")
        await limiter.reserve({"agent": "0.15", "other": "0.01"})
        await audit.check(limiter)
        assert 'ktrdr_budget_adds_up{budget="agent"} 1.0' in shown(audit)
        with server.client() as client:
            client.hincrby(window_key(client), "spent", 1)
        await audit.check(limiter)
        assert 'ktrdr_budget_adds_up{budget="agent"} 0.0' in shown(audit)
        assert 'ktrdr_budget_adds_up{budget="other"} 1.0' in shown(audit)
    audit.close()
