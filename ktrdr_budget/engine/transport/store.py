"""Connects to the store, and tells its failures apart. redis-py is imported at the first connection, not before."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ktrdr_budget.engine.protocol import Command, Read
from ktrdr_budget.engine.protocol.scripts import Script, script
from ktrdr_budget.engine.transport.connection import Connection, ConnectionPool
from ktrdr_budget.engine.transport.credentials import Credentials
from ktrdr_budget.engine.transport.durability import Durability, confirmed
from ktrdr_budget.engine.transport.errors import NoScript, Transient, meaning, unavailable
from ktrdr_budget.engine.transport.node import Node
from ktrdr_budget.engine.transport.urls import check_url, mask_url
from ktrdr_budget.errors import BudgetError, StoreError

if TYPE_CHECKING:
    from ktrdr_budget.engine.embedded.server import EmbeddedServer

__all__ = ["NoScript", "Store", "Transient", "check_url", "mask_url", "unavailable"]

_HOPS_MAX = 5


def _unnoticed() -> None:
    """Called before a second attempt of what may run twice anyway."""


class Store:
    """One store, reached through redis-py. Opens by itself; closing is final. This class: one server, that stays.

    Args:
        url: where it is; ``None`` starts or joins the embedded server.
        data_dir: the embedded server's data directory.
        credentials: asked at each connection.
    """

    def __init__(self, url: str | None, data_dir: str | None = None, credentials: Credentials | None = None) -> None:
        self.credentials = credentials
        self._configured_url = None if url is None else check_url(url)
        self._data_dir = data_dir
        self.durability: Durability = "memory"
        """Where a batch must be before it counts as answered."""
        self._server: Node | None = None
        self._connections = ConnectionPool()
        """Those of the server, looked up for every batch."""
        self._embedded: EmbeddedServer | None = None
        self._opening: asyncio.Lock | None = None
        self._reviving: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Store {self.shown}>"

    @property
    def shown(self) -> str:
        """Where the store is, without secrets."""
        if self._configured_url is not None:
            return mask_url(self._configured_url)
        return self._embedded.url if self._embedded is not None else "embedded"

    @property
    def address(self) -> str | None:
        """Where the store is, secrets included; ``None`` for an embedded server that has not been started."""
        return self._configured_url or (self._embedded.url if self._embedded is not None else None)

    async def open(self) -> None:
        """Makes what connects; starts the embedded server if that is the store.

        Raises:
            StoreUnavailable: the embedded server does not start.
        """
        if self._server is not None:
            return
        if self._opening is None:
            self._opening = asyncio.Lock()
        async with self._opening:
            if self._server is None:
                url = self._configured_url or await self._start_embedded()
                self._settle(Node(url, credentials=self.credentials))

    def _settle(self, server: Node) -> None:
        """From now on batches go to this server."""
        self._server, self._connections = server, server.connections

    async def _start_embedded(self) -> str:
        from ktrdr_budget.engine import embedded

        if self._embedded is None:
            try:
                self._embedded = await asyncio.to_thread(embedded.start, self._data_dir)
            except embedded.EmbeddedServerError as error:
                raise StoreError(str(error)) from None
        return self._embedded.url

    async def close(self) -> None:
        """Closes connections, and lets go of the embedded server."""
        server, self._server = self._server, None
        if server is not None:
            await server.close()
        reviving, self._reviving = self._reviving, None
        if reviving is not None and not reviving.done():
            reviving.cancel()
            await asyncio.wait({reviving})
        embedded, self._embedded = self._embedded, None
        if embedded is not None:
            await asyncio.to_thread(embedded.close)

    def forget(self) -> Any:
        """In the child after a fork: the parent's connections are the parent's, and must be kept unused."""
        connections = self._server
        self._server, self._connections = None, ConnectionPool()
        self._opening = None
        self._reviving = None
        return connections

    @property
    def ready(self) -> bool:
        """Whether a batch can be sent at once, unless the connections turn out to have been idle for too long."""
        return bool(self._connections.idle)

    def begin(
        self,
        name: str,
        keys: Sequence[str],
        args: Sequence[str],
        deadline: float,
        told: Callable[[Any], None],
        resent: Callable[[], None],
    ) -> bool:
        """Sends one batch of a write script at once, if a connection is ready for it; returns whether it was.

        Args:
            deadline: the time of the event loop until which an answer is waited for.
            told: is called once, with the answer, or with an exception for :meth:`failure` to explain.
            resent: called before the batch is sent a second time, because its connection is silent.
        """
        wire = self._connections.ready()
        if wire is None:
            return False
        wire.send(("EVALSHA", script(name).sha, len(keys), *keys, *args), deadline, told, resent)
        return True

    async def apply(
        self,
        name: str,
        keys: Sequence[str],
        args: Sequence[str],
        deadline: float,
        resent: Callable[[], None] | None = None,
    ) -> Any:
        """Runs one batch of a write script, connecting first if need be.

        Args:
            deadline, resent: as for :meth:`begin`; without ``resent`` it is not sent a second time.

        Raises:
            TimeoutError: there was no answer by the deadline, a time of the event loop.
            Transient, StoreError: as for :meth:`run`.
        """

        async def send(server: Node, words: Sequence[Any], asking: bool) -> Any:
            if self.durability != "memory":
                lua = script(name)
                if lua.sha not in server.scripts:  # to be told so would take as long as to confirm what was not done
                    words = ("EVAL", lua.source, *words[2:])

                def confirm() -> Awaitable[Any]:
                    left_s = deadline - asyncio.get_running_loop().time()
                    return confirmed(server, words, asking, self.durability, keys[0], left_s, self.shown)

                answer = await server.patiently(confirm, deadline, resent)
                server.scripts.add(lua.sha)
                return answer
            wire = await self._wire_to(server)
            if wire is None:
                return await server.execute(words, asking, deadline, resent)
            try:
                if asking:  # both commands need the same connection: neither is sent on another
                    await wire.ask(("ASKING",), deadline)
                return await wire.ask(tuple(words), deadline, None if asking else resent)
            finally:
                wire.release()

        async with asyncio.timeout_at(deadline):
            return await self._evaluate(partial(self._deliver, send), script(name), keys, args)

    async def _wire_to(self, server: Node) -> Connection | None:
        try:
            return await server.wire()
        except Exception as error:
            failure = meaning(error, self.shown)
            if isinstance(failure, Transient):
                failure.sent = False
            raise failure from None

    async def run(self, command: Command | Read, deadline: float) -> Any:
        """Runs a read script or a plain command; the write script as a batch, confirmed as one.

        Args:
            deadline: the time of the event loop until which a reply is awaited.

        Raises:
            TimeoutError: there was no reply by then.
            Transient: no answer, or one that will pass.
            StoreError: the store refuses.
        """

        async def send(server: Node, words: Sequence[Any], asking: bool) -> Any:
            # An idle connection for batches serves a lone read sooner than the client; many at once are the client's.
            wire = None if asking else server.connections.ready()
            if wire is None:
                return await server.execute(words, asking, deadline, _unnoticed)
            try:
                return await wire.ask(tuple(words), deadline, _unnoticed)
            finally:
                wire.release()

        if command.script == "apply":
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
            # EVAL loads it on the node that needs it, which SCRIPT LOAD would have to be told.
            return await execute("EVAL", lua.source, len(keys), *keys, *args)

    async def _deliver(self, send: Callable[[Node, Sequence[Any], bool], Awaitable[Any]], *words: Any) -> Any:
        """Sends a command to where it belongs, following the nodes of a cluster."""
        server, asking = await self._home(), False
        for _ in range(_HOPS_MAX):
            try:
                return await send(server, words, asking)
            except (BudgetError, TimeoutError):
                raise
            except asyncio.CancelledError:
                self._doubt(server, None)  # it may have hung
                raise
            except Exception as error:
                elsewhere = self._elsewhere(server, error)
                if elsewhere is None:
                    self._doubt(server, error)
                    raise self.failure(error) from None
                server, asking = elsewhere
        raise Transient(f"store at {self.shown}: its nodes send from one to the next", sent=False)

    async def _home(self) -> Node:
        """The server that batches go to."""
        await self.open()
        assert self._server is not None
        return self._server

    def _elsewhere(self, server: Node, error: Exception) -> tuple[Node, bool] | None:
        """Whom an answer names instead, and whether that is to be asked for this request only."""
        return None

    def _doubt(self, server: Node, error: Exception | None) -> None:
        """A server has failed, or has not answered: it may not be the right one any more."""

    def failure(self, error: Exception) -> Exception:
        """What a failure of the driver means; an embedded server that may be gone is looked after."""
        mapped = meaning(error, self.shown)
        if isinstance(mapped, Transient):
            self._revive()
        return mapped

    def _revive(self) -> None:
        """The embedded server's supervisor restarts it; should that have been killed as well, somebody must ask."""
        if self._embedded is not None and (self._reviving is None or self._reviving.done()):
            self._reviving = asyncio.ensure_future(asyncio.to_thread(self._embedded.ensure))
            self._reviving.add_done_callback(lambda task: task.cancelled() or task.exception())
