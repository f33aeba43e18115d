"""A store that evicts keys may lose a budget, so a limiter logs a warning about the store's eviction policy (P10)."""

from __future__ import annotations

import logging

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter
from ktrdr_budget.engine.batching import loss_repair

from ...helpers.waiting import until

BUDGETS = [Budget("agent", "5.00")]


@pytest.fixture
def evicting(start_server):
    own = start_server(None, "--maxmemory-policy", "allkeys-lru")
    yield own
    own.kill()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "maxmemory-policy" in record.message]


async def test_a_starting_limiter_logs_one_warning_if_the_store_may_evict_keys(evicting, caplog):
    async with AsyncBudgetLimiter(evicting.url, BUDGETS) as limiter:
        await limiter.reserve("agent", "0.15")
        assert warnings(caplog) == [
            f"store at {evicting.url}: maxmemory-policy is allkeys-lru; it must be noeviction, or budgets may vanish"
        ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_a_starting_sync_limiter_logs_one_warning_if_the_store_may_evict_keys(evicting, caplog):
    with BudgetLimiter(evicting.url, BUDGETS):
        assert len(warnings(caplog)) == 1


async def test_a_limiter_that_starts_with_its_first_call_logs_one_warning_about_eviction(evicting, caplog, monkeypatch):
    monkeypatch.setattr(loss_repair, "PULSE_S", 0.05)
    limiter = AsyncBudgetLimiter(evicting.url, BUDGETS)
    await limiter.reserve("agent", "0.15")
    await until(lambda: warnings(caplog))
    repair = limiter.engine.dispatcher.repair
    pulses = repair.pulses
    await until(lambda: repair.pulses > pulses + 5)
    assert len(warnings(caplog)) == 1
    await limiter.close()


async def test_no_warning_is_logged_if_the_store_evicts_no_keys_or_if_its_eviction_policy_is_unreadable(server, caplog):
    async with AsyncBudgetLimiter(server.url, BUDGETS):
        pass
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "worker", "on", ">pw", "~*", "+@all", "-info")
        async with AsyncBudgetLimiter(f"{server.url}?username=worker&password=pw", BUDGETS) as limiter:
            await limiter.reserve("agent", "0.15")
        client.execute_command("ACL", "DELUSER", "worker")
    assert not caplog.records
