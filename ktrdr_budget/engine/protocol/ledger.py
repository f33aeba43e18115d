"""Ledger entries as the store keeps them; ``docs/wire.md`` describes the text of an entry and the numbering."""

from __future__ import annotations

import re
from typing import Any, NamedTuple, cast

from ktrdr_budget.engine.protocol.hold_record import scope_fields, unword
from ktrdr_budget.errors import InvalidArgument
from ktrdr_budget.models import LedgerEntry
from ktrdr_budget.money import from_units
from ktrdr_budget.periods import from_ms

__all__ = ["StoredEntry", "entry_cursor", "parse_entry", "public_entry"]

_SUMMARY = "carried"


class StoredEntry(NamedTuple):
    """One entry of a ledger, in whole units."""

    time_us: int
    units: int
    kind: str
    hold_id: str
    """Empty if the entry belongs to no hold."""
    operation: str
    trace_id: str
    trimmed_count: int
    """For a summary of trimmed entries: how many entries it replaces. For any other entry: 0."""
    scope: str = ""
    """The fields of the scope as text; empty if there are none."""


def parse_entry(stored: bytes | str) -> StoredEntry:
    """Read the text of an entry.

    Raises:
        ValueError: the text is not a ledger entry.
    """
    text = stored.decode() if isinstance(stored, bytes) else stored
    time_us, units, kind, hold_id, operation, trace_id, scope = text.split(" ")
    trimmed_count = int(hold_id) if kind == _SUMMARY and hold_id.isdecimal() else 0
    hold_id = "" if hold_id == "-" or trimmed_count else hold_id
    scope = "" if scope == "-" else scope
    labels = unword(operation), unword(trace_id)
    return StoredEntry(int(time_us), int(units), kind, hold_id, *labels, trimmed_count, scope)


def public_entry(entry: StoredEntry, number: int, unit: str) -> LedgerEntry:
    """An entry in the form that limiters return.

    Args:
        number: the entry's number in its ledger, from 1. It is ignored for a summary of trimmed entries.
        unit: the unit of the entry's budget.
    """
    return LedgerEntry(
        entry_id="" if entry.trimmed_count else str(number),
        at=from_ms(entry.time_us // 1000),
        kind=cast(Any, entry.kind),
        hold_id=entry.hold_id,
        amount=from_units(entry.units, unit),
        operation=entry.operation,
        trace_id=entry.trace_id,
        scope=scope_fields(entry.scope),
    )


def entry_cursor(cursor: str | None) -> str:
    """Check a cursor: the number of the entry that follows the page. The result is empty for the first page.

    Raises:
        InvalidArgument: the cursor is not the number of an entry.
    """
    if cursor is None:
        return ""
    if not isinstance(cursor, str) or not re.fullmatch(r"[1-9]\d{0,15}", cursor, re.ASCII):
        raise InvalidArgument("invalid cursor: use the one that the previous page returned")
    return cursor
