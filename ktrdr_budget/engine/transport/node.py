"""One server of a store: its own connections for batches, and redis-py's client as the fallback."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from ktrdr_budget.engine.transport.connection import HEDGE_SHARE, Connection, ConnectionPool, ReplyError
from ktrdr_budget.engine.transport.credentials import Credentials
from ktrdr_budget.engine.transport.errors import without_secrets
from ktrdr_budget.engine.transport.hedging import hedged
from ktrdr_budget.engine.transport.urls import Address
from ktrdr_budget.errors import InvalidArgument

__all__ = ["Node", "redis_connection"]

Result = TypeVar("Result")


class Node:
    """One server and the connections to it.

    Args:
        url: the URL of the server in redis-py's form, including secrets.
        address: the address of the server; ``None`` if the store is a single server.
        connect_timeout: seconds to open a connection; if ``None``, only the deadline of the call applies.
        credentials: the source of the login for each connection; if ``None``, the URL contains the login, if any.
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
        self.connections.on_silent = self._hedge
        self._hedges: set[asyncio.Task[None]] = set()
        self.draining = False
        """Whether the node gets no more requests; pending ones still await their reply."""
        self.scripts: set[str] = set()
        """Digests of the scripts that the server is known to have."""
        self.durability_checked = False
        """Whether the server has accepted the command that confirms writes; see :mod:`.durability`."""
        self._connect_timeout = connect_timeout

    async def connection(self) -> Connection | None:
        """A connection for a batch, opened if needed; ``None`` if the batch must go through the client.

        Raises:
            OSError, redis.RedisError: the server cannot be reached, or refuses this user.
        """
        return self.connections.check_out() or await self._connect()

    async def _connect(self) -> Connection | None:
        limit = asyncio.timeout(self._connect_timeout)
        try:
            async with limit:
                return await self.connections.connect(self.client)
        except TimeoutError:
            if not limit.expired():
                raise
            raise ConnectionError("timeout while connecting") from None

    # -- silent connections --------------------------------------------------------------------------------------------

    def _hedge(self, silent: Connection) -> None:
        # In an empty context: an instrumentation must not attribute this to a caller.
        task = asyncio.get_running_loop().create_task(self._resend(silent), context=contextvars.Context())
        self._hedges.add(task)
        task.add_done_callback(self._hedges.discard)

    async def _resend(self, silent: Connection) -> None:
        """Send the request of a silent connection again on a new connection. The first reply is used.

        If the new connection replies first, the silent one is dead, and every connection that was idle meanwhile may
        be dead as well.
        """
        request = silent.pending
        try:
            async with asyncio.timeout_at(silent.deadline):
                fresh = await self._connect()
        except Exception:
            return  # the reply of the silent connection is still awaited, and a further attempt reports the cause
        if fresh is None:
            return
        if silent.pending is not request:
            fresh.release()
            return

        def on_reply(reply: Any) -> None:
            if silent.pending is request and (isinstance(reply, ReplyError) or not isinstance(reply, Exception)):
                self.connections.discard_idle()
                silent.supersede(reply)

        if silent.on_resend is not None:
            silent.on_resend()
        fresh.send(silent.words, silent.deadline, on_reply)

    async def with_hedge(
        self, send: Callable[[], Awaitable[Result]], deadline: float, on_resend: Callable[[], None] | None
    ) -> Result:
        """Send by redis-py's client. If no reply comes for a while, also send on a new connection.

        If ``on_resend`` is ``None``, the request is sent once only.
        """
        if on_resend is None:
            return await send()

        async def resend() -> Result:
            await self.client.connection_pool.disconnect(inuse_connections=False)
            on_resend()
            return await send()

        from redis import exceptions

        now_s = asyncio.get_running_loop().time()
        no_reply = (OSError, exceptions.ConnectionError, exceptions.TimeoutError)
        return await hedged(send, now_s + (deadline - now_s) * HEDGE_SHARE, resend, no_reply)

    async def execute(
        self, words: Sequence[Any], asking: bool, deadline: float, on_resend: Callable[[], None] | None
    ) -> Any:
        """Send one command by redis-py's client.

        Args:
            asking: whether to send ``ASKING`` first. A node that is importing the slot requires this.
        """
        return await self.with_hedge(partial(self._execute, words, asking), deadline, on_resend)

    async def _execute(self, words: Sequence[Any], asking: bool) -> Any:
        try:
            if not asking:
                return await self.client.execute_command(*words)
            async with self.client.client() as single:  # both commands on one connection, with nothing in between
                await single.execute_command("ASKING")
                return await single.execute_command(*words)
        finally:
            if self.draining:  # its connection may have been opened after the others were closed
                await self.client.connection_pool.disconnect(inuse_connections=False)

    async def close(self) -> None:
        """Close all connections, and return when they are closed."""
        for task in list(self._hedges):
            task.cancel()
        await asyncio.gather(*self._hedges, return_exceptions=True)
        await self.connections.close()
        await self.client.aclose()


def redis_connection(url: str, credentials: Credentials | None = None) -> Any:
    """Create a connection of redis-py that is not open yet and belongs to no client."""
    return _pool(url, credentials).make_connection()


def _client(url: str, credentials: Credentials | None) -> Any:
    import redis.asyncio as redis

    try:
        return redis.Redis.from_pool(_pool(url, credentials))
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"invalid store URL: {without_secrets(error)}") from None


def _pool(url: str, credentials: Credentials | None) -> Any:
    """Create a pool whose connections do not retry, because retries by redis-py would ignore the deadline of a call."""
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from ktrdr_budget.engine.transport.redis_pool import pool_of

    options: dict[str, Any] = {"retry": Retry(NoBackoff(), 0), "socket_timeout": None, "protocol": 2}
    if credentials is not None:
        options["credential_provider"] = credentials
    return pool_of(url, **options)
