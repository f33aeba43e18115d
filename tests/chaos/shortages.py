"""Rows of the table: a store without memory, disk space or a correct clock."""

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
    """`maxmemory` is reached repeatedly, and removed again."""
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
    """A limit on the size of the append-only file, for a while: each write fails as on a full disk."""
    server = bench.server(
        "--appendonly", "yes", "--appendfsync", "everysec", binary=_server_that_ignores_sigxfsz(bench.directory)
    )
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
        _wait_writable(client)


def _server_that_ignores_sigxfsz(directory: Path) -> str:
    """A script that starts the server so that a write above the file size limit fails, but does not kill the server."""
    script = directory / "server"
    script.write_text(f"#!/bin/sh\ntrap '' XFSZ\nexec '{valkey_binary()}' \"$@\"\n")
    script.chmod(0o755)
    return str(script)


def _wait_writable(client: redis.Redis) -> None:
    ends = time.monotonic() + 10
    while time.monotonic() < ends:
        with suppress(redis.ResponseError):
            client.delete("nothing")
            return
        time.sleep(0.05)


def the_clock_jumps(bench: Bench) -> None:
    """Jumps by hours, ahead and back: over midnight, and over every deadline."""
    server = bench.server()
    bench.terms.steady_clock, bench.terms.midnight_ns = False, None
    bench.spend(server.url, server.client)
    origin_s = highest_s = server.offset_s
    for _ in bench.turns(0.2, 0.8):
        server.advance(origin_s + bench.random.uniform(-8, 8) * 3600 - server.offset_s)
        highest_s = max(highest_s, server.offset_s)
        bench.fault()
    server.advance(
        highest_s + 5 - server.offset_s
    )  # otherwise holds granted at the highest time would be open for hours


ROWS = [
    Row("memory", "`maxmemory` reached", "explicit errors, no wrong admission, recovery", memory_runs_out, 12, 2.5),
    Row("disk", "disk full", "explicit errors, no wrong admission, recovery", the_disk_is_full, 12, 3),
    Row("clock", "clock of the server jumps", "no wrong admission", the_clock_jumps, 12, 2),
]
