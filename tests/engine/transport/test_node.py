"""A node: the connections to one server, with options that leave retries and timeouts to the caller's deadline."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ktrdr_budget.engine.transport.credentials import Credentials
from ktrdr_budget.engine.transport.node import Node, redis_connection
from ktrdr_budget.errors import InvalidArgument


class Pool:
    """redis-py's pool of connections: counts how often its idle connections are closed."""

    closed_idle = 0

    async def disconnect(self, inuse_connections: bool) -> None:
        assert not inuse_connections, "requests in flight keep their connection"
        self.closed_idle += 1


class Client:
    """redis-py's client: records each command and the connection that it was sent on."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, tuple[Any, ...]]] = []
        self.connection_pool = Pool()

    async def execute_command(self, *words: Any) -> str:
        self.sent.append(("any", words))
        return "reply"

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        single = Client()
        yield single
        self.sent += [("single", words) for _, words in single.sent]


@pytest.fixture
async def node():
    made = Node("redis://store")
    client, made.client = made.client, Client()
    yield made
    made.client = client
    await made.close()


def test_a_redis_py_connection_has_no_retries_and_no_timeout_of_its_own():
    connection = redis_connection("redis://store")
    assert connection.retry.get_retries() == 0
    assert connection.socket_timeout is None


def test_a_connection_gets_its_login_from_the_given_credentials():
    credentials = Credentials(lambda: "password")
    assert redis_connection("redis://store", credentials).credential_provider is credentials


@pytest.mark.parametrize("url", ["redis://:secret@store:port", "http://:secret@store", "redis://:secret@store?db=x"])
def test_the_error_for_an_invalid_url_does_not_show_the_password(url):
    with pytest.raises(InvalidArgument, match="^invalid store URL: ") as raised:
        Node(url)
    assert "secret" not in str(raised.value)


async def test_the_asking_command_and_the_redirected_command_are_sent_on_the_same_connection(node):
    assert await node.execute(("GET", "k"), asking=True, deadline=0, on_resend=None) == "reply"
    assert node.client.sent == [("single", ("ASKING",)), ("single", ("GET", "k"))]


@pytest.mark.parametrize(("draining", "closed"), [(False, 0), (True, 1)])
async def test_a_draining_node_closes_its_idle_connections_after_each_command(node, draining, closed):
    node.draining = draining
    await node.execute(("GET", "k"), asking=False, deadline=0, on_resend=None)
    assert node.client.connection_pool.closed_idle == closed


async def test_a_command_without_a_reply_is_sent_again_on_a_new_connection(node):
    attempts, resent = [], []

    async def send() -> str:
        attempts.append(node.client.connection_pool.closed_idle)
        if len(attempts) == 1:
            await asyncio.Event().wait()
        return "reply"

    deadline = asyncio.get_running_loop().time() + 0.01
    assert await node.with_hedge(send, deadline, lambda: resent.append(True)) == "reply"
    assert attempts == [0, 1], "idle connections may be dead as well, so they are closed before the second attempt"
    assert resent == [True]


async def test_a_command_that_must_not_be_repeated_is_sent_once(node):
    attempts = []

    async def send() -> str:
        attempts.append("sent")
        for _ in range(5):  # a second attempt would be due at once
            await asyncio.sleep(0)
        return "reply"

    assert await node.with_hedge(send, asyncio.get_running_loop().time(), None) == "reply"
    assert attempts == ["sent"]
