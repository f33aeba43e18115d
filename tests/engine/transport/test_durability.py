"""Durable batches: a batch is acknowledged once a replica, or the disk, has confirmed its writes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ResponseError

from ktrdr_budget.engine.transport.durability import check_durability, execute_durably
from ktrdr_budget.engine.transport.errors import Transient
from ktrdr_budget.errors import InvalidArgument, StoreError

BATCH = ("EVALSHA", "digest", 0)


class Client:
    """redis-py's client: records the commands, and returns the given replies to a pipeline."""

    def __init__(self, *replies: Any, probe: Exception | None = None) -> None:
        self.sent: list[tuple[Any, ...]] = []
        self.probes: list[tuple[Any, ...]] = []
        self._replies, self._probe = replies, probe

    async def execute_command(self, *words: Any) -> None:
        self.probes.append(words)
        if self._probe is not None:
            raise self._probe

    def pipeline(self, transaction: bool) -> Any:
        async def execute(raise_on_error: bool) -> list[Any]:
            return list(self._replies)

        return SimpleNamespace(execute_command=lambda *words: self.sent.append(words), execute=execute)


async def send(client: Client, durability: Any = "replica", *, asking: bool = False, checked: bool = True) -> Any:
    node: Any = SimpleNamespace(client=client, durability_checked=checked)
    return await execute_durably(node, BATCH, asking, durability, "meta", 1.0, "redis://store")


@pytest.mark.parametrize(
    ("durability", "confirmations", "wait"),
    [("replica", 1, ("WAIT", 1, 850)), ("disk", [1, 0], ("WAITAOF", 1, 0, 850))],
)
async def test_after_a_durable_batch_a_write_command_and_a_wait_command_are_sent(durability, confirmations, wait):
    client = Client("reply", 0, confirmations)
    assert await send(client, durability) == "reply"
    assert client.sent == [BATCH, ("HSET", "meta", "confirmed", "1"), wait], "the wait leaves 0.15 s for the reply"


async def test_an_asking_command_precedes_each_write_to_a_node_that_imports_the_slot():
    client = Client("OK", "reply", "OK", 0, 1)
    assert await send(client, asking=True) == "reply"
    assert [words[0] for words in client.sent] == ["ASKING", "EVALSHA", "ASKING", "HSET", "WAIT"]


@pytest.mark.parametrize(
    ("durability", "confirmations", "message"),
    [("replica", 0, "no replica has confirmed it"), ("disk", [0, 1], "it is not on disk yet")],
)
async def test_if_the_writes_of_a_batch_are_not_confirmed_the_outcome_is_ambiguous(durability, confirmations, message):
    with pytest.raises(Transient, match=message) as raised:
        await send(Client("reply", 0, confirmations), durability)
    assert (raised.value.sent, raised.value.answered) == (True, True)


async def test_if_a_batch_fails_and_is_not_confirmed_the_error_reply_is_raised():
    with pytest.raises(ResponseError, match="NOSCRIPT"):
        await send(Client(ResponseError("NOSCRIPT"), 0, 0))


async def test_before_the_first_batch_a_node_is_checked_once_for_support_of_the_wait_command():
    client = Client("reply", 0, [1, 0])
    node: Any = SimpleNamespace(client=client, durability_checked=False)
    for _ in range(2):
        await execute_durably(node, BATCH, False, "disk", "meta", 1.0, "redis://store")
    assert client.probes == [("WAITAOF", 1, 0, 1)]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("unknown command 'WAITAOF'", "needs WAITAOF"),
        ("WAITAOF cannot be used when numlocal is set but appendonly is disabled.", "needs appendonly to be on"),
    ],
)
async def test_nothing_is_sent_to_a_store_that_cannot_confirm_writes(reply, message):
    client = Client(probe=ResponseError(reply))
    with pytest.raises(StoreError, match=message):
        await send(client, "disk", checked=False)
    assert not client.sent


def test_the_error_for_an_unknown_durability_lists_the_valid_values():
    for known in ("memory", "replica", "disk"):
        check_durability(known)
    with pytest.raises(InvalidArgument, match="durability must be 'memory', 'replica' or 'disk', not 'everywhere'"):
        check_durability("everywhere")
