"""Stores whose server can change: the master that Sentinel names, or the primary for one slot of a cluster.

All keys of a tenant are in one slot, so a limiter uses one server at a time. The connections are the same as for a
store on a single server; the task of this module is to discover that server.

After a failure the server is suspect, and the primary is discovered again before the next attempt. Once a second, and
at each notification by Sentinel, the module checks whether the server is still the primary. If the server is not, the
module closes the connections to it, because an old master behind a partition would continue to reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Coroutine
from typing import Any

from ktrdr_budget.engine.transport.connection import ConnectionPool
from ktrdr_budget.engine.transport.credentials import Credentials
from ktrdr_budget.engine.transport.discovery import (
    QUERY_TIMEOUT_S,
    ClusterDiscovery,
    Discovery,
    DiscoveryRefused,
    PrimaryNotFound,
    SentinelDiscovery,
)
from ktrdr_budget.engine.transport.errors import (
    NoScript,
    Transient,
    is_temporary,
    means_failover,
    redirection,
    translate,
)
from ktrdr_budget.engine.transport.node import Node
from ktrdr_budget.engine.transport.store import Store
from ktrdr_budget.engine.transport.urls import Address, StoreUrl

__all__ = ["FailoverStore"]


class FailoverStore(Store):
    """A store behind Sentinel, or on one slot of a cluster.

    Args:
        key: any key of the tenant, since all keys of a tenant are in the same slot.
    """

    def __init__(self, url: str, parsed: StoreUrl, key: str, credentials: Credentials | None = None) -> None:
        super().__init__(url, credentials)
        self._parsed = parsed
        self._key = key
        self._connect_timeout = float(dict(parsed.options).get("socket_connect_timeout", QUERY_TIMEOUT_S))
        self._reset()

    def _reset(self) -> None:
        self._discovery: Discovery | None = None
        self._finding: asyncio.Task[None] | None = None
        self._check_now = asyncio.Event()
        """Set when the primary may have changed."""
        self._suspect: Address | None = None
        self._importing: Node | None = None
        """The node to which the slot is being migrated."""
        self._draining: set[Node] = set()
        """Former servers whose last replies are pending."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Start the checks; the first request discovers the server."""
        if self._discovery is None:
            self._discovery = self._make_discovery()
            self._start(self._check_forever(self._discovery), self._tasks)

    def _make_discovery(self) -> Discovery:
        if self._parsed.kind == "sentinel":
            return SentinelDiscovery(self._parsed)
        from redis.crc import key_slot

        return ClusterDiscovery(self._parsed, int(key_slot(self._key.encode())), self.credentials)

    @staticmethod
    def _start(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
        # In an empty context: an instrumentation must not attribute this to a caller.
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # the awaiting call reports it
        return task

    async def close(self) -> None:
        """Close all connections."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._closing, return_exceptions=True)
        if self._discovery is not None:
            await self._discovery.close()
        if self._importing is not None:
            await self._importing.close()
        for node in self._draining:
            await node.close()
        await super().close()

    def forget(self) -> Any:
        """See :meth:`Store.forget`."""
        tasks = (self._finding, self._tasks, self._closing)
        connections = (super().forget(), self._discovery, self._importing, self._draining, tasks)
        self._reset()
        return connections

    # -- the current server --------------------------------------------------------------------------------------------

    async def _current_node(self) -> Node:
        await self.open()
        while self.node is None:
            if self._finding is None or self._finding.done():
                self._finding = self._start(self._find(), self._tasks)
            await asyncio.shield(self._finding)  # other calls await it, too
        return self.node

    async def _find(self) -> None:
        assert self._discovery is not None
        try:
            address = await self._discovery.find(self._suspect)
        except PrimaryNotFound as error:
            raise Transient(f"store at {self.shown}: {error}", sent=False) from None
        except DiscoveryRefused as error:
            raise translate(error.cause, self.shown) from None
        self._suspect = None
        if self.node is None:  # else a redirect has named it meanwhile
            self._move_to(address)

    def node_at(self, address: Address) -> Node:
        """Create a :class:`Node` for a server of this store."""
        timeout = self._connect_timeout
        url = self._parsed.at(address, socket_connect_timeout=str(timeout))
        return Node(url, address, timeout, self.credentials)

    def _move_to(self, address: Address) -> None:
        for node in self._draining:
            if node.address != address:
                node.connections.abort()  # replies of a former primary do not count
        self._use(self.node_at(address))

    def _use(self, node: Node) -> None:
        super()._use(node)
        node.connections.on_close = lambda: self._leave(node)

    def _leave(self, node: Node, *, abort: bool = False) -> None:
        """Send no more requests to this server. The next request discovers the primary.

        If ``abort`` is set, pending requests fail at once; otherwise their replies are awaited.
        """
        if node is not self.node:
            return
        self.node, self._connections = None, ConnectionPool()
        self._suspect = node.address
        self._drain(node, abort=abort)

    def _drain(self, node: Node, *, abort: bool = False) -> None:
        if abort:
            node.connections.abort()
        else:
            node.connections.drain()
        node.draining = True
        self._draining = {former for former in self._draining if former.connections.opened} | {node}
        self._start(node.client.aclose(), self._closing)

    # -- failures ------------------------------------------------------------------------------------------------------

    def _on_failure(self, node: Node, error: Exception | None) -> None:
        if error is None or (isinstance(translate(error, self.shown), Transient) and not is_temporary(error)):
            self._leave(node)

    def failure(self, error: Exception) -> Exception:
        """See :meth:`Store.failure`. A redirect becomes :class:`NoScript`, so that :meth:`apply` retries."""
        node = self.node
        if redirection(error) is not None:
            if node is not None:
                self._redirect(node, error)
            return NoScript()
        if node is not None and means_failover(error):
            self._leave(node)  # a closed connection has already done so
        return super().failure(error)

    def _redirect(self, node: Node, error: Exception) -> tuple[Node, bool] | None:
        target = redirection(error)
        if target is None or self._discovery is None or node.address is None:
            return None
        address = target.address(node.address)
        self._discovery.add_node(address)
        if target.asking:
            return self._importing_node(address), True
        if self.node is None or self.node.address != address:
            if self.node is not None:
                self._leave(self.node)
            importing, self._importing = self._importing, None
            if importing is not None and importing.address != address:
                self._drain(importing)
                importing = None
            self._use(importing or self.node_at(address))
            self._check_now.set()  # other slots may have moved as well
        assert self.node is not None
        return self.node, False

    def _importing_node(self, address: Address) -> Node:
        if self._importing is None or self._importing.address != address:
            if self._importing is not None:
                self._drain(self._importing)
            self._importing = self.node_at(address)
        return self._importing

    # -- checks --------------------------------------------------------------------------------------------------------

    async def _check_forever(self, discovery: Discovery) -> None:
        subscription = self._start(discovery.subscribe(self._check_now.set), self._tasks)
        before: dict[Any, object] = {}
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(discovery.interval_s):
                        await self._check_now.wait()
                notified = self._check_now.is_set()
                self._check_now.clear()
                node = self.node
                if node is None:
                    continue
                in_flight = node.connections.in_flight()
                hanging = any(in_flight.get(connection) is request for connection, request in before.items())
                before = in_flight
                if notified or discovery.always_checks or hanging:
                    await self.check(node, hanging=hanging)
        finally:
            subscription.cancel()

    async def check(self, node: Node, *, hanging: bool = False) -> None:
        """Send no more requests to this server if the server is no longer the primary.

        Args:
            hanging: whether a request to the server has been pending for a whole interval.
        """
        assert self._discovery is not None
        discovery = self._discovery
        try:
            address = await discovery.find(node.address if hanging else None)
        except PrimaryNotFound as error:
            if error.confirmed:
                self._leave(node, abort=True)
            return
        except DiscoveryRefused:
            return
        if address != node.address and self.node is node and (hanging or discovery.always_checks):
            self._leave(node)
            self._suspect = None
            self._move_to(address)
