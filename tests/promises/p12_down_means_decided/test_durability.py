"""Option ``durability``: a call returns only when its writes are on a replica of the store, or on disk."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, InvalidArgument, StoreUnavailable
from ktrdr_budget.errors import StoreError
from ktrdr_budget.money import to_units

from ...conftest import free_port, redis_binary
from ...helpers.keyspace import sums
from ...helpers.patience import away
from ...helpers.stopwatch import Stopwatch
from ...helpers.waiting import until, wait_until

BUDGETS = [Budget("agent", "5.00")]
TIMEOUT_S = 0.8


@pytest.fixture
def master(start_server: Callable):
    made = start_server(None, "--port", str(free_port()))
    yield made
    made.kill()


@pytest.fixture
def replica(master, start_server: Callable):
    """A replica of the master."""
    with master.client() as client:
        port = client.config_get("port")["port"]
        made = start_server(None, "--replicaof", "127.0.0.1", port, "--repl-diskless-sync", "yes")
        client.config_set("repl-diskless-sync-delay", "0")
        wait_until(lambda: client.info("replication").get("slave0", {}).get("state") == "online")
    yield made
    made.resume()
    made.kill()


async def test_acknowledged_holds_and_spend_are_on_the_replica_if_durability_is_replica(master, replica):
    async with AsyncBudgetLimiter(master.url, BUDGETS, durability="replica") as limiter:
        hold = await limiter.reserve("agent", "0.15")
        await hold.commit("0.07")
        await limiter.reserve("agent", "0.20")
        with replica.client() as client:
            assert sums(client) == {"spent": to_units("0.07"), "held": to_units("0.20"), "unconfirmed": 0, "events": 1}


async def test_nothing_is_granted_while_the_replica_hangs_if_durability_is_replica(master, replica):
    async with AsyncBudgetLimiter(master.url, BUDGETS, durability="replica", timeout=TIMEOUT_S) as limiter:
        hold = await limiter.reserve("agent", "0.15")
        replica.pause()
        with away(master.url):  # its deadlines are short
            with pytest.raises(StoreUnavailable, match="no replica has confirmed it") as refused, Stopwatch() as took:
                await limiter.reserve("agent", "0.20")
            assert refused.value.ambiguous
            assert took.seconds < 5 * TIMEOUT_S
            with pytest.raises(StoreUnavailable):
                await hold.commit("0.07")
        replica.resume()
        await until(lambda: limiter.store_state == "closed" and limiter.unresolved == 0)
        assert limiter.resolved["released"] == 1
        await hold.commit("0.07")
        with replica.client() as client:
            assert sums(client) == {"spent": to_units("0.07"), "held": 0, "unconfirmed": 0, "events": 1}


async def test_a_replay_fails_until_the_replica_has_confirmed_the_original_reservation(master, replica):
    """A replay writes nothing, but the original may not be on the replica yet."""
    async with (
        AsyncBudgetLimiter(master.url, BUDGETS) as careless,
        AsyncBudgetLimiter(master.url, BUDGETS, durability="replica", timeout=TIMEOUT_S) as limiter,
    ):
        await limiter.record("agent", 0)
        replica.pause()
        await careless.reserve("agent", "0.15", id="op_1")
        with away(master.url), pytest.raises(StoreUnavailable):
            await limiter.reserve("agent", "0.15", id="op_1")
        replica.resume()
        await until(lambda: limiter.store_state == "closed")
        assert (await limiter.reserve("agent", "0.15", id="op_1")).replayed


async def test_a_record_fails_if_durability_is_replica_and_the_master_has_no_replica(master):
    async with AsyncBudgetLimiter(master.url, BUDGETS, durability="replica", timeout=TIMEOUT_S) as limiter:
        with away(master.url), pytest.raises(StoreUnavailable, match="no replica"):
            await limiter.record("agent", "0.01")
        await until(lambda: limiter.store_state == "open")


async def test_acknowledged_spend_is_kept_after_the_server_is_killed_if_durability_is_disk(start_server: Callable):
    """The server is killed right after the reply; the spend is in its file."""
    server = start_server(None, "--appendonly", "yes", "--appendfsync", "always")
    async with AsyncBudgetLimiter(server.url, BUDGETS, durability="disk") as limiter:
        await limiter.record("agent", "0.07")
        server.kill()
        server.start()
        with server.client() as client:
            assert sums(client)["spent"] == to_units("0.07")
        await until(lambda: _spent(limiter))
        assert limiter.losses == 0
    server.kill()


async def _spent(limiter: AsyncBudgetLimiter) -> bool:
    try:
        return (await limiter.status("agent")).spent == Decimal("0.07")
    except StoreUnavailable:
        return False


async def test_a_reservation_is_refused_if_durability_is_disk_and_the_server_has_no_append_only_file(server):
    async with AsyncBudgetLimiter(server.url, BUDGETS, durability="disk") as limiter:
        with pytest.raises(StoreError, match="appendonly"):
            await limiter.reserve("agent", "0.15")
        with server.client() as client:
            assert sums(client)["held"] == 0


async def test_a_reservation_is_refused_if_durability_is_disk_and_the_server_lacks_the_waitaof_command(
    start_server: Callable,
):
    binary = redis_binary()
    if binary is None:
        pytest.fail("redis-server is not installed")
    old = start_server(binary, "--appendonly", "yes")
    with old.client() as client:
        version = tuple(map(int, client.info("server")["redis_version"].split(".")))
    async with AsyncBudgetLimiter(old.url, BUDGETS, durability="disk") as limiter:
        if version >= (7, 2):
            assert (await limiter.reserve("agent", "0.15")).cap_checked
        else:
            with pytest.raises(StoreError, match="WAITAOF"):
                await limiter.reserve("agent", "0.15")
    old.kill()


def test_an_unknown_durability_option_is_refused():
    with pytest.raises(InvalidArgument, match="durability"):
        AsyncBudgetLimiter("redis://localhost", BUDGETS, durability="everywhere")
