"""Bounds on the holds and budgets of one tenant, whatever its clients request."""

from __future__ import annotations

import asyncio
import re
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter
from ktrdr_budget.audit import verify
from ktrdr_budget.environment import limiter_options
from ktrdr_budget.errors import InvalidArgument, TooManyBudgets, TooManyHolds

from ...api.processes import ServiceProcess, serving
from ...helpers.keyspace import dump, window_key
from ...helpers.waiting import until

MANY = [Budget("agent", "1000"), Budget("free", None, unit="calls")]


async def attempts(limiter: AsyncBudgetLimiter, count: int, **options) -> list:
    """The outcomes of ``count`` concurrent reservations with distinct ids and labels."""
    calls = [
        limiter.reserve("free", 1, id=f"attack/{number}", operation=f"label {number}", **options)
        for number in range(count)
    ]
    return await asyncio.gather(*calls, return_exceptions=True)


async def test_a_client_that_reserves_with_2000_different_ids_gets_at_most_max_holds(server):
    async with AsyncBudgetLimiter(server.url, MANY, timeout=20, max_holds=50) as limiter:
        outcomes = await attempts(limiter, 2000)
        granted = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
        refused = [outcome for outcome in outcomes if isinstance(outcome, TooManyHolds)]
        assert (len(granted), len(refused)) == (50, 1950)
        assert str(refused[0]) == "tenant 'default' has 50 open and unconfirmed holds; the maximum is 50"
        assert 800 <= refused[0].retry_after <= 900
        with server.client() as client:
            before = dump(client)
            assert sum(":h:" in key for key in before) == 50
            granted_ids = {hold.id for hold in granted}  # not always the first: batches may overtake each other
            retried = await attempts(limiter, 2050)
            for number, outcome in enumerate(retried):
                assert isinstance(outcome, TooManyHolds) or (f"attack/{number}" in granted_ids and outcome.replayed)
            assert dump(client) == before, "a refusal writes nothing"
        assert all(report.adds_up for report in await asyncio.to_thread(verify, server.url))


async def test_at_max_holds_a_reservation_can_be_replayed_and_a_settlement_makes_room(server):
    async with AsyncBudgetLimiter(server.url, MANY, timeout=20, max_holds=2) as limiter:
        first = await limiter.reserve("free", 1, id="one")
        await limiter.reserve("free", 1, id="two")
        assert (await limiter.reserve("free", 1, id="one")).replayed
        with pytest.raises(TooManyHolds):
            await limiter.reserve("free", 1)
        settled, granted = await asyncio.gather(first.commit(), limiter.reserve("free", 1, id="three"))
        assert (settled.state, granted.id) == ("committed", "three")
        await limiter.record("agent", "0.01")  # spend is a fact


async def test_expired_holds_count_towards_max_holds_until_settled(server):
    async with AsyncBudgetLimiter(server.url, MANY, timeout=20, max_holds=3) as limiter:
        await attempts(limiter, 3, ttl=1, on_expiry="release")

        async def expired() -> bool:
            return (await limiter.status("free")).held == 0

        await until(expired)
        with pytest.raises(TooManyHolds) as refused:
            await limiter.reserve("free", 1)
        assert refused.value.retry_after is None
        await limiter.release("attack/1")
        await limiter.reserve("free", 1)


async def test_a_batch_of_reservations_does_not_exceed_max_holds(server):
    async with AsyncBudgetLimiter(server.url, MANY, timeout=20, max_holds=20_000) as limiter:
        with server.client() as client:
            pipeline = client.pipeline(transaction=False)
            for number in range(0, 19_990, 10):
                pipeline.zadd("ktrdr:{default}:due", {f"old/{number + i}": 9e12 for i in range(10)})
            pipeline.execute()

            first = await limiter.reserve("free", 1)  # from here on by the fast path
            outcomes = await attempts(limiter, 300)
            assert sum(not isinstance(outcome, Exception) for outcome in outcomes) == 9
            assert client.zcard("ktrdr:{default}:due") == 20_000
            await first.release()
            await limiter.reserve("free", 1)


async def test_exactly_max_holds_of_30000_concurrent_reservations_are_granted(server):
    async with AsyncBudgetLimiter(server.url, MANY, timeout=60, max_holds=20_000) as limiter:
        outcomes = await attempts(limiter, 30_000)
        assert sum(not isinstance(outcome, Exception) for outcome in outcomes) == 20_000
        assert all(isinstance(outcome, TooManyHolds) for outcome in outcomes if isinstance(outcome, Exception))


async def test_a_tenant_at_max_holds_does_not_affect_another_tenant(server):
    async with AsyncBudgetLimiter(server.url, MANY, timeout=20, max_holds=1) as full:
        await full.reserve("free", 1)
        async with AsyncBudgetLimiter(server.url, MANY, tenant="other", timeout=20, max_holds=1) as other:
            await other.reserve("free", 1)


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_a_limiter_with_more_than_max_budgets_is_refused():
    budgets = [Budget(f"user/{number}", 1) for number in range(1001)]
    BudgetLimiter("redis://127.0.0.1:1", budgets[:1000])
    with pytest.raises(InvalidArgument, match="1001 budgets are given; max_budgets is 1000"):
        BudgetLimiter("redis://127.0.0.1:1", budgets)
    BudgetLimiter("redis://127.0.0.1:1", budgets, max_budgets=1001)


def test_all_limiters_of_a_tenant_together_can_use_at_most_max_budgets(server):
    for number in range(12):
        with BudgetLimiter(server.url, timeout=20, budgets=[Budget(f"user/{number}", "1")], max_budgets=10) as limiter:
            if number < 10:
                limiter.reserve(f"user/{number}", "0.10")
                continue
            with pytest.raises(TooManyBudgets, match=f"the maximum of 10 budgets; 'user/{number}' would be one more"):
                limiter.reserve(f"user/{number}", "0.10")
            with pytest.raises(TooManyBudgets):
                limiter.record(f"user/{number}", "0.10")
    with BudgetLimiter(server.url, timeout=20, budgets=[Budget("user/3", "1")], max_budgets=10) as limiter:
        limiter.reserve("user/3", "0.10")
    with server.client() as client:
        assert len(client.keys("ktrdr:{default}:w:*")) == 10


def test_at_max_budgets_a_new_budget_is_admitted_after_another_budget_has_expired(server):
    with BudgetLimiter(
        server.url, timeout=20, budgets=[Budget("old", "1"), Budget("new", "1")], max_budgets=2
    ) as limiter:
        limiter.record("old", "0.10")
        with server.client() as client:
            client.zadd("ktrdr:{default}:budgets:expiry", {"other": "inf"})
            with pytest.raises(TooManyBudgets):
                limiter.record("new", "0.10")
            client.zadd("ktrdr:{default}:budgets:expiry", {"other": 1000})
            limiter.record("new", "0.10")


# -- no growing key is read whole or kept for ever ---------------------------------------------------------------------


def commands_of(client, run) -> dict[str, int]:
    """Count the commands that the store runs during ``run``, by name; commands inside scripts are included."""
    client.config_resetstat()
    run()
    found = client.info("commandstats")
    return {name.removeprefix("cmdstat_"): figures["calls"] for name, figures in found.items()}


def test_the_first_use_of_a_budget_needs_at_most_eight_more_commands_if_20000_budgets_exist(server):
    with server.client() as client:

        def first_use(name: str) -> dict[str, int]:
            budgets = [Budget(name, "1")]
            with BudgetLimiter(server.url, budgets, timeout=20, max_budgets=1_000_000) as limiter:
                return commands_of(client, lambda: limiter.record(name, "0.01"))

        first_use("agent")
        # The fewest of three: a slow store may receive a request twice.
        few = min(sum(first_use(f"few/{number}").values()) for number in range(3))
        pipeline = client.pipeline(transaction=False)
        for number in range(20_000):
            pipeline.hset("ktrdr:{default}:budgets", f"w:user/{number}", "ever")
            pipeline.zadd("ktrdr:{default}:budgets:expiry", {f"user/{number}": "inf"})
        pipeline.execute()
        many = [first_use(f"many/{number}") for number in range(3)]
        assert not any("hgetall" in each for each in many)
        assert min(sum(each.values()) for each in many) <= few + 8


def test_a_write_reads_no_hash_in_full_even_if_50000_replicas_are_stored(server):
    with server.client() as client, BudgetLimiter(server.url, MANY, timeout=20) as limiter:
        now_s = client.time()[0]
        pipeline = client.pipeline(transaction=False)
        for number in range(50_000):
            pipeline.hset(limiter.keys.meta, f"r:{number:012x}", 1)
            pipeline.zadd(limiter.keys.replicas, {f"{number:012x}": now_s - (1000 if number % 2 else 200_000)})
        pipeline.execute()
        ran = commands_of(client, lambda: limiter.record("agent", "0.01"))
        assert "hgetall" not in ran and "hkeys" not in ran
        assert ran["hdel"] <= 16
        assert client.zscore(limiter.keys.replicas, limiter.replica_id) >= now_s


def test_subtotals_of_short_lived_processes_are_merged_in_a_window_without_an_end(clocked_server):
    """Two days after the last request of a process, its subtotal is added to a field that such processes share."""
    budgets = [Budget("lifetime", None, period="ever")]
    for day in range(4):
        for _ in range(20):
            with BudgetLimiter(clocked_server.url, budgets, timeout=30) as limiter:
                limiter.record("lifetime", "0.01")
        clocked_server.advance(3 * 86_400 if day < 3 else 1)
    with BudgetLimiter(clocked_server.url, budgets, timeout=30) as limiter, clocked_server.client() as client:
        assert limiter.status("lifetime").spent == Decimal("0.80")
        stored = client.hgetall(window_key(client, "lifetime", "ever"))
        subtotals = {name: int(value) for name, value in stored.items() if name.startswith("r:")}
        assert len(subtotals) < 60
        assert sum(subtotals.values()) == int(stored["spent"])
        assert subtotals["r:-"] > 0
    assert all(report.adds_up for report in verify(clocked_server.url))


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "10", None])
def test_max_holds_and_max_budgets_must_be_positive_whole_numbers(value):
    for option in ("max_holds", "max_budgets"):
        with pytest.raises(InvalidArgument, match=f"{option} must be a whole number from 1"):
            BudgetLimiter("redis://127.0.0.1:1", [], **{option: value})


@pytest.mark.parametrize("value", [1, 0, -1, 3651, True, "35", 2.5, None])
def test_the_retention_must_be_a_whole_number_of_at_least_two_days(value):
    with pytest.raises(InvalidArgument, match="retention_days must be a whole number from 2"):
        BudgetLimiter("redis://127.0.0.1:1", [], retention_days=value)


def test_environment_variables_set_the_options_of_a_limiter():
    assert limiter_options({}) == {}
    given = {"KTRDR_MAX_HOLDS": "7", "KTRDR_MAX_BUDGETS": " 9 ", "KTRDR_TIMEOUT": "2.5", "KTRDR_DURABILITY": "disk"}
    given["KTRDR_RETENTION_DAYS"] = "90"
    expected = {"max_holds": 7, "max_budgets": 9, "retention_days": 90, "timeout": 2.5, "durability": "disk"}
    assert limiter_options(given) == expected
    with pytest.raises(InvalidArgument, match="KTRDR_MAX_HOLDS must be a whole number, not 'many'"):
        limiter_options({"KTRDR_MAX_HOLDS": "many"})
    for wrong in ({"KTRDR_TIMEOUT": "soon"}, {"KTRDR_TIMEOUT": "-1"}, {"KTRDR_DURABILITY": "dsik"}):
        with pytest.raises(InvalidArgument):
            limiter_options(wrong)


# -- over HTTP ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(start_server) -> Iterator[ServiceProcess]:
    store = start_server()
    with serving(KTRDR_REDIS_URL=store.url, KTRDR_MAX_HOLDS=2, KTRDR_MAX_BUDGETS=7) as running:
        yield running
    store.kill()


def test_the_service_responds_429_to_a_reservation_above_max_holds(service):
    body = {"amounts": {"agent": "0.01"}, "ttl": 60}
    made = [service.post("/api/v1/reservations", body) for _ in range(2)]
    assert [response.status_code for response in made] == [201, 201]
    refused = service.post("/api/v1/reservations", body)
    document = refused.json()
    assert (refused.status_code, refused.headers["content-type"]) == (429, "application/problem+json")
    assert (document["code"], document["reason"]) == ("too-many-holds", "too_many_holds")
    assert document["detail"] == "tenant 'default' has 2 open and unconfirmed holds; the maximum is 2"
    assert 20 <= document["retry_after"] == int(refused.headers["retry-after"]) <= 60
    trigger = service.post("/api/v1/agent/trigger", {})
    assert (trigger.status_code, trigger.json()["code"]) == (429, "too-many-holds")
    words = [sys.executable, "-m", "ktrdr_budget.cli", "--api-url", service.url, "budget", "reserve", "agent", "0.01"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert re.fullmatch(
        r"denied: tenant 'default' has 2 open and .*; the maximum is 2; retry in (1 min|\d+ s)\n", done.stderr
    )
    counted = 'ktrdr_budget_reservations_total{outcome="error",reason="too_many_holds"} 3.0'
    assert counted in service.get("/metrics").text
    for response in made:
        assert service.post(f"/api/v1/reservations/{response.json()['id']}/release").status_code == 200
    assert service.post("/api/v1/reservations", body).status_code == 201


@pytest.mark.parametrize("framing", ["Content-Length: 1000000000", "Transfer-Encoding: chunked"])
def test_the_service_responds_413_while_the_client_is_still_sending_a_body_that_is_too_large(service, framing):
    """The body has no end: the response arrives while the client is still sending."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        head = f"POST /api/v1/reservations HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n{framing}\r\n\r\n"
        connection.sendall(head.encode())
        piece = b" " * 4096
        if "chunked" in framing:
            piece = b"1000\r\n" + piece + b"\r\n"
        sent, response = 0, b""
        connection.setblocking(False)
        while b"}" not in response:
            readable, writable, _ = select.select([connection], [connection] if sent < 10**7 else [], [], 10)
            if readable:
                response += connection.recv(65_536)
            elif writable:
                sent += connection.send(piece)
            assert sent < 10**7
    assert response.startswith(b"HTTP/1.1 413 ")
    assert b"application/problem+json" in response
    assert b'"code":"content-too-large"' in response
