"""From figures of the store to the models of the outside."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ktrdr_budget.engine.protocol import FLAGS, STATES, Record, Window
from ktrdr_budget.engine.protocol.scripts import without_script_location
from ktrdr_budget.errors import DefinitionConflict, InvalidArgument, shown
from ktrdr_budget.models import Budget, Denial, Status, identity_of
from ktrdr_budget.money import MAX_UNITS, Amount, format_amount, from_units
from ktrdr_budget.periods import from_ms

__all__ = [
    "amounts_text",
    "conflict",
    "conflict_message",
    "denial",
    "holds_cursor",
    "outdated",
    "page_size",
    "policy_fault",
    "refusal_faults",
    "status_of",
    "told_amounts",
]

_PAGE_MAX = 1000
_STATES = {
    "READONLY": "it is a read-only replica",
    "OOM": "it is full",
    "MISCONF": "it cannot write to its disk",
    "NOREPLICAS": "it has too few replicas",
}
"""What the first word of an error says of the whole store."""


def denial(window: Window, figures: Sequence[str], now_us: int, unit: str) -> Denial:
    """Why a window has no room; ``figures``: limit, spent, held, unconfirmed, requested, first deadline.

    Of a hold that was to grow, what it would have counted then follows.

    The reason is ``exceeds_limit`` if no window of this limit could hold the request, ``budget_held`` if it would fit
    once all open holds were returned, else ``budget_exhausted``.
    """
    limit = MAX_UNITS - 1 if figures[0] == "-" else int(figures[0])
    spent, held, unconfirmed, requested, deadline_ms = map(int, figures[1:6])
    if max([requested, *map(int, figures[6:])]) > limit:
        reason = "exceeds_limit"
    elif spent + unconfirmed + requested <= limit:
        reason = "budget_held"
    else:
        reason = "budget_exhausted"
    closed = spent + held + unconfirmed >= MAX_UNITS
    remaining = 0 if closed else max(0, limit - spent - held - unconfirmed)

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
        retry_after=_retry_after(reason, window.span.end_ms, deadline_ms, now_us),
        unit=unit,
    )


def _retry_after(reason: str, end_ms: int | None, deadline_ms: int, now_us: int) -> int | None:
    """Whole seconds, rounded up; ``None`` when waiting cannot help."""
    if reason == "exceeds_limit":
        return None
    candidates = [] if end_ms is None else [end_ms]
    if reason == "budget_held" and deadline_ms:
        candidates.append(deadline_ms)
    if not candidates:
        return None
    return max(1, -((now_us - min(candidates) * 1000) // 1_000_000))


def conflict(budget: Budget, registered: str, way_out: str = "") -> DefinitionConflict:
    """The error of a replica that defines a budget otherwise than it is registered."""
    there, here = identity_of(registered), budget.identity
    words = f"budget {budget.name!r} is registered with {there}; this replica defines {here}"
    way_out = way_out or f"to replace the registered definition: ktrdr budget migrate {budget.name}"
    return DefinitionConflict(f"{words}; {way_out}", registered=there, configured=here)


def outdated(hold_id: str, name: str, registered: str) -> DefinitionConflict:
    """The error of a hold that is to grow, though its budget has been redefined since it was admitted."""
    there = identity_of(registered)
    words = f"budget {name!r} has been redefined since hold {hold_id!r} was admitted ({there})"
    return DefinitionConflict(f"{words}; it can be settled and prolonged, but not grow", registered=there)


def status_of(
    budget: Budget,
    window: Window,
    stored: Sequence[bytes | str],
    now_us: int,
    repaired_ms: int,
    claim: tuple[int, str],
) -> Status:
    """A window's figures; one that nobody has touched reads as 0 spent.

    Of the configured limits, that of the replica that started last is in force: if this one did (``claim``: when, and
    its id), its own, though no reservation has brought it to the store yet.

    Raises:
        DefinitionConflict: another definition of the budget is registered, so these figures are unknown.
    """
    runtime, registered, configured, spent, held, unconfirmed, events, overruns, asserted = (
        value.decode() if isinstance(value, bytes) else value for value in stored
    )
    if registered and registered != budget.definition:
        raise conflict(budget, registered)
    started, _, replica = asserted.partition(" ")
    newest = not configured or not started or (int(started), replica) < claim or int(started) > now_us
    source, until_ms, limit = "configured", 0, _units_text(budget) if newest else configured
    if runtime:
        word, until = runtime.split(" ")[:2]
        if until == "0" or int(until) > now_us // 1000:
            source, until_ms, limit = "runtime", int(until), word

    def out(text: str) -> Amount:
        return from_units(int(text or 0), budget.unit)

    return Status(
        budget=budget.name,
        unit=budget.unit,
        kind=budget.kind,
        period=budget.period,
        timezone=budget.timezone,
        window=window.span.name,
        starts_at=from_ms(window.span.start_ms) if window.span.end_ms else None,
        resets_at=window.span.resets_at,
        limit=None if limit == "-" else out(limit),
        spent=out(spent),
        held=out(held),
        unconfirmed=out(unconfirmed),
        events=int(events or 0),
        overruns=int(overruns or 0),
        limit_source=source,  # type: ignore[arg-type]  # one of the two words above
        limit_until=from_ms(until_ms) if until_ms else None,
        configured_limit=None if budget.limit_units is None else from_units(budget.limit_units, budget.unit),
        as_of=from_ms(now_us // 1000),
        recovering_until=from_ms(repaired_ms) if repaired_ms else None,
    )


_AMOUNTS_SHOWN = 3


def conflict_message(hold_id: str, record: Record, letter: str, budgets: Mapping[str, Budget]) -> str:
    """Why a request conflicts with the hold of its id: ``… was already committed at $0.07; it cannot be released``.

    Args:
        record: the hold as the store has it.
        letter: of the operation that was refused.
        budgets: those known here, for their units.
    """
    settled = record.state in "cn"
    parts = [segment for segment in record.segments if segment.flag != "s"] or record.segments
    amounts = amounts_text(
        {
            segment.budget: (
                segment.charged if settled else segment.reserved,
                budgets[segment.budget].unit if segment.budget in budgets else FLAGS[segment.flag],
            )
            for segment in parts
        }
    )
    match record.state:
        case "n":
            found = f"was recorded at {amounts}"
        case "c":
            found = f"was already committed at {amounts}"
        case "z":
            found = "was released by an operator"
        case "r":
            found = "was already released"
        case _:
            found = f"was reserved at {amounts} and is {STATES[record.state]}"
    match letter:
        case "R" | "N":
            refused = "its id cannot be used again with other contents"
        case "L":
            refused = "it cannot be released"
        case "E":
            refused = "it cannot be extended"
        case _:
            refused = f"it cannot be committed{' at another amount' if record.state == 'c' else ''}"
    return f"hold {hold_id!r} {found}; {refused}"


def amounts_text(amounts: Mapping[str, tuple[int, str]]) -> str:
    """Whole units with their unit, per budget, for a person: ``$0.07``, or ``agent $0.07, tokens 3 tokens``."""
    shown_amounts = {name: format_amount(from_units(units, unit), unit) for name, (units, unit) in amounts.items()}
    if len(shown_amounts) == 1:
        return next(iter(shown_amounts.values()))
    listed = [f"{name} {amount}" for name, amount in shown_amounts.items()]
    more = [f"… ({len(listed)} budgets)"] if len(listed) > _AMOUNTS_SHOWN else []
    return ", ".join(listed[:_AMOUNTS_SHOWN] + more)


def _units_text(budget: Budget) -> str:
    return "-" if budget.limit_units is None else str(budget.limit_units)


def told_amounts(parts: Sequence[tuple[Window, str]], told: str) -> dict[str, Amount]:
    """The amounts that a settlement reports, per budget."""
    if len(parts) == 1:
        window = parts[0][0]
        return {window.budget: from_units(int(told or 0), window.unit)}
    units = told.split(",")
    if len(units) != len(parts):  # a release of a hold that the store has lost
        units = ["0"] * len(parts)
    return {window.budget: from_units(int(text), window.unit) for (window, _), text in zip(parts, units, strict=True)}


def policy_fault(info: object) -> str | None:
    """What is wrong with the store's eviction policy, from ``INFO memory``, which redis-py parses."""
    if isinstance(info, bytes):
        lines = info.decode(errors="replace").splitlines()
        info = dict(line.split(":", 1) for line in lines if ":" in line)
    policy = str(info.get("maxmemory_policy", "unknown")) if isinstance(info, Mapping) else "unknown"
    if policy == "noeviction":
        return None
    return f"maxmemory-policy is {policy}; it must be noeviction, or budgets may vanish"


def refusal_faults(refused: Sequence[tuple[str, str]]) -> tuple[str | None, str | None]:
    """What is wrong with the store, and with its scripts, from commands and the errors that they met.

    Args:
        refused: an empty error means that the store's user lacks the permission.
    """
    store_fault, by_error = None, dict[str, list[str]]()
    for command, error in refused:
        state = next((words for first, words in _STATES.items() if first in error), None)
        if state is not None:
            store_fault = store_fault or f"{state}, and refuses {command}: {error}"
        else:
            by_error.setdefault(without_script_location(error), []).append(command)
    missing = by_error.pop("", [])
    faults = [f"the store's user may not run {', '.join(missing)}"] if missing else []
    faults += [f"the store refuses {', '.join(commands)}: {error}" for error, commands in by_error.items()]
    return store_fault, "; ".join(faults) or None


def page_size(limit: int) -> int:
    """How many items a page may have: 1 to 1000."""
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= _PAGE_MAX:
        raise InvalidArgument(f"a page has 1 to {_PAGE_MAX} items, not {shown(limit)}")
    return limit


def holds_cursor(cursor: str | None) -> tuple[int, int]:
    """Which index of holds, and how far in."""
    if cursor is None:
        return 0, 0
    if not isinstance(cursor, str) or not (found := re.fullmatch(r"([01])-(\d{1,9})", cursor, re.ASCII)):
        raise InvalidArgument("not a cursor of this list")
    return int(found[1]), int(found[2])
