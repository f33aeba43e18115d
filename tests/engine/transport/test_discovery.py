"""How the replies of sentinels and cluster nodes are compared; the replies are fakes that contradict each other."""

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


def with_replies(discovery: Discovery, *replies: Any, by_source: dict[Any, Any] | None = None) -> Discovery:
    """Replace the queries of a discovery by ``replies`` in the order of the sources, or by those of ``by_source``."""

    async def query(addresses: Any, *commands: Any) -> list[Any]:
        addresses = list(addresses)
        if by_source is not None:
            return [(address, by_source[address]) for address in addresses if address in by_source]
        return list(zip(addresses, replies, strict=False))

    discovery.query = query
    return discovery


def view(listed: tuple[str, int], epoch: int, flags: str = "master", named: tuple[str, int] | None = None) -> list[Any]:
    """A sentinel's replies to SENTINEL MASTER and SENTINEL GET-MASTER-ADDR-BY-NAME."""
    state = {"name": "budgets", "ip": listed[0], "port": listed[1], "flags": flags, "config-epoch": epoch}
    words = [str(word).encode() for pair in state.items() for word in pair]
    host, port = named or listed
    return [words, [host.encode(), str(port).encode()]]


async def find_by_sentinels(*replies: Any) -> Any:
    return await with_replies(SentinelDiscovery(SENTINELS), *replies).find(None)


async def test_if_sentinels_disagree_the_master_with_the_newest_epoch_is_used():
    assert await find_by_sentinels(view(OLD, 1), view(NEW, 2), view(OLD, 1)) == NEW
    assert await find_by_sentinels(view(NEW, 2), view(OLD, 1, "s_down,o_down,master")) == NEW


async def test_a_promoted_replica_is_used_as_the_master_while_the_failover_is_still_in_progress():
    promoting = view(OLD, 2, "s_down,o_down,master,failover_in_progress", named=NEW)
    assert await find_by_sentinels(view(OLD, 1, "s_down,o_down,master"), promoting) == NEW


async def test_a_master_that_sentinels_report_as_objectively_down_is_not_used():
    with pytest.raises(PrimaryNotFound, match="down") as missing:
        await find_by_sentinels(view(OLD, 1), view(OLD, 1, "s_down,o_down,master"), view(OLD, 1, "s_down,master"))
    assert missing.value.confirmed
    assert await find_by_sentinels(view(OLD, 1), view(OLD, 1, "s_down,master")) == OLD, (
        "one sentinel alone may be wrong"
    )


async def test_a_refusal_by_a_sentinel_and_a_missing_reply_raise_different_errors():
    with pytest.raises(DiscoveryRefused, match="No such master"):
        await find_by_sentinels(TimeoutError(), redis.ResponseError("No such master with that name"))
    with pytest.raises(PrimaryNotFound, match="no sentinel replies") as missing:
        await find_by_sentinels(TimeoutError(), redis.ConnectionError("Error 111 connecting to a:1. Refused"))
    assert not missing.value.confirmed
    assert await find_by_sentinels(redis.ResponseError("NOAUTH"), view(OLD, 1)) == OLD


def slots(owner: tuple[str, int], first: int = 0, last: int = 16383) -> list[Any]:
    """A reply to CLUSTER SLOTS: one range, with a replica."""
    host, port = owner
    return [[[first, last, [host.encode(), port, b"id"], [b"10.0.0.9", 6379, b"id"]]]]


async def test_if_any_cluster_node_names_a_new_primary_the_new_primary_is_used():
    discovery = ClusterDiscovery(NODES, slot=7)
    with_replies(discovery, by_source={("a", 1): slots(OLD), ("b", 2): slots(NEW)})
    assert await discovery.find(OLD) == NEW
    assert ("10.0.0.9", 6379) in discovery.nodes, "a source of the next query"
    discovery = with_replies(ClusterDiscovery(NODES, slot=7), slots(OLD), slots(OLD))
    assert await discovery.find(OLD) == OLD, "only a connection had failed"


async def test_if_no_other_cluster_node_replies_the_suspected_primary_is_queried():
    discovery = ClusterDiscovery(parse_url("redis+cluster://a:1"), slot=7)
    with_replies(discovery, by_source={("a", 1): slots(("", 1))})
    assert await discovery.find(("a", 1)) == ("a", 1), "a node without a host name has the host of the source"


async def test_a_slot_without_a_primary_raises_an_error():
    with pytest.raises(PrimaryNotFound, match="no node of the cluster serves slot 7"):
        await with_replies(ClusterDiscovery(NODES, slot=7), slots(OLD, 8), slots(("?", 1))).find(None)


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
def test_redirects_are_parsed_from_error_replies_and_from_redis_py_exceptions(error, named):
    found = redirection(error)
    assert (found and (found.address(OLD), found.asking)) == named
