"""The names of keys, and the names of windows in keys and hold records; defined nowhere else.

All keys of a tenant carry its name as hash tag, so they share one slot of a cluster: a reservation over many budgets
stays atomic, and tenants spread over shards.

The store names a window by its period's name and a fingerprint of the budget's definition: ``2026-11-30~k3f9a1``.
Windows of different definitions have different keys, so they cannot be confused even if they begin and end at the same
time. A budget whose definition is changed back continues in its old window. Outside of the store a window is
``2026-11-30``.
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
    """The name in the store of a budget's window: ``2026-11-30~k3f9a1``."""
    return f"{window}~{fingerprint(definition)}"


def public_window(stored: str) -> str:
    """The name outside of the store: ``2026-11-30``."""
    return stored.partition("~")[0]


def split_name(name: str) -> tuple[str, str]:
    """Budget and stored window of ``budget:window``, as keys and hold records have it."""
    budget, _, window = name.rpartition(":")
    return budget, window


class Keys:
    """The keys of one tenant."""

    __slots__ = (
        "budgets",
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
        """The fixed keys of a write script; the keys of windows follow."""
        self.hold_prefix = self.prefix + "h:"
        self.cycles = tuple(f"{self.prefix}cycles:{part}" for part in ("active", "ended", "order"))
        self.trial = tuple(f"{self.prefix}trial:{kind}" for kind in ("hash", "zset", "list", "string"))

    def hold(self, hold_id: str) -> str:
        """The key of the record of a hold, or of a recorded spend."""
        return self.hold_prefix + hold_id

    def window(self, budget: str, window: str) -> str:
        """The key of a window's sums; ``window`` is the store's name of it."""
        return f"{self.prefix}w:{budget}:{window}"

    def ledger(self, budget: str, window: str) -> str:
        """The key of a window's ledger."""
        return f"{self.prefix}l:{budget}:{window}"
