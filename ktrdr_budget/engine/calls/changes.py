"""Read the log of changes."""

from __future__ import annotations

from ktrdr_budget.engine.calls.context import CallContext, Flow
from ktrdr_budget.engine.calls.results import page_size
from ktrdr_budget.engine.protocol.changes import parse_change
from ktrdr_budget.engine.protocol.ledger import entry_cursor
from ktrdr_budget.engine.protocol.requests import changes_read, parse_changes_page
from ktrdr_budget.models import Change, Page

__all__ = ["changes"]


def changes(context: CallContext, limit: int, cursor: str | None) -> Flow[Page[Change]]:
    """Read the log of changes, newest entry first."""
    state = context.state
    page_size(limit)
    _, items = yield changes_read(state.keys, state.replica_id, entry_cursor(cursor), limit)
    trimmed, more, texts = parse_changes_page(items)
    entries = [parse_change(text) for text in texts]
    return Page(tuple(reversed(entries)), str(entries[0].number) if more else None, trimmed=trimmed)
