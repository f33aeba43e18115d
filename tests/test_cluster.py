"""A plain reserve and commit, and a race, on a real cluster of three nodes: scripts go to the slot's node."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import pytest
import redis

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, BudgetLimiter, StoreUnavailable
from ktrdr_budget.money import to_units

from .helpers.processes import workers
from .helpers.waiting import until, wait_until

SLOTS = 16384
BUDGETS = [Budget("agent", "5.00"), Budget("team:quant", "5.00"), Budget("cycles", 10, unit="cycles")]


class Cluster:
    """Three servers of this test run, each with a third of the slots."""

    def __init__(self, binary: str, directory: Path) -> None:
        self.ports = free_ports(3)
        self._processes = [self._start(binary, directory / str(port), port) for port in self.ports]
        self.nodes = [redis.Redis(port=port, decode_responses=True) for port in self.ports]

    def form(self) -> None:
        """Makes one cluster of the nodes."""
        for node in self.nodes:
            wait_until(lambda node=node: answers(node), within_s=10)
        for number, node in enumerate(self.nodes):
            first, last = SLOTS * number // 3, SLOTS * (number + 1) // 3 - 1
            node.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
            node.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes:
            for port in self.ports:
                node.execute_command("CLUSTER MEET", "127.0.0.1", port, port + 10000)
        wait_until(self._is_whole, within_s=30)

    @staticmethod
    def _start(binary: str, directory: Path, port: int) -> subprocess.Popen[bytes]:
        directory.mkdir()
        words = [binary, "--port", str(port), "--dir", str(directory), "--save", "", "--cluster-enabled", "yes"]
        words += ["--cluster-node-timeout", "2000", "--cluster-require-full-coverage", "no"]
        with (directory / "log").open("ab") as log:
            return subprocess.Popen([*words, "--maxmemory-policy", "noeviction"], stdout=log, stderr=log)

    def _is_whole(self) -> bool:
        for node in self.nodes:
            known = node.execute_command("CLUSTER INFO")
            if known["cluster_state"] != "ok" or known["cluster_slots_ok"] != str(SLOTS):
                return False
        return True

    @property
    def url(self) -> str:
        return f"redis+cluster://127.0.0.1:{self.ports[0]}"

    def keys_by_node(self) -> list[list[str]]:
        """The keys of each node."""
        return [sorted(node.scan_iter()) for node in self.nodes]

    def flush(self) -> None:
        for node in self.nodes:
            node.flushall()
            node.script_flush()

    def signal(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)

    def end(self) -> None:
        for node in self.nodes:
            node.close()
        for process in self._processes:
            process.kill()
            process.wait()


def answers(node: redis.Redis) -> bool:
    try:
        return bool(node.ping())
    except redis.ConnectionError:
        return False


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, whose bus ports (+10000) are free as well."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as listener, socket.socket() as bus:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            if port + 10000 < 65536:
                try:
                    bus.bind(("127.0.0.1", port + 10000))
                except OSError:
                    continue
                found.append(port)
        # Some ranges of automatic ports leave no room above them.
        if not found and port + 10000 >= 65536:
            found += [port for port in range(21000, 21000 + 7 * count, 7) if is_free(port) and is_free(port + 10000)]
    return found[:count]


def is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@pytest.fixture(scope="module")
def _cluster(start_server: Callable, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    probe = start_server()
    binary = probe.binary
    probe.kill()
    made = Cluster(binary, Path(tmp_path_factory.mktemp("cluster")))
    try:
        made.form()
        yield made
    finally:
        made.end()


@pytest.fixture
def cluster(_cluster: Cluster) -> Cluster:
    _cluster.flush()
    return _cluster


@pytest.mark.parametrize("tenant", ["default", "alpha", "beta", "team:quant"])
async def test_reserve_and_commit_of_each_tenant_stay_in_one_slot(cluster, tenant):
    """runcycles, PostHog #60838, gateway #248: no CROSSSLOT, for all keys are declared and share a hash tag."""
    async with AsyncBudgetLimiter(cluster.url, BUDGETS, tenant=tenant, timeout=5.0) as limiter:
        hold = await limiter.reserve({"agent": "0.15", "team:quant": "0.15", "cycles": 1}, id="op_1")
        hold.accrue("0.03")
        await hold.extend()
        await hold.grow({"agent": "0.10"})
        assert (await limiter.reserve({"agent": "0.15", "team:quant": "0.15", "cycles": 1}, id="op_1")).replayed
        settlement = await hold.commit("0.07")
        assert settlement.amounts == {"agent": Decimal("0.07"), "team:quant": Decimal("0.07"), "cycles": 1}
    used = [keys for keys in cluster.keys_by_node() if keys]
    assert len(used) == 1, "one node has them all"
    assert all(key.startswith(f"ktrdr:{{{tenant}}}:") for key in used[0])


async def test_everything_else_works_through_a_cluster_client_too(cluster):
    async with AsyncBudgetLimiter(cluster.url, BUDGETS, timeout=5.0) as limiter:
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


async def test_script_flush_on_every_node_is_invisible(cluster):
    async with AsyncBudgetLimiter(cluster.url, BUDGETS, timeout=5.0) as limiter:
        for _ in range(3):
            await (await limiter.reserve("agent", "0.15")).commit("0.07")
            for node in cluster.nodes:
                node.script_flush()
        assert (await limiter.status("agent")).spent == Decimal("0.21")


def test_the_sync_limiter_and_its_threads_speak_to_a_cluster_too(cluster):
    with BudgetLimiter(cluster.url, BUDGETS, timeout=5.0) as limiter:
        with limiter.hold("agent", "0.15") as hold:
            hold.accrue("0.05")
        assert limiter.status("agent").spent == Decimal("0.05")


async def test_many_callers_of_one_process_fill_the_cap_exactly(cluster):
    async with AsyncBudgetLimiter(cluster.url, BUDGETS, timeout=10.0) as limiter:
        tries = [limiter.reserve("agent", "0.01") for _ in range(700)]
        outcomes = await asyncio.gather(*tries, return_exceptions=True)
        assert sum(isinstance(outcome, BudgetExceeded) for outcome in outcomes) == 200
        assert (await limiter.status("agent")).held == Decimal("5.00")


def test_eight_processes_race_a_cap_on_a_cluster_and_fill_it_to_the_unit(cluster):
    options = {"url": cluster.url, "limit": "0.7", "amounts": ["0.0007"], "callers": 8, "ttl": 60, "settle": False}
    with workers("spender.py", 8, options) as racers:
        for racer in racers:
            racer.tell(go=True)
        reports = [racer.hear() for racer in racers]
    assert sum(report["grants"] for report in reports) == 1000
    assert held_in(cluster) == to_units("0.7")


def test_mixed_amounts_and_kill_9_never_pass_the_cap_on_a_cluster(cluster):
    limit = to_units("3.00")
    amounts = ["0.01", "0.003", "0.0000007", "0.02", "0.0151"]
    options = {"url": cluster.url, "limit": "3.00", "amounts": amounts, "callers": 8, "ttl": 1, "settle": True}
    with workers("spender.py", 8, options) as racers:
        for racer in racers:
            racer.tell(go=True)
        for tenths, doomed in enumerate(racers[:3], 2):
            wait_until(lambda tenths=tenths: window(cluster)["spent"] >= limit * tenths // 10, within_s=30)
            doomed.kill()
        reports = [racer.hear() for racer in racers[3:]]
        found = window(cluster)
        assert found["spent"] + found["held"] + found["unconfirmed"] <= limit
        assert sum(report["committed"] for report in reports) <= found["spent"]


def window(cluster: Cluster) -> dict[str, int]:
    """The figures of the only window of `agent`, on whichever node it is."""
    figures = {"spent": 0, "held": 0, "unconfirmed": 0}
    for node in cluster.nodes:
        for key in node.scan_iter("ktrdr:{default}:w:agent:*", count=10000):
            figures = {name: int(node.hget(key, name) or 0) for name in figures}
    return figures


def held_in(cluster: Cluster) -> int:
    return window(cluster)["held"]


async def test_a_cluster_that_hangs_gives_every_call_its_answer_in_time(cluster):
    async with AsyncBudgetLimiter(cluster.url, BUDGETS, timeout=0.5) as limiter:
        hold = await limiter.reserve("agent", "0.15")
        cluster.signal(signal.SIGSTOP)
        try:
            for call in (lambda: limiter.reserve("agent", "0.15"), lambda: limiter.status("agent"), hold.commit):
                async with asyncio.timeout(1.0):
                    with pytest.raises(StoreUnavailable):
                        await call()
        finally:
            cluster.signal(signal.SIGCONT)
        await until(lambda: _answers(limiter), within_s=10)
        assert (await hold.commit("0.07")).amounts == {"agent": Decimal("0.07")}


async def _answers(limiter) -> bool:
    try:
        await limiter.status("agent")
    except StoreUnavailable:
        return False
    return True


async def test_a_cluster_that_is_not_there_is_unavailable(cluster):
    [port] = free_ports(1)
    async with AsyncBudgetLimiter(f"redis+cluster://127.0.0.1:{port}", BUDGETS, timeout=0.3) as limiter:
        async with asyncio.timeout(0.8):
            with pytest.raises(StoreUnavailable):
                await limiter.reserve("agent", "0.15")
