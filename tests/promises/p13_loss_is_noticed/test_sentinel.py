"""A real master with replicas behind real sentinels: requests go to the current master only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter, StoreError, StoreUnavailable
from ktrdr_budget.audit import verify
from ktrdr_budget.engine.transport.failover import FailoverStore

from ...conftest import redis_binary, valkey_binary
from ...helpers.nodes import Node, free_ports
from ...helpers.processes import in_child
from ...helpers.sentinels import SentinelGroup
from ...helpers.stopwatch import Stopwatch
from ...helpers.stores import current_port, own_connections, store_of
from ...helpers.waiting import until

BUDGETS = [Budget("agent", "5.00")]
BINARIES = {"valkey": valkey_binary(), "redis": redis_binary()}


SECRETS = {"user": "ktrdr", "password": "pass-word-1", "sentinel_password": "pass-word-2"}


@pytest.fixture(scope="module")
def _steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelGroup]:
    with SentinelGroup(valkey_binary(), Path(tmp_path_factory.mktemp("sentinels")), **SECRETS) as made:
        yield made


@pytest.fixture
def steady(_steady: SentinelGroup) -> SentinelGroup:
    """An empty group, shared by the tests that do not change its master; servers and sentinels require a password."""
    _steady.master.client.flushall()
    return _steady


@pytest.fixture
def group(tmp_path: Path) -> Iterator[SentinelGroup]:
    """A new group for each test: sentinels accept the old master as a replica only ten seconds after a failover."""
    with SentinelGroup(valkey_binary(), tmp_path, **SECRETS) as made:
        yield made


@pytest.fixture(params=[kind for kind, binary in BINARIES.items() if binary])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SentinelGroup]:
    """A new group for each test; the test runs once with each kind of server."""
    with SentinelGroup(BINARIES[request.param], tmp_path, **SECRETS) as made:
        yield made


async def _answers(limiter: AsyncBudgetLimiter) -> bool:
    try:
        await limiter.status("agent")
    except StoreUnavailable:
        return False
    return True


async def _new_master(group: SentinelGroup, old: Node) -> int:
    """The port of the new master, once all sentinels name it."""
    return (await asyncio.to_thread(group.wait_master, old)).port


async def test_batches_and_reads_go_to_the_master(steady):
    async with AsyncBudgetLimiter(steady.url, BUDGETS, timeout=20.0) as limiter:
        hold = await limiter.reserve("agent", "0.15", id="op_1")
        assert own_connections(limiter)
        await hold.commit("0.07")
        assert (await limiter.get("op_1")).state == "committed"
        assert (await limiter.status("agent")).spent == Decimal("0.07")
        assert steady.master.command("EXISTS", "ktrdr:{default}:meta")
        shown = f"{limiter!r} {limiter.store_url} {store_of(limiter)!r}"
        assert "pass-word" not in shown
        assert "ktrdr:***@" in shown
    [report] = verify(steady.url)
    assert report.adds_up and report.spent == 70_000_000


def test_the_sync_limiter_works_with_sentinel(steady):
    with BudgetLimiter(steady.url, BUDGETS, timeout=20.0) as limiter:
        limiter.reserve("agent", "0.15").commit("0.07")
        assert limiter.status("agent").spent == Decimal("0.07")


def test_a_forked_child_can_reserve_through_sentinel(steady):
    with BudgetLimiter(steady.url, BUDGETS, timeout=20.0) as limiter:
        limiter.reserve("agent", "0.50")
        assert in_child(lambda: limiter.reserve("agent", "0.25")) == 0
        assert limiter.status("agent").held == Decimal("0.75")


async def test_calls_succeed_on_the_new_master_within_their_deadline_if_the_old_master_is_killed(either):
    old = either.master
    async with AsyncBudgetLimiter(either.url, BUDGETS, timeout=20.0) as limiter:
        hold = await limiter.reserve("agent", "1.00", id="op_1")
        await until(lambda: either.replicated())
        old.kill()
        calls = (limiter.reserve("agent", "0.50", id="op_2"), limiter.status("agent"), hold.commit("0.25"))
        _, _, settlement = await asyncio.gather(*calls)
        assert settlement.amounts == {"agent": Decimal("0.25")}
        assert current_port(limiter) == await _new_master(either, old)
        assert (await limiter.status("agent")).held == Decimal("0.50")
        assert limiter.losses == 0


async def test_after_a_manual_failover_a_limiter_uses_the_new_master_before_the_old_master_is_demoted(group):
    """The old master remains a master for seconds; writes that it accepted meanwhile would be lost."""
    old = group.master
    async with AsyncBudgetLimiter(group.url, BUDGETS, timeout=30.0) as limiter:
        hold = await limiter.reserve("agent", "1.00", id="op_1")
        await until(lambda: group.replicated())
        new = await asyncio.to_thread(group.fail_over)
        began = time.monotonic()
        await until(lambda: current_port(limiter) == new.port)
        role = old.client.role()[0]
        assert role == "master" or time.monotonic() - began > 0.5, "it has not been demoted yet"
        await hold.commit("0.25")
        await limiter.record("agent", "0.50")
        assert new.client.role()[0] == "master"
        assert limiter.losses == 0
        assert (await limiter.status("agent")).spent == Decimal("0.75")


async def test_if_a_node_replies_readonly_the_limiter_discovers_the_master_again(steady):
    """The test demotes the master without Sentinel. A call retries until there is a master, or until its deadline."""
    async with AsyncBudgetLimiter(steady.url, BUDGETS, timeout=20.0) as limiter:
        await limiter.reserve("agent", "1.00", id="op_1")
        master, other = steady.master, steady.replicas[0]
        first = store_of(limiter).node
        master.command("REPLICAOF", "127.0.0.1", other.port)
        waiting = asyncio.create_task(limiter.reserve("agent", "0.50", id="op_2"))
        await until(lambda: store_of(limiter).node not in (first, None))
        assert not waiting.done()
        master.command("REPLICAOF", "NO", "ONE")
        await waiting
        assert (await limiter.status("agent")).held == Decimal("1.50")


async def test_calls_succeed_on_the_new_master_after_the_failover_if_the_old_master_hangs(group):
    old = group.master
    async with AsyncBudgetLimiter(group.url, BUDGETS, timeout=60.0) as limiter:
        await limiter.reserve("agent", "1.00", id="op_1")
        await until(lambda: group.replicated())
        old.pause()
        async with asyncio.timeout(50):
            await asyncio.gather(limiter.reserve("agent", "0.50", id="op_2"), limiter.status("agent"))
        assert current_port(limiter) == await _new_master(group, old)


async def test_writes_missing_on_the_promoted_replica_are_replayed_after_the_failover(group):
    async with AsyncBudgetLimiter(group.url, BUDGETS, timeout=20.0) as limiter:
        await limiter.record("agent", "1.00")
        await until(lambda: group.replicated())
        old = group.master
        group.lose_writes()
        await limiter.record("agent", "0.50")
        await limiter.reserve("agent", "0.25", id="op_1")
        old.kill()
        await until(lambda: _is_repaired(limiter))
        assert limiter.losses == 1


async def test_a_hold_missing_on_the_promoted_replica_can_be_committed_by_id(group):
    async with AsyncBudgetLimiter(group.url, BUDGETS, timeout=60.0) as limiter:
        await limiter.record("agent", "1.00")
        await until(lambda: group.replicated())
        old = group.master
        group.lose_writes()
        await limiter.reserve("agent", "0.25", id="op_1")
        old.kill()
        assert (await limiter.get("op_1")).state == "open"
        assert (await limiter.commit("op_1", "0.20")).amounts == {"agent": Decimal("0.20")}
        assert limiter.losses == 1


async def _is_repaired(limiter: AsyncBudgetLimiter) -> bool:
    try:
        status = await limiter.status("agent")
    except StoreUnavailable:
        return False
    return (status.spent, status.held) == (Decimal("1.50"), Decimal("0.25"))


async def _check_server(limiter: AsyncBudgetLimiter) -> None:
    store = store_of(limiter)
    assert isinstance(store, FailoverStore) and store.node is not None
    await store.check(store.node)


async def test_a_limiter_starts_in_time_if_two_of_three_sentinels_hang(group):
    group.sentinels[0].pause()
    group.sentinels[1].pause()
    with Stopwatch() as took:
        async with AsyncBudgetLimiter(group.url, BUDGETS, timeout=20.0) as limiter:
            await limiter.reserve("agent", "0.01")
            group.sentinels[2].pause()
            await _check_server(limiter)
            await limiter.reserve("agent", "0.01")  # the master is still there
    assert took.seconds < 10


async def test_calls_end_in_time_if_no_sentinel_or_no_master_replies(group):
    ports = free_ports(2)
    unreachable = f"redis+sentinel://127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}/budgets"
    limiter = AsyncBudgetLimiter(unreachable, BUDGETS, timeout=0.3)
    with pytest.raises(StoreUnavailable, match="no sentinel replies"), Stopwatch() as took:
        await limiter.reserve("agent", "0.01")
    assert took.seconds < 2
    await limiter.close()
    for server in group.servers:
        server.pause()
    await until(lambda: all("o_down" in s.client.sentinel_master("budgets")["flags"] for s in group.sentinels))
    async with AsyncBudgetLimiter(group.url, BUDGETS, timeout=2.0) as limiter:
        down = "the sentinels report that budgets is down"
        with pytest.raises(StoreUnavailable, match=down), Stopwatch() as took:
            await limiter.reserve("agent", "0.01")
        assert took.seconds < 5
        for server in group.servers:
            server.resume()
        await until(lambda: _answers(limiter))


@pytest.mark.parametrize(
    ("change", "words", "fault"),
    [
        (("/budgets", "/unknown"), "No such master", ""),
        (("pass-word-2", "pass-word-3"), "WRONGPASS|invalid username-password", "login"),
        (("pass-word-1", "pass-word-3"), "invalid username-password", "login"),
        (("?sentinel_password=pass-word-2", ""), "Authentication required|NOAUTH", "login"),
    ],
)
async def test_an_error_about_a_wrong_service_name_or_password_shows_no_password(steady, change, words, fault):
    limiter = AsyncBudgetLimiter(steady.url.replace(*change), BUDGETS, timeout=30.0)
    with pytest.raises(StoreError, match=words) as refused:
        await limiter.reserve("agent", "0.01")
    assert refused.value.fault == fault
    assert "pass-word" not in f"{refused.value} {limiter!r}"
    await limiter.close()


async def test_passwords_may_contain_reserved_characters_of_urls(tmp_path):
    secrets = {"password": "p@ss/w:rd?%41,[", "sentinel_password": "s3nt&=+nel/@:%"}
    with SentinelGroup(valkey_binary(), tmp_path, replicas=0, sentinels=1, **secrets) as group:
        async with AsyncBudgetLimiter(group.url, BUDGETS, timeout=20.0) as limiter:
            await limiter.reserve("agent", "0.01")
