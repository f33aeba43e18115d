"""A cluster: the throughput of three shards compared with one, and the time of a call compared with a single server."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import redis
from redis.crc import key_slot

from benchmarks.client import per_call_us
from benchmarks.measures import Measure, Settings, at_least, at_most
from benchmarks.servers import binary_of, free_port, running
from ktrdr_budget import AsyncBudgetLimiter, Budget

__all__ = ["cluster"]

_SLOTS = 16384
_SHARDS = 3
_CALLERS = 100
_START_TIMEOUT_S = 20.0
_AMPLE = "5000000"


@contextmanager
def _cluster(kind: str) -> Iterator[list[int]]:
    """Start a cluster of three masters on this machine, each with a third of the slots. Yield their ports."""
    binary = binary_of(kind)
    if binary is None:
        raise RuntimeError(f"{kind}-server is not installed")
    ports = _ports()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        for me in ports:
            place = Path(directory, str(me))
            place.mkdir()
            lines = []
            for number, port in enumerate(ports):
                slots = f"{_SLOTS * number // _SHARDS}-{_SLOTS * (number + 1) // _SHARDS - 1}"
                flags = "myself,master" if port == me else "master"
                lines.append(f"{port:040x} 127.0.0.1:{port}@{port + 5000} {flags} - 0 0 {number + 1} connected {slots}")
            text = "\n".join((*lines, f"vars currentEpoch {_SHARDS} lastVoteEpoch 0", ""))
            (place / "nodes.conf").write_text(text, encoding="utf-8")
            words = [binary, "--port", str(me), "--bind", "127.0.0.1", "--dir", str(place), "--save", ""]
            words += ["--cluster-enabled", "yes", "--cluster-port", str(me + 5000), "--maxmemory-policy", "noeviction"]
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
        _wait_until_whole(ports)
        yield ports


def _ports() -> list[int]:
    ports: list[int] = []
    while len(ports) < _SHARDS:
        port = free_port()
        if port + 5000 < 65536 and port not in ports:
            ports.append(port)
    return ports


def _wait_until_whole(ports: Sequence[int]) -> None:
    ends = time.monotonic() + _START_TIMEOUT_S
    for port in ports:
        with redis.Redis(port=port, decode_responses=True) as client:
            while True:
                try:
                    found = client.execute_command("CLUSTER INFO")
                    if found["cluster_state"] == "ok":
                        break
                except redis.ConnectionError:
                    pass
                if time.monotonic() > ends:
                    raise RuntimeError("the cluster does not start")
                time.sleep(0.02)


def _tenants(shards: Sequence[int]) -> list[str]:
    """Return one tenant for each of these shard numbers. The keys of the tenant are on that shard."""
    names: list[str] = []
    for shard in shards:
        name = next(
            name
            for name in (f"tenant-{number}" for number in range(10_000))
            if name not in names and key_slot(name.encode()) * _SHARDS // _SLOTS == shard
        )
        names.append(name)
    return names


class _Client:
    """A process that reserves for one tenant, on demand."""

    def __init__(self, url: str, tenant: str) -> None:
        words = [sys.executable, "-m", "benchmarks.cluster_client", url, tenant, str(_CALLERS)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.wait()

    def start(self, calls: int) -> None:
        """Begin a block of calls."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{calls}\n")
        self._process.stdin.flush()

    def wait(self) -> tuple[float, float]:
        """Wait for the end of the block; return when it began and ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a client of the cluster has ended")
        begun, ended = json.loads(line)
        return begun, ended

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()


def _round(clients: Sequence[_Client], ports: Sequence[int], calls: int) -> tuple[float, float]:
    """Calls per second of all clients together, and microseconds of CPU of the busiest server per call."""
    before = [_cpu_s(port) for port in ports]
    for client in clients:
        client.start(calls)
    times = [client.wait() for client in clients]
    seconds = max(ended for _, ended in times) - min(begun for begun, _ in times)
    busiest = max(_cpu_s(port) - then for port, then in zip(ports, before, strict=True))
    return len(clients) * calls / seconds, busiest / (len(clients) * calls) * 1e6


def _cpu_s(port: int) -> float:
    with redis.Redis(port=port) as client:
        used = client.info("cpu")
        return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


async def cluster(settings: Settings) -> list[Measure]:
    """Measure three processes with one tenant each. The tenants are on one shard and on three shards, by turns."""
    rounds, calls = settings.rounds(7), settings.size(20_000, 1_000)
    with _cluster(settings.store) as ports:
        url = "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)
        plans = {"one": _tenants([0, 0, 0]), "three": _tenants([0, 1, 2])}
        taken: dict[str, list[tuple[float, float]]] = {plan: [] for plan in plans}
        with ExitStack() as stack:
            clients = {plan: [_Client(url, tenant) for tenant in tenants] for plan, tenants in plans.items()}
            for each in clients.values():
                for client in each:
                    stack.callback(client.end)
            for number in range(rounds + 1):
                for plan in sorted(plans, reverse=bool(number % 2)):
                    figures = _round(clients[plan], ports, calls if number else 500)
                    if number:  # the first round connects
                        taken[plan].append(figures)
        overhead = await _overhead(settings, url)
    return [*_shards(taken), overhead]


def _shards(taken: dict[str, list[tuple[float, float]]]) -> list[Measure]:
    speed = {plan: [figures[0] for figures in found] for plan, found in taken.items()}
    busy = {plan: [figures[1] for figures in found] for plan, found in taken.items()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Measure(
            "cluster_three_shards_to_one",
            "reservations of 3 tenants on 3 shards, to those on 1 shard",
            "x",
            tuple(three / one for three, one in zip(speed["three"], speed["one"], strict=True)),
            at_least(2),
            detail=f"{statistics.median(speed['three']):,.0f} and {statistics.median(speed['one']):,.0f} per second; "
            f"{cores} cores for 3 clients and 3 servers, which would need 6",
        ),
        Measure(
            "cluster_busiest_server_one_to_three",
            "CPU of the busiest server, 3 tenants on 1 shard, to 3 shards",
            "x",
            tuple(one / three for three, one in zip(busy["three"], busy["one"], strict=True)),
            at_least(2),
            detail=f"{statistics.median(busy['one']):.2f}, {statistics.median(busy['three']):.2f} µs per reservation",
        ),
    ]


async def _overhead(settings: Settings, url: str) -> Measure:
    """Compare the time of a reservation on a cluster with its time on one server, by turns, in one process."""
    rounds, calls = settings.rounds(7), settings.size(20_000, 1_000)
    taken: dict[str, list[float]] = {"cluster": [], "server": []}
    with running(settings.store) as server:
        budgets = [Budget("agent", limit=_AMPLE)]
        options: dict[str, Any] = {"tenant": "overhead", "timeout": 30, "max_holds": 10**7}  # none is ever settled
        async with (
            AsyncBudgetLimiter(url, budgets, **options) as far,
            AsyncBudgetLimiter(server.url, budgets, **options) as near,
        ):
            for number in range(rounds + 1):
                for name, limiter in sorted({"cluster": far, "server": near}.items(), reverse=bool(number % 2)):
                    reserve = partial(limiter.reserve, "agent", "0.0015")
                    us = await per_call_us(reserve, _CALLERS, calls if number else 500)
                    if number:
                        taken[name].append(us)
    return Measure(
        "cluster_reserve_to_server",
        f"reserve, {_CALLERS} callers, on a cluster, to one server",
        "x",
        tuple(far / near for far, near in zip(taken["cluster"], taken["server"], strict=True)),
        at_most(1.1),
        detail=f"{statistics.median(taken['cluster']):.1f} and {statistics.median(taken['server']):.1f} µs",
    )
