"""Limiters in memory, which users of the package can use in tests; the promises are tested on real servers only."""

from __future__ import annotations

import asyncio
import builtins
import logging
import re
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from ktrdr_budget import (
    AsyncBudgetLimiter,
    Budget,
    BudgetExceeded,
    BudgetLimiter,
    HoldConflict,
    StoreUnavailable,
    UnknownBudget,
    UnknownHold,
)
from ktrdr_budget.access_keys import AccessKeys
from ktrdr_budget.agent.cycle_store import CycleStore
from ktrdr_budget.engine.protocol.scripts import CORRECT, PARTS, REINDEX, script
from ktrdr_budget.testing import AsyncMemoryLimiter, MemoryLimiter, memory_server

from .helpers.waiting import until, wait_until

BUDGETS = [Budget("agent", "5.00"), Budget("jobs", 2, kind="slots"), Budget("calls", 10, unit="requests")]
GUIDE = Path(__file__).parents[1] / "docs" / "testing.md"
EXAMPLE = Path(__file__).with_name("test_testing_example.py")


@pytest.fixture
def limiter() -> Iterator[MemoryLimiter]:
    with MemoryLimiter(BUDGETS) as made:
        yield made


@pytest.fixture
async def async_limiter() -> AsyncIterator[AsyncMemoryLimiter]:
    async with AsyncMemoryLimiter(BUDGETS) as made:
        yield made


def test_a_memory_limiter_is_an_instance_of_the_limiter_class(limiter):
    assert isinstance(limiter, BudgetLimiter)
    assert issubclass(AsyncMemoryLimiter, AsyncBudgetLimiter)
    assert limiter.store_url == "memory"
    assert repr(limiter).startswith("<MemoryLimiter tenant='default' store='memory'")


def test_a_commit_replaces_the_reserved_amount_with_the_cost(limiter):
    hold = limiter.reserve("agent", "1.00", operation="chat")
    assert limiter.status("agent").held == Decimal("1.00")
    assert [view.id for view in limiter.holds("agent").items] == [hold.id]
    settlement = hold.commit("0.30")
    assert (settlement.state, settlement.amounts) == ("committed", {"agent": Decimal("0.30")})
    status = limiter.status("agent")
    assert (status.spent, status.held, status.remaining) == (Decimal("0.30"), 0, Decimal("4.70"))
    [entry] = limiter.ledger("agent").items
    assert (entry.kind, entry.hold_id, entry.amount, entry.operation) == ("commit", hold.id, Decimal("0.30"), "chat")


def test_a_release_returns_the_reserved_amount_to_the_budget(limiter):
    limiter.reserve("agent", "1.00").release()
    status = limiter.status("agent")
    assert (status.spent, status.held) == (0, 0)
    assert limiter.ledger("agent").items == ()


def test_a_denied_reservation_raises_an_error_with_figures_and_reserves_nothing(limiter):
    limiter.reserve("agent", "4.00")
    with pytest.raises(BudgetExceeded) as denied:
        limiter.reserve({"calls": 1, "agent": "1.50"})
    assert (denied.value.budget, denied.value.reason, denied.value.fits) == ("agent", "budget_held", Decimal("1.00"))
    assert limiter.status("calls").held == 0


def test_concurrent_reservations_are_granted_until_the_cap_is_reached():
    async def race() -> list[bool]:
        async with AsyncMemoryLimiter(BUDGETS) as limiter:
            reserving = (limiter.reserve("agent", "0.15") for _ in range(50))
            outcomes = await asyncio.gather(*reserving, return_exceptions=True)
        return [isinstance(outcome, BudgetExceeded) for outcome in outcomes]

    assert sorted(asyncio.run(race())) == [False] * 33 + [True] * 17


def test_a_repeated_id_is_a_replay_with_equal_contents_and_a_conflict_with_different_contents(limiter):
    hold = limiter.reserve("agent", "1.00", id="op_1")
    assert limiter.reserve("agent", "1.00", id="op_1").replayed
    with pytest.raises(HoldConflict):
        limiter.reserve("agent", "2.00", id="op_1")
    hold.commit("0.50")
    assert limiter.commit("op_1", "0.50").replayed
    with pytest.raises(UnknownHold):
        limiter.get("op_2")
    with pytest.raises(UnknownBudget):
        limiter.reserve("other", "1.00")


def test_a_hold_block_commits_the_accrued_amount_or_releases_the_hold_after_an_error(limiter):
    with limiter.hold("agent", "1.00") as hold:
        hold.accrue("0.20")
        hold.extend()
        hold.grow("0.50")
    assert limiter.get(hold.id).charged == {"agent": Decimal("0.20")}
    with pytest.raises(ZeroDivisionError), limiter.hold("agent", "1.00"):
        raise ZeroDivisionError
    status = limiter.status("agent")
    assert (status.spent, status.held) == (Decimal("0.20"), 0)


def test_slots_are_released_at_the_end_of_the_hold_block(limiter):
    with limiter.hold("jobs", 1), limiter.hold("jobs", 1):
        with pytest.raises(BudgetExceeded):
            limiter.reserve("jobs", 1)
    assert limiter.status("jobs").held == 0


def test_an_expired_hold_becomes_unconfirmed_and_a_late_commit_counts(limiter):
    hold = limiter.reserve("agent", "1.00", ttl=1)
    wait_until(lambda: limiter.status("agent").unconfirmed == Decimal("1.00"))
    assert hold.commit("0.40").late
    assert limiter.status("agent").spent == Decimal("0.40")


def test_closing_a_lease_returns_the_unspent_part_of_the_chunk(limiter):
    with limiter.lease("agent", "1.00") as lease:
        lease.spend("0.25")
        lease.acquire("0.10").release()
        assert limiter.status("agent").held == Decimal("1.00")
    status = limiter.status("agent")
    assert (status.spent, status.held) == (Decimal("0.25"), 0)


def test_a_limit_can_be_set_and_cleared_at_run_time(limiter):
    assert limiter.set_limit("agent", "0.50").limit == Decimal("0.50")
    with pytest.raises(BudgetExceeded):
        limiter.reserve("agent", "0.60")
    assert limiter.clear_limit("agent").limit == Decimal("5.00")


async def test_an_async_memory_limiter_commits_holds_and_records_spend(async_limiter):
    async with async_limiter.hold("agent", "1.00") as hold:
        hold.accrue("0.07")
    await async_limiter.record({"agent": "0.03", "calls": 2}, id="r-1")
    by_name = {status.budget: status.spent for status in await async_limiter.statuses()}
    assert by_name == {"agent": Decimal("0.10"), "jobs": 0, "calls": 2}
    assert [entry.kind for entry in (await async_limiter.ledger("agent")).items] == ["record", "commit"]


def test_memory_limiters_on_the_same_server_share_budgets():
    server = memory_server()
    with MemoryLimiter(BUDGETS, server=server) as one:
        with MemoryLimiter(BUDGETS, server=server) as another:
            hold = one.reserve("agent", "4.00")
            with pytest.raises(BudgetExceeded):
                another.reserve("agent", "2.00")
            another.commit(hold.id, "3.00")
            assert one.status("agent").spent == Decimal("3.00")


def test_memory_limiters_on_separate_servers_share_no_budgets(limiter):
    limiter.record("agent", "1.00")
    with MemoryLimiter(BUDGETS) as another:
        assert another.status("agent").spent == 0


def test_disconnecting_the_memory_server_simulates_an_outage(caplog):
    server = memory_server()
    with MemoryLimiter(BUDGETS, server=server, timeout=0.2) as limiter:
        server.connected = False
        with pytest.raises(StoreUnavailable):
            limiter.reserve("agent", "1.00")
        server.connected = True
        wait_until(lambda: limiter.store_state == "closed")
    assert "circuit breaker opened: store at memory" in caplog.text


async def test_the_readiness_check_of_a_memory_limiter_finds_no_fault(async_limiter, caplog):
    caplog.set_level(logging.WARNING, "ktrdr_budget")
    assert await async_limiter.check() == {"store": None, "policy": None, "scripts": None}
    assert not caplog.records


async def test_every_script_of_a_limiter_runs_in_memory():
    """Only two scripts do not run: the audit uses them, over separate connections."""
    server = memory_server()
    with fakeredis.FakeRedis(server=server) as client:
        async with AsyncMemoryLimiter(BUDGETS, server=server) as limiter:
            await limiter.check()
            for number in range(3):
                hold = await limiter.reserve({"agent": "0.10", "calls": 1}, id=f"op_{number}")
                await limiter.extend(hold.id, accrued="0.05")
                await hold.commit("0.05")
            await limiter.holds("agent")
            await limiter.ledger("agent")
            await limiter.set_limit("agent", "6.00")
            assert [change.after for change in await limiter.changes()] == ["$6.00"]
            keys = AccessKeys(limiter)
            assert (await keys.create("ci")).key == (await keys.list())[0]
            await keys.revoke("ci")
            async with AsyncMemoryLimiter([Budget("jobs", "1.00")], server=server) as another:
                await another.migrate("jobs")
            async with AsyncMemoryLimiter(BUDGETS, server=server, timeout=0.2, on_store_error="allow") as another:
                server.connected = False
                offline = await another.reserve("agent", "0.10")
                server.connected = True
                await until(lambda: another.store_state == "closed")
                await offline.commit("0.05")
                await until(lambda: not another.deferred)
            await CycleStore(limiter).get("op_1")
            await limiter.reserve("agent", "1.00", id="open")
            client.flushall()  # a loss of data: the limiter replays its journal
            await until(lambda: _replayed(limiter))
            status = await limiter.status("agent")
            assert (status.spent, status.held, status.limit) == (Decimal("0.15"), Decimal("1.00"), Decimal("6.00"))
        names = list(PARTS)
        known = client.script_exists(*(script(name).sha for name in names))
    assert {name for name, there in zip(names, known, strict=True) if not there} == {CORRECT, REINDEX}


async def _replayed(limiter: AsyncBudgetLimiter) -> bool:
    await limiter.status("agent")
    return limiter.losses == 1 and limiter.repaired.holds == 1


@pytest.mark.parametrize("missing", ["fakeredis", "lupa"])
def test_if_fakeredis_or_lupa_is_missing_the_error_names_the_extra_to_install(monkeypatch, missing):
    real = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=rf"'{missing}': limiters in memory need the extra ktrdr-budget\[testing\]"):
        MemoryLimiter(BUDGETS)


def test_the_example_in_the_testing_guide_equals_the_tested_example_file():
    [example] = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert EXAMPLE.read_text(encoding="utf-8") == example
