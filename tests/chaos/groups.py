"""Rows of the table: failovers and slot migrations in groups of servers."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import redis

from ..conftest import redis_binary, valkey_binary
from ..helpers.clusters import Cluster
from ..helpers.sentinels import SentinelGroup
from .bench import Bench, Row


def the_master_dies_behind_sentinels(bench: Bench) -> None:
    """The promoted replica lacks the last acknowledged writes of the master."""
    binary = redis_binary() or valkey_binary()
    group = bench.enter(
        SentinelGroup(binary, bench.directory, replicas=2, sentinels=3, environment=bench.clock_environment())
    )
    bench.losses_expected = True
    bench.spend(group.url, lambda: redis.Redis(port=group.master.port, decode_responses=True, socket_timeout=20))
    for left in bench.turns(0.5, 1.0):
        master = group.master
        group.lose_writes()
        time.sleep(min(left, bench.random.uniform(0.2, 0.5)))
        bench.terms.excess_max = max(bench.terms.excess_max, bench.counted())
        master.kill()
        bench.fault()
        group.wait_master(but=master)
        master.start()
        master.wait_ready()
        group.wait_in_sync()


def _cluster(bench: Bench, **options: Any) -> Cluster:
    binary = redis_binary() or valkey_binary()
    cluster = bench.enter(Cluster(binary, bench.directory, environment=bench.clock_environment(), **options))
    # Two tenants on the server with the faults, and one on another server.
    faulty = cluster.owner("default")
    bench.tenants = ["default", cluster.tenant_of(faulty), cluster.tenant_of(cluster.others(faulty)[0])]
    bench.untouched = (bench.tenants[2],)

    def connect() -> redis.RedisCluster:
        nodes = [redis.cluster.ClusterNode("127.0.0.1", node.port) for node in cluster.nodes]
        return redis.RedisCluster(startup_nodes=nodes, decode_responses=True, socket_timeout=20)

    bench.spend(cluster.url, connect)
    return cluster


def a_master_of_a_cluster_dies(bench: Bench) -> None:
    """The replica lacks the last acknowledged writes of its master."""
    bench.losses_expected = None
    cluster = _cluster(bench, masters=3, replicas=1)
    for left in bench.turns(0.5, 1.0):
        owner = cluster.owner("default")
        cluster.lose_writes(owner)
        time.sleep(min(left, bench.random.uniform(0.1, 0.3)))
        bench.terms.excess_max = max(bench.terms.excess_max, bench.counted())
        owner.kill()
        bench.fault()
        cluster.wait_owner("default", owner)
        owner.start()
        owner.wait_ready()
        cluster.wait_whole()


def a_slot_moves(bench: Bench) -> None:
    """A slot migrates key by key, to another master and back, repeatedly."""
    cluster = _cluster(bench, masters=3)
    for _ in bench.turns(0.1, 0.3):
        target = bench.random.choice(cluster.others(cluster.owner("default")))
        with suppress(redis.ResponseError):
            cluster.migrate("default", target)
            bench.fault()


ROWS = [
    Row("sentinel", "Sentinel failover with a lagging replica", "detected, repaired, final spend = truth",
        the_master_dies_behind_sentinels, 25, 3),
    Row("cluster-master", "Cluster: a master dies", "detected and repaired; tenants elsewhere untouched",
        a_master_of_a_cluster_dies, 25, 3),
    Row("cluster-slot", "Cluster: a slot migrates key by key", "cap; no CROSSSLOT, no split window",
        a_slot_moves, 15, 3),
]  # fmt: skip
