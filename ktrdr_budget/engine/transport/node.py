"""One server of a store: wires for batches, redis-py's client where there are none."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from ktrdr_budget.engine.transport.connection import PATIENCE, Connection, ConnectionPool, ReplyError
from ktrdr_budget.engine.transport.credentials import Credentials
from ktrdr_budget.engine.transport.errors import without_secrets
from ktrdr_budget.engine.transport.hedging import hedged
from ktrdr_budget.engine.transport.urls import Address
from ktrdr_budget.errors import InvalidArgument

__all__ = ["Node", "connection_to"]

Result = TypeVar("Result")


class Node:
    """Its connections.

    Args:
        url: secrets included, as redis-py reads it.
        address: ``None`` if the store is this one server.
        connect_timeout: how long making a connection may take, in seconds; ``None`` is as long as the call.
        credentials: asked at each connection.
    """

    def __init__(
        self,
        url: str,
        address: Address | None = None,
        connect_timeout: float | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        self.address = address
        self.client = _client(url, credentials)
        self.connections = ConnectionPool()
        self.connections.on_late = self._send_elsewhere
        self._resending: set[asyncio.Task[None]] = set()
        self.left = False
        """Nothing more goes there; who waits for an answer still waits for it."""
        self.scripts: set[str] = set()
        """The digests of those that it is known to know."""
        self.confirms = False
        """Whether it is known that it can tell when a write is safe; see :mod:`.durability`."""
        self._connect_timeout = connect_timeout

    async def wire(self) -> Connection | None:
        """A connection for a batch, made if need be; ``None`` if the client must be asked instead.

        Raises:
            OSError, redis.RedisError: the server cannot be reached, or refuses this user.
        """
        return self.connections.ready() or await self._connect()

    async def _connect(self) -> Connection | None:
        limit = asyncio.timeout(self._connect_timeout)
        try:
            async with limit:
                return await self.connections.connect(self.client)
        except TimeoutError:
            if not limit.expired():
                raise
            raise ConnectionError("no answer to a new connection") from None

    # -- silent connections --------------------------------------------------------------------------------------------

    def _send_elsewhere(self, silent: Connection) -> None:
        # On no caller's behalf: an instrumentation must not see one here.
        task = asyncio.get_running_loop().create_task(self._resend(silent), context=contextvars.Context())
        self._resending.add(task)
        task.add_done_callback(self._resending.discard)

    async def _resend(self, silent: Connection) -> None:
        """Send the request of a silent connection on a new one, too; the first reply counts.

        The new connection decides what was wrong: if it replies first, the silent one is dead, and so may be each that
        was idle meanwhile.
        """
        request = silent.request
        try:
            async with asyncio.timeout_at(silent.deadline):
                fresh = await self._connect()
        except Exception:
            return  # the silent connection is still waited for, and a further attempt reports what is wrong
        if fresh is None:
            return
        if silent.request is not request:
            fresh.release()
            return

        def replied(reply: Any) -> None:
            if silent.request is request and not (isinstance(reply, Exception) and not isinstance(reply, ReplyError)):
                self.connections.drop_idle()
                silent.supersede(reply)

        if silent.resent is not None:
            silent.resent()
        fresh.send(silent.words, silent.deadline, replied)

    async def patiently(
        self, send: Callable[[], Awaitable[Result]], deadline: float, resent: Callable[[], None] | None
    ) -> Result:
        """What the client sends, with the same second attempt on a new connection."""
        if resent is None:
            return await send()

        async def again() -> Result:
            await self.client.connection_pool.disconnect(inuse_connections=False)
            resent()
            return await send()

        from redis import exceptions

        now_s = asyncio.get_running_loop().time()
        unanswered = (OSError, exceptions.ConnectionError, exceptions.TimeoutError)
        return await hedged(send, now_s + (deadline - now_s) * PATIENCE, again, unanswered)

    async def execute(
        self, words: Sequence[Any], asking: bool, deadline: float, resent: Callable[[], None] | None
    ) -> Any:
        """One command by the client; ``asking`` a node of a cluster for what another is moving to it."""
        return await self.patiently(partial(self._execute, words, asking), deadline, resent)

    async def _execute(self, words: Sequence[Any], asking: bool) -> Any:
        try:
            if not asking:
                return await self.client.execute_command(*words)
            async with self.client.client() as one:  # a connection of its own: nothing may come in between
                await one.execute_command("ASKING")
                return await one.execute_command(*words)
        finally:
            if self.left:  # its connection may have been made after the others were closed
                await self.client.connection_pool.disconnect(inuse_connections=False)

    async def close(self) -> None:
        """Ends its connections, and returns when they have ended."""
        for task in list(self._resending):
            task.cancel()
        await asyncio.gather(*self._resending, return_exceptions=True)
        await self.connections.close()
        await self.client.aclose()


def connection_to(url: str, credentials: Credentials | None = None) -> Any:
    """One connection of redis-py's, which its client does not know of."""
    return _pool(url, credentials).make_connection()


def _client(url: str, credentials: Credentials | None) -> Any:
    import redis.asyncio as redis

    try:
        return redis.Redis.from_pool(_pool(url, credentials))
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"invalid store URL: {without_secrets(error)}") from None


def _pool(url: str, credentials: Credentials | None) -> Any:
    """Connections that do not retry: retries are bounded by each call's deadline, which redis-py does not know."""
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from ktrdr_budget.engine.transport.redis_pool import pool_of

    options: dict[str, Any] = {"retry": Retry(NoBackoff(), 0), "socket_timeout": None, "protocol": 2}
    if credentials is not None:
        options["credential_provider"] = credentials
    return pool_of(url, **options)
