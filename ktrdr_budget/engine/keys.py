"""The one place that spells keys.

All keys of a tenant carry its name as hash tag, so they share one slot of a cluster: a reservation over many budgets
stays atomic, and tenants spread over shards.
"""

from __future__ import annotations

__all__ = ["Keys"]


class Keys:
    """The keys of one tenant."""

    __slots__ = ("cycles", "due", "hold_prefix", "limits", "meta", "prefix", "unconfirmed")

    def __init__(self, tenant: str) -> None:
        self.prefix = f"ktrdr:{{{tenant}}}:"
        self.meta = self.prefix + "meta"
        self.limits = self.prefix + "limits"
        self.due = self.prefix + "due"
        self.unconfirmed = self.prefix + "unconfirmed"
        self.hold_prefix = self.prefix + "h:"
        self.cycles = tuple(f"{self.prefix}cycles:{part}" for part in ("active", "ended", "order"))

    def hold(self, hold_id: str) -> str:
        """The record of a hold, or of a recorded spend."""
        return self.hold_prefix + hold_id

    def window(self, budget: str, window: str) -> str:
        """The sums of one budget in one period."""
        return f"{self.prefix}w:{budget}:{window}"

    def ledger(self, budget: str, window: str) -> str:
        """The entries that these sums add up from."""
        return f"{self.prefix}l:{budget}:{window}"
