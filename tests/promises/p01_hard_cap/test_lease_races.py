"""Leases of several threads, processes and replicas share one cap (P1)."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from decimal import Decimal

import pytest

from ktrdr_budget import (
    AsyncBudgetLimiter,
    Budget,
    BudgetExceeded,
    BudgetLimiter,
)
from ktrdr_budget.money import to_units

from ...helpers.keyspace import counted, ledger_sum, sums
from ...helpers.processes import workers
from ...helpers.waiting import wait_until

AGENT = Budget("agent", "5.00")


def only_spent(nanos: int, events: int) -> dict[str, int]:
    return {"spent": nanos, "held": 0, "unconfirmed": 0, "events": events}


def test_the_spend_of_eight_threads_that_share_a_lease_adds_up(server, client):
    with BudgetLimiter(server.url, [Budget("agent", "1.00")], timeout=10.0) as limiter:
        with limiter.lease("agent", "0.10") as lease:

            def work() -> None:
                try:
                    while True:
                        with lease.acquire("0.003") as grant:
                            grant.commit("0.002")
                except BudgetExceeded:
                    pass

            threads = [threading.Thread(target=work) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert Decimal("0.997") < lease.spent <= 1
            spent = lease.spent
        assert sums(client)["spent"] == to_units(spent)
        assert sums(client)["held"] == 0


def test_closing_the_sync_limiter_commits_the_spend_of_an_open_lease(server, client):
    limiter = BudgetLimiter(server.url, [AGENT])
    lease = limiter.lease("agent", "0.50").__enter__()
    lease.spend("0.10")
    limiter.close()
    assert sums(client) == only_spent(to_units("0.10"), 1)
    with pytest.raises(RuntimeError, match="closed"):
        lease.spend("0.10")


def test_a_forked_child_cannot_use_a_lease_of_its_parent(server, client):
    with BudgetLimiter(server.url, [AGENT]) as limiter:
        with limiter.lease("agent", "0.50") as lease:
            lease.spend("0.10")
            grant = lease.reserve("0.10")
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                results = []
                try:
                    for call in (lambda: lease.spend("0.10"), lambda: lease.acquire("0.10")):
                        try:
                            call()
                        except RuntimeError as error:
                            results.append("child" in str(error))
                    grant.commit("0.01")
                    lease.__exit__(None, None, None)
                    with limiter.lease("agent", "0.20") as own:
                        own.spend("0.03")
                    results.append(True)
                finally:
                    os.write(writer, str(results).encode())
                    os._exit(0)
            os.waitpid(pid, 0)
            assert os.read(reader, 100).decode() == "[True, True, True]"
            os.close(reader)
            os.close(writer)
            assert sums(client)["spent"] == to_units("0.03")
            grant.commit("0.05")
        wait_until(lambda: sums(client) == only_spent(to_units("0.18"), 2))


def test_the_leases_of_four_processes_together_never_exceed_the_cap(server, client):
    """The chunks of the processes add up to more than the cap. #23714: all replicas share one cap."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    cap = to_units("1.00")
    amounts = ["0.001", "0.0037", "0.02", "0.0001"]
    options = {"url": server.url, "limit": "1.00", "slab": "0.40", "amounts": amounts, "callers": 4, "ttl": 60}
    peak = 0
    with workers("leaser.py", 4, {**options, "seed": seed}) as replicas:
        for replica in replicas:
            replica.send(go=True)
        reports = []
        listener = threading.Thread(target=lambda: reports.extend(replica.receive() for replica in replicas))
        listener.start()
        while listener.is_alive():
            peak = max(peak, counted(client))
            listener.join(0.01)
    spent = sum(report["spent"] for report in reports)
    assert peak <= cap
    assert sums(client)["spent"] == ledger_sum(client) == spent
    assert cap - to_units("0.0001") < spent <= cap
    assert sums(client)["held"] == sums(client)["unconfirmed"] == 0
    assert {report["last"] for report in reports} == {"budget_exhausted"}


def test_the_chunk_of_a_killed_process_becomes_unconfirmed_in_full(server, client):
    options = {"url": server.url, "limit": "5.00", "slab": "0.40", "amounts": ["0.01"], "callers": 1, "ttl": 1}
    with workers("leaser.py", 1, {**options, "seed": 0}) as [replica]:
        replica.send(go=True)
        wait_until(lambda: sums(client)["spent"] > 0)
        replica.kill()
        with BudgetLimiter(server.url, [AGENT]) as limiter:
            left = wait_until(lambda: (status := limiter.status("agent")).held == 0 and status)
        assert 0 < left.unconfirmed <= Decimal("0.80")
        assert left.spent + left.unconfirmed <= 5
        assert ledger_sum(client) == to_units(left.spent + left.unconfirmed)


async def test_the_spend_from_leases_of_three_replicas_adds_up_in_a_random_history(server, client):
    """The final spend in the store equals the sum that the test has kept, and the cap is never exceeded."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    cap, truth = to_units("3.00"), 0
    budget = Budget("agent", "3.00")
    limiters = [AsyncBudgetLimiter(server.url, [budget], timeout=5.0) for _ in range(3)]
    leases = [
        await limiter.lease("agent", chance.choice(["0.30", "0.71"]), idle=chance.choice([0.1, 5])).__aenter__()
        for limiter in limiters
    ]
    grants: list[tuple[object, int]] = []
    for _ in range(1500):
        lease = chance.choice(leases)
        units = chance.randrange(1, to_units("0.02"))
        amount = Decimal(units) / 10**9
        try:
            match chance.randrange(5):
                case 0:
                    lease.spend(amount)
                    truth += units
                case 1:
                    grants.append((lease.reserve(amount), units))
                case 2:
                    grants.append((await lease.acquire(amount), units))
                case 3 if grants:
                    grant, reserved = grants.pop(chance.randrange(len(grants)))
                    spent = chance.choice([0, reserved, chance.randrange(reserved + 1)])
                    grant.commit(Decimal(spent) / 10**9)
                    truth += spent
                case 4:
                    await asyncio.sleep(chance.choice([0, 0, 0, 0.001]))
        except BudgetExceeded:
            pass
        assert counted(client) <= cap
    for grant, reserved in grants:
        grant.commit()
        truth += reserved
    assert sum(to_units(lease.spent) for lease in leases) == truth
    for lease, limiter in zip(leases, limiters, strict=True):
        await lease.__aexit__(None, None, None)
        await limiter.close()
    assert truth <= cap
    assert sums(client)["spent"] == ledger_sum(client) == truth
    assert sums(client)["held"] == sums(client)["unconfirmed"] == 0
