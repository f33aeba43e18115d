"""Replies and stored data of the real system in the terms of the reference model: whole units and milliseconds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

import redis

from ..helpers.keyspace import entry_of

NOISE_MS = 50
"""The frozen clock of a server still moves a little: it is ahead by at most this many milliseconds."""
FINGERPRINT = re.compile("~[a-z2-7]{6}")
STAMPS = ("created_at", "expires_at", "resets_at", "limit_until")
STATES = {"o": "open", "x": "unconfirmed", "z": "released", "c": "committed", "r": "released", "n": "recorded"}
PERSISTENT = ("meta", "limits", "due", "unconfirmed", "changes")


def units(amount) -> int | None:
    """Convert decimal dollars to nano-dollars; leave counts unchanged."""
    if isinstance(amount, Decimal):
        exact = Fraction(amount) * 10**9
        assert exact.denominator == 1, amount
        return exact.numerator
    assert amount is None or type(amount) is int, amount
    return amount


def all_units(amounts: Mapping) -> dict[str, int]:
    return {name: units(amount) for name, amount in amounts.items()}


def stamp(instant: datetime | None) -> int | None:
    """Milliseconds since the epoch."""
    if instant is None:
        return None
    assert instant.utcoffset() == timedelta(0)
    return (instant - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def plain(value):
    """A field of a reply in the model's terms."""
    if isinstance(value, datetime):
        return stamp(value)
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    return units(value) if isinstance(value, Decimal) else value


def fields(reply, names) -> dict:
    return {name: plain(getattr(reply, name)) for name in names}


def agree(real: dict, model: dict) -> None:
    """Check that all fields are equal, and instants within ``NOISE_MS``."""
    assert real.keys() == model.keys()
    for name, value in model.items():
        if name in STAMPS and value is not None and real[name] is not None:
            assert abs(real[name] - value) <= NOISE_MS, (name, real, model)
        else:
            assert real[name] == value, (name, real, model)


def retry_after_agrees(real: int | None, model_ms: int | None) -> bool:
    """Whether the real value is the model's, rounded up to whole seconds, and at least one second."""
    if model_ms is None or real is None:
        return real is None and model_ms is None
    return real in {max(1, -(-(model_ms + noise) // 1000)) for noise in (-NOISE_MS, 0, NOISE_MS)}


# -- the store itself --------------------------------------------------------------------------------------------------


EVERYTHING = """
local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kind, value = redis.call('TYPE', key).ok, ''
  if kind == 'string' then value = redis.call('GET', key) end
  if kind == 'hash' then value = redis.call('HGETALL', key) end
  if kind == 'list' then value = redis.call('LRANGE', key, 0, -1) end
  found[#found + 1] = { key, redis.call('PTTL', key), value }
end
return found
"""
"""One atomic read, since a replica may expire holds in the background."""


def pairs(flat: list) -> dict:
    return dict(zip(flat[::2], flat[1::2], strict=True))


class RawStore:
    """The contents of the store, read without the package, to check invariants."""

    def __init__(self, client: redis.Redis, tenant: str = "default") -> None:
        self.prefix = f"ktrdr:{{{tenant}}}:"
        # Windows by their public names: the model has one definition of each budget.
        found = [
            (FINGERPRINT.sub("", key), ttl_ms, FINGERPRINT.sub("", value) if isinstance(value, str) else value)
            for key, ttl_ms, value in client.eval(EVERYTHING, 0)
        ]
        self.ttls = {key: ttl_ms for key, ttl_ms, _ in found}
        assert all(key.startswith(self.prefix) for key in self.ttls), self.ttls
        self.windows = {name: pairs(value) for name, value in self._of("w:", found)}
        self.ledgers = {name: [entry_of(text) for text in value] for name, value in self._of("l:", found)}
        self.holds = dict(self._of("h:", found))

    def _of(self, kind: str, found: list) -> list[tuple]:
        prefix = self.prefix + kind
        return [(key.removeprefix(prefix), value) for key, _, value in found if key.startswith(prefix)]

    def sums(self, window: str) -> dict[str, int]:
        stored = self.windows[window]
        return {name: int(stored.get(name) or 0) for name in ("spent", "held", "unconfirmed")}

    def open_weights(self) -> dict[str, int]:
        """The held units of each window, summed over the records of open holds."""
        weights: dict[str, int] = {}
        for record in self.holds.values():
            head, *segments = record.split("|")
            if not head.startswith("o "):
                continue
            for segment in segments:
                flag, window, _, reserved, accrued, _ = segment.split(",")
                weight = int(reserved) if flag == "s" else max(int(reserved), int(accrued or 0))
                weights[window] = weights.get(window, 0) + weight
        return weights

    def states(self) -> dict[str, tuple[str, int]]:
        """The state and the deadline of each hold, by id; an open hold may be past its deadline."""
        heads = {hold_id: record.split(" ", 3) for hold_id, record in self.holds.items()}
        return {hold_id: (STATES[state], int(deadline)) for hold_id, (state, _, deadline, _) in heads.items()}

    def check_it_adds_up(self) -> None:
        """P11: the sums of every window equal its ledger and its open holds."""
        weights = self.open_weights()
        assert weights.keys() <= self.windows.keys()
        for window in self.windows:
            sums = self.sums(window)
            entered = sum(entry.units for entry in self.ledgers.get(window, []))
            assert sums["spent"] + sums["unconfirmed"] == entered, (window, sums, self.ledgers.get(window))
            assert sums["held"] == weights.get(window, 0), (window, sums, weights)
            assert min(sums.values()) >= 0, (window, sums)

    def check_keys_expire(self) -> None:
        """P7: only keys of a bounded size may lack an expiry."""
        for key, ttl_ms in self.ttls.items():
            name = key.removeprefix(self.prefix)
            lasting = name in PERSISTENT or name.endswith(":ever")
            assert lasting or ttl_ms >= 0, (key, ttl_ms)
