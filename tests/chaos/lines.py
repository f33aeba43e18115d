"""Rows of the table: faults of the network between the replicas and the store."""

from __future__ import annotations

import random
import time

from ..conftest import ClockedServer
from ..helpers.patience import away
from ..helpers.proxy import ThreadedProxy
from .bench import DURABLE, Bench, Row


def _behind_a_line(bench: Bench, *options: str, start: bool = True) -> tuple[ThreadedProxy, ClockedServer]:
    server = bench.server(*options, start=start)
    return bench.enter(ThreadedProxy(server.socket_path, ("127.0.0.1", 0))), server


def replies_are_lost(bench: Bench) -> None:
    """A fifth of all calls loses the request, or the reply after execution; callers and replicas repeat such calls."""
    line, server = _behind_a_line(bench)
    chance = random.Random(bench.figures.seed)
    line.proxy.fate = lambda: chance.choice(("request", "reply", "reply", *(None,) * 12))
    bench.spend(line.url, server.client)
    for _ in bench.turns(0.2, 0.5):
        bench.fault(line.proxy.replies_lost + line.proxy.requests_lost - bench.figures.faults)
    line.proxy.fate = lambda: None


PARTITIONS_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def the_line_is_cut(bench: Bench) -> None:
    """Partitions of 0.1 to 30 s: alternately, connections are closed, or stay open and receive nothing."""
    line, server = _behind_a_line(bench)
    bench.spend(line.url, server.client)
    kinds = [(line.cut, line.mend), (line.freeze, line.thaw)]
    lengths = [seconds for seconds in PARTITIONS_S if seconds < 0.7 * bench.seconds]
    for number, left in enumerate(bench.turns(0.2, 0.6)):
        # Each length once, the longest first; then random short ones.
        seconds = lengths[-1 - number] if number < len(lengths) else bench.random.choice(lengths[:3])
        begin, end = kinds[number % 2]
        begin()
        bench.fault()
        time.sleep(min(seconds, left))
        end()


def the_line_is_slow(bench: Bench) -> None:
    """Delays up to the deadline and beyond, and a trickle of bytes."""
    line, server = _behind_a_line(bench)
    bench.spend(line.url, server.client)
    for _ in bench.turns(0.3, 0.8):
        line.proxy.delay_s = bench.random.choice((0.0, 0.01, 0.1, 0.6, 1.5))
        line.proxy.bytes_per_s = bench.random.choice((0.0, 0.0, 20_000.0))
        bench.fault()
    line.proxy.delay_s = line.proxy.bytes_per_s = 0.0


def the_store_comes_late(bench: Bench) -> None:
    """The store starts after the replicas."""
    line, server = _behind_a_line(bench, *DURABLE, start=False)
    bench.spend(line.url, server.client)
    bench.fault()
    with away(line.url):
        bench.expect_ready(False)
    time.sleep(bench.seconds / 5)  # the delay of the store
    server.start()
    bench.expect_ready(True)
    bench.last(bench.seconds / 2)
    for _ in bench.turns(bench.seconds / 5, bench.seconds / 5):
        pass


ROWS = [
    Row(
        "replies-lost",
        "replies dropped after execution, requests dropped, duplicated attempts",
        "each id applied once; deadlines kept",
        replies_are_lost, 15, 2,
    ),
    Row("line-cut", "partitions of 0.1 to 30 s, half-open connections", "deadlines kept", the_line_is_cut, 55, 4),
    Row("line-slow", "delays up to 1.5 s, a trickle of bytes", "deadlines kept", the_line_is_slow, 15),
    Row("store-late", "store down at start, up later", "starts, not ready, recovers", the_store_comes_late, 8, 3),
]  # fmt: skip
