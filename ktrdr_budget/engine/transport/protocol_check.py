"""Find out why a server does not reply as a store: TLS on one side only, or an HTTP server."""

from __future__ import annotations

import socket
import ssl

from ktrdr_budget.engine.transport.urls import Address

__all__ = ["WrongProtocol", "check_protocol"]

_TIMEOUT_S = 0.5
_REQUEST = b"PING / HTTP/1.0\r\n\r\n"
"""A request that is invalid for Redis and for HTTP servers, so that each server replies in its own protocol."""


class WrongProtocol(Exception):
    """The server speaks another protocol than the store's URL says."""


def check_protocol(address: Address, tls: bool) -> WrongProtocol | None:
    """Send a request without TLS and without a login, on a separate connection, and identify the server by its reply.

    Return ``None`` if the reply does not explain the failure. The function blocks for up to a second.

    Args:
        tls: whether the store's URL asks for TLS.
    """
    try:
        reply = _reply(address)
    except OSError:
        return None
    where = f"the server at {address[0]}:{address[1]}"
    if reply.startswith((b"HTTP/", b"<")):
        return WrongProtocol(f"{where} is not a Redis server: it speaks HTTP")
    if tls and reply.startswith((b"+", b"-")):
        return WrongProtocol(f"{where} does not speak TLS; its URL must start with redis, not rediss")
    if not tls and not reply.startswith((b"+", b"-")) and _speaks_tls(address):
        return WrongProtocol(f"{where} speaks TLS; its URL must start with rediss, not redis")
    return None


def _reply(address: Address) -> bytes:
    with socket.create_connection(address, timeout=_TIMEOUT_S) as connection:
        try:
            connection.sendall(_REQUEST)
            return connection.recv(64)
        except ConnectionError:
            return b""  # a server that speaks TLS resets such a connection


def _speaks_tls(address: Address) -> bool:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection(address, timeout=_TIMEOUT_S) as connection, context.wrap_socket(connection):
            return True
    except OSError:
        return False
