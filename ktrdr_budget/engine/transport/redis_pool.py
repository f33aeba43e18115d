"""redis-py's connections, with three additions: faster packing, a stream that can be detached, and clear errors.

TLS, authentication, parsing, pooling and instrumentation are redis-py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from redis import exceptions
from redis.asyncio import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection

from ktrdr_budget.engine.transport.connection import IDLE_MAX_S
from ktrdr_budget.engine.transport.hedging import hedged
from ktrdr_budget.engine.transport.protocol_check import check_protocol
from ktrdr_budget.engine.transport.resp import pack

__all__ = ["pool_of"]

_CHECK_AFTER_S = 0.2
"""If the first connection has no reply for this many seconds, the server's protocol is checked."""
_CHECKS = 2
"""The maximum number of checks. A check may find nothing, because the server or this machine is busy."""


class _Detachable:
    """A connection that packs commands by :mod:`.resp`, and can hand over its stream."""

    _writer: asyncio.StreamWriter | None
    _reader: asyncio.StreamReader | None

    def pack_command(self, *words: Any) -> list[bytes]:
        """Override redis-py's packing."""
        command = words[0]
        if isinstance(command, str) and " " in command:  # "CLIENT SETINFO" and the like are two words
            words = (*command.split(), *words[1:])
        return [pack(words)]

    def detach(self) -> asyncio.StreamWriter:
        """Return the stream to the caller; afterwards this object is in the state of an unopened connection."""
        writer, self._writer, self._reader = self._writer, None, None
        assert writer is not None
        return writer


class _Inconclusive(Exception):
    """The check found nothing wrong; the server may just be slow."""


class _Checked(_Detachable):
    """A connection that checks the protocol of a server that is slow or fails.

    Without this check, TLS on one side only would look like a timeout.
    """

    _tls = False
    pool: _Pool | None = None
    host: str
    port: int

    async def connect(self) -> None:
        """See redis-py."""
        connect = super().connect  # type: ignore[misc]
        if self.pool is None or self.pool.has_connected:
            await self._connect_cleanly(connect)
            return
        try:
            check_at_s = asyncio.get_running_loop().time() + _CHECK_AFTER_S
            await hedged(lambda: self._connect_cleanly(connect), check_at_s, self._check, (_Inconclusive,))
        except exceptions.RedisError as error:
            if _may_be_wrong_protocol(error):
                with contextlib.suppress(_Inconclusive):
                    await self._check()
            raise
        self.pool.has_connected = True

    async def _connect_cleanly(self, connect: Callable[[], Awaitable[None]]) -> None:
        try:
            await connect()
        except BaseException:
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]  # else the pool would reuse it half made
            raise

    async def _check(self) -> None:
        for _ in range(_CHECKS):
            wrong = await asyncio.to_thread(check_protocol, (self.host, self.port), self._tls)
            if wrong is not None:
                raise wrong
        raise _Inconclusive


def _may_be_wrong_protocol(error: exceptions.RedisError) -> bool:
    if isinstance(error, (exceptions.AuthenticationError, exceptions.ResponseError)):
        return False
    text = str(error).lower()
    return not isinstance(error.__context__, (ConnectionRefusedError, socket.gaierror)) and "certificate" not in text


class _TCP(_Checked, Connection):
    pass


class _TLS(_Checked, SSLConnection):
    _tls = True


class _Unix(_Detachable, UnixDomainSocketConnection):
    pass


_CLASSES: dict[type[Any], type[Any]] = {Connection: _TCP, SSLConnection: _TLS, UnixDomainSocketConnection: _Unix}


class _Pool(ConnectionPool):
    """A pool that replaces connections that were idle for too long, as :class:`~.connection.ConnectionPool` does."""

    has_connected = False
    """Whether a connection was opened before. If so, the server speaks the right protocol."""

    def make_connection(self) -> Any:
        """See redis-py."""
        connection = super().make_connection()  # type: ignore[no-untyped-call]
        connection.pool = self
        return connection

    @property
    def idle(self) -> list[Any]:
        """The idle connections."""
        return list(self._available_connections)

    async def release(self, connection: Any) -> None:
        """See redis-py."""
        connection.last_used_s = asyncio.get_running_loop().time()
        await super().release(connection)

    async def ensure_connection(self, connection: Any) -> None:
        """See redis-py."""
        last_used_s: float | None = getattr(connection, "last_used_s", None)
        if last_used_s is not None and asyncio.get_running_loop().time() - last_used_s > IDLE_MAX_S:
            await connection.disconnect(nowait=True)
        await super().ensure_connection(connection)


def pool_of(url: str, **options: Any) -> ConnectionPool:
    """Create a pool of the connections of this module, for a URL in redis-py's form."""
    pool: ConnectionPool = _Pool.from_url(url, **options)
    pool.connection_class = _CLASSES.get(pool.connection_class, pool.connection_class)
    return pool
