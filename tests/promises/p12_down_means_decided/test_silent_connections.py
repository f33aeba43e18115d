"""A NAT that has lost its state discards packets silently; even then, no call fails or waits until its deadline.

litellm PR #31577, redis-py #722.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter
from ktrdr_budget.engine.batching import loss_repair as recovery
from ktrdr_budget.engine.transport import resp
from ktrdr_budget.engine.transport.connection import IDLE_MAX_S
from ktrdr_budget.engine.transport.discovery import ClusterDiscovery, SentinelDiscovery

from ...helpers.keyspace import sums
from ...helpers.patience import away
from ...helpers.proxy import Proxy, ThreadedProxy
from ...helpers.stopwatch import Stopwatch
from ...helpers.stores import idle_connections
from ...helpers.waiting import until

BUDGETS = [Budget("agent", "100.00"), Budget("cycles", 10_000, unit="cycles")]
BURST = 300
TIMEOUT_S = 4.0
LATEST_S = TIMEOUT_S * 0.75
"""A call that is resent gets its reply long before this time; a call that waits until its deadline ends later."""


@pytest.fixture(params=["connections", "client"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How batches are sent: over the package's own connections, or through the client of redis-py."""
    if request.param == "client":
        monkeypatch.setattr(resp, "Reader", None)
    return str(request.param)


@pytest.fixture
def no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle replica sends no probes, so that the first burst uses the silent connections."""
    monkeypatch.setattr(recovery, "PULSE_S", 3600.0)


@pytest.fixture
async def proxy(server, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Proxy]:
    async with Proxy(server.socket_path, ("127.0.0.1", 0)) as made:
        with away(made.url):  # the tests below measure deadlines
            yield made


async def burst(limiter: AsyncBudgetLimiter) -> float:
    """Reserve many holds at once, then commit all of them; return how many seconds the reservations took."""
    with Stopwatch() as took:
        holds = await asyncio.gather(*[limiter.reserve("agent", "0.10") for _ in range(BURST)])
    assert not any(hold.replayed for hold in holds)
    await asyncio.gather(*[hold.commit("0.05") for hold in holds])
    return took.seconds


async def wait_until_stale(limiter: AsyncBudgetLimiter) -> None:
    """Wait until each idle connection is too old to be used."""
    loop = asyncio.get_running_loop()
    assert idle_connections(limiter)
    await until(lambda: all(loop.time() - each.last_used_s > IDLE_MAX_S for each in idle_connections(limiter)))


async def test_a_burst_of_calls_after_an_idle_time_uses_new_connections(proxy, way, no_probes, client):
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        await burst(limiter)
        await wait_until_stale(limiter)
        proxy.blackhole()
        await burst(limiter)
        assert proxy.requests_ignored == 0, "no request was sent on an idle connection"
        assert limiter.unresolved == 0
    assert sums(client)["spent"] == 2 * BURST * 50_000_000


async def test_probes_keep_a_connection_of_an_idle_replica_usable(proxy, way):
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        await limiter.record("agent", "0.01")
        called_s = asyncio.get_running_loop().time()

        def trusted() -> bool:
            now_s = asyncio.get_running_loop().time()
            used_s = max([each.last_used_s for each in idle_connections(limiter)], default=0.0)
            return now_s > called_s + 1.5 * IDLE_MAX_S and now_s < used_s + IDLE_MAX_S

        await until(trusted)  # long after the last call


@pytest.mark.parametrize("forgotten", [1, None], ids=["one", "all"])
async def test_if_a_burst_of_calls_gets_no_replies_the_calls_are_resent_on_new_connections(
    proxy, way, no_probes, forgotten, client
):
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        await burst(limiter)
        proxy.blackhole(forgotten)
        assert await burst(limiter) < LATEST_S
        assert limiter.store_state == "closed"
    assert sums(client) == {"spent": 2 * BURST * 50_000_000, "held": 0, "unconfirmed": 0, "events": 2 * BURST}


async def test_if_the_reply_to_an_executed_request_is_lost_the_request_counts_once(proxy, way, no_probes, client):
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        await limiter.record("agent", "0.01")
        proxy.hold_replies()
        reserving = asyncio.create_task(limiter.reserve("agent", "0.10"))
        await until(lambda: sums(client)["held"] == 100_000_000)
        proxy.blackhole()
        proxy.release_replies()
        hold = await reserving
        assert not hold.replayed
        await hold.commit("0.05")
    assert sums(client)["spent"] == 60_000_000


@pytest.mark.parametrize("durability", ["disk"])
async def test_a_record_that_must_reach_the_disk_is_resent_on_a_new_connection_if_no_reply_arrives(
    start_server: Callable, no_probes, durability
):
    own = start_server(None, "--appendonly", "yes")
    async with Proxy(own.socket_path, ("127.0.0.1", 0)) as proxy:
        with away(proxy.url):
            async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=TIMEOUT_S, durability=durability) as limiter:
                await limiter.record("agent", "0.01")
                proxy.blackhole()
                with Stopwatch() as took:
                    await limiter.record("agent", "0.01")
                assert took.seconds < LATEST_S
    own.kill()


async def test_reads_are_resent_on_a_new_connection_if_no_reply_arrives(proxy, way, no_probes):
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        await asyncio.gather(*[limiter.status("agent") for _ in range(20)])
        proxy.blackhole()
        with Stopwatch() as took:
            statuses = await asyncio.gather(*[limiter.status("agent") for _ in range(20)])
        assert took.seconds < LATEST_S
        assert {status.spent for status in statuses} == {0}


async def test_a_request_on_a_slow_connection_is_granted_if_the_reply_arrives_within_the_timeout(
    proxy, way, no_probes, client
):
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        for _ in range(2):  # the store has the scripts
            await limiter.reserve("agent", "0.10")
        proxy.delay_s = 0.4 * TIMEOUT_S  # each way: the reply arrives after a new connection could have been opened
        assert (await limiter.reserve("agent", "0.10")).state == "open"
        proxy.delay_s = 0.0
        assert limiter.store_state == "closed"
    assert sums(client)["held"] == 300_000_000


@pytest.mark.parametrize(
    ("discovery", "form"), [(SentinelDiscovery, "redis+sentinel://{}/main"), (ClusterDiscovery, "redis+cluster://{}")]
)
async def test_requests_that_get_no_reply_are_resent_to_the_same_primary(
    proxy, way, no_probes, discovery, form, monkeypatch, client
):
    place = proxy.url.removeprefix("redis://")
    suspects = []

    async def find(self, suspect):
        suspects.append(suspect)
        return ("127.0.0.1", int(place.rpartition(":")[2]))

    async def subscribe(self, on_change):
        await asyncio.Event().wait()

    monkeypatch.setattr(discovery, "find", find)
    monkeypatch.setattr(discovery, "subscribe", subscribe)
    async with AsyncBudgetLimiter(form.format(place), BUDGETS, timeout=TIMEOUT_S) as limiter:
        await burst(limiter)
        await wait_until_stale(limiter)
        proxy.blackhole()
        await burst(limiter)
        assert proxy.requests_ignored == 0, "no request was sent on an idle connection"
        proxy.blackhole(1)
        assert await burst(limiter) < LATEST_S
        assert set(suspects) <= {None, ("127.0.0.1", int(place.rpartition(":")[2]))}
    assert sums(client)["spent"] == 3 * BURST * 50_000_000


def test_the_sync_limiter_resends_requests_that_get_no_reply(server, way, no_probes, client):
    with ThreadedProxy(server.socket_path, ("127.0.0.1", 0)) as proxy, away(proxy.url):
        with BudgetLimiter(proxy.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
            limiter.reserve("agent", "0.10").commit("0.05")
            proxy.blackhole()
            with Stopwatch() as took:
                limiter.reserve("agent", "0.10").commit("0.05")
            assert took.seconds < LATEST_S
            proxy.blackhole()
            with Stopwatch() as took:
                assert limiter.status("agent").spent == Decimal("0.10")
            assert took.seconds < LATEST_S
    assert sums(client)["spent"] == 100_000_000
