"""Convert refusals by the store to exceptions."""

from __future__ import annotations

from ktrdr_budget.engine.calls.context import CallContext, Flow
from ktrdr_budget.engine.calls.results import conflict_error, definition_conflict, denial, outdated_definition
from ktrdr_budget.engine.protocol.keys import split_name
from ktrdr_budget.engine.protocol.operations import Operation, RecordSpend, Reserve
from ktrdr_budget.engine.protocol.replies import (
    Conflict,
    Denied,
    OtherDefinition,
    Reply,
    TooManyBudgetsReply,
    TooManyHoldsReply,
    UnknownHoldReply,
    UnknownLimit,
    Unreadable,
    WindowFull,
)
from ktrdr_budget.engine.protocol.requests import due_read, parse_ids
from ktrdr_budget.engine.protocol.window import Window
from ktrdr_budget.errors import (
    BudgetExceeded,
    InvalidAmount,
    StoreError,
    StoreUnavailable,
    TooManyBudgets,
    TooManyHolds,
    UnknownBudget,
    UnknownHold,
)
from ktrdr_budget.money import amount_bound

__all__ = ["error_for", "refusal"]

HOLDS_SEARCHED = 128


def refusal(context: CallContext, op: Operation, reply: Reply, now_us: int) -> Flow[Exception]:
    """The exception for a reply that refuses a request, denials included."""
    if not isinstance(reply, Denied):
        return error_for(context, op, reply, now_us)
    window = next(window for window in op.windows if window.name == reply.window)
    budget = context.state.budgets.get(window.budget)
    unit = budget.unit if budget else window.unit
    denied = denial(window, reply, now_us, unit)
    if denied.reason == "budget_held" and reply.first_deadline_ms:
        first_ms = yield from _first_return_ms(context, window, op, reply.first_deadline_ms, now_us // 1000)
        denied = denial(window, reply._replace(first_deadline_ms=first_ms), now_us, unit)
    return BudgetExceeded(denied)


def _first_return_ms(context: CallContext, window: Window, op: Operation, first_ms: int, now_ms: int) -> Flow[int]:
    """When a retry may succeed: the first deadline of an open hold of this window.

    Args:
        first_ms: the first deadline of any hold of the tenant, also of other budgets.
    """
    if not isinstance(op, Reserve):
        return (yield from _search_first_deadline(context, window, op.hold_id, now_ms))
    cache = context.denials
    found_ms = cache.get(window, first_ms, now_ms)
    if found_ms is None:
        # Callers that are denied during the search receive the first deadline of any hold.
        cache.put(window, first_ms, now_ms, first_ms)
        found_ms = yield from _search_first_deadline(context, window, op.hold_id, now_ms)
        cache.put(window, first_ms, now_ms, found_ms)
    return found_ms


def _search_first_deadline(context: CallContext, window: Window, but: str, now_ms: int) -> Flow[int]:
    """The first deadline of an open hold of a window; 0 if none is found.

    At most :data:`HOLDS_SEARCHED` holds of the tenant are searched: those with the earliest deadlines. If there may
    be more holds and the window has no end, the last deadline among the searched holds is returned instead of 0.

    Args:
        but: the id of a hold that is ignored.
    """
    state = context.state
    try:
        _, items = yield due_read(state.keys, state.replica_id, HOLDS_SEARCHED)
        ids = parse_ids(items)
        records = (yield from context.read_records(ids)) if ids else []
    except StoreUnavailable:
        return 0
    last_ms = 0
    for hold_id, record in zip(ids, records, strict=True):
        if record and record.is_open and hold_id != but and record.deadline_ms > now_ms:
            last_ms = record.deadline_ms
            if any(segment.name == window.name for segment in record.segments):
                return last_ms
    return last_ms if window.span.end_ms is None and len(ids) == HOLDS_SEARCHED else 0


def error_for(context: CallContext, op: Operation, reply: Reply, now_us: int) -> Exception:
    """The exception for a refusal that is not a denial."""
    state, hold_id = context.state, op.hold_id
    match reply:
        case Conflict():
            return conflict_error(op, reply.record, state.budgets)
        case OtherDefinition(name, registered):
            budget = state.budgets.get(name)
            if isinstance(op, (Reserve, RecordSpend)) or (budget and budget.definition != registered):
                return definition_conflict(state.budget(name), registered)
            return outdated_definition(hold_id, name, registered)
        case TooManyHoldsReply(count, deadline_ms):
            seconds = max(1, -((now_us - deadline_ms * 1000) // 1_000_000)) if deadline_ms else None
            many = f"tenant {state.tenant!r} has {count} open and unconfirmed holds"
            return TooManyHolds(f"{many}; the maximum is {state.max_holds}", retry_after=seconds)
        case TooManyBudgetsReply(name):
            full = f"tenant {state.tenant!r} has the maximum of {state.max_budgets} budgets"
            return TooManyBudgets(f"{full}; {name!r} would be one more")
        case WindowFull(window_name):
            name, _ = split_name(window_name)
            unit = next((window.unit for window in op.windows if window.name == window_name), "count")
            bound = amount_bound(state.budgets[name].unit if name in state.budgets else unit, 2**62)
            return InvalidAmount(f"{name!r} would count {bound} or more in this window; nothing was written")
        case UnknownLimit(name):
            return UnknownBudget(f"budget {name!r} has no limit in this replica or in the store; nothing was granted")
        case UnknownHoldReply():
            return UnknownHold(f"unknown hold {hold_id!r}")
        case Unreadable(error):
            return StoreError(f"hold {hold_id!r}: {error}")
    return StoreError(f"unexpected reply to {type(op).__name__} of {hold_id!r}: {type(reply).__name__}")
