"""The names of the store's keys, and the names of windows in keys and hold records.

All keys of a tenant have the tenant's name as hash tag, so they are in one slot of a cluster. So a reservation in
several budgets is atomic, while different tenants can be on different shards.

The store's name of a window consists of a date or hour and a fingerprint of the budget's definition:
``2026-11-30~k3f9a1``. Windows of different definitions have different keys, so they cannot be confused even if they
begin and end at the same time. If a definition is changed back, the budget continues in its old window. Outside of the
store, the name of the window is ``2026-11-30``.
"""

from __future__ import annotations

import hashlib
from base64 import b32encode
from functools import lru_cache

__all__ = ["Keys", "fingerprint", "public_window", "split_name", "stored_window"]

_FINGERPRINT_LENGTH = 6


@lru_cache(maxsize=4096)
def fingerprint(definition: str) -> str:
    """Six characters that stand for a budget's definition (:attr:`~ktrdr_budget.models.Budget.definition`)."""
    digest = hashlib.sha256(definition.encode()).digest()
    return b32encode(digest)[:_FINGERPRINT_LENGTH].decode().lower()


def stored_window(window: str, definition: str) -> str:
    """The store's name of a window: ``2026-11-30~k3f9a1``."""
    return f"{window}~{fingerprint(definition)}"


def public_window(stored: str) -> str:
    """The name of a window outside of the store: ``2026-11-30``."""
    return stored.partition("~")[0]


def split_name(name: str) -> tuple[str, str]:
    """Split the text ``budget:window`` of a key or hold record into the budget and the store's name of the window."""
    budget, _, window = name.rpartition(":")
    return budget, window


class Keys:
    """The keys of one tenant."""

    __slots__ = (
        "access_ends",
        "access_names",
        "budgets",
        "changes",
        "cycles",
        "due",
        "expiries",
        "hold_prefix",
        "limits",
        "meta",
        "of_writes",
        "prefix",
        "replicas",
        "trial",
        "unconfirmed",
    )

    def __init__(self, tenant: str) -> None:
        self.prefix = f"ktrdr:{{{tenant}}}:"
        self.meta = self.prefix + "meta"
        self.limits = self.prefix + "limits"
        self.due = self.prefix + "due"
        self.unconfirmed = self.prefix + "unconfirmed"
        self.budgets = self.prefix + "budgets"
        self.expiries = self.prefix + "budgets:expiry"
        self.replicas = self.prefix + "replicas"
        listed = self.budgets, self.expiries, self.replicas
        self.of_writes = self.meta, self.limits, self.due, self.unconfirmed, *listed
        """The first keys of each write script. The keys of windows and holds follow."""
        self.changes = self.prefix + "changes"
        self.access_names, self.access_ends = self.prefix + "keys", self.prefix + "keys:ends"
        self.hold_prefix = self.prefix + "h:"
        self.cycles = tuple(f"{self.prefix}cycles:{part}" for part in ("active", "ended", "order"))
        self.trial = tuple(f"{self.prefix}trial:{kind}" for kind in ("hash", "zset", "list", "string"))

    def hold(self, hold_id: str) -> str:
        """The key of the record of a hold, or of a recorded spend."""
        return self.hold_prefix + hold_id

    def access_key(self, digest: str) -> str:
        """The key of the record of an access key. ``digest`` is the SHA-256 digest of its secret."""
        return f"{self.prefix}key:{digest}"

    def window(self, budget: str, window: str) -> str:
        """The key of a window's sums. ``window`` is the store's name of the window."""
        return f"{self.prefix}w:{budget}:{window}"

    def ledger(self, budget: str, window: str) -> str:
        """The key of a window's ledger."""
        return f"{self.prefix}l:{budget}:{window}"
