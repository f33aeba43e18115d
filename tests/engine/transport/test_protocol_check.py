"""The protocol check sends one request to a server, and recognises by the reply that the server is no store."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Any

import pytest

from ktrdr_budget.engine.transport.protocol_check import check_protocol

ADDRESS = ("store", 6379)


class Server:
    """A server behind ``socket.create_connection``, with one reply to any request."""

    def __init__(self, reply: bytes | OSError, speaks_tls: bool) -> None:
        self.reply, self.speaks_tls = reply, speaks_tls

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *details: object) -> None:
        pass

    def sendall(self, request: bytes) -> None:
        pass

    def recv(self, size: int) -> bytes:
        if isinstance(self.reply, OSError):
            raise self.reply
        return self.reply


class Context:
    """A TLS context whose handshake succeeds with a server that speaks TLS."""

    def wrap_socket(self, server: Server) -> Any:
        if not server.speaks_tls:
            raise ssl.SSLError("wrong version number")
        return contextlib.nullcontext()


@pytest.fixture
def serve(monkeypatch):
    def serve(reply: bytes | OSError, speaks_tls: bool = False) -> None:
        monkeypatch.setattr(socket, "create_connection", lambda address, timeout: Server(reply, speaks_tls))
        monkeypatch.setattr(ssl, "create_default_context", Context)

    return serve


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("reply", [b"HTTP/1.1 400 Bad Request", b"<html>"])
def test_the_protocol_check_reports_an_http_server(serve, tls, reply):
    serve(reply)
    assert str(check_protocol(ADDRESS, tls)) == "the server at store:6379 is not a Redis server: it speaks HTTP"


@pytest.mark.parametrize("reply", [b"+PONG", b"-ERR wrong number of arguments", b"-NOAUTH Authentication required."])
def test_a_server_without_tls_is_reported_only_if_the_url_requires_tls(serve, reply):
    serve(reply)
    assert check_protocol(ADDRESS, tls=False) is None
    assert str(check_protocol(ADDRESS, tls=True)).endswith(
        "does not speak TLS; its URL must start with redis, not rediss"
    )


@pytest.mark.parametrize("reply", [b"\x15\x03\x03\x00\x02", b"", ConnectionResetError()])
def test_a_server_with_tls_is_reported_only_if_the_url_does_not_use_tls(serve, reply):
    serve(reply, speaks_tls=True)
    assert check_protocol(ADDRESS, tls=True) is None
    assert str(check_protocol(ADDRESS, tls=False)).endswith("speaks TLS; its URL must start with rediss, not redis")


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("reply", [b"", ConnectionResetError(), TimeoutError()])
def test_the_protocol_check_reports_nothing_if_a_server_without_tls_sends_no_reply(serve, tls, reply):
    serve(reply)
    assert check_protocol(ADDRESS, tls) is None


def test_the_protocol_check_reports_nothing_if_the_server_is_unreachable(monkeypatch):
    def refuse(address: object, timeout: float) -> None:
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert check_protocol(ADDRESS, tls=False) is None
