"""How what sentinels and nodes say is weighed; the answers are made up, so that they can contradict each other."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from ktrdr_budget.engine.transport.connection import ReplyError
from ktrdr_budget.engine.transport.discovery import (
    ClusterDiscovery,
    Discovery,
    DiscoveryRefused,
    PrimaryNotFound,
    SentinelDiscovery,
)
from ktrdr_budget.engine.transport.errors import redirection
from ktrdr_budget.engine.transport.urls import parse_url

SENTINELS = parse_url("redis+sentinel://a:1,b:2,c:3/budgets")
NODES = parse_url("redis+cluster://a:1,b:2")
OLD, NEW = ("10.0.0.1", 6379), ("10.0.0.2", 6379)


def answering(discovery: Discovery, *answers: Any, by_whom: dict[Any, Any] | None = None) -> Discovery:
    """The same, but instead of asking anybody it hears these answers."""

    async def ask_all(addresses: Any, *commands: Any) -> list[Any]:
        addresses = list(addresses)
        if by_whom is not None:
            return [(address, by_whom[address]) for address in addresses if address in by_whom]
        return list(zip(addresses, answers, strict=False))

    discovery.query = ask_all  # type: ignore[method-assign]
    return discovery


def view(listed: tuple[str, int], epoch: int, flags: str = "master", named: tuple[str, int] | None = None) -> list[Any]:
    """What a sentinel answers to both questions."""
    state = {"name": "budgets", "ip": listed[0], "port": listed[1], "flags": flags, "config-epoch": epoch}
    words = [str(word).encode() for pair in state.items() for word in pair]
    host, port = named or listed
    return [words, [host.encode(), str(port).encode()]]


async def found_by_sentinels(*answers: Any) -> Any:
    return await answering(SentinelDiscovery(SENTINELS), *answers).find(None)


async def test_the_sentinel_that_has_seen_the_last_failover_is_believed():
    assert await found_by_sentinels(view(OLD, 1), view(NEW, 2), view(OLD, 1)) == NEW
    assert await found_by_sentinels(view(NEW, 2), view(OLD, 1, "s_down,o_down,master")) == NEW


async def test_a_replica_that_was_promoted_is_the_master_before_the_other_replicas_know():
    promoting = view(OLD, 2, "s_down,o_down,master,failover_in_progress", named=NEW)
    assert await found_by_sentinels(view(OLD, 1, "s_down,o_down,master"), promoting) == NEW


async def test_a_master_of_whom_most_sentinels_say_that_it_is_down_is_none():
    with pytest.raises(PrimaryNotFound, match="down") as missing:
        await found_by_sentinels(view(OLD, 1), view(OLD, 1, "s_down,o_down,master"), view(OLD, 1, "s_down,master"))
    assert missing.value.confirmed
    assert await found_by_sentinels(view(OLD, 1), view(OLD, 1, "s_down,master")) == OLD, "one alone may be wrong"


async def test_errors_are_told_apart_from_silence():
    with pytest.raises(DiscoveryRefused, match="No such master"):
        await found_by_sentinels(TimeoutError(), redis.ResponseError("No such master with that name"))
    with pytest.raises(PrimaryNotFound, match="no sentinel replies") as missing:
        await found_by_sentinels(TimeoutError(), redis.ConnectionError("Error 111 connecting to a:1. Refused"))
    assert not missing.value.confirmed
    assert await found_by_sentinels(redis.ResponseError("NOAUTH"), view(OLD, 1)) == OLD


def slots(owner: tuple[str, int], first: int = 0, last: int = 16383) -> list[Any]:
    """What a node answers: one range, with a replica."""
    host, port = owner
    return [[[first, last, [host.encode(), port, b"id"], [b"10.0.0.9", 6379, b"id"]]]]


async def test_the_nodes_of_a_cluster_are_asked_until_one_names_another_than_the_one_that_failed():
    discovery = ClusterDiscovery(NODES, slot=7)
    answering(discovery, by_whom={("a", 1): slots(OLD), ("b", 2): slots(NEW)})
    assert await discovery.find(OLD) == NEW
    assert ("10.0.0.9", 6379) in discovery.nodes, "to be asked the next time"
    discovery = answering(ClusterDiscovery(NODES, slot=7), slots(OLD), slots(OLD))
    assert await discovery.find(OLD) == OLD, "it was but a connection"


async def test_the_node_that_failed_is_asked_itself_if_nobody_else_answers():
    discovery = ClusterDiscovery(parse_url("redis+cluster://a:1"), slot=7)
    answering(discovery, by_whom={("a", 1): slots(("", 1))})
    assert await discovery.find(("a", 1)) == ("a", 1), "a node without a name is where it was asked"


async def test_a_slot_that_nobody_serves_is_told():
    with pytest.raises(PrimaryNotFound, match="no node of the cluster serves slot 7"):
        await answering(ClusterDiscovery(NODES, slot=7), slots(OLD, 8), slots(("?", 1))).find(None)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (ReplyError("MOVED 866 10.0.0.2:6379"), (NEW, False)),
        (ReplyError("ASK 866 10.0.0.2:6379"), (NEW, True)),
        (ReplyError("MOVED 866 ::1:6379"), (("::1", 6379), False)),
        (ReplyError("MOVED 866 :6380"), ((OLD[0], 6380), False)),
        (redis.exceptions.MovedError("866 10.0.0.2:6379"), (NEW, False)),
        (redis.exceptions.AskError("866 10.0.0.2:6379"), (NEW, True)),
        (ReplyError("TRYAGAIN Multiple keys request during rehashing of slot"), None),
        (redis.ConnectionError("MOVED 866 10.0.0.2:6379"), None),
    ],
)
def test_redirections_are_read_in_the_words_of_servers_and_of_the_driver(error, named):
    found = redirection(error)
    assert (found and (found.address(OLD), found.asking)) == named
