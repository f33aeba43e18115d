"""Convert replies to the models and errors of the public API."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from ktrdr_budget.engine.protocol import codes
from ktrdr_budget.engine.protocol.hold_record import HoldRecord
from ktrdr_budget.engine.protocol.operations import Extend, Operation, RecordSpend, Release, Reserve
from ktrdr_budget.engine.protocol.replies import Denied
from ktrdr_budget.engine.protocol.requests import WindowFigures
from ktrdr_budget.engine.protocol.scripts import without_script_location
from ktrdr_budget.engine.protocol.window import Window
from ktrdr_budget.errors import DefinitionConflict, HoldConflict, InvalidArgument, shown
from ktrdr_budget.models import Budget, Denial, Status, identity_of
from ktrdr_budget.money import MAX_UNITS, Amount, format_amount, from_units
from ktrdr_budget.periods import from_ms

__all__ = [
    "amounts_of",
    "amounts_text",
    "conflict_error",
    "definition_conflict",
    "denial",
    "eviction_fault",
    "holds_cursor",
    "outdated_definition",
    "page_size",
    "refusal_faults",
    "status_of",
]

_PAGE_MAX = 1000
_STORE_FAULTS = {
    "READONLY": "it is a read-only replica",
    "OOM": "it is full",
    "MISCONF": "it cannot write to its disk",
    "NOREPLICAS": "it has too few replicas",
}
"""Faults of the whole store, by the first word of the error."""
_AMOUNTS_SHOWN = 3

# -- denials and conflicts ---------------------------------------------------------------------------------------------


def denial(window: Window, denied: Denied, now_us: int, unit: str) -> Denial:
    """The denial of a request for which a window has no room.

    The reason is ``exceeds_limit`` if even an empty window has no room for the request. The reason is ``budget_held``
    if the request would fit once all open holds were released. Otherwise, the reason is ``budget_exhausted``.
    """
    limit = MAX_UNITS - 1 if denied.limit is None else denied.limit
    spent, held, unconfirmed, requested = denied.spent, denied.held, denied.unconfirmed, denied.requested
    if max(requested, denied.total) > limit:
        reason = "exceeds_limit"
    elif spent + unconfirmed + requested <= limit:
        reason = "budget_held"
    else:
        reason = "budget_exhausted"
    counted = spent + held + unconfirmed
    remaining = 0 if counted >= MAX_UNITS else max(0, limit - counted)

    def out(units: int) -> Amount:
        return from_units(units, unit)

    return Denial(
        budget=window.budget,
        reason=reason,
        limit=out(limit),
        spent=out(spent),
        held=out(held),
        unconfirmed=out(unconfirmed),
        remaining=out(remaining),
        requested=out(requested),
        fits=out(remaining),
        retry_after=_retry_after_s(reason, window.span.end_ms, denied.first_deadline_ms, now_us),
        unit=unit,
    )


def _retry_after_s(reason: str, end_ms: int | None, deadline_ms: int, now_us: int) -> int | None:
    """Seconds until a retry may succeed, rounded up; ``None`` if waiting cannot help."""
    if reason == "exceeds_limit":
        return None
    candidates = [] if end_ms is None else [end_ms]
    if reason == "budget_held" and deadline_ms:
        candidates.append(deadline_ms)
    if not candidates:
        return None
    return max(1, -((now_us - min(candidates) * 1000) // 1_000_000))


def definition_conflict(budget: Budget, registered: str, way_out: str = "") -> DefinitionConflict:
    """The error for a budget whose registered definition differs from this replica's."""
    there, here = identity_of(registered), budget.identity
    words = f"budget {budget.name!r} is registered with {there}; this replica defines {here}"
    way_out = way_out or f"to replace the registered definition: ktrdr budget migrate {budget.name}"
    return DefinitionConflict(f"{words}; {way_out}", registered=there, configured=here)


def outdated_definition(hold_id: str, name: str, registered: str) -> DefinitionConflict:
    """The error for growing a hold whose budget was redefined after the reservation."""
    there = identity_of(registered)
    words = f"budget {name!r} has been redefined since hold {hold_id!r} was granted ({there})"
    return DefinitionConflict(f"{words}; the hold can be settled and extended, but cannot grow", registered=there)


def conflict_error(op: Operation, record: HoldRecord, budgets: Mapping[str, Budget]) -> HoldConflict:
    """The error for a request that conflicts with its hold: ``… was already committed at $0.07; it cannot be
    released``.

    Args:
        record: the record of the hold in the store.
        budgets: the configured budgets, for their units.
    """
    settled = record.state in (codes.COMMITTED, codes.RECORDED)
    parts = [segment for segment in record.segments if segment.flag != codes.SLOTS] or record.segments
    amounts = amounts_text(
        {
            segment.budget: (
                segment.charged if settled else segment.reserved,
                budgets[segment.budget].unit if segment.budget in budgets else codes.FLAGS[segment.flag],
            )
            for segment in parts
        }
    )
    match record.state:
        case codes.RECORDED:
            found = f"was recorded at {amounts}"
        case codes.COMMITTED:
            found = f"was already committed at {amounts}"
        case codes.RELEASED_BY_OPERATOR:
            found = "was released by an operator"
        case codes.RELEASED:
            found = "was already released"
        case _:
            found = f"was reserved at {amounts} and is {codes.STATES[record.state]}"
    match op:
        case Reserve() | RecordSpend():
            refused = "its id cannot be used again with other contents"
        case Release():
            refused = "it cannot be released"
        case Extend():
            refused = "it cannot grow" if op.asks_for_money else "it cannot be extended"
        case _:
            at_another = " at another amount" if record.state == codes.COMMITTED else ""
            refused = f"it cannot be committed{at_another}"
    obeyed = record.state == codes.RELEASED_BY_OPERATOR and isinstance(op, Extend)
    message = f"hold {op.hold_id!r} {found}; {refused}"
    return HoldConflict(message, state=codes.STATES[record.state], released_by_operator=obeyed)


def amounts_text(amounts: Mapping[str, tuple[int, str]]) -> str:
    """A text of amounts: ``$0.07`` for one budget, ``agent $0.07, input 3 tokens`` for several budgets."""
    shown_amounts = {name: format_amount(from_units(units, unit), unit) for name, (units, unit) in amounts.items()}
    if len(shown_amounts) == 1:
        return next(iter(shown_amounts.values()))
    listed = [f"{name} {amount}" for name, amount in shown_amounts.items()]
    more = [f"… ({len(listed)} budgets)"] if len(listed) > _AMOUNTS_SHOWN else []
    return ", ".join(listed[:_AMOUNTS_SHOWN] + more)


def amounts_of(windows: Sequence[Window], units: Sequence[int]) -> dict[str, Amount]:
    """The amounts of a settlement, per budget; all 0 if ``units`` is empty."""
    if len(units) != len(windows):  # the release of a hold that the store does not have
        units = (0,) * len(windows)
    return {window.budget: from_units(amount, window.unit) for window, amount in zip(windows, units, strict=True)}


# -- status ------------------------------------------------------------------------------------------------------------


def status_of(
    budget: Budget,
    window: Window,
    figures: WindowFigures,
    now_us: int,
    repaired_ms: int,
    claim: tuple[int, str],
) -> Status:
    """The status of a budget in one window. In a window without any request, 0 is spent.

    If no limit is set at run time, the configured limit of the replica that started last is in force. If this replica
    started last, its limit is shown even before a reservation has written the limit to the store.

    Args:
        repaired_ms: until when replicas may replay lost data; 0: no replay is pending.
        claim: the time at which this replica started, and the id of this replica.

    Raises:
        DefinitionConflict: another definition of the budget is registered, so these figures are unknown.
    """
    if figures.registered and figures.registered != budget.definition:
        raise definition_conflict(budget, figures.registered)
    there = figures.claim
    is_newest = not figures.has_limit or there is None or there < claim or there[0] > now_us
    limit_units = budget.limit_units if is_newest else figures.limit
    source: Literal["configured", "runtime"] = "configured"
    until_ms = 0
    runtime = figures.runtime
    if runtime is not None and runtime.is_in_force(now_us // 1000):
        source, until_ms, limit_units = "runtime", runtime.until_ms, runtime.units

    def out(units: int) -> Amount:
        return from_units(units, budget.unit)

    return Status(
        budget=budget.name,
        unit=budget.unit,
        kind=budget.kind,
        period=budget.period,
        timezone=budget.timezone,
        window=window.span.name,
        starts_at=from_ms(window.span.start_ms) if window.span.end_ms else None,
        resets_at=window.span.resets_at,
        limit=None if limit_units is None else out(limit_units),
        spent=out(figures.spent),
        held=out(figures.held),
        unconfirmed=out(figures.unconfirmed),
        events=figures.events,
        overruns=figures.overruns,
        limit_source=source,
        limit_until=from_ms(until_ms) if until_ms else None,
        configured_limit=None if budget.limit_units is None else out(budget.limit_units),
        as_of=from_ms(now_us // 1000),
        recovering_until=from_ms(repaired_ms) if repaired_ms else None,
    )


# -- faults of the store -----------------------------------------------------------------------------------------------


def eviction_fault(policy: str) -> str | None:
    """The fault of an eviction policy that may evict budgets; ``None`` for ``noeviction``."""
    if policy == "noeviction":
        return None
    return f"maxmemory-policy is {policy}; it must be noeviction, or budgets may vanish"


def refusal_faults(refused: Sequence[tuple[str, str]]) -> tuple[str | None, str | None]:
    """The faults of the store and of its scripts, derived from the commands that the store refused.

    Args:
        refused: each refused command with its error. If the error is empty, the store's user lacks the permission.
    """
    store_fault, by_error = None, dict[str, list[str]]()
    for command, error in refused:
        fault = next((words for first, words in _STORE_FAULTS.items() if first in error), None)
        if fault is not None:
            store_fault = store_fault or f"{fault}, and refuses {command}: {error}"
        else:
            by_error.setdefault(without_script_location(error), []).append(command)
    missing = by_error.pop("", [])
    faults = [f"the store's user may not run {', '.join(missing)}"] if missing else []
    faults += [f"the store refuses {', '.join(commands)}: {error}" for error, commands in by_error.items()]
    return store_fault, "; ".join(faults) or None


# -- pages -------------------------------------------------------------------------------------------------------------


def page_size(limit: int) -> int:
    """Check the number of items of a page, which is 1 to 1000."""
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= _PAGE_MAX:
        raise InvalidArgument(f"a page has 1 to {_PAGE_MAX} items, not {shown(limit)}")
    return limit


def holds_cursor(cursor: str | None) -> tuple[int, int]:
    """Parse a cursor: the number of an index of holds, and an offset in that index."""
    if cursor is None:
        return 0, 0
    if not isinstance(cursor, str) or not (found := re.fullmatch(r"([01])-(\d{1,9})", cursor, re.ASCII)):
        raise InvalidArgument("invalid cursor: use the one that the previous page returned")
    return int(found[1]), int(found[2])
