"""The audit of a store in use: it finds wrong counters, and concurrent writers cause no false alarm (P11)."""

from __future__ import annotations

import asyncio

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, BudgetLimiter, StoreUnavailable
from ktrdr_budget.audit import verify

BUDGETS = [
    Budget("agent", "1000"),
    Budget("tokens", 10**6, unit="tokens", period="hour"),
    Budget("slots", 50, kind="slots"),
]


def spend(url: str) -> None:
    with BudgetLimiter(url, BUDGETS) as limiter:
        limiter.reserve({"agent": "0.15", "tokens": 100, "slots": 1}, id="open")
        limiter.reserve("agent", "0.15").commit("0.20")
        limiter.record("agent", "0.02")


def test_the_counters_of_all_windows_add_up_after_ordinary_calls(server):
    spend(server.url)
    reports = {report.budget: report for report in verify(server.url)}
    assert set(reports) == {"agent", "tokens", "slots"}
    assert all(report.adds_up and report.conclusive for report in reports.values())
    agent = reports["agent"]
    assert (agent.spent, agent.held, agent.unit) == (220_000_000, 150_000_000, "usd")
    assert (agent.ledger_sum, agent.holds_sum) == (220_000_000, 150_000_000)


@pytest.mark.parametrize("field", ["spent", "held", "unconfirmed"])
def test_an_audit_finds_a_wrong_counter(server, field):
    spend(server.url)
    report = next(report for report in verify(server.url) if report.budget == "agent")
    with server.client() as client:
        client.hincrby(report.window_key, field, 1)
    wrong = [report.budget for report in verify(server.url) if not report.adds_up]
    assert wrong == ["agent"]


def test_only_the_given_budgets_are_checked(server):
    spend(server.url)
    assert [report.budget for report in verify(server.url, budgets=[Budget("tokens", 1, unit="tokens")])] == ["tokens"]


def test_other_tenants_are_not_checked(server):
    spend(server.url)
    assert verify(server.url, "someone-else") == []


def test_an_audit_of_an_unreachable_store_raises_store_unavailable(tmp_path):
    with pytest.raises(StoreUnavailable):
        verify(f"unix://{tmp_path}/missing")


async def test_concurrent_writers_cause_no_false_alarm(server):
    stop = asyncio.Event()

    async def worker(limiter: AsyncBudgetLimiter, number: int) -> None:
        while not stop.is_set():
            try:
                hold = await limiter.reserve({"agent": "0.01", "slots": 1})
            except BudgetExceeded:
                continue
            hold.accrue("0.02")
            if number % 3 == 0:
                await hold.extend()
            if number % 5 == 0:
                await hold.grow("0.01")
            await (hold.release() if number % 2 else hold.commit())

    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        workers = [asyncio.create_task(worker(limiter, number)) for number in range(40)]
        conclusive = 0
        for _ in range(25):
            reports = await asyncio.to_thread(verify, server.url)
            assert all(report.adds_up for report in reports), reports
            conclusive += all(report.conclusive for report in reports)
        stop.set()
        await asyncio.gather(*workers)
        assert conclusive > 5
        final = await asyncio.to_thread(verify, server.url)
        assert all(report.adds_up and report.conclusive for report in final)
        assert {report.held for report in final} == {0}
