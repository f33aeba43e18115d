"""The store of a limiter: one server that receives batches, reads and commands.

:class:`Store` is always the same server; :class:`~.failover.FailoverStore` changes its server after a failover.
redis-py is imported at the first connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from ktrdr_budget.engine.protocol.requests import Command, Read
from ktrdr_budget.engine.protocol.scripts import WRITE, Script, script
from ktrdr_budget.engine.transport.connection import Connection, ConnectionPool
from ktrdr_budget.engine.transport.credentials import Credentials
from ktrdr_budget.engine.transport.durability import Durability, execute_durably
from ktrdr_budget.engine.transport.errors import NoScript, Transient, translate, unavailable
from ktrdr_budget.engine.transport.node import Node
from ktrdr_budget.engine.transport.urls import check_url, mask_url
from ktrdr_budget.errors import BudgetError

__all__ = ["NoScript", "Store", "Transient", "unavailable"]

_REDIRECTIONS_MAX = 5


def _may_run_twice() -> None:
    """Does nothing: the ``on_resend`` of a request that may be executed twice without harm."""


class Store:
    """A store on a single server. The first request opens the store. After a close, the store is not used again.

    Args:
        url: the store's URL; ``None`` in a subclass that finds its server by other means.
        credentials: the source of the login for each connection; if ``None``, the URL contains the login, if any.
    """

    def __init__(self, url: str | None, credentials: Credentials | None = None) -> None:
        self.credentials = credentials
        self.address = None if url is None else check_url(url)
        """The store's URL, secrets included; ``None`` until it is known."""
        self.durability: Durability = "memory"
        """Where a batch's writes must be before the batch counts as acknowledged."""
        self.node: Node | None = None
        """The server that receives requests; ``None`` before the first request and during a discovery."""
        self._connections = ConnectionPool()
        """The connections of :attr:`node`, kept here because every batch needs them."""
        self._opening: asyncio.Lock | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.shown}>"

    @property
    def shown(self) -> str:
        """The store's URL without secrets."""
        return mask_url(self.address or "")

    async def open(self) -> None:
        """Prepare connections.

        Raises:
            StoreError: the embedded server does not start.
        """
        if self.node is not None:
            return
        if self._opening is None:
            self._opening = asyncio.Lock()
        async with self._opening:
            if self.node is None:
                self._use(Node(await self._server_url(), credentials=self.credentials))

    async def _server_url(self) -> str:
        assert self.address is not None
        return self.address

    def _use(self, node: Node) -> None:
        """Use this server for further requests."""
        self.node, self._connections = node, node.connections

    async def close(self) -> None:
        """Close all connections."""
        node, self.node = self.node, None
        if node is not None:
            await node.close()

    def forget(self) -> Any:
        """Drop all connections without closing them, in the child of a fork.

        The caller must keep the returned objects: their destructors would close the parent's connections.
        """
        connections = self.node
        self.node, self._connections = None, ConnectionPool()
        self._opening = None
        return connections

    @property
    def ready(self) -> bool:
        """Whether there is an idle connection. It may have been idle for too long: :meth:`begin` checks the time."""
        return bool(self._connections.idle)

    def begin(
        self,
        name: str,
        keys: Sequence[str],
        args: Sequence[str],
        deadline: float,
        on_reply: Callable[[Any], None],
        on_resend: Callable[[], None],
    ) -> bool:
        """Send one batch of a write script at once, if a connection is ready. Return whether the batch was sent.

        Args:
            name: the name of the script.
            deadline: when the wait for the reply ends, in the event loop's time.
            on_reply: called once, with the reply, or with an exception for :meth:`failure` to translate.
            on_resend: called before the batch is sent a second time because its connection is silent.
        """
        connection = self._connections.check_out()
        if connection is None:
            return False
        connection.send(("EVALSHA", script(name).sha, len(keys), *keys, *args), deadline, on_reply, on_resend)
        return True

    async def apply(
        self,
        name: str,
        keys: Sequence[str],
        args: Sequence[str],
        deadline: float,
        on_resend: Callable[[], None] | None = None,
    ) -> Any:
        """Send one batch of a write script and return its reply; connect first if needed.

        Args:
            deadline, on_resend: see :meth:`begin`. If ``on_resend`` is ``None``, the batch is not sent a second time.

        Raises:
            TimeoutError: no reply by the deadline.
            Transient, StoreError: see :meth:`run`.
        """

        async def send(node: Node, words: Sequence[Any], asking: bool) -> Any:
            if self.durability != "memory":
                return await self._send_durably(node, script(name), words, asking, deadline, on_resend)
            connection = await self._connection_to(node)
            if connection is None:
                return await node.execute(words, asking, deadline, on_resend)
            try:
                if asking:  # both commands need the same connection, so neither is hedged
                    await connection.execute(("ASKING",), deadline)
                return await connection.execute(tuple(words), deadline, None if asking else on_resend)
            finally:
                connection.release()

        async with asyncio.timeout_at(deadline):
            return await self._evaluate(partial(self._deliver, send), script(name), keys, args)

    async def _send_durably(
        self,
        node: Node,
        lua: Script,
        words: Sequence[Any],
        asking: bool,
        deadline: float,
        on_resend: Callable[[], None] | None,
    ) -> Any:
        if lua.sha not in node.scripts:  # the reply NOSCRIPT would come only after the whole wait for a confirmation
            words = ("EVAL", lua.source, *words[2:])

        meta = words[3]  # the first key

        def send() -> Awaitable[Any]:
            left_s = deadline - asyncio.get_running_loop().time()
            return execute_durably(node, words, asking, self.durability, meta, left_s, self.shown)

        reply = await node.with_hedge(send, deadline, on_resend)
        node.scripts.add(lua.sha)
        return reply

    async def _connection_to(self, node: Node) -> Connection | None:
        try:
            return await node.connection()
        except Exception as error:
            failure = translate(error, self.shown)
            if isinstance(failure, Transient):
                failure.sent = False
            raise failure from None

    async def run(self, command: Command | Read, deadline: float) -> Any:
        """Run a script or a plain command, and return the reply. The write script is sent by :meth:`apply`.

        Args:
            deadline: when the wait for the reply ends, in the event loop's time.

        Raises:
            TimeoutError: no reply by the deadline.
            Transient: the store did not reply, or cannot serve the request at the moment.
            StoreError: the store refuses the request.
        """

        async def send(node: Node, words: Sequence[Any], asking: bool) -> Any:
            # An idle connection for batches is faster for a single read than the client, which serves many at once.
            connection = None if asking else node.connections.check_out()
            if connection is None:
                return await node.execute(words, asking, deadline, _may_run_twice)
            try:
                return await connection.execute(tuple(words), deadline, _may_run_twice)
            finally:
                connection.release()

        if command.script == WRITE:
            return await self.apply(command.script, command.keys, [str(word) for word in command.args], deadline)
        execute = partial(self._deliver, send)
        async with asyncio.timeout_at(deadline):
            if command.script is not None:
                return await self._evaluate(execute, script(command.script), command.keys, command.args)
            return await execute(*command.args)

    async def _evaluate(
        self, execute: Callable[..., Awaitable[Any]], lua: Script, keys: Sequence[str], args: Sequence[str | int]
    ) -> Any:
        try:
            return await execute("EVALSHA", lua.sha, len(keys), *keys, *args)
        except NoScript:
            # EVAL loads the script on the node that needs it; SCRIPT LOAD would need the node's address.
            return await execute("EVAL", lua.source, len(keys), *keys, *args)

    async def _deliver(self, send: Callable[[Node, Sequence[Any], bool], Awaitable[Any]], *words: Any) -> Any:
        """Send a command to the right server, following redirects of cluster nodes."""
        node, asking = await self._current_node(), False
        for _ in range(_REDIRECTIONS_MAX):
            try:
                return await send(node, words, asking)
            except (BudgetError, TimeoutError):
                raise
            except asyncio.CancelledError:
                self._on_failure(node, None)  # the server may hang
                raise
            except Exception as error:
                target = self._redirect(node, error)
                if target is None:
                    self._on_failure(node, error)
                    raise self.failure(error) from None
                node, asking = target
        raise Transient(f"store at {self.shown}: its nodes redirect in a circle", sent=False)

    async def _current_node(self) -> Node:
        """The server that receives the next request, opened or discovered if necessary."""
        await self.open()
        assert self.node is not None
        return self.node

    def _redirect(self, node: Node, error: Exception) -> tuple[Node, bool] | None:
        """The target of a redirect, and whether the redirect is for this request only (ASK, not MOVED).

        Return ``None`` if the error is not a redirect.
        """
        return None

    def _on_failure(self, node: Node, error: Exception | None) -> None:
        """Handle the failure of a request to this server. If ``error`` is ``None``, the request was cancelled."""

    def failure(self, error: Exception) -> Exception:
        """Translate a failure of the transport; see :func:`~.errors.translate`."""
        return translate(error, self.shown)
