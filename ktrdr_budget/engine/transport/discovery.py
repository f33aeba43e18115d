"""Discovery of the primary server: by Sentinel, or by the nodes of a cluster.

A *source* is a sentinel or a node of the cluster. All sources are queried at once, with a short deadline, and their
replies are compared: a source that is dead, hangs, or is cut off by a partition must neither delay nor mislead the
client. (redis-py's Sentinel queries one source after another and trusts the first reply; its RedisCluster sends no
scripts through a pipeline and has no deadlines.)
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ktrdr_budget.engine.transport.connection import IDLE_MAX_S
from ktrdr_budget.engine.transport.credentials import Credentials
from ktrdr_budget.engine.transport.node import redis_connection
from ktrdr_budget.engine.transport.protocol_check import WrongProtocol
from ktrdr_budget.engine.transport.urls import Address, StoreUrl

__all__ = [
    "ClusterDiscovery",
    "Discovery",
    "DiscoveryRefused",
    "PrimaryNotFound",
    "SentinelDiscovery",
    "node_address",
    "primary_of_slot",
]

QUERY_TIMEOUT_S = 0.5
"""How long one source may take to connect and to reply."""
_STRAGGLERS_S = 0.05
"""How long to wait for the last sources once most have replied."""
_QUERIED_MAX = 8
_SLOTS = ("CLUSTER", "SLOTS")


class PrimaryNotFound(Exception):
    """No primary server was found.

    ``confirmed`` is true if the sources replied that there is no primary, and false if they gave no useful reply.
    """

    def __init__(self, message: str, confirmed: bool) -> None:
        super().__init__(message)
        self.confirmed = confirmed


class DiscoveryRefused(Exception):
    """Every source that replied refused the query; ``cause`` is the first such error."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Source:
    """One sentinel or cluster node, with a connection that stays open.

    Commands do not go through redis-py's client: an instrumentation of the client would attribute them to a caller.
    """

    def __init__(self, url: str, credentials: Credentials | None = None) -> None:
        self._url = url
        self._credentials = credentials
        self._connection: Any = None
        self._last_reply_s = 0.0
        self._lock = asyncio.Lock()

    async def query(self, commands: Sequence[Sequence[str]]) -> list[Any]:
        """Send commands and return their replies, within :data:`QUERY_TIMEOUT_S`.

        Raises:
            OSError, TimeoutError, redis.RedisError: no reply, or an error reply.
        """
        import redis

        async with asyncio.timeout(QUERY_TIMEOUT_S), self._lock:
            if asyncio.get_running_loop().time() - self._last_reply_s > IDLE_MAX_S:
                await self.close()
            if self._connection is not None:
                try:
                    return await self._query(commands)
                except (ConnectionError, redis.ConnectionError):
                    pass  # the connection was closed since its last use
            self._connection = redis_connection(self._url, self._credentials)
            return await self._query(commands)

    async def _query(self, commands: Sequence[Sequence[str]]) -> list[Any]:
        try:
            await self._connection.connect()
            for words in commands:
                await self._connection.send_command(*words)
            replies = [await self._connection.read_response() for _ in commands]
            self._last_reply_s = asyncio.get_running_loop().time()
            return replies
        except BaseException:  # also after an error reply: the remaining replies have not been read
            await self.close()
            raise

    async def subscribe(self, channels: Sequence[str], on_message: Callable[[], None]) -> None:
        """Call ``on_message`` at each message on these channels, until the connection is closed.

        The subscription has a connection of its own.
        """
        connection = redis_connection(self._url, self._credentials)
        try:
            await connection.connect()
            await connection.send_command("SUBSCRIBE", *channels)
            while True:
                message = await connection.read_response()
                if message and message[0] == b"message":
                    on_message()
        finally:
            await connection.disconnect(nowait=True)

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)


class Discovery:
    """Finds the primary server, and notices when another server becomes the primary."""

    interval_s = 1.0
    """How often :class:`~.failover.FailoverStore` checks its server."""
    always_checks = False
    """Whether each check queries the sources. If false, a check queries them only after a sign of trouble, because a
    cluster node that is no longer the primary redirects its clients."""

    def __init__(self, url: StoreUrl, credentials: Credentials | None = None) -> None:
        self.url = url
        self._credentials = credentials
        self._sources: dict[Address, _Source] = {}

    async def find(self, suspect: Address | None) -> Address:
        """The address of the primary server.

        Args:
            suspect: a server that has just failed, or ``None``.

        Raises:
            PrimaryNotFound: there is no primary, or no source replied.
            DiscoveryRefused: the sources refuse this user, or do not support the query.
        """
        raise NotImplementedError

    async def subscribe(self, on_change: Callable[[], None]) -> None:
        """Call ``on_change`` whenever the primary may have changed. The method never returns."""
        await asyncio.Event().wait()

    def add_node(self, address: Address) -> None:
        """Add a server of the store to the sources. A redirect has named this server."""

    async def close(self) -> None:
        """Close the connections to all sources."""
        for source in self._sources.values():
            await source.close()
        self._sources.clear()

    def _source_url(self, address: Address) -> str:
        return self.url.at(address)

    def _source(self, address: Address) -> _Source:
        source = self._sources.get(address)
        if source is None:
            source = self._sources[address] = _Source(self._source_url(address), self._credentials)
        return source

    async def query(self, addresses: Iterable[Address], *commands: Sequence[str]) -> list[tuple[Address, Any]]:
        """Query these sources concurrently.

        Return the addresses of the sources that were not late, each with the source's replies or exception.
        """
        tasks = {asyncio.ensure_future(self._source(address).query(commands)): address for address in addresses}
        loop = asyncio.get_running_loop()
        pending, outcomes, ends_s = set(tasks), list[tuple[Address, Any]](), loop.time() + QUERY_TIMEOUT_S
        try:
            while pending and (left_s := ends_s - loop.time()) > 0:
                done, pending = await asyncio.wait(pending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    outcomes.append((tasks[task], task.exception() or task.result()))
                replied = sum(not isinstance(outcome, Exception) for _, outcome in outcomes)
                if 2 * replied > len(tasks):
                    ends_s = min(ends_s, loop.time() + _STRAGGLERS_S)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        return outcomes

    def _not_found(self, outcomes: Iterable[tuple[Address, Any]], message: str) -> Exception:
        """The error when no source gave a useful reply."""
        from redis.exceptions import AuthenticationError, ResponseError

        errors = [outcome for _, outcome in outcomes if isinstance(outcome, Exception)]
        refusals = [error for error in errors if isinstance(error, (ResponseError, AuthenticationError, WrongProtocol))]
        temporary = ("LOADING", "MASTERDOWN", "CLUSTERDOWN")
        if refusals and not any(str(error).startswith(temporary) for error in refusals):
            return DiscoveryRefused(refusals[0])
        causes = sorted({str(error).split(":", 1)[0][:100] or type(error).__name__ for error in errors})
        return PrimaryNotFound(f"{message}{': ' if causes else ''}{'; '.join(causes)}", confirmed=False)


class _SentinelView:
    """The master of a service, as one sentinel sees it.

    Args:
        state: the reply to ``SENTINEL MASTER``, which names the old master until every replica follows the new one.
        named: the reply to ``SENTINEL GET-MASTER-ADDR-BY-NAME``, which names the new master once it is promoted.
    """

    def __init__(self, state: list[bytes], named: list[bytes]) -> None:
        fields = dict(zip(state[::2], state[1::2], strict=True))
        self.address: Address = (named[0].decode(), int(named[1]))
        self.epoch = int(fields[b"config-epoch"])
        self.is_failing_over = (fields[b"ip"].decode(), int(fields[b"port"])) != self.address
        self.is_down = b"o_down" in fields[b"flags"].split(b",") and not self.is_failing_over


class SentinelDiscovery(Discovery):
    """Finds the master of a service. If the sentinels disagree, the most recent view counts."""

    always_checks = True

    def _source_url(self, address: Address) -> str:
        return self.url.sentinel_at(address)

    async def find(self, suspect: Address | None) -> Address:
        """See :class:`Discovery`. A master that Sentinel reports as objectively down does not count as primary."""
        service = self.url.service
        commands = ("SENTINEL", "MASTER", service), ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
        outcomes = await self.query(self.url.hosts, *commands)
        views = [_SentinelView(*replies) for _, replies in outcomes if isinstance(replies, list)]
        if not views:
            raise self._not_found(outcomes, "no sentinel replies")
        # Each failover increments the epoch: a sentinel behind a partition missed it, and still names the old master.
        newest = max(views, key=lambda view: (view.epoch, view.is_failing_over)).address
        if any(view.address == newest and view.is_down for view in views):
            raise PrimaryNotFound(f"the sentinels report that {service} is down", confirmed=True)
        return newest

    async def subscribe(self, on_change: Callable[[], None]) -> None:
        """See :class:`Discovery`."""
        channels = ("+switch-master", "+promoted-slave", "+odown")

        async def subscribe_to(address: Address) -> None:
            while True:
                with contextlib.suppress(Exception):
                    await _Source(self._source_url(address)).subscribe(channels, on_change)
                await asyncio.sleep(self.interval_s)

        await asyncio.gather(*map(subscribe_to, self.url.hosts))


class ClusterDiscovery(Discovery):
    """Finds the primary of a slot. The first reply that names another server than the suspect counts.

    If every reply names the suspect, the suspect is the primary.

    Args:
        slot: the slot of the tenant's keys.
    """

    interval_s = 0.5

    def __init__(self, url: StoreUrl, slot: int, credentials: Credentials | None = None) -> None:
        super().__init__(url, credentials)
        self._slot = slot
        self.nodes: list[Address] = []
        """The nodes named by the last reply, and by redirects since then."""

    def add_node(self, address: Address) -> None:
        """See :class:`Discovery`."""
        if address not in self.nodes:
            self.nodes.append(address)

    async def find(self, suspect: Address | None) -> Address:
        """See :class:`Discovery`."""
        known = [*dict.fromkeys((*self.nodes, *self.url.hosts))]
        others = [address for address in known if address != suspect]
        outcomes = await self.query(random.sample(others, min(_QUERIED_MAX, len(others))), _SLOTS)
        if suspect in known and not any(isinstance(replies, list) for _, replies in outcomes):
            outcomes += await self.query([suspect], _SLOTS)
        primaries = []
        for address, replies in outcomes:
            if isinstance(replies, list):
                primary, nodes = primary_of_slot(self._slot, replies[0], address)
                if primary is not None:
                    primaries.append(primary)
                    self.nodes = nodes
        await self._close_sources_except({*self.nodes, *self.url.hosts})
        if not primaries:
            if any(isinstance(replies, list) for _, replies in outcomes):
                raise PrimaryNotFound(f"no node of the cluster serves slot {self._slot}", confirmed=True)
            raise self._not_found(outcomes, "no node of the cluster replies")
        return next((primary for primary in primaries if primary != suspect), primaries[0])

    async def _close_sources_except(self, nodes: set[Address]) -> None:
        for address in [address for address in self._sources if address not in nodes]:
            await self._sources.pop(address).close()


def primary_of_slot(slot: int, ranges: Any, source: Address) -> tuple[Address | None, list[Address]]:
    """Parse a reply to ``CLUSTER SLOTS``: the primary of a slot, and all nodes.

    Args:
        source: the address of the node that replied.
    """
    primary, nodes = None, dict[Address, None]()
    for first, last, *members in ranges:
        addresses = [node_address(member, source) for member in members]
        nodes.update((address, None) for address in addresses if address is not None)
        if first <= slot <= last and addresses:
            primary = addresses[0]
    return primary, list(nodes)


def node_address(member: Sequence[Any], source: Address) -> Address | None:
    """Parse the host and port of a node. Return ``None`` if the address is unknown.

    A node without a host name has the host of the source.
    """
    host = (member[0] or b"").decode()
    return None if host == "?" else (host or source[0], int(member[1]))
