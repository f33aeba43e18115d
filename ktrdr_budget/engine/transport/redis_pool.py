"""Redis connections that pack commands faster (a batch has hundreds of arguments) and can be taken over.

Everything else (TLS, authentication, parsing, pooling, instrumentation) is redis-py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from redis import exceptions
from redis.asyncio import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection

from ktrdr_budget.engine.transport.connection import TRUSTED_IDLE_S
from ktrdr_budget.engine.transport.hedging import hedged
from ktrdr_budget.engine.transport.wrong_protocol import probe_protocol

__all__ = ["Reader", "pack", "pool_of"]

_EXPLAINED_AFTER_S = 0.2
"""A first connection that takes longer is looked into."""
_EXPLAINED_TRIES = 2
"""The server, or this machine, may be busy."""


def _pack_slowly(words: tuple[Any, ...]) -> bytes:
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word if type(word) is bytes else str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


pack: Callable[[tuple[Any, ...]], bytes]
Reader: Any
try:
    from hiredis import Reader
    from hiredis import pack_command as pack
except ImportError:  # without the extra `fast`
    pack, Reader = _pack_slowly, None


class _Own:
    """For words that are ``bytes``, ``str`` or ``int``."""

    _writer: asyncio.StreamWriter | None
    _reader: asyncio.StreamReader | None

    def pack_command(self, *words: Any) -> list[bytes]:
        """Replaces redis-py's."""
        command = words[0]
        if isinstance(command, str) and " " in command:  # "CLIENT SETINFO" and the like are two words
            words = (*command.split(), *words[1:])
        return [pack(words)]

    def hand_over(self) -> asyncio.StreamWriter:
        """Lets go of its stream, as if it had never been connected; the caller owns it now."""
        writer, self._writer, self._reader = self._writer, None, None
        assert writer is not None
        return writer


class _Unexplained(Exception):
    """The server may be slow."""


class _Explained(_Own):
    """Says so where the server speaks another protocol: without that, it is one that does not reply."""

    _tls = False
    pool: _Pool | None = None
    host: str
    port: int

    async def connect(self) -> None:
        """See redis-py."""
        connect = super().connect  # type: ignore[misc]
        if self.pool is None or self.pool.reached:
            await self._cleanly(connect)
            return
        try:
            second_at_s = asyncio.get_running_loop().time() + _EXPLAINED_AFTER_S
            await hedged(lambda: self._cleanly(connect), second_at_s, self._explain, (_Unexplained,))
        except exceptions.RedisError as error:
            if _needs_explaining(error):
                with contextlib.suppress(_Unexplained):
                    await self._explain()
            raise
        self.pool.reached = True

    async def _cleanly(self, connect: Callable[[], Awaitable[None]]) -> None:
        try:
            await connect()
        except BaseException:
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]  # else the pool would reuse it half made
            raise

    async def _explain(self) -> None:
        for _ in range(_EXPLAINED_TRIES):
            foreign = await asyncio.to_thread(probe_protocol, (self.host, self.port), self._tls)
            if foreign is not None:
                raise foreign
        raise _Unexplained


def _needs_explaining(error: exceptions.RedisError) -> bool:
    if isinstance(error, (exceptions.AuthenticationError, exceptions.ResponseError)):
        return False
    text = str(error).lower()
    return not isinstance(error.__context__, (ConnectionRefusedError, socket.gaierror)) and "certificate" not in text


class _TCP(_Explained, Connection):
    pass


class _TLS(_Explained, SSLConnection):
    _tls = True


class _Unix(_Own, UnixDomainSocketConnection):
    pass


_OWN: dict[type[Any], type[Any]] = {Connection: _TCP, SSLConnection: _TLS, UnixDomainSocketConnection: _Unix}


class _Pool(ConnectionPool):
    """A pool that replaces connections which were idle for too long, as :class:`~.connection.ConnectionPool` does."""

    reached = False
    """Whether a connection was made before: then the server speaks the right protocol."""

    def make_connection(self) -> Any:
        """See redis-py."""
        connection = super().make_connection()  # type: ignore[no-untyped-call]
        connection.pool = self
        return connection

    async def release(self, connection: Any) -> None:
        """See redis-py."""
        connection.used_s = asyncio.get_running_loop().time()
        await super().release(connection)

    async def ensure_connection(self, connection: Any) -> None:
        """See redis-py."""
        used_s: float | None = getattr(connection, "used_s", None)
        if used_s is not None and asyncio.get_running_loop().time() - used_s > TRUSTED_IDLE_S:
            await connection.disconnect(nowait=True)
        await super().ensure_connection(connection)


def pool_of(url: str, **options: Any) -> ConnectionPool:
    """A connection pool of these connections, for a URL as redis-py understands it."""
    pool: ConnectionPool = _Pool.from_url(url, **options)
    pool.connection_class = _OWN.get(pool.connection_class, pool.connection_class)
    return pool
