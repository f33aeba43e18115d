"""Real sentinel groups: a master with replicas, and sentinels that monitor it.

with SentinelGroup(binary, directory, replicas=2, sentinels=3) as group:   # ready in about two seconds
    group.url                        # redis+sentinel://127.0.0.1:…,127.0.0.1:…/budgets
    group.master                     # the node that the sentinels name: kill(), pause(), restart(), …
    group.lag()                      # pause its replicas, which then lack its further writes
    group.master.kill()              # a replica is promoted a little after `down_after_ms`
    group.wait_master(but=old)
    group.fail_over()                # a manual failover
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import redis

from .nodes import Node, free_ports
from .waiting import WITHIN_S, wait_until


class SentinelGroup:
    """A master, its replicas, and the sentinels that monitor them under the name ``budgets``.

    Args:
        down_after_ms: time without a reply after which a sentinel considers the master down.
        user: the user name of clients and servers; requires ``password``, and disables the default user.
        password: the password of ``user``, or of the default user.
        sentinel_password: the password of the default user of the sentinels.
        options: command-line options of the master and the replicas.
    """

    SERVICE = "budgets"

    def __init__(
        self,
        binary: str,
        directory: Path,
        *,
        replicas: int = 2,
        sentinels: int = 3,
        down_after_ms: int = 500,
        user: str = "",
        password: str = "",
        sentinel_password: str = "",
        options: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        ports = free_ports(1 + replicas + sentinels)
        self._user, self._password, self._sentinel_password = user, password, sentinel_password
        self._quorum = sentinels // 2 + 1
        self._down_after_ms = down_after_ms
        self.servers = [
            self._server(binary, directory, port, ports[0], options, environment) for port in ports[: 1 + replicas]
        ]
        self.sentinels = [self._sentinel(binary, directory, port, ports) for port in ports[1 + replicas :]]

    def _server(
        self,
        binary: str,
        directory: Path,
        port: int,
        master_port: int,
        options: tuple[str, ...],
        environment: Mapping[str, str] | None,
    ) -> Node:
        place = directory / str(port)
        lines = [f"port {port}", "bind 127.0.0.1", f"dir {place}", 'save ""', "maxmemory-policy noeviction"]
        lines += ["repl-diskless-sync-delay 0", "repl-timeout 10"]
        if self._user:
            lines += ["user default off", f"user {self._user} on >{self._password} ~* &* +@all"]
            lines += [f"masteruser {self._user}"]
        elif self._password:
            lines += [f"requirepass {self._password}"]
        if self._password:
            lines += [f"masterauth {self._password}"]
        if port != master_port:
            lines += [f"replicaof 127.0.0.1 {master_port}"]
        node = self._node(binary, place, port, lines, options, environment)
        if self._password:
            node.login = {"password": self._password, "username": self._user or None}
        return node

    def _sentinel(self, binary: str, directory: Path, port: int, ports: list[int]) -> Node:
        place = directory / str(port)
        name = self.SERVICE
        lines = [f"port {port}", "bind 127.0.0.1", f"dir {place}", f"sentinel myid {port:040x}"]
        if self._sentinel_password:
            lines += [f"requirepass {self._sentinel_password}", f"sentinel sentinel-pass {self._sentinel_password}"]
        lines += [f"sentinel monitor {name} 127.0.0.1 {ports[0]} {self._quorum}"]
        lines += [f"sentinel down-after-milliseconds {name} {self._down_after_ms}"]
        lines += [f"sentinel failover-timeout {name} 3000"]
        if self._user:
            lines += [f"sentinel auth-user {name} {self._user}"]
        if self._password:
            lines += [f"sentinel auth-pass {name} {self._password}"]
        # Without these lines sentinels need about ten seconds to discover each other.
        servers = len(self.servers)
        lines += [f"sentinel known-replica {name} 127.0.0.1 {other}" for other in ports[1:servers]]
        lines += [
            f"sentinel known-sentinel {name} 127.0.0.1 {other} {other:040x}"
            for other in ports[servers:]
            if other != port
        ]
        node = self._node(binary, place, port, lines, ("--sentinel",), None)
        if self._sentinel_password:
            node.login = {"password": self._sentinel_password}
        return node

    @staticmethod
    def _node(
        binary: str,
        place: Path,
        port: int,
        lines: list[str],
        options: tuple[str, ...],
        environment: Mapping[str, str] | None,
    ) -> Node:
        place.mkdir(parents=True)
        (place / "conf").write_text("\n".join(lines) + "\n")
        node = Node(binary, place, [str(place / "conf"), *options], environment)
        node.port = port
        return node

    def start(self) -> SentinelGroup:
        """Start all; return when every sentinel has discovered the others and every replica is in sync."""
        for server in self.servers:
            server.start()
        for server in self.servers:
            server.wait_ready()
        wait_until(self._in_sync)
        for sentinel in self.sentinels:
            sentinel.start()
        for sentinel in self.sentinels:
            sentinel.wait_ready()
        wait_until(self._monitored)
        return self

    def __enter__(self) -> SentinelGroup:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Stop every process."""
        for node in (*self.sentinels, *self.servers):
            node.end()

    # -- state ----------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The URL for a limiter: all sentinels and all passwords."""
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        login = f"{self._user}:{quote(self._password, safe='')}@" if self._password else ""
        query = f"?sentinel_password={quote(self._sentinel_password, safe='')}" if self._sentinel_password else ""
        return f"redis+sentinel://{login}{hosts}/{self.SERVICE}{query}"

    @property
    def master(self) -> Node:
        """The server that most sentinels name."""
        named = self._named()
        return self._at(max(set(named), key=named.count))

    @property
    def replicas(self) -> list[Node]:
        """The running servers that are not the master."""
        master = self.master
        return [server for server in self.servers if server is not master and server.process is not None]

    def _at(self, port: int) -> Node:
        return next(server for server in self.servers if server.port == port)

    def _named(self) -> list[int]:
        named = []
        for sentinel in self.sentinels:
            if sentinel.process is not None:
                with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                    named.append(int(sentinel.raw("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.SERVICE)[1]))
        return named

    def _in_sync(self) -> bool:
        return all(server.client.role()[3:4] == ["connected"] for server in self.servers[1:])

    def _monitored(self) -> bool:
        for sentinel in self.sentinels:
            known = sentinel.client.sentinel_master(self.SERVICE)
            if known["num-other-sentinels"] != len(self.sentinels) - 1 or known["flags"] != "master":
                return False
            replicas = sentinel.client.sentinel_slaves(self.SERVICE)
            if len(replicas) != len(self.servers) - 1 or any(r["flags"] != "slave" for r in replicas):
                return False
            if any(replica["role-reported"] != "slave" or not replica["slave-priority"] for replica in replicas):
                return False
        return True

    # -- faults --------------------------------------------------------------------------------------------------------

    def lag(self) -> list[Node]:
        """Pause the replicas, so that they lack further writes of the master; return the paused replicas.

        Sentinels consider a replica down after ``down_after_ms``, and wait for it.
        """
        hanging = self.replicas
        for replica in hanging:
            replica.pause()
        return hanging

    def lose_writes(self) -> None:
        """Stop replication, so that further writes of the master are lost in a failover; the replicas stay up.

        Closes the replicas' connections, and revokes their permission to open new ones.
        """
        master = self.master
        master.command("ACL", "SETUSER", self._user or "default", "-psync", "-sync")
        with contextlib.suppress(redis.ResponseError):
            master.command("CLIENT", "KILL", "TYPE", "replica")

    def fail_over(self) -> Node:
        """Promote a replica; return it as soon as all sentinels name it."""
        old = self.master
        requested_at = 0.0

        def named() -> bool:
            nonlocal requested_at
            if time.monotonic() - requested_at > 2:
                requested_at = time.monotonic()
                with contextlib.suppress(
                    redis.ResponseError
                ):  # a failover is in progress, or no replica is suitable yet
                    self.sentinels[0].command("SENTINEL FAILOVER", self.SERVICE)
            return old.port not in self._named()

        wait_until(named)
        return self.master

    def wait_master(self, but: Node, within_s: float = WITHIN_S) -> Node:
        """Wait until all sentinels name another server, and that server is a master; return it."""
        wait_until(lambda: len(set(named := self._named())) == 1 and named[0] != but.port, within_s)
        master = self.master
        wait_until(lambda: master.client.role()[0] == "master", within_s)
        return master

    def replicated(self) -> bool:
        """Whether every replica has acknowledged all writes of the master."""
        info = self.master.client.info("replication")
        offsets = [info[name]["offset"] for name in info if name.startswith("slave") and name[5:].isdecimal()]
        return len(offsets) == len(self.replicas) and min(offsets, default=0) >= info["master_repl_offset"]

    def rejoin(self) -> None:
        """Run all servers as replicas of the master, with all permissions, without waiting for the sentinels."""
        for node in (*self.sentinels, *self.servers):
            if node.process is None:
                node.start()
            node.resume()
        for node in (*self.sentinels, *self.servers):
            node.wait_ready()
        wait_until(self._has_master)
        master = self.master
        for server in self.servers:
            server.command("ACL", "SETUSER", self._user or "default", "+@all")
            if server is not master and server.client.role()[0] == "master":
                server.command("REPLICAOF", "127.0.0.1", master.port)
        wait_until(self._is_whole)
        wait_until(self._may_fail_over)

    def _may_fail_over(self) -> bool:
        """Whether every sentinel sees the master, and a replica that could be promoted."""
        for sentinel in self.sentinels:
            replicas = sentinel.client.sentinel_slaves(self.SERVICE)
            if sentinel.client.sentinel_master(self.SERVICE)["flags"] != "master":
                return False
            if replicas and not any(r["flags"] == "slave" and r["master-link-status"] == "ok" for r in replicas):
                return False
        return True

    def _has_master(self) -> bool:
        return len(set(self._named())) == 1 and self.master.client.role()[0] == "master"

    def wait_in_sync(self, within_s: float = WITHIN_S) -> None:
        """Wait until every running server is the master, or a replica in sync."""
        wait_until(self._is_whole, within_s)

    def _is_whole(self) -> bool:
        master = self.master
        try:
            return all(
                server is master or server.client.role()[1:4:2] == ["127.0.0.1", "connected"]
                for server in self.servers
                if server.process is not None
            )
        except redis.RedisError:
            return False
