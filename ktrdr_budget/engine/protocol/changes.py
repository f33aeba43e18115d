"""The log of changes as the store keeps it; ``docs/wire.md`` describes the text of an entry."""

from __future__ import annotations

from typing import Any, cast

from ktrdr_budget.engine.protocol.hold_record import unword
from ktrdr_budget.models import Change
from ktrdr_budget.money import format_amount, from_units
from ktrdr_budget.periods import from_ms

__all__ = ["parse_change"]


def parse_change(text: str) -> Change:
    """Read the text of an entry.

    Raises:
        ValueError: the text is not an entry of the log.
    """
    number, time_us, kind, name, *words = text.split(" ")
    by, before, after, reason = map(unword, words)
    if kind == "limit":
        before, after = _limit_text(before), _limit_text(after)
    elif kind == "key":
        before, after = _key_text(before), _key_text(after)
    at = from_ms(int(time_us) // 1000)
    return Change(int(number), at, cast(Any, kind), name, by, before, after, reason)


def _limit_text(stored: str) -> str:
    """Format a limit, ``limit,until_ms,unit`` as ``lua/set_limit.lua`` writes it. An empty text is no limit."""
    if not stored:
        return ""
    units, until_ms, unit = stored.split(",")
    limit = format_amount(None if units == "-" else from_units(int(units), unit), unit)
    return limit if until_ms == "0" else f"{limit} until {_instant_text(int(until_ms))}"


def _key_text(stored: str) -> str:
    """Format a key, ``rights;expires_ms;scope;may_set`` as ``lua/create_key.lua`` writes it; an empty text is none."""
    if not stored:
        return ""
    rights, expires_ms, scope, may_set = stored.split(";")
    words = [rights]
    words += [f"scope {scope}"] if scope != "-" else []
    words += [f"may set {may_set}"] if may_set != "-" else []
    words += [f"until {_instant_text(int(expires_ms))}"] if expires_ms != "0" else []
    return "; ".join(words)


def _instant_text(instant_ms: int) -> str:
    return from_ms(instant_ms).isoformat(timespec="milliseconds" if instant_ms % 1000 else "seconds")[:-6] + "Z"
