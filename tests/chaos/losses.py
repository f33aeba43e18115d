"""Rows of the table: data losses of the store, while every replica that has written to it stays alive."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import redis

from .bench import DURABLE, Bench, Row

RECOVERS_S = 3.5
"""Pause after a data loss: the store grants nothing for 3 s, and then grants again before the next loss."""


def everything_is_flushed(bench: Bench) -> None:
    """FLUSHALL."""
    server = bench.server()
    bench.losses_expected = True
    bench.spend(server.url, server.client)
    for left in bench.turns(0.4, 1.2):
        with server.client() as client:  # the epoch of all replicas differs from an empty store's: no grant
            client.flushall()
        bench.fault()
        time.sleep(min(left, RECOVERS_S))


def an_old_snapshot_is_restored(bench: Bench) -> None:
    """The server is killed, and restarts with an old snapshot."""
    server = bench.server()
    bench.losses_expected = True
    bench.spend(server.url, server.client)
    bench.wait_spending()
    with server.client() as client:
        client.save()
    for left in bench.turns(0.4, 1.2):
        bench.terms.excess_max = max(bench.terms.excess_max, bench.counted())
        server.kill()
        server.start()
        bench.fault()
        time.sleep(min(left, RECOVERS_S))
        with server.client() as client:
            client.save()


def the_tail_is_cut_off(bench: Bench) -> None:
    """The server is killed, and restarts without the last part of its append-only file."""
    server = bench.server(*DURABLE)
    bench.losses_expected = True
    bench.spend(server.url, server.client)
    for left in bench.turns(0.4, 1.2):
        bench.terms.excess_max = max(bench.terms.excess_max, bench.counted())
        server.kill()
        _cut(server.directory, bench.random.uniform(0.3, 0.7))
        server.start()
        bench.fault()
        time.sleep(min(left, RECOVERS_S))


def _cut(directory: Path, share: float) -> None:
    [file] = (directory / "appendonlydir").glob("*.incr.aof")
    os.truncate(file, int(file.stat().st_size * (1 - share)))


def scripts_are_flushed(bench: Bench) -> None:
    """SCRIPT FLUSH, which is not a data loss."""
    server = bench.server()
    bench.spend(server.url, server.client)
    for _ in bench.turns(0.02, 0.2):
        with suppress(redis.RedisError), server.client() as client:
            client.script_flush()
            bench.fault()


ROWS = [
    Row("tail-cut", "the same with the tail of its append-only file cut off", "detected and repaired",
        the_tail_is_cut_off, 20, 2.5),
    Row("flushall", "FLUSHALL", "detected and repaired", everything_is_flushed, 20, 2.5),
    Row("snapshot", "restore of an old snapshot", "detected and repaired", an_old_snapshot_is_restored, 20),
    Row("script-flush", "scripts flushed", "no replica notices", scripts_are_flushed, 8),
]  # fmt: skip
