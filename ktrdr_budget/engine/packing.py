"""Redis connections that pack commands faster: a batch has hundreds of arguments.

Everything else (TLS, authentication, parsing, pooling, instrumentation) is redis-py's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from redis.asyncio import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection

__all__ = ["pool_of"]


def _pack_slowly(words: tuple[Any, ...]) -> bytes:
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word if type(word) is bytes else str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


_pack: Callable[[tuple[Any, ...]], bytes]
try:
    from hiredis import pack_command as _pack
except ImportError:  # without the extra `fast`
    _pack = _pack_slowly


class _Packing:
    """Replaces ``pack_command``, for words that are ``bytes``, ``str`` or ``int``."""

    def pack_command(self, *words: Any) -> list[bytes]:
        command = words[0]
        if isinstance(command, str) and " " in command:  # "CLIENT SETINFO" and the like are two words
            words = (*command.split(), *words[1:])
        return [_pack(words)]


class _TCP(_Packing, Connection):
    pass


class _TLS(_Packing, SSLConnection):
    pass


class _Unix(_Packing, UnixDomainSocketConnection):
    pass


_FASTER: dict[type[Any], type[Any]] = {Connection: _TCP, SSLConnection: _TLS, UnixDomainSocketConnection: _Unix}


def pool_of(url: str, **options: Any) -> ConnectionPool:
    """A connection pool of these connections, for a URL as redis-py understands it."""
    pool: ConnectionPool = ConnectionPool.from_url(url, **options)
    pool.connection_class = _FASTER.get(pool.connection_class, pool.connection_class)
    return pool
