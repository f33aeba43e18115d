"""Heartbeats, growth, and reports of accrued amounts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ktrdr_budget.engine.calls.context import RETIRE_ROUNDS_MAX, CallContext, Flow
from ktrdr_budget.engine.calls.refusals import refusal
from ktrdr_budget.engine.protocol.amounts import NO_COUNTS, Amounts, check_amounts, spread
from ktrdr_budget.engine.protocol.codes import ExtendMode
from ktrdr_budget.engine.protocol.hold_record import HoldRecord
from ktrdr_budget.engine.protocol.operations import Extend, ExtendAmount
from ktrdr_budget.engine.protocol.replies import Conflict, Denied, Extended, Outgrown
from ktrdr_budget.engine.protocol.requests import PreparedFact
from ktrdr_budget.engine.protocol.window import Window
from ktrdr_budget.engine.replica.hold import HoldBase, added
from ktrdr_budget.errors import HoldConflict, StoreUnavailable, UnknownHold
from ktrdr_budget.models import TTL_DEFAULT_S, HoldView, check_name, check_ttl_ms
from ktrdr_budget.money import AmountIn

__all__ = ["extend", "extend_by_id", "grow", "grow_by_id", "grow_to", "raise_units", "report", "report_units"]

Totals = Mapping[str, int]
"""Whole units per budget."""

# -- a hold in hand ----------------------------------------------------------------------------------------------------


def extend(context: CallContext, hold: HoldBase, ttl: float | None) -> Flow[None]:
    """Send a heartbeat: a new deadline, and the accrued amount.

    Args:
        ttl: the seconds until the new deadline; ``None``: the ttl of the hold.
    """
    ttl_ms = hold.ttl_ms if ttl is None else check_ttl_ms(ttl)
    flow = _send(context, _extension(context, hold, _accrued(hold), ttl_ms, ExtendMode.HEARTBEAT))
    yield from _extended(context, hold, flow, lambda: hold.parts, ttl_ms)
    hold.ttl_ms = ttl_ms


def grow_to(context: CallContext, hold: HoldBase, totals: Amounts) -> Flow[None]:
    """Enlarge the reservation to at least these totals, in all budgets or in none."""
    given = hold.spread(totals)
    parts = [(window, max(units, given.get(window.budget, 0))) for window, units in hold.parts]
    amounts = [ExtendAmount(reserved=units) for _, units in parts]
    flow = _send(context, _extension(context, hold, amounts, hold.ttl_ms, ExtendMode.GROW))
    return _extended(context, hold, flow, lambda: parts)


def grow(
    context: CallContext, hold: HoldBase, amount: Amounts | None, counts: Mapping[str, AmountIn] = NO_COUNTS
) -> Flow[None]:
    """Enlarge the reservation, in all budgets or in none.

    The increase is added exactly once, although several callers and processes may grow the hold at the same time. The
    store keeps the largest total, so a repeated request is harmless. To add to a total, each attempt names the totals
    that it expects. If others have grown the hold since, the store refuses the attempt, and it is repeated with the
    current totals. One case is ambiguous: if a reply was lost and another process has grown the hold to the same
    totals, this attempt is taken as done.
    """
    more = hold.spread(amount, counts)

    def grown() -> list[tuple[Window, int]]:
        sums = added(hold.reserved_units, more, hold.unit_of)
        return [(window, sums.get(window.budget, units)) for window, units in hold.parts]

    grown()
    return _extended(context, hold, _grow(context, hold, more), grown)


def _grow(context: CallContext, hold: HoldBase, more: Totals) -> Flow[HoldRecord]:
    expected: Totals = {window.budget: units for window, units in hold.parts if window.budget in more}
    before, hold.in_doubt_growth = hold.in_doubt_growth, None
    is_retry = before is not None and before[0] == more
    if before is not None and is_retry:
        expected = before[1]
    while True:
        totals = added(expected, more, hold.unit_of)
        amounts = [
            ExtendAmount(0, totals[name], expected[name]) if name in totals else ExtendAmount()
            for name in hold.reserved_units
        ]
        op = _extension(context, hold, amounts, hold.ttl_ms, ExtendMode.GROW)
        op.was_resent = is_retry
        try:
            grown, record = yield from _send_growth(context, op)
        except StoreUnavailable as error:
            continues = context.policy.extends and not error.reached  # as if the hold had grown
            if (error.ambiguous or is_retry) and not continues:
                hold.in_doubt_growth = more, expected
            raise
        reserved = {segment.budget: segment.reserved for segment in record.segments if segment.budget in more}
        if grown or (op.was_resent and reserved == totals != hold.last_growth):
            hold.last_growth = totals
            return record
        expected, is_retry = reserved, False


def report(context: CallContext, hold: HoldBase) -> Flow[HoldRecord]:
    """Report the accrued amount of a hold that will not be settled, so that the hold expires with that amount."""
    return _send(context, _extension(context, hold, _accrued(hold), hold.ttl_ms, ExtendMode.REPORT))


def report_units(context: CallContext, hold: HoldBase, accrued: int, ttl_ms: int) -> Flow[HoldRecord]:
    """Send a heartbeat for a hold of one budget, with the whole units accrued."""
    return _send(context, _extension(context, hold, [ExtendAmount(accrued)], ttl_ms, ExtendMode.HEARTBEAT))


def raise_units(context: CallContext, hold: HoldBase, total: int, ttl_ms: int) -> Flow[HoldRecord]:
    """Raise the reservation of a hold of one budget to a total of whole units."""
    return _send(context, _extension(context, hold, [ExtendAmount(reserved=total)], ttl_ms, ExtendMode.GROW))


def _accrued(hold: HoldBase) -> list[ExtendAmount]:
    return [ExtendAmount(accrued) for accrued in hold.accrued_units]


def _extension(
    context: CallContext, hold: HoldBase, amounts: Sequence[ExtendAmount], ttl_ms: int, mode: ExtendMode
) -> Extend:
    return Extend(hold.id, context.state.keys.hold(hold.id), hold.window_list, amounts, ttl_ms, mode)


def _extended(
    context: CallContext,
    hold: HoldBase,
    flow: Flow[HoldRecord],
    parts: Callable[[], Sequence[tuple[Window, int]]],
    ttl_ms: int | None = None,
) -> Flow[None]:
    """Extend a hold in the store, or in this process if it was granted offline.

    Args:
        parts: a function that returns the windows of the hold, each with the total to reach. The function is called
            when the hold is extended.
        ttl_ms: the ttl of a heartbeat; ``None`` for growth.
    """
    if hold.offline is not None and hold.offline.extend(hold, parts, ttl_ms):
        flow.close()
        return
    try:
        record = yield from flow
    except HoldConflict as error:
        if error.released_by_operator:
            hold.state, hold.released_by_operator = "released", True
        raise
    except StoreUnavailable as error:
        if not context.policy.extends or error.reached:
            raise
        hold.parts = parts()
        return
    except UnknownHold:
        if hold.offline is None:
            raise
        # The store does not have the hold: a heartbeat is skipped, but growth is impossible.
        if parts() != hold.parts:
            raise StoreUnavailable(
                f"hold {hold.id!r} was granted while the store was unreachable, so it cannot grow: "
                "make another reservation",
                reached=True,
            ) from None
        return
    hold.update(record)


# -- by id -------------------------------------------------------------------------------------------------------------


def extend_by_id(context: CallContext, hold_id: str, ttl: float | None, accrued: Amounts | None) -> Flow[HoldView]:
    """Send a heartbeat for a hold, by its id.

    Args:
        ttl: the seconds until the new deadline. ``None``: the default ttl, unless this would make the deadline earlier.
        accrued: the total accrued so far; ``None``: the total in the store is kept.
    """
    ttl_ms = check_ttl_ms(TTL_DEFAULT_S if ttl is None else ttl)
    check_name(hold_id, "id")
    check_amounts(accrued)
    if (hold := context.offline_hold(hold_id)) is not None:
        hold.accrue_to(accrued)
        yield from extend(context, hold, ttl)
        return hold.offline_view().view(hold_id)

    def extension(record: HoldRecord, mode: ExtendMode) -> Extend:
        given = {} if accrued is None else spread(accrued, {s.budget: s.flag for s in record.segments}, record.units)
        amounts = [ExtendAmount(given.get(segment.budget, 0)) for segment in record.segments]
        key = context.state.keys.hold(hold_id)
        return Extend(hold_id, key, context.windows_of(record), amounts, ttl_ms, mode)

    fact = None
    if accrued is not None:
        key = context.state.keys.hold(hold_id)
        fact = PreparedFact(hold_id, key, repr(accrued), lambda record: extension(record, ExtendMode.REPORT))
    record = yield from context.read_hold(hold_id, fact)
    mode = ExtendMode.HEARTBEAT_NO_SOONER if ttl is None else ExtendMode.HEARTBEAT
    return (yield from _send(context, extension(record, mode))).view(hold_id)


def grow_by_id(context: CallContext, hold_id: str, amounts: Mapping[str, AmountIn], ttl: float) -> Flow[HoldView]:
    """Raise the reservation of a hold to new totals, by its id.

    The reservation is raised in all budgets or in none, and is never lowered.
    """
    ttl_ms = check_ttl_ms(ttl)
    check_name(hold_id, "id")
    check_amounts(amounts)
    if (hold := context.offline_hold(hold_id)) is not None:
        yield from grow_to(context, hold, amounts)
        return hold.offline_view().view(hold_id)
    record = yield from context.read_hold(hold_id)
    given = spread(amounts, {s.budget: s.flag for s in record.segments}, record.units)
    totals = [ExtendAmount(reserved=given.get(segment.budget, 0)) for segment in record.segments]
    key = context.state.keys.hold(hold_id)
    op = Extend(hold_id, key, context.windows_of(record), totals, ttl_ms, ExtendMode.GROW)
    return (yield from _send(context, op)).view(hold_id)


# -- the operation -----------------------------------------------------------------------------------------------------


def _send(context: CallContext, op: Extend) -> Flow[HoldRecord]:
    """Send an extension; return the record of the extended hold."""
    _, record = yield from _send_growth(context, op)
    return record


def _send_growth(context: CallContext, op: Extend) -> Flow[tuple[bool, HoldRecord]]:
    """Send an extension; return whether the store executed it, and the record of the hold.

    Growth is not executed if others have grown the hold meanwhile.
    """
    state = context.state
    rounds = 0
    while True:
        reply, head = yield op
        if isinstance(reply, (Extended, Outgrown)):
            record = reply.record
            state.journal.extended(op.hold_id, reply.text, context.windows_of(record), head.now_us)
            return isinstance(reply, Extended), record
        if isinstance(reply, Conflict):
            state.journal.seen(op.hold_id, reply.text, head.now_us)
        rounds += 1
        if not isinstance(reply, Denied) or not head.due or rounds == RETIRE_ROUNDS_MAX:
            raise (yield from refusal(context, op, reply, head.now_us))
        yield from context.retire(head.due)
