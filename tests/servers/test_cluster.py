"""Real clusters of three masters and three replicas: requests go to the current master of the tenant's slot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

import pytest
import redis.asyncio
import wrapt

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, BudgetLimiter, StoreError, StoreUnavailable
from ktrdr_budget.audit import verify
from ktrdr_budget.engine.transport import resp
from ktrdr_budget.money import to_units

from ..conftest import redis_binary, valkey_binary
from ..helpers.clusters import Cluster, slot_of
from ..helpers.crowd import crowd
from ..helpers.nodes import free_ports
from ..helpers.patience import hurried
from ..helpers.processes import in_child, workers
from ..helpers.stopwatch import Stopwatch
from ..helpers.stores import current_port, own_connections
from ..helpers.waiting import until, wait_until

BUDGETS = [Budget("agent", "5.00"), Budget("team:quant", "5.00"), Budget("cycles", 10, unit="cycles")]
BINARIES = {"valkey": valkey_binary(), "redis": redis_binary()}


@pytest.fixture(scope="module")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(valkey_binary(), Path(tmp_path_factory.mktemp("cluster")), replicas=1) as made:
        yield made


@pytest.fixture
def cluster(_cluster: Cluster) -> Cluster:
    """An empty cluster of Valkey, shared by all tests."""
    _cluster.flush()
    return _cluster


@pytest.fixture(scope="module", params=[kind for kind, binary in BINARIES.items() if binary])
def _either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if request.param == "valkey":
        yield request.getfixturevalue("_cluster")
        return
    with Cluster(BINARIES[request.param], Path(tmp_path_factory.mktemp("cluster")), replicas=1) as made:
        yield made


@pytest.fixture
def either(_either: Cluster) -> Cluster:
    """An empty cluster, once for each kind of server; the kinds reply differently during a slot migration."""
    _either.flush()
    return _either


@pytest.mark.parametrize("tenant", ["default", "alpha", "beta", "team:quant"])
async def test_all_keys_of_a_tenant_are_in_one_slot(cluster, tenant):
    """runcycles, PostHog #60838, gateway #248: no CROSSSLOT error, since all keys of a tenant share a hash tag."""
    async with AsyncBudgetLimiter(cluster.url, BUDGETS, tenant=tenant, timeout=20.0) as limiter:
        hold = await limiter.reserve({"agent": "0.15", "team:quant": "0.15", "cycles": 1}, id="op_1")
        hold.accrue("0.03")
        await hold.extend()
        await hold.grow({"agent": "0.10"})
        assert (await limiter.reserve({"agent": "0.15", "team:quant": "0.15", "cycles": 1}, id="op_1")).replayed
        settlement = await hold.commit("0.07")
        assert settlement.amounts == {"agent": Decimal("0.07"), "team:quant": Decimal("0.07"), "cycles": 1}
    used = [
        keys for node, keys in zip(cluster.nodes, cluster.keys_by_node(), strict=True) if keys and node.role == "master"
    ]
    assert len(used) == 1, "one node has all keys"
    assert all(key.startswith(f"ktrdr:{{{tenant}}}:") for key in used[0])


async def test_every_call_of_the_limiter_works_on_a_cluster(cluster):
    async with AsyncBudgetLimiter(cluster.url, BUDGETS, timeout=20.0) as limiter:
        await limiter.record("agent", "0.02", id="op_1", operation="research")
        for number in range(3):
            await limiter.reserve("agent", "1.00", id=f"held_{number}", ttl=1)
        with pytest.raises(BudgetExceeded) as denied:
            await limiter.reserve("agent", "2.00")
        assert (denied.value.reason, denied.value.remaining) == ("budget_held", Decimal("1.98"))
        assert [hold.state for hold in await limiter.holds("agent")] == ["open"] * 3
        await until(lambda: _all_unconfirmed(limiter))
        holds = await limiter.holds("agent", limit=2)
        assert (len(holds), holds.next_cursor is not None) == (2, True)
        await limiter.commit("held_0", "0.50")
        await limiter.release("held_1")
        entries = (await limiter.ledger("agent")).items
        assert [entry.kind for entry in entries] == ["release", "correction", *["expiry"] * 3, "record"]
        assert entries[-1].operation == "research"
        status = await limiter.status("agent")
        assert (status.spent, status.unconfirmed) == (Decimal("0.52"), Decimal("1.00"))
        assert sum(entry.amount for entry in entries) == status.spent + status.unconfirmed
        assert (await limiter.set_limit("agent", "10.00")).limit == 10
        assert (await limiter.clear_limit("agent")).limit == 5
        assert (await limiter.get("held_0")).state == "committed"
        assert [status.budget for status in await limiter.statuses()] == ["agent", "team:quant", "cycles"]


async def _all_unconfirmed(limiter) -> bool:
    return (await limiter.status("agent")).held == 0


async def test_script_flush_on_every_node_does_not_affect_calls(cluster):
    async with AsyncBudgetLimiter(cluster.url, BUDGETS, timeout=20.0) as limiter:
        for _ in range(3):
            await (await limiter.reserve("agent", "0.15")).commit("0.07")
            for node in cluster.masters:
                node.client.script_flush()
        assert (await limiter.status("agent")).spent == Decimal("0.21")


def test_the_sync_limiter_works_on_a_cluster(cluster):
    with BudgetLimiter(cluster.url, BUDGETS, timeout=20.0) as limiter:
        with limiter.hold("agent", "0.15") as hold:
            hold.accrue("0.05")
        assert limiter.status("agent").spent == Decimal("0.05")


def test_a_limiter_on_a_cluster_works_in_a_forked_child(cluster):
    with BudgetLimiter(cluster.url, BUDGETS, timeout=20.0) as limiter:
        limiter.reserve("agent", "0.50")
        assert in_child(lambda: limiter.reserve("agent", "0.25")) == 0
        assert limiter.status("agent").held == Decimal("0.75")


async def test_many_callers_of_one_process_fill_the_cap_exactly(cluster):
    async with AsyncBudgetLimiter(cluster.url, BUDGETS, timeout=30.0) as limiter:
        tries = [limiter.reserve("agent", "0.01") for _ in range(700)]
        outcomes = await asyncio.gather(*tries, return_exceptions=True)
        assert sum(isinstance(outcome, BudgetExceeded) for outcome in outcomes) == 200
        assert (await limiter.status("agent")).held == Decimal("5.00")


def test_eight_processes_fill_a_cap_on_a_cluster_exactly(cluster):
    options = {"url": cluster.url, "limit": "0.7", "amounts": ["0.0007"], "callers": 8, "ttl": 60, "settle": False}
    with workers("spender.py", 8, options) as racers:
        for racer in racers:
            racer.send(go=True)
        reports = [racer.receive() for racer in racers]
    assert sum(report["grants"] for report in reports) == 1000
    assert held_in(cluster) == to_units("0.7")


def test_mixed_amounts_and_killed_processes_never_exceed_the_cap_on_a_cluster(cluster):
    limit = to_units("3.00")
    amounts = ["0.01", "0.003", "0.0000007", "0.02", "0.0151"]
    options = {"url": cluster.url, "limit": "3.00", "amounts": amounts, "callers": 8, "ttl": 1, "settle": True}
    with workers("spender.py", 8, options) as racers:
        for racer in racers:
            racer.send(go=True)
        for tenths, doomed in enumerate(racers[:3], 2):
            wait_until(lambda tenths=tenths: window(cluster)["spent"] >= limit * tenths // 10)
            doomed.kill()
        reports = [racer.receive() for racer in racers[3:]]
        found = window(cluster)
        assert found["spent"] + found["held"] + found["unconfirmed"] <= limit
        assert sum(report["committed"] for report in reports) <= found["spent"]


def window(cluster: Cluster, tenant: str = "default") -> dict[str, int]:
    """The figures of the only window of `agent` on any master; fail if there are two windows."""
    found = []
    for node in cluster.masters:
        for key in node.client.scan_iter(f"ktrdr:{{{tenant}}}:w:agent:*", count=10000):
            pipeline = node.client.pipeline(transaction=False)
            pipeline.execute_command("ASKING")  # the key may be migrating to this node
            pipeline.hmget(key, "spent", "held", "unconfirmed")
            found.append([int(figure or 0) for figure in pipeline.execute()[1]])
    assert len(found) <= 1, "a split window"
    return dict(zip(("spent", "held", "unconfirmed"), found[0] if found else (0, 0, 0), strict=True))


def held_in(cluster: Cluster) -> int:
    return window(cluster)["held"]


@asynccontextmanager
async def spenders(limiter: AsyncBudgetLimiter) -> AsyncIterator[None]:
    """Four callers spend during the block and after it, until 50 more commits succeed. Each commit must count once."""

    async def spend() -> None:
        nonlocal spent
        await (await limiter.reserve("agent", "0.002")).commit("0.001")
        spent += 1
        await asyncio.sleep(0.001)  # slower than the limit is spent

    spent = 0
    async with crowd(spend, callers=4):
        yield
        before = spent
        await until(lambda: spent > before + 50)
    assert (await limiter.status("agent")).spent == spent * Decimal("0.001")
    assert limiter.losses == 0


async def test_calls_to_a_hanging_cluster_end_by_their_deadline(cluster):
    async with AsyncBudgetLimiter(cluster.url, BUDGETS, timeout=20.0) as limiter:
        hold = await limiter.reserve("agent", "0.15")
        for node in cluster.nodes:
            node.pause()
        try:
            for call in (lambda: limiter.reserve("agent", "0.15"), lambda: limiter.status("agent"), hold.commit):
                with hurried(limiter, 0.5), pytest.raises(StoreUnavailable), Stopwatch() as took:
                    await call()
                assert took.seconds < 2.0
        finally:
            for node in cluster.nodes:
                node.resume()
        await until(lambda: _answers(limiter))
        assert (await hold.commit("0.07")).amounts == {"agent": Decimal("0.07")}


async def _answers(limiter) -> bool:
    try:
        await limiter.status("agent")
    except StoreUnavailable:
        return False
    return True


async def test_an_unreachable_cluster_raises_store_unavailable(cluster):
    [port] = free_ports(1)
    async with AsyncBudgetLimiter(f"redis+cluster://127.0.0.1:{port}", BUDGETS, timeout=0.3) as limiter:
        with pytest.raises(StoreUnavailable), Stopwatch() as took:
            await limiter.reserve("agent", "0.15")
        assert took.seconds < 2.0


# -- slot migration ----------------------------------------------------------------------------------------------------


def test_a_slot_migration_under_load_loses_no_spend_and_counts_no_spend_twice(either):
    """Two migrations, to another node and back. No grant is lost or counted twice, and the cap is filled exactly."""
    options = {
        "url": either.url,
        "limit": "0.9",
        "amounts": ["0.001", "0.0005"],
        "callers": 4,
        "ttl": 60,
        "settle": True,
    }
    with workers("spender.py", 3, options) as racers:
        for racer in racers:
            racer.send(go=True)
        for tenths in (2, 5):
            wait_until(lambda tenths=tenths: window(either)["spent"] >= to_units("0.09") * tenths)
            source = either.owner("default")
            target = either.others(source)[0]
            moved = either.migrate("default", target, between=lambda moved: len(moved) % 100 or window(either))
            assert len(moved) > 4
            assert either.owner("default") is not source
        reports = [racer.receive() for racer in racers]
    found = window(either)
    assert found["held"] == found["unconfirmed"] == 0
    assert found["spent"] == sum(report["committed"] for report in reports) <= to_units("0.9")
    assert found["spent"] >= to_units("0.899")
    [report] = verify(either.url)
    assert report.adds_up and report.conclusive and report.spent == found["spent"]
    assert [key for node in either.masters for key in node.client.scan_iter("*:meta")] == ["ktrdr:{default}:meta"]


async def test_nothing_is_granted_while_a_slot_is_half_migrated(either):
    source, target = either.owner("default"), either.others(either.owner("default"))[0]
    async with AsyncBudgetLimiter(either.url, BUDGETS, timeout=20.0) as limiter:
        hold = await limiter.reserve("agent", "1.00", id="op_1")
        for moved_first in sorted(source.client.scan_iter()):
            with either.migrating("default", target) as move:
                move(moved_first)
                calls = [limiter.reserve("agent", "5.00"), limiter.reserve("cycles", 1), hold.extend()]
                if moved_first in (limiter.keys.meta, limiter.keys.hold("op_1")):
                    calls.append(limiter.get("op_1"))  # the epoch of its record is unknown
                else:
                    assert (await limiter.get("op_1")).state == "open"
                for call in calls:
                    with hurried(limiter, 0.3), pytest.raises(StoreUnavailable):
                        await call
                window(either)
            await until(lambda: _holds(limiter, 1))
            source, target = target, source
        assert (await hold.commit("0.50")).amounts == {"agent": Decimal("0.50")}
        assert (await limiter.status("agent")).remaining == Decimal("4.50")


async def _holds(limiter, amount: int) -> bool:
    try:
        return (await limiter.status("agent")).held == amount
    except StoreUnavailable:
        return False


async def test_the_first_reservation_of_a_tenant_waits_until_its_slot_has_migrated(either):
    """The tenant has no keys yet, so the source replies ASK; no window must be created before the slot has migrated."""
    source = either.owner("fresh")
    async with AsyncBudgetLimiter(either.url, BUDGETS, tenant="fresh", timeout=30.0) as limiter:
        with either.migrating("fresh", either.others(source)[0]):
            first = asyncio.create_task(limiter.reserve("agent", "1.00"))
            done, _ = await asyncio.wait([first], timeout=0.3)
            assert not done
            assert not any(node.client.keys("ktrdr:{fresh}:*") for node in either.masters)
        await first
        assert window(either, "fresh")["held"] == to_units("1.00")


async def test_tenants_in_other_slots_are_not_affected_by_a_migration(cluster):
    source, target, elsewhere = cluster.masters
    moving, calm = cluster.tenant_of(source), cluster.tenant_of(elsewhere)
    async with (
        AsyncBudgetLimiter(cluster.url, BUDGETS, tenant=moving, timeout=20.0) as stuck,
        AsyncBudgetLimiter(cluster.url, BUDGETS, tenant=calm, timeout=20.0) as free,
    ):
        await stuck.reserve("agent", "0.01")
        with cluster.migrating(moving, target) as move:
            move()
            for _ in range(20):
                await free.reserve("agent", "0.01")
            with hurried(stuck, 1.0), pytest.raises(StoreUnavailable, match="TRYAGAIN|rehashing"):
                await stuck.reserve("agent", "0.01")
        await until(lambda: _answers(stuck))
        await stuck.reserve("agent", "0.01")


async def test_calls_continue_and_no_spend_is_lost_during_an_atomic_slot_migration_of_valkey(cluster):
    """Valkey 9 copies the whole slot, as to a replica, and then switches at once: no TRYAGAIN, and no loss."""
    source = cluster.owner("default")
    target = cluster.others(source)[0]
    slot = slot_of("default")
    async with AsyncBudgetLimiter(cluster.url, BUDGETS, timeout=20.0) as limiter, spenders(limiter):
        source.command("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", target.id)
        await asyncio.to_thread(cluster.wait_owner, "default", source)


@pytest.mark.parametrize("way", ["connections", "client without hiredis", "instrumented client"])
async def test_the_limiter_follows_redirects_with_its_own_connections_and_with_the_redis_py_client(
    cluster, monkeypatch, way
):
    if way == "client without hiredis":
        monkeypatch.setattr(resp, "Reader", None)
    if way == "instrumented client":
        plain = redis.asyncio.Redis.execute_command
        monkeypatch.setattr(redis.asyncio.Redis, "execute_command", plain)  # restored at the end
        wrapt.wrap_function_wrapper(
            redis.asyncio.Redis, "execute_command", lambda call, _, words, more: call(*words, **more)
        )
    async with AsyncBudgetLimiter(cluster.url, BUDGETS, timeout=20.0) as limiter:
        hold = await limiter.reserve("agent", "1.00", id="op_1")
        assert bool(own_connections(limiter)) == (way == "connections")
        source = cluster.owner("default")
        with cluster.migrating("default", cluster.others(source)[0]) as move:
            while move():
                pass
            assert (await limiter.get("op_1")).state == "open"
            blocked = asyncio.create_task(limiter.status("agent"))  # the keys of its window exist on neither node
            done, _ = await asyncio.wait([blocked], timeout=0.2)
            assert not done
        assert (await blocked).held == 1
        async with asyncio.timeout(20):
            await hold.commit("0.50")
            assert (await limiter.status("agent")).spent == Decimal("0.50")
        assert current_port(limiter) == cluster.owner("default").port


# -- failover ----------------------------------------------------------------------------------------------------------


async def test_calls_to_a_killed_master_succeed_after_a_replica_is_promoted(either):
    old = either.owner("default")
    async with AsyncBudgetLimiter(either.url, BUDGETS, timeout=20.0) as limiter:
        hold = await limiter.reserve("agent", "1.00", id="op_1")
        await asyncio.to_thread(old.client.wait, 1, 5000)
        old.kill()
        try:
            calls = (limiter.reserve("agent", "0.50", id="op_2"), limiter.status("agent"), hold.commit("0.25"))
            _, _, settlement = await asyncio.gather(*calls)
            assert settlement.amounts == {"agent": Decimal("0.25")}
            assert current_port(limiter) == either.wait_owner("default", old).port
            assert (await limiter.status("agent")).held == Decimal("0.50")
        finally:
            old.start()
            old.wait_ready()
            either.wait_whole()


async def test_a_manual_failover_loses_no_spend(cluster):
    async with AsyncBudgetLimiter(cluster.url, BUDGETS, timeout=30.0) as limiter, spenders(limiter):
        old = cluster.owner("default")
        assert await asyncio.to_thread(cluster.fail_over, "default") is not old


async def test_calls_to_a_hanging_master_succeed_after_a_new_master_is_elected(cluster):
    """The connections to the hanging master stay open without replies; still, no call may wait until its deadline."""
    old = cluster.owner("default")
    async with AsyncBudgetLimiter(cluster.url, BUDGETS, timeout=60.0) as limiter:
        await limiter.reserve("agent", "1.00", id="op_1")
        await asyncio.to_thread(old.client.wait, 1, 5000)
        old.pause()
        try:
            async with asyncio.timeout(50):
                await asyncio.gather(limiter.reserve("agent", "0.50", id="op_2"), limiter.reserve("agent", "0.50"))
        finally:
            old.resume()
            await asyncio.to_thread(cluster.wait_whole)
        assert (await limiter.status("agent")).held == 2


# -- wrong URLs --------------------------------------------------------------------------------------------------------


async def test_the_error_names_the_cause_if_a_cluster_url_leads_to_a_single_server_or_the_reverse(
    cluster, start_server
):
    [port] = free_ports(1)
    start_server(None, "--port", str(port))
    elsewhere = cluster.others(cluster.owner("default"))[0]
    wrong = {f"redis+cluster://127.0.0.1:{port}": "cluster support disabled"}
    wrong[f"redis://127.0.0.1:{elsewhere.port}"] = "redis.cluster://"
    for url, words in wrong.items():
        limiter = AsyncBudgetLimiter(url, BUDGETS, timeout=20.0)
        for call in (limiter.start, lambda limiter=limiter: limiter.reserve("agent", "1.00")):
            with pytest.raises(StoreError, match=words):
                await call()
        await limiter.close()


async def test_a_cluster_is_found_if_one_node_of_the_url_is_reachable(cluster):
    dead = free_ports(2)
    hosts = ",".join(f"127.0.0.1:{port}" for port in (*dead, cluster.masters[0].port))
    async with AsyncBudgetLimiter(f"redis+cluster://{hosts}", BUDGETS, timeout=20.0) as limiter:
        await limiter.reserve("agent", "1.00")


@pytest.mark.slow
async def test_if_a_replica_is_promoted_during_a_slot_migration_the_cap_is_not_exceeded(either):
    """In Redis 7, replicas have no record of a migration: a promoted one takes its part of the slot for all of it."""
    source = either.owner("torn")
    target = either.others(source)[0]
    async with AsyncBudgetLimiter(either.url, BUDGETS, tenant="torn", timeout=20.0) as limiter:
        await limiter.record("agent", "3.00")
        with either.migrating("torn", target) as move:
            move(next(source.client.scan_iter("ktrdr:{torn}:w:*")))
            copy = either.replicas(source)[0]
            await until(lambda: {*copy.client.scan_iter("*{torn}*")} == {*source.client.scan_iter("*{torn}*")})
            source.kill()
            await asyncio.to_thread(either.wait_owner, "torn", source)
            for call in (limiter.reserve("agent", "3.00"), limiter.status("agent")):
                with (
                    hurried(limiter, 1.0),
                    pytest.raises(StoreUnavailable, match="TRYAGAIN|rehashing|its key is missing"),
                ):
                    await call
        source.start()
        source.wait_ready()
        await asyncio.to_thread(either.wait_whole)
        await until(lambda: _answers(limiter))
        with pytest.raises(BudgetExceeded):
            await limiter.reserve("agent", "3.00")
        assert (await limiter.status("agent")).spent == 3
        assert window(either, "torn")["spent"] == to_units("3.00")
