"""Real clusters: masters with or without replicas, with failovers, and slots that migrate key by key.

with Cluster(binary, directory, masters=3, replicas=1) as cluster:   # ready in about three seconds
    cluster.url                                # redis+cluster://127.0.0.1:…,127.0.0.1:…
    owner = cluster.owner("default")           # the master of a tenant's slot: kill(), pause(), restart(), …
    cluster.lag(owner)                         # pause its replicas, which then lack its further writes
    owner.kill()                               # a replica is elected a little after `node_timeout_ms`
    cluster.migrate("default", cluster.others(owner)[0], between=lambda moved: …)     # key by key
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import redis
from redis.crc import key_slot

from .nodes import Node, free_ports
from .waiting import WITHIN_S, wait_until

SLOTS = 16384


class ClusterNode(Node):
    """A master or a replica; a failover changes its role."""

    def __init__(
        self, binary: str, directory: Path, port: int, options: tuple[str, ...], environment: Mapping[str, str] | None
    ) -> None:
        words = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory), "--save", ""]
        words += ["--cluster-enabled", "yes", "--maxmemory-policy", "noeviction", "--repl-diskless-sync-delay", "0"]
        super().__init__(binary, directory, [*words, *options], environment)
        self.port = port
        self.id = f"{port:040x}"

    @property
    def role(self) -> str:
        """``master`` or ``slave``, from the node itself."""
        return str(self.client.role()[0])

    def is_whole(self) -> bool:
        """Whether the node has an owner for every slot, and accepts commands."""
        try:
            known = self.command("CLUSTER INFO")
        except redis.RedisError:
            return False
        return known["cluster_state"] == "ok" and known["cluster_slots_ok"] == str(SLOTS)


class Cluster:
    """Masters that share the slots evenly, with ``replicas`` replicas each.

    Args:
        node_timeout_ms: time without a reply after which a node counts as failed.
        options: command-line options of every node.
        environment: environment variables of every node, such as those of a clock that the test controls.
    """

    def __init__(
        self,
        binary: str,
        directory: Path,
        *,
        masters: int = 3,
        replicas: int = 0,
        node_timeout_ms: int = 1000,
        options: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        common = ("--cluster-node-timeout", str(node_timeout_ms), "--cluster-require-full-coverage", "no")
        common += ("--cluster-replica-validity-factor", "0", "--repl-timeout", "5")
        self.nodes = [
            ClusterNode(binary, directory / str(port), port, (*common, *options), environment)
            for port in free_ports(masters * (1 + replicas))
        ]
        self._initial_masters = masters
        self._write_topology()

    def _write_topology(self) -> None:
        """Write the list of all nodes into each node's configuration. This is faster than CLUSTER MEET."""
        count = self._initial_masters
        for me in self.nodes:
            lines = []
            for number, node in enumerate(self.nodes):
                of = number % count
                flags = "myself," if node is me else ""
                place = f"{node.id} 127.0.0.1:{node.port}@{node.port + 10000} {flags}"
                if number < count:
                    slots = f"{SLOTS * of // count}-{SLOTS * (of + 1) // count - 1}"
                    lines.append(f"{place}master - 0 0 {of + 1} connected {slots}")
                else:
                    lines.append(f"{place}slave {self.nodes[of].id} 0 0 {of + 1} connected")
            lines.append(f"vars currentEpoch {count} lastVoteEpoch 0")
            (me.directory / "nodes.conf").write_text("\n".join(lines) + "\n")

    def start(self) -> Cluster:
        """Start all nodes; return when every slot is served and every replica is in sync."""
        for node in self.nodes:
            node.start()
        for node in self.nodes:
            node.wait_ready()
        self.wait_whole()
        return self

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Stop every process."""
        for node in self.nodes:
            node.end()

    # -- state ----------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The URL for a limiter: all nodes."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    @property
    def running(self) -> list[ClusterNode]:
        """The running nodes."""
        return [node for node in self.nodes if node.process is not None]

    @property
    def masters(self) -> list[ClusterNode]:
        """The running masters."""
        return [node for node in self.running if node.role == "master"]

    def owner(self, tenant: str) -> ClusterNode:
        """The master of a tenant's slot, as most running nodes see it."""
        return self._by_id(self._owners(slot_of(tenant))[0])

    def replicas(self, master: ClusterNode) -> list[ClusterNode]:
        """The running replicas of this node."""
        port = master.port
        return [node for node in self.running if (role := node.client.role())[0] != "master" and role[2] == port]

    def others(self, than: ClusterNode) -> list[ClusterNode]:
        """The other masters."""
        return [node for node in self.masters if node is not than]

    def tenant_of(self, master: ClusterNode, but: tuple[str, ...] = ()) -> str:
        """The name of a tenant whose slot this master serves."""
        return next(
            name for name in (f"tenant-{n}" for n in range(10_000)) if name not in but and self.owner(name) is master
        )

    def _by_id(self, node_id: str) -> ClusterNode:
        return next(node for node in self.nodes if node.id == node_id)

    def _owners(self, slot: int) -> list[str]:
        """The ids that running nodes name as the master of the slot, the most frequent first."""
        seen: list[str] = []
        for node in self.running:
            with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                seen += [master for first, last, master in _slots(node) if first <= slot <= last]
        return sorted(set(seen), key=seen.count, reverse=True)

    # -- waiting -------------------------------------------------------------------------------------------------------

    def wait_whole(self, within_s: float = WITHIN_S) -> None:
        """Wait until the running nodes serve every slot and agree, and all replicas are in sync."""
        wait_until(self._is_whole, within_s)

    def _is_whole(self) -> bool:
        try:
            if not all(node.is_whole() for node in self.running):
                return False
            roles = [node.client.role() for node in self.running]
        except redis.RedisError:
            return False
        return all(role[0] == "master" or role[3] == "connected" for role in roles)

    def wait_owner(self, tenant: str, but: ClusterNode, within_s: float = WITHIN_S) -> ClusterNode:
        """Wait until all nodes see another master of the tenant's slot; return it."""
        slot = slot_of(tenant)
        wait_until(lambda: len(owners := self._owners(slot)) == 1 and owners[0] != but.id, within_s)
        owner = self.owner(tenant)
        wait_until(lambda: owner.is_whole(), within_s)
        return owner

    # -- faults --------------------------------------------------------------------------------------------------------

    def lag(self, master: ClusterNode) -> list[ClusterNode]:
        """Pause the replicas, so that they lack further writes of the master; return the paused replicas."""
        hanging = self.replicas(master)
        for replica in hanging:
            replica.pause()
        return hanging

    def lose_writes(self, master: ClusterNode) -> None:
        """Stop replication, so that further writes of the master are lost in a failover.

        Closes the replicas' connections, and revokes their permission to open new ones.
        """
        master.command("ACL SETUSER", "default", "-psync", "-sync", "-replconf")
        with contextlib.suppress(redis.ResponseError):
            master.command("CLIENT KILL", "TYPE", "replica")

    def fail_over(self, tenant: str, *how: str) -> ClusterNode:
        """Run ``CLUSTER FAILOVER [FORCE|TAKEOVER]`` on a replica of the tenant's master; return the new master."""
        owner = self.owner(tenant)
        replica = self.replicas(owner)[0]
        requested_at = 0.0

        def is_master() -> bool:
            nonlocal requested_at
            if time.monotonic() - requested_at > 2:  # masters that have just voted ignore the next request
                requested_at = time.monotonic()
                replica.command("CLUSTER FAILOVER", *how)
            return replica.role == "master"

        wait_until(is_master)
        return self.wait_owner(tenant, owner)

    def migrate(
        self, tenant: str, target: ClusterNode, between: Callable[[list[str]], None] | None = None, pause_s: float = 0.0
    ) -> list[str]:
        """Migrate the tenant's slot to another master, key by key, like ``redis-cli --cluster reshard``.

        Args:
            between: called before the first key, and after each, with the list of migrated keys.
            pause_s: delay after each key.
        """
        with self.migrating(tenant, target) as move:
            if between is not None:
                between([])
            moved: list[str] = []
            while key := move():
                moved.append(key)
                if between is not None:
                    between(moved)
                time.sleep(pause_s)
        return moved

    @contextmanager
    def migrating(self, tenant: str, target: ClusterNode) -> Iterator[Callable[..., str | None]]:
        """Migrate the slot during the block; the target owns it at the end.

        Yields a function that migrates one key: the given key, or any key. The function returns the migrated key, or
        ``None`` if no key is left. The remaining keys are migrated at the end of the block.
        """
        slot, source = slot_of(tenant), self.owner(tenant)
        target.command("CLUSTER SETSLOT", slot, "IMPORTING", source.id)
        source.command("CLUSTER SETSLOT", slot, "MIGRATING", target.id)

        def move(key: str | None = None) -> str | None:
            exporter = self._exporter(slot, source, target)
            if exporter is target:
                return None
            if key is None:
                keys = exporter.command("CLUSTER GETKEYSINSLOT", slot, 1)
                if not keys:
                    return None
                key = keys[0]
            # The reply may be NOKEY: the key has expired or was deleted meanwhile.
            exporter.command("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
            return key

        try:
            yield move
        finally:
            self._finish(slot, source, target, move)

    def _exporter(self, slot: int, source: ClusterNode, target: ClusterNode) -> ClusterNode:
        """The node with the remaining keys: the source, or the replica promoted in its place."""
        if source.process is not None and source.role == "master":
            return source
        exporters = [node for node in self.masters if node is not target and slot in _served(node)]
        if not exporters:
            return target  # it owns the whole slot already
        exporter = exporters[0]
        exporter.command("CLUSTER SETSLOT", slot, "MIGRATING", target.id)
        for words in (("STABLE",), ("NODE", exporter.id), ("IMPORTING", exporter.id)):
            target.command("CLUSTER SETSLOT", slot, *words)
        return exporter

    def _finish(self, slot: int, source: ClusterNode, target: ClusterNode, move: Callable[[], str | None]) -> None:
        while True:
            while move() is not None:
                pass
            exporter = self._exporter(slot, source, target)
            # If a key was created on the source meanwhile, it refuses to give up the slot.
            with contextlib.suppress(redis.ResponseError):
                target.command("CLUSTER SETSLOT", slot, "NODE", target.id)
                exporter.command("CLUSTER SETSLOT", slot, "NODE", target.id)
                break
        for node in self.masters:
            node.command("CLUSTER SETSLOT", slot, "NODE", target.id)

    def flush(self) -> None:
        """Delete all keys and scripts."""
        for node in self.masters:
            node.client.flushall()
            node.client.script_flush()

    def keys_by_node(self) -> list[list[str]]:
        """The keys of each running node."""
        return [sorted(node.client.scan_iter(count=10_000)) for node in self.running]


def _served(node: ClusterNode) -> set[int]:
    """The slots that a node considers its own."""
    return {slot for first, last, owner in _slots(node) if owner == node.id for slot in range(first, last + 1)}


def _slots(node: ClusterNode) -> Iterator[tuple[int, int, str]]:
    """For each range of slots that a node lists: the first slot, the last slot, and the id of the master."""
    for line in str(node.raw("CLUSTER", "NODES")).splitlines():
        node_id, _, flags, _, _, _, _, _, *ranges = line.split()
        if "master" in flags and "fail" not in flags.split(","):
            for words in ranges:
                if not words.startswith("["):
                    first, _, last = words.partition("-")
                    yield int(first), int(last or first), node_id


def slot_of(tenant: str) -> int:
    """The slot of a tenant's keys."""
    return int(key_slot(tenant.encode()))
