"""Rows of the table: a store that stands, but cannot do what it should."""

from __future__ import annotations

import resource
import time
from contextlib import suppress
from pathlib import Path

import redis

from ..conftest import valkey_binary
from ..helpers.waiting import wait_until
from .bench import Bench, Row

FILES_MAX = resource.RLIM_INFINITY


def memory_runs_out(bench: Bench) -> None:
    """`maxmemory` is reached now and then, and raised again."""
    server = bench.server()
    bench.terms.refusals = ("StoreError",)
    bench.spend(server.url, server.client)
    with server.client() as client:
        for left in bench.turns(0.3, 1.0):
            client.config_set("maxmemory", client.info("memory")["used_memory"])
            bench.fault()
            time.sleep(min(left, bench.random.uniform(0.1, 0.8)))
            client.config_set("maxmemory", 0)


def the_disk_is_full(bench: Bench) -> None:
    """The append-only file may not grow any more, for a while: each write fails as on a full disk."""
    server = bench.server("--appendonly", "yes", "--appendfsync", "everysec", binary=_deaf_to_xfsz(bench.directory))
    bench.terms.refusals = ("StoreError",)
    bench.spend(server.url, server.client)
    assert server.process is not None
    with server.client() as client:
        for left in bench.turns(0.5, 1.2):
            [file] = (server.directory / "appendonlydir").glob("*.incr.aof")
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (file.stat().st_size + 1000, FILES_MAX))
            bench.fault()
            wait_until(lambda: client.info("persistence")["aof_last_write_status"] == "err")
            time.sleep(min(left, bench.random.uniform(0.5, 1.5)))
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (FILES_MAX, FILES_MAX))
        _until_it_writes(client)


def _deaf_to_xfsz(directory: Path) -> str:
    """The server as a process that is not killed for a file that grows too large, but told so by an error."""
    script = directory / "server"
    script.write_text(f"#!/bin/sh\ntrap '' XFSZ\nexec '{valkey_binary()}' \"$@\"\n")
    script.chmod(0o755)
    return str(script)


def _until_it_writes(client: redis.Redis) -> None:
    ends = time.monotonic() + 10
    while time.monotonic() < ends:
        with suppress(redis.ResponseError):
            client.delete("nothing")
            return
        time.sleep(0.05)


def its_clock_jumps(bench: Bench) -> None:
    """By hours, ahead and back: over midnight, and over every deadline."""
    server = bench.server()
    bench.terms.steady_clock, bench.terms.midnight_ns = False, None
    bench.spend(server.url, server.client)
    origin_s = highest_s = server.offset_s
    for _ in bench.turns(0.2, 0.8):
        server.advance(origin_s + bench.random.uniform(-8, 8) * 3600 - server.offset_s)
        highest_s = max(highest_s, server.offset_s)
        bench.fault()
    server.advance(highest_s + 5 - server.offset_s)  # else what was granted then would be open for hours


ROWS = [
    Row("memory", "`maxmemory` reached", "explicit errors, no wrong admission, recovery", memory_runs_out, 12, 2.5),
    Row("disk", "disk full", "explicit errors, no wrong admission, recovery", the_disk_is_full, 12, 3),
    Row("clock", "clock of the server jumps", "no wrong admission", its_clock_jumps, 12, 2),
]
