"""The contents of a store, read without the package."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, NamedTuple

import redis

from ktrdr_budget.engine.protocol.keys import fingerprint

PERSISTENT = ("meta", "limits", "due", "unconfirmed", "changes")
"""The keys of a tenant that have a bounded size and no expiry, like windows and ledgers named `ever`."""


class Entry(NamedTuple):
    """An entry of a ledger, as stored."""

    time_us: int
    units: int
    kind: str
    hold_id: str
    operation: str
    trace_id: str
    scope: str


def ledger_entries(client: redis.Redis, key: str) -> list[Entry]:
    """The entries of a ledger, oldest first."""
    return [entry_of(text) for text in client.lrange(key, 0, -1)]


def entry_of(text: str) -> Entry:
    """An entry from its text."""
    time_us, units, *labels = text.split(" ")
    return Entry(int(time_us), int(units), *labels)


def dump(client: redis.Redis) -> dict[str, tuple[str, Any, int]]:
    """Every key with its type, its value and its expiry time in milliseconds (-1: none)."""
    return {key: _value(client, key) for key in sorted(client.scan_iter(count=1000))}


def _value(client: redis.Redis, key: str) -> tuple[str, Any, int]:
    kind = client.type(key)
    read = {
        "string": client.get,
        "hash": lambda key: sorted(client.hgetall(key).items()),
        "zset": lambda key: client.zrange(key, 0, -1, withscores=True),
        "list": lambda key: client.lrange(key, 0, -1),
    }
    return kind, read[kind](key), client.pexpiretime(key)


def immortal_keys(client: redis.Redis) -> list[str]:
    """Keys without an expiry that should have one (P7)."""
    keys = list(client.scan_iter(count=1000))
    pipeline = client.pipeline(transaction=False)
    for key in keys:
        pipeline.pttl(key)
    found = [key for key, ttl_ms in zip(keys, pipeline.execute(), strict=True) if ttl_ms == -1]
    return [key for key in found if public(key.rpartition(":")[2]) not in (*PERSISTENT, "ever")]


def public(window: str) -> str:
    """A window's public name: without the fingerprint of its definition."""
    return window.partition("~")[0]


def window_key(client: redis.Redis, budget: str = "agent", window: str | None = None) -> str:
    """The key of a budget's stored window, whatever its definition is.

    If no such window is stored: the key of a daily window in dollars (UTC).
    """
    prefix = f"ktrdr:{{default}}:w:{budget}:{window or today(client)}"
    found = list(client.scan_iter(f"{prefix}~*", count=1000))
    assert len(found) <= 1, found
    return found[0] if found else f"{prefix}~{fingerprint('usd,day,UTC,spend')}"


def ledger_key(client: redis.Redis, budget: str = "agent", window: str | None = None) -> str:
    """The key of the window's ledger."""
    return window_key(client, budget, window).replace(":w:", ":l:", 1)


def today(client: redis.Redis) -> str:
    """The day (UTC) by the store's clock."""
    return f"{datetime.fromtimestamp(client.time()[0], UTC):%Y-%m-%d}"


def sums(client: redis.Redis, budget: str = "agent", window: str | None = None) -> dict[str, int]:
    """A window's figures, in units: spent, held, unconfirmed, events; 0 where nothing is stored."""
    names = ("spent", "held", "unconfirmed", "events")
    stored = client.hmget(window_key(client, budget, window), names)
    return {name: int(value or 0) for name, value in zip(names, stored, strict=True)}


def counted(client: redis.Redis, budget: str = "agent", window: str | None = None) -> int:
    """The units of a window that count against its limit."""
    found = sums(client, budget, window)
    return found["spent"] + found["held"] + found["unconfirmed"]


def ledger_sum(client: redis.Redis, budget: str = "agent", window: str | None = None) -> int:
    """The sum of a window's ledger, in units."""
    return sum(entry.units for entry in ledger_entries(client, ledger_key(client, budget, window)))


def units_of_windows(client: redis.Redis, budget: str) -> list[int]:
    """The units that each window of a budget counts, whatever its definition is; windows at zero are left out."""
    found = []
    for key in client.scan_iter(f"ktrdr:{{default}}:w:{budget}:*", count=1000):
        found.append(sum(int(units or 0) for units in client.hmget(key, "spent", "held", "unconfirmed")))
    return [units for units in found if units]


def spent_and_held(client: redis.Redis, budget: str = "agent") -> tuple[int, int]:
    """Spent and held, in units; fail if anything is unconfirmed, or if the ledger differs from ``spent``."""
    found = sums(client, budget)
    assert found["unconfirmed"] == 0
    assert ledger_sum(client, budget) == found["spent"]
    return found["spent"], found["held"]
