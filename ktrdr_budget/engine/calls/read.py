"""Read the figures of budgets, holds and ledgers."""

from __future__ import annotations

from collections.abc import Sequence

from ktrdr_budget.engine.calls.context import RETIRE_ROUNDS_MAX, CallContext, Flow
from ktrdr_budget.engine.calls.results import holds_cursor, page_size, status_of
from ktrdr_budget.engine.protocol.codes import OPEN, UNCONFIRMED
from ktrdr_budget.engine.protocol.hold_record import HoldRecord
from ktrdr_budget.engine.protocol.keys import stored_window
from ktrdr_budget.engine.protocol.ledger import entry_cursor, parse_entry, public_entry
from ktrdr_budget.engine.protocol.requests import (
    WindowFigures,
    index_read,
    ledger_read,
    parse_ids,
    parse_ledger_page,
    parse_status,
    status_read,
)
from ktrdr_budget.engine.protocol.window import Window
from ktrdr_budget.errors import BudgetError, DefinitionConflict, StoreError, StoreUnavailable, UnknownHold
from ktrdr_budget.models import Budget, HoldView, LedgerEntry, Page, Status, Statuses, check_name
from ktrdr_budget.periods import window_named

__all__ = ["hold_view", "holds", "ledger", "status", "statuses"]

_PAGE_MAX = 1000


def status(context: CallContext, names: Sequence[str], *, complete: bool = False) -> Flow[list[Status]]:
    """Read the figures of budgets.

    Holds past their deadline are made unconfirmed first, so that the figures count these holds as unconfirmed.

    Args:
        complete: whether to wait while replicas may still replay data that the store has lost. If not, the figures may
            lack that data.

    Raises:
        DefinitionConflict: another definition of a budget is registered.
        StoreError: a window cannot be read.
    """
    found = yield from _read_budgets(context, [context.state.budget(name) for name in names], complete)
    for each in found:
        if not isinstance(each, Status):
            raise each
    return [each for each in found if isinstance(each, Status)]


def statuses(context: CallContext, *, complete: bool = False) -> Flow[Statuses]:
    """Read the figures of all budgets. A budget whose figures are unknown does not hide the others."""
    budgets = context.state.budgets
    found = yield from _read_budgets(context, [*budgets.values()], complete)
    unavailable = {name: each for name, each in zip(budgets, found, strict=True) if not isinstance(each, Status)}
    return Statuses([each for each in found if isinstance(each, Status)], unavailable)


def _read_budgets(context: CallContext, budgets: Sequence[Budget], complete: bool) -> Flow[list[Status | BudgetError]]:
    """Each budget's figures, or the reason why they are unknown."""
    state = context.state
    rounds, due_before = 0, list[str]()
    while True:
        windows = [state.current_window(budget.name) for budget in budgets]
        head, items = yield status_read(state.keys, state.replica_id, windows, complete=complete)
        if not all(window.span.contains(head.now_ms) for window in windows):
            continue
        due, figures = parse_status(items)
        rounds += 1
        if not due or due == due_before or rounds == RETIRE_ROUNDS_MAX:
            break
        due_before = due
        yield from context.retire(due)
    found: list[Status | BudgetError] = []
    for budget, window, each in zip(budgets, windows, figures, strict=True):
        result = _status_or_error(context, budget, window, each, head.now_us, head.recovering_until_ms)
        if isinstance(result, Status) and isinstance(each, WindowFigures):
            state.journal.limit_seen(budget, each.runtime, head.now_us)
        found.append(result)
    return found


def _status_or_error(
    context: CallContext,
    budget: Budget,
    window: Window,
    figures: WindowFigures | str,
    now_us: int,
    repaired_ms: int,
) -> Status | BudgetError:
    if isinstance(figures, str):
        return StoreError(f"budget {budget.name!r} cannot be read: {figures}")
    try:
        return status_of(budget, window, figures, now_us, repaired_ms, context.state.claim)
    except DefinitionConflict as error:
        return error


def hold_view(context: CallContext, hold_id: str) -> Flow[HoldView]:
    """Read a hold by id."""
    check_name(hold_id, "id")
    if context.policy.owns(hold_id):
        context.policy.expire()
        return context.policy.holds[hold_id].offline_view().view(hold_id)
    try:
        return (yield from context.read_hold(hold_id)).view(hold_id)
    except (StoreUnavailable, UnknownHold):
        context.policy.expire()
        hold = context.offline_hold(hold_id)
        if hold is None:
            raise
        return hold.offline_view().view(hold_id)


def holds(context: CallContext, name: str, limit: int, cursor: str | None) -> Flow[Page[HoldView]]:
    """Read the open and unconfirmed holds of a budget, the latest deadline first."""
    state = context.state
    budget = state.budget(name)
    page_size(limit)
    index, offset = holds_cursor(cursor)
    yield from _read_budgets(context, [budget], False)  # makes holds past their deadline unconfirmed
    found: list[HoldView] = []
    indexes = (state.keys.due, state.keys.unconfirmed)
    while index < len(indexes):
        _, items = yield index_read(state.keys, state.replica_id, indexes[index], offset, _PAGE_MAX)
        ids = parse_ids(items)
        records = (yield from context.read_records(ids)) if ids else []
        for hold_id, record in zip(ids, records, strict=True):
            if len(found) == limit:
                return Page(tuple(found), f"{index}-{offset}")
            offset += 1
            if record and _is_listed(record, name):
                found.append(record.view(hold_id))
        if len(ids) < _PAGE_MAX:
            index, offset = index + 1, 0
    return Page(tuple(found), None)


def _is_listed(record: HoldRecord, name: str) -> bool:
    listed = record.state in (OPEN, UNCONFIRMED)
    return listed and any(segment.budget == name for segment in record.segments)


def ledger(
    context: CallContext, name: str, window: str | None, limit: int, cursor: str | None
) -> Flow[Page[LedgerEntry]]:
    """Read the ledger of a window, newest entry first.

    Args:
        window: the name of the window; ``None``: the current window.
    """
    state = context.state
    budget = state.budget(name)
    page_size(limit)
    before = entry_cursor(cursor)
    if window is None:
        [now] = yield from status(context, [name])
        window = now.window
    window_named(budget.period, budget.timezone, window)
    stored = stored_window(window, budget.definition)
    _, items = yield ledger_read(state.keys, state.replica_id, name, stored, before, limit)
    trimmed, number, texts = parse_ledger_page(items)
    entries = [public_entry(parse_entry(text), number + n, budget.unit) for n, text in enumerate(texts)]
    more = number > 1 and entries and entries[0].entry_id  # neither the first entry nor a summary
    return Page(tuple(reversed(entries)), str(number) if more else None, trimmed=trimmed)
