"""Rows of the table: killed processes, and all faults at once."""

from __future__ import annotations

import random
import time

from ..helpers.proxy import ThreadedProxy
from .bench import CLOCKS, DURABLE, Bench, Row


def clients_die(bench: Bench) -> None:
    """Random replicas are killed with `kill -9`; a new replica replaces each killed replica."""
    server = bench.server(*DURABLE)
    bench.spend(server.url, server.client)
    for _ in bench.turns(0.2, 0.8):
        bench.kill_spender()
        bench.fault()
        bench.start_spenders(1, bench.random.choice(CLOCKS))


def the_server_dies(bench: Bench) -> None:
    """kill -9 of the server, which restarts with its complete append-only file: no acknowledged write is lost."""
    server = bench.server(*DURABLE)
    bench.spend(server.url, server.client)
    for _ in bench.turns(0.3, 1.2):
        server.kill()
        bench.fault()
        server.start()


def an_outage_under_allow(bench: Bench) -> None:
    """Outages under policy `allow`: spend during the outage is deferred, and recorded once."""
    server = bench.server(*DURABLE)
    bench.losses_expected = None  # None disables the check of samples: the policy admits above the limit.
    bench.spend(server.url, server.client, on_store_error="allow")
    for left in bench.turns(0.5, 1.5):
        server.kill()
        bench.fault()
        time.sleep(min(left, bench.random.uniform(0.5, 2.0)))
        server.start()


def an_outage_under_lease(bench: Bench) -> None:
    """Outages under policy `lease`: holds are drawn from leases, and the cap holds."""
    server = bench.server(*DURABLE)
    bench.leaves, bench.closes_first = False, True
    bench.terms.prepaid_units = 2 * bench.replicas * 10**9
    bench.spend(server.url, server.client, on_store_error="lease", lease_slab="1.00")
    for left in bench.turns(0.8, 1.5):
        server.kill()
        bench.fault()
        time.sleep(min(left, bench.random.uniform(0.5, 2.0)))
        server.start()


def everything_at_once(bench: Bench) -> None:
    """Kills of replicas and the server; partitions, delays and lost replies; flushed scripts; a full memory."""
    server = bench.server(*DURABLE)
    line = bench.enter(ThreadedProxy(server.socket_path, ("127.0.0.1", 0)))
    chance = random.Random(bench.figures.seed)
    line.proxy.fate = lambda: chance.choice(("request", "reply", *(None,) * 58))
    bench.terms.refusals, bench.clocks = ("StoreError",), CLOCKS

    def kill_replica() -> None:
        bench.kill_spender()
        bench.start_spenders(1, bench.random.choice(CLOCKS))

    def kill_server() -> None:
        server.kill()
        server.start()

    def cut_line() -> None:
        begin, end = bench.random.choice([(line.cut, line.mend), (line.freeze, line.thaw)])
        begin()
        time.sleep(bench.random.choice((0.1, 0.3, 1.0)))
        end()

    def slow_line() -> None:
        line.proxy.delay_s = 0.0 if line.proxy.delay_s else bench.random.choice((0.05, 0.3))

    def fill_memory() -> None:
        with server.client() as client:
            client.config_set("maxmemory", client.info("memory")["used_memory"])
            time.sleep(0.2)
            client.config_set("maxmemory", 0)

    def flush_scripts() -> None:
        with server.client() as client:
            client.script_flush()

    bench.spend(line.url, server.client)
    provoke = (kill_replica, kill_server, cut_line, slow_line, fill_memory, flush_scripts)
    for _ in bench.turns(0.1, 0.5):
        bench.random.choice(provoke)()
        bench.fault()
    line.proxy.fate, line.proxy.delay_s = lambda: None, 0.0
    bench.fault(line.proxy.replies_lost + line.proxy.requests_lost)


ROWS = [
    Row(
        "clients-die",
        "`kill -9` of clients at random",
        "cap; their holds become unconfirmed at the deadline; capacity as the policy says",
        clients_die, 15, 2.5,
    ),
    Row(
        "server-dies",
        "`kill -9` and restart of the server",
        "nothing acknowledged is lost",
        the_server_dies, 15, 2.5,
    ),
    Row(
        "outage-allow",
        "the same under policy `allow`",
        "spend during the outage is recorded, once",
        an_outage_under_allow, 15,
    ),
    Row(
        "outage-lease",
        "the same under policy `lease`",
        "cap; spend of drawn holds is recorded once",
        an_outage_under_lease, 15, 3,
    ),
    Row(
        "everything",
        "clients' clocks off by ± 26 hours; midnight during all of the above",
        "right window; all of the above",
        everything_at_once, 25, 4,
    ),
]  # fmt: skip
