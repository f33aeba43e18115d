"""Replicas race for one cap, each in a separate process; some are killed during the race (P1, P5, P11)."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.models import Status
from ktrdr_budget.money import to_units

from ...helpers.keyspace import counted, immortal_keys, sums
from ...helpers.processes import workers
from ...helpers.waiting import until, wait_until

PROCESSES = 8


@pytest.fixture(params=["valkey", "redis"])
def store(request: pytest.FixtureRequest, server, start_server: Callable):
    """Each kind of server: the embedded Valkey, and Redis where it is installed."""
    if request.param == "valkey":
        yield server
        return
    binary = shutil.which("redis-server")
    if binary is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("redis-server is not installed")
    redis_server = start_server(binary)
    yield redis_server
    redis_server.kill()


def race_options(url: str, **more: object) -> dict[str, object]:
    return {"url": url, "limit": "1.00", "amounts": ["0.01"], "callers": 16, "ttl": 60, "settle": False, **more}


def test_eight_processes_with_identical_amounts_fill_the_cap_exactly(store):
    """#23714, #24682: all replicas share one cap. #28247, #28283, #40095: eight processes start to use it at once."""
    options = race_options(store.url, limit="0.7", amounts=["0.0007"])
    with workers("spender.py", PROCESSES, options) as racers, store.client() as client:
        for racer in racers:
            racer.send(go=True)
        reports = [racer.receive() for racer in racers]
        assert sum(report["grants"] for report in reports) == 1000
        assert sum(report["granted"] for report in reports) == to_units("0.7")
        assert sums(client) == {"spent": 0, "held": to_units("0.7"), "unconfirmed": 0, "events": 0}
        assert len(list(client.scan_iter("*:w:*"))) == 1, "one window was started"
        assert immortal_keys(client) == []


def test_processes_with_mixed_amounts_never_exceed_the_cap_when_some_processes_are_killed(store):
    """The hold of a killed replica counts until its deadline, and then becomes unconfirmed."""
    limit = to_units("6.00")
    amounts = ["0.01", "0.003", "0.0000007", "0.02", "0.0151"]
    options = race_options(store.url, limit="6.00", amounts=amounts, ttl=1, settle=True)
    doomed = random.Random(store.url).sample(range(PROCESSES), 3)
    with workers("spender.py", PROCESSES, options) as racers, store.client() as client:
        for racer in racers:
            racer.send(go=True)
        peaks = [kill_at(client, racers[number], limit * tenths // 10) for tenths, number in enumerate(doomed, 2)]
        reports = [racer.receive() for number, racer in enumerate(racers) if number not in doomed]
        assert all(racers[number].receive() is None for number in doomed)
        assert max(peaks) <= limit
        assert counted(client) <= limit
        survivors = sum(report["committed"] for report in reports)
        assert survivors <= sums(client)["spent"] <= limit
        assert immortal_keys(client) == []


def kill_at(client, racer, spent: int) -> int:
    """Kill a racer once the racers together have spent ``spent`` units. Return the most units in use until then."""
    peak = 0

    def reached() -> bool:
        nonlocal peak
        found = sums(client)
        peak = max(peak, found["spent"] + found["held"] + found["unconfirmed"])
        return found["spent"] >= spent

    wait_until(reached)
    racer.kill()
    return peak


async def test_holds_of_killed_processes_become_unconfirmed_at_their_deadline(store):
    """#27639, PR #30522: an operator can list, settle and release the holds of a killed process."""
    options = race_options(store.url, limit="0.08", ttl=1, callers=1)
    with workers("spender.py", 2, options) as racers:
        for racer in racers:
            racer.send(go=True)
        reports = [racer.receive() for racer in racers]
        assert sum(report["grants"] for report in reports) == 8
        for racer in racers:
            racer.kill()
    async with AsyncBudgetLimiter(store.url, [Budget("agent", "0.08")]) as limiter:
        status = await until(lambda: _status_when_all_are_unconfirmed(limiter))
        assert (status.held, status.unconfirmed, status.remaining) == (0, Decimal("0.08"), 0)
        holds = (await limiter.holds("agent")).items
        assert {hold.state for hold in holds} == {"unconfirmed"}
        assert {hold.owner for hold in holds} <= {"worker-0", "worker-1"}
        first, second, *_ = holds
        await limiter.commit(first.id, "0.004")
        await limiter.release(second.id, operator=True)
        status = await limiter.status("agent")
        assert (status.spent, status.unconfirmed) == (Decimal("0.004"), Decimal("0.06"))
        assert status.remaining == Decimal("0.016")


async def _status_when_all_are_unconfirmed(limiter: AsyncBudgetLimiter) -> Status | None:
    status = await limiter.status("agent")
    return status if not status.held else None


def test_if_eight_processes_use_a_new_budget_at_once_the_cap_is_not_exceeded(store):
    """#40095: the first requests arrive at once. #28247, #28283: a cap needs no counter that exists in advance."""
    options = race_options(store.url, limit="0.15", amounts=["0.15"], callers=1)
    with workers("spender.py", PROCESSES, options) as racers, store.client() as client:
        for racer in racers:
            racer.send(go=True)
        assert sum(racer.receive()["grants"] for racer in racers) == 1
        assert counted(client) == to_units("0.15")
