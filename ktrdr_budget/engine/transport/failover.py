"""Stores whose server may become another: the master that sentinels name, the node that serves a slot of a cluster.

Everything of a tenant is in one slot, so a limiter speaks to one server at a time, by the same wires as to a store that
is one server. What differs: that server has to be found; it is suspect after each failure, and asked for anew before
the next attempt; and somebody looks, once a second and whenever the sentinels say something, whether it is still the
one. Its connections are cut as soon as it is not: an old master on the wrong side of a partition would go on to answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Coroutine
from typing import Any

from ktrdr_budget.engine.transport.connection import ConnectionPool
from ktrdr_budget.engine.transport.credentials import Credentials, CredentialSource, credentials_for
from ktrdr_budget.engine.transport.discovery import (
    ANSWER_S,
    ClusterDiscovery,
    Discovery,
    DiscoveryRefused,
    PrimaryNotFound,
    SentinelDiscovery,
)
from ktrdr_budget.engine.transport.errors import NoScript, Transient, doubtful, meaning, needs_time, redirection
from ktrdr_budget.engine.transport.node import Node
from ktrdr_budget.engine.transport.store import Store
from ktrdr_budget.engine.transport.urls import Address, StoreUrl, parse_url
from ktrdr_budget.errors import StoreError

__all__ = ["FailoverStore", "store_for"]


def store_for(
    url: str | None, data_dir: str | None, key: str, credential_provider: CredentialSource | None = None
) -> Store:
    """The store of a limiter.

    Args:
        url: where it is; ``None`` is the embedded server.
        data_dir: the embedded server's data directory.
        key: any key of the tenant.
        credential_provider: asked at each connection; ``None``: the login, if there is one, is in the URL.

    Raises:
        InvalidArgument: the URL or the provider is not usable.
    """
    parsed = None if url is None else parse_url(url)
    credentials = credentials_for(credential_provider, parsed)
    if url is not None and parsed is not None and parsed.kind != "server":
        return FailoverStore(url, parsed, key, credentials)
    return Store(url, data_dir, credentials)


class FailoverStore(Store):
    """A store behind sentinels, or a slot of a cluster.

    Args:
        key: any key of the tenant: all have the same slot.
    """

    def __init__(self, url: str, parsed: StoreUrl, key: str, credentials: Credentials | None = None) -> None:
        super().__init__(url, credentials=credentials)
        self._parsed = parsed
        self._key = key
        self._connect_timeout = float(dict(parsed.options).get("socket_connect_timeout", ANSWER_S))
        self._reset()

    def _reset(self) -> None:
        self._discovery: Discovery | None = None
        self._finding: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._told = asyncio.Event()
        """Set when there is a reason to look at once."""
        self._suspect: Address | None = None
        self._target: Node | None = None
        """The node to which the slot is being moved."""
        self._left: set[Node] = set()
        """Servers whose last answers are still on their way."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Begins to watch; the server is looked for by whoever needs it."""
        if self._discovery is None:
            self._discovery = self._make_discovery()
            self._watch = self._start(self._watching(self._discovery), self._tasks)

    def _make_discovery(self) -> Discovery:
        if self._parsed.kind == "sentinel":
            return SentinelDiscovery(self._parsed)
        from redis.crc import key_slot

        return ClusterDiscovery(self._parsed, int(key_slot(self._key.encode())), self.credentials)

    @staticmethod
    def _start(work: Coroutine[Any, Any, None], among: set[asyncio.Task[None]]) -> asyncio.Task[None]:
        # On nobody's behalf: an instrumentation must not see a caller here.
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        among.add(task)
        task.add_done_callback(among.discard)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # whoever waits for it is told
        return task

    async def close(self) -> None:
        """Closes connections."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._closing, return_exceptions=True)
        if self._discovery is not None:
            await self._discovery.close()
        if self._target is not None:
            await self._target.close()
        for server in self._left:
            await server.close()
        await super().close()

    def forget(self) -> Any:
        """See :meth:`Store.forget`."""
        tasks = (self._finding, self._watch, self._tasks, self._closing)
        connections = (super().forget(), self._discovery, self._target, self._left, tasks)
        self._reset()
        return connections

    # -- finding the server --------------------------------------------------------------------------------------------

    async def _home(self) -> Node:
        await self.open()
        while self._server is None:
            if self._finding is None or self._finding.done():
                self._finding = self._start(self._find(), self._tasks)
            await asyncio.shield(self._finding)  # others wait for it, too
        return self._server

    async def _find(self) -> None:
        assert self._discovery is not None
        try:
            address = await self._discovery.find(self._suspect)
        except PrimaryNotFound as error:
            raise Transient(f"store at {self.shown}: {error}", sent=False) from None
        except DiscoveryRefused as error:
            raise StoreError(f"store at {self.shown}: {error}") from None
        self._suspect = None
        if self._server is None:  # else it has been told meanwhile
            self._move_to(address)

    def _server_at(self, address: Address) -> Node:
        timeout = self._connect_timeout
        url = self._parsed.at(address, socket_connect_timeout=str(timeout))
        return Node(url, address, timeout, self.credentials)

    def _move_to(self, address: Address) -> None:
        for left in self._left:
            if left.address != address:
                left.connections.abort()  # what it still answers does not count
        self._settle(self._server_at(address))

    def _settle(self, server: Node) -> None:
        super()._settle(server)
        server.connections.on_end = lambda: self._leave(server)

    def _leave(self, server: Node, *, abort: bool = False) -> None:
        """No more requests to this server: another must be found. ``abort``: answers under way are not waited for."""
        if server is not self._server:
            return
        self._server, self._connections = None, ConnectionPool()
        self._suspect = server.address
        self._part_from(server, abort=abort)

    def _part_from(self, server: Node, *, abort: bool) -> None:
        if abort:
            server.connections.abort()
        else:
            server.connections.retire()
        server.left = True
        self._left = {left for left in self._left if left.connections.opened} | {server}
        self._start(server.client.aclose(), self._closing)

    # -- failures ------------------------------------------------------------------------------------------------------

    def _doubt(self, server: Node, error: Exception | None) -> None:
        if error is None or (isinstance(meaning(error, self.shown), Transient) and not needs_time(error)):
            self._leave(server)

    def failure(self, error: Exception) -> Exception:
        """See :meth:`Store.failure`; where a node names another, :meth:`apply` goes there."""
        server = self._server
        if redirection(error) is not None:
            if server is not None:
                self._elsewhere(server, error)
            return NoScript()
        if server is not None and doubtful(error):
            self._leave(server)  # a connection that ended has told so itself
        return super().failure(error)

    def _elsewhere(self, server: Node, error: Exception) -> tuple[Node, bool] | None:
        named = redirection(error)
        if named is None or self._discovery is None or server.address is None:
            return None
        address = named.address(server.address)
        self._discovery.learn(address)
        if named.asking:
            return self._moving_to(address), True
        if self._server is None or self._server.address != address:
            if self._server is not None:
                self._leave(self._server)
            target, self._target = self._target, None
            if target is not None and target.address != address:
                self._part_from(target, abort=False)
                target = None
            self._settle(target or self._server_at(address))
            self._told.set()  # to learn what else has moved
        assert self._server is not None
        return self._server, False

    def _moving_to(self, address: Address) -> Node:
        if self._target is None or self._target.address != address:
            if self._target is not None:
                self._part_from(self._target, abort=False)
            self._target = self._server_at(address)
        return self._target

    # -- watching ------------------------------------------------------------------------------------------------------

    async def _watching(self, discovery: Discovery) -> None:
        listening = self._start(discovery.listen(self._told.set), self._tasks)
        before: dict[Any, object] = {}
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(discovery.look_every_s):
                        await self._told.wait()
                told = self._told.is_set()
                self._told.clear()
                server = self._server
                if server is None:
                    continue
                in_flight = server.connections.in_flight()
                hanging = any(in_flight.get(wire) is request for wire, request in before.items())
                before = in_flight
                if told or discovery.always_looks or hanging:
                    await self._look(discovery, server, hanging)
        finally:
            listening.cancel()

    async def _look(self, discovery: Discovery, server: Node, hanging: bool) -> None:
        """Leaves the server if it is not the right one any more."""
        try:
            address = await discovery.find(server.address if hanging else None)
        except PrimaryNotFound as error:
            if error.known:
                self._leave(server, abort=True)
            return
        except DiscoveryRefused:
            return
        if address != server.address and self._server is server and (hanging or discovery.always_looks):
            self._leave(server)
            self._suspect = None
            self._move_to(address)
