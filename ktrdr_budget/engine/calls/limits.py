"""Limits that are set at run time, and the migration of budget definitions."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from ktrdr_budget.engine.calls.context import CallContext, Flow, checked_label
from ktrdr_budget.engine.calls.read import status
from ktrdr_budget.engine.calls.results import definition_conflict
from ktrdr_budget.engine.protocol.keys import stored_window
from ktrdr_budget.engine.protocol.replies import OtherDefinition
from ktrdr_budget.engine.protocol.requests import (
    definition_read,
    parse_migrate,
    parse_set_limit,
    parse_text,
)
from ktrdr_budget.engine.protocol.requests import (
    migrate as migrate_command,
)
from ktrdr_budget.engine.protocol.requests import (
    set_limit as set_limit_command,
)
from ktrdr_budget.errors import InvalidArgument, shown
from ktrdr_budget.models import Budget, Migration, Status
from ktrdr_budget.money import AmountIn, to_units
from ktrdr_budget.periods import to_ms, window_at

__all__ = ["clear_limit", "migrate", "set_limit"]

logger = logging.getLogger("ktrdr_budget")


def set_limit(
    context: CallContext,
    name: str,
    limit: AmountIn | None,
    until: datetime | str | None,
    by: str = "",
    reason: str = "",
) -> Flow[Status]:
    """Set the limit of a budget at run time, for all replicas.

    Args:
        until: when the limit ends; ``"window"``: at the end of the current window; ``None``: never.
        by: who sets it, and why (``reason``), for the log of changes.
    """
    budget, by, reason = context.state.budget(name), checked_label(by), checked_label(reason)
    units = None if limit is None else to_units(limit, budget.unit, round_down=True)
    if until is not None and until != "window" and (not isinstance(until, datetime) or until.utcoffset() is None):
        raise InvalidArgument(f"until must be an aware datetime, 'window' or None, not {shown(until)}")
    while True:
        yield from status(context, [name])  # reads the store's clock, by which _until_ms judges the time
        until_ms = _until_ms(context, budget, until)
        changed_us = yield from _change_limit(context, budget, units, until_ms, by, reason)
        context.state.journal.limit_changed(budget, units, until_ms, changed_us)
        [now] = yield from status(context, [name])
        if until != "window" or now.resets_at is None or to_ms(now.resets_at) == until_ms:
            return now


def clear_limit(context: CallContext, name: str, by: str = "", reason: str = "") -> Flow[Status]:
    """Clear the limit that was set at run time, so that the configured limit applies again."""
    budget, by, reason = context.state.budget(name), checked_label(by), checked_label(reason)
    changed_us = yield from _change_limit(context, budget, None, 0, by, reason, clear=True)
    context.state.journal.limit_cleared(budget, changed_us)
    return (yield from status(context, [name]))[0]


def _change_limit(
    context: CallContext,
    budget: Budget,
    units: int | None,
    until_ms: int,
    by: str,
    reason: str,
    *,
    clear: bool = False,
) -> Flow[int]:
    """Set or clear a limit; return the time of the change by the store's clock, in microseconds."""
    keys = context.state.keys
    reply = yield set_limit_command(keys, budget.name, units, until_ms, budget.definition, by, reason, clear=clear)
    result = parse_set_limit(reply, budget.name)
    if isinstance(result, OtherDefinition):
        raise definition_conflict(budget, result.registered)
    return result


def _until_ms(context: CallContext, budget: Budget, until: datetime | str | None) -> int:
    now_ms = context.state.now_ms()
    if until is None:
        return 0
    if not isinstance(until, datetime):
        return window_at(budget.period, budget.timezone, now_ms).end_ms or 0
    until_ms = to_ms(until.astimezone(UTC))
    if until_ms <= now_ms:
        raise InvalidArgument(f"until lies in the past: {until.isoformat()}")
    return until_ms


def migrate(context: CallContext, name: str) -> Flow[Migration]:
    """Replace the registered definition of a budget by the definition of this replica.

    If both definitions are the same, nothing changes.
    """
    state = context.state
    budget, keys = state.budget(name), state.keys
    before: str | None = None
    while True:
        head, items = yield definition_read(keys, state.replica_id, name)
        registered = parse_text(items)
        there = _registered_budget(budget, registered)
        before = (registered and there.identity) if before is None else before
        if registered == budget.definition:  # from the start, or by an attempt whose reply was lost
            return Migration(name, before or None, budget.identity)
        span = window_at(there.period, there.timezone, head.now_ms)
        window = keys.window(name, stored_window(span.name, there.definition))
        reply = yield migrate_command(
            keys,
            name,
            registered,
            budget.definition,
            window,
            start_ms=span.start_ms,
            end_ms=span.end_ms or 0,
            drop=there.unit != budget.unit,
        )
        if (dropped := parse_migrate(reply)) is not None:
            logger.warning(
                "definition of budget %s registered: %s; before: %s", name, budget.identity, before or "none"
            )
            return Migration(name, before or None, budget.identity, limit_cleared=dropped)


def _registered_budget(budget: Budget, registered: str) -> Budget:
    """The budget as it is registered in the store, or as this replica defines it if none is registered."""
    if not registered:
        return budget
    try:
        unit, period, timezone, kind = registered.split(",")
        return Budget(budget.name, None, unit=unit, period=period, timezone=timezone, kind=kind)
    except ValueError:
        way_out = "a version that supports the registered definition can replace it"
        raise definition_conflict(budget, registered, way_out) from None
