"""One server of a store: redis-py's client for what is read, wires for batches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ktrdr_budget.engine.stores.failures import without_secrets
from ktrdr_budget.engine.stores.urls import Address
from ktrdr_budget.engine.stores.wire import Wire, Wires
from ktrdr_budget.errors import InvalidArgument

__all__ = ["Server", "connection_to"]


class Server:
    """Its connections.

    Args:
        url: secrets included, as redis-py reads it.
        address: ``None`` if the store is this one server.
        connect_timeout: how long making a connection may take, in seconds; ``None`` is as long as the call.
    """

    def __init__(self, url: str, address: Address | None = None, connect_timeout: float | None = None) -> None:
        self.address = address
        self.client = _client(url)
        self.wires = Wires()
        self.left = False
        """Nothing more goes there; who waits for an answer still waits for it."""
        self.scripts: set[str] = set()
        """The digests of those that it is known to know."""
        self.confirms = False
        """Whether it is known that it can tell when a write is safe; see :mod:`.durability`."""
        self._connect_timeout = connect_timeout

    async def wire(self) -> Wire | None:
        """A connection for a batch, made if need be; ``None`` if the client must be asked instead.

        Raises:
            OSError, redis.RedisError: the server cannot be reached, or refuses this user.
        """
        wire = self.wires.ready()
        if wire is not None:
            return wire
        limit = asyncio.timeout(self._connect_timeout)
        try:
            async with limit:
                return await self.wires.connect(self.client)
        except TimeoutError:
            if not limit.expired():
                raise
            raise ConnectionError("no answer to a new connection") from None

    async def execute(self, words: Sequence[Any], asking: bool) -> Any:
        """One command by the client; ``asking`` a node of a cluster for what another is moving to it."""
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
        await self.wires.close()
        await self.client.aclose()


def connection_to(url: str) -> Any:
    """One connection of redis-py's, which its client does not know of."""
    return _pool(url).make_connection()


def _client(url: str) -> Any:
    import redis.asyncio as redis

    try:
        return redis.Redis.from_pool(_pool(url))
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"the store's URL is not usable: {without_secrets(error)}") from None


def _pool(url: str) -> Any:
    """Connections that do not retry: retries are bounded by each call's deadline, which redis-py does not know."""
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from ktrdr_budget.engine.stores.packing import pool_of

    options: dict[str, Any] = {"retry": Retry(NoBackoff(), 0), "socket_timeout": None, "protocol": 2}
    return pool_of(url, **options)
