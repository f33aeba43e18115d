"""Commits, releases and records of spend."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from ktrdr_budget.engine.calls.context import CallContext, Flow, checked_label
from ktrdr_budget.engine.calls.extend import report
from ktrdr_budget.engine.calls.refusals import error_for
from ktrdr_budget.engine.calls.results import amounts_of
from ktrdr_budget.engine.protocol import codes
from ktrdr_budget.engine.protocol.amounts import NO_COUNTS, Amounts, check_amounts, commit_amounts, with_counts
from ktrdr_budget.engine.protocol.codes import CommitMode, ReleaseMode
from ktrdr_budget.engine.protocol.digest import request_digest
from ktrdr_budget.engine.protocol.hold_record import HoldRecord
from ktrdr_budget.engine.protocol.operations import Commit, CommitAmount, RecordSpend, Release, SettlingOperation
from ktrdr_budget.engine.protocol.replies import Settled, StaleWindow, UnknownHoldReply
from ktrdr_budget.engine.protocol.requests import PreparedFact
from ktrdr_budget.engine.replica.hold import HoldBase, OnError
from ktrdr_budget.engine.replica.journal import AGE_MAX_MS
from ktrdr_budget.errors import HoldConflict, InvalidArgument, StoreError, StoreUnavailable, UnknownHold
from ktrdr_budget.models import HoldState, Settlement, check_name
from ktrdr_budget.money import AmountIn, from_units, to_units

__all__ = ["commit", "commit_units", "leave", "record", "release", "settle_by_id"]

logger = logging.getLogger("ktrdr_budget")

_UNKNOWN = "unknown hold: settled more than 24 h ago, or never granted"

# -- a hold in hand ----------------------------------------------------------------------------------------------------


def commit(
    context: CallContext, hold: HoldBase, amount: Amounts | None, counts: Mapping[str, AmountIn] = NO_COUNTS
) -> Flow[Settlement]:
    """Commit ``amount`` and ``counts``; if there are none, commit the accrued amount."""
    if len(hold.parts) == 1 and isinstance(amount, (str, Decimal)) and not counts:  # the usual case
        window, _ = hold.parts[0]
        if window.flag == codes.DOLLARS or (window.flag == codes.COUNT and not hold.scope_units):
            return _settle(context, hold, [CommitAmount(CommitMode.EXACT, to_units(amount, window.unit))])
    units = hold.scope_units
    amount = with_counts(amount, counts, units)
    check_amounts(amount)
    figures = zip(hold.parts, hold.accrued_units, strict=True)
    segments = {window.budget: (window.flag, reserved, accrued) for (window, reserved), accrued in figures}
    return _settle(context, hold, commit_amounts(segments, amount, units))


def commit_units(context: CallContext, hold: HoldBase, units: int) -> Flow[Settlement]:
    """Commit whole units of a hold of one budget; 0 releases the hold."""
    return _settle(context, hold, [CommitAmount(CommitMode.EXACT, units)] if units else None)


def release(context: CallContext, hold: HoldBase) -> Flow[Settlement]:
    """Release the whole reservation."""
    return _settle(context, hold, None)


def leave(context: CallContext, hold: HoldBase, failed: bool, on_error: OnError) -> Flow[Any] | None:
    """The settlement or report to send at the end of ``with limiter.hold(...)``; ``None`` if none is needed.

    Args:
        failed: whether the block has raised an exception.
    """
    if hold.settled or hold.settling:  # a settlement completes even if its caller is cancelled
        return None
    if hold.uncertain_commit is not None:
        return _settle(context, hold, hold.uncertain_commit)
    if any(hold.accrued_units):
        return _report(context, hold) if failed and on_error == "charge" else commit(context, hold, None)
    if not failed and not hold.drawn:
        reserved = [CommitAmount(CommitMode.RESERVED, units) for _, units in hold.parts]
        return _settle_unless_settled(context, hold, reserved)
    # Metered calls were made or denied in this block, and cost nothing: nothing is to be committed.
    return None if failed and on_error == "charge" else _settle_unless_settled(context, hold, None)


def _report(context: CallContext, hold: HoldBase) -> Flow[Any]:
    """Report the accrued amount of a hold that will expire. When the hold expires, at least that amount is charged.

    Raises:
        StoreUnavailable: the store did not reply. The outage policy is not applied; the limiter resends the report.
    """
    if hold.offline is None:
        hold.update((yield from report(context, hold)))
    elif not hold.cap_checked:  # the store does not have the hold, so nothing would expire there
        yield from commit(context, hold, None)


def _settle_unless_settled(context: CallContext, hold: HoldBase, amounts: Sequence[CommitAmount] | None) -> Flow[Any]:
    """Settle a hold, if no other client has settled the hold by its id."""
    try:
        yield from _settle(context, hold, amounts)
    except HoldConflict as error:
        if error.state not in ("committed", "released"):
            raise
        hold.state = error.state


def _settle(context: CallContext, hold: HoldBase, amounts: Sequence[CommitAmount] | None) -> Flow[Settlement]:
    """Commit these amounts; if they are ``None``, release the hold."""
    if hold.busy:
        raise HoldConflict(
            f"metered calls inside hold {hold.id!r} are in progress: settle the hold after the calls have ended, or "
            "leave the block of the hold, so that the last call settles the hold"
        )
    hold.settling = True
    try:
        op = _settling_operation(context, hold, amounts)
        settlement = op if isinstance(op, Settlement) else (yield from _send(context, op, hold.parts, hold))
    except StoreUnavailable:
        if amounts is not None:
            hold.uncertain_commit = amounts
        raise
    finally:
        hold.settling = False
    hold.state, hold.released_by_operator = settlement.state, False
    return settlement


def _settling_operation(
    context: CallContext, hold: HoldBase, amounts: Sequence[CommitAmount] | None
) -> SettlingOperation | Settlement:
    """Return the operation that settles a hold.

    If the outage policy settles an offline hold at once, return the settlement instead.
    """
    if hold.offline is not None:
        return hold.offline.settle(hold, amounts, hold.remark)
    state, windows = context.state, hold.window_list
    key = state.keys.hold(hold.id)
    if amounts is None:
        return Release(hold.id, key, windows)
    remark = checked_label(hold.remark)
    op = Commit(hold.id, key, windows, amounts, remark, context.trace_id if remark else "")
    if hold.granted is not None and not remark:
        op.enable_fast_path(state.replica_id, hold.granted, hold.parts)
    return op


def _send(
    context: CallContext,
    first: SettlingOperation,
    reserved: Sequence[tuple[Any, int]],
    hold: HoldBase | None = None,
) -> Flow[Settlement]:
    """Send a settlement.

    Args:
        reserved: the windows of the hold, each with the whole units reserved.
        hold: the worker's hold object; ``None`` for a settlement by id.
    """
    op, hold_id = first, first.hold_id
    try:
        reply, head = yield op
        if isinstance(reply, UnknownHoldReply) and isinstance(op, Commit) and hold and _is_lost(context, hold):
            op = hold.restored_commit([amount.units for amount in op.amounts])
            reply, head = yield op
    except StoreError:
        raise
    except StoreUnavailable as error:
        if not context.policy.defers:
            raise
        return context.policy.defer(first, ambiguous=error.ambiguous)
    if not isinstance(reply, Settled):
        if isinstance(reply, UnknownHoldReply) and op.is_release and hold is not None and hold.offline is not None:
            # The store does not have the hold, so there is nothing to give back.
            return Settlement(hold_id, "released", amounts_of(op.windows, op.units))
        if isinstance(reply, UnknownHoldReply) and not op.is_release:
            logger.error("commit of hold %s not recorded: %s; %s", hold_id, _UNKNOWN, amounts_of(op.windows, op.units))
        raise error_for(context, op, reply, head.now_us)
    context.state.journal.settled(op, reply, head.now_us // 1000)
    overruns: tuple[str, ...] = ()
    if reply.overrun:
        figures = zip(reserved, reply.units, strict=False)
        overruns = tuple(window.budget for (window, held), units in figures if units > held)
    state: HoldState = "released" if op.is_release else "committed"
    amounts = amounts_of(op.windows, reply.units)
    return Settlement(hold_id, state, amounts, reply.replayed, reply.overrun, overruns, reply.late)


def _is_lost(context: CallContext, hold: HoldBase) -> bool:
    """Whether a data loss is the reason that the store does not know a hold.

    There was no data loss if the epoch is the same as when the hold was granted. If the hold is old, there is another
    possible reason: the hold was settled, and the store has dropped the record.
    """
    oldest_us = (context.state.now_ms() - AGE_MAX_MS) * 1000
    return hold.offline is None and hold.granted_in != context.state.epoch and hold.created_us > oldest_us


# -- by id -------------------------------------------------------------------------------------------------------------


def settle_by_id(
    context: CallContext, hold_id: str, amount: Amounts | None, *, released: bool = False, by_operator: bool = False
) -> Flow[Settlement]:
    """Commit or release a hold of any process, by its id.

    If an unconfirmed hold is released by id, its worker can still commit the hold, because it is unknown whether the
    worker itself has released the hold.

    Args:
        released: whether the hold is released. If not, ``amount`` is committed.
        by_operator: whether an operator, not a client, releases the hold.
    """
    check_name(hold_id, "id")
    if not released:
        check_amounts(amount)
    if (hold := context.offline_hold(hold_id)) is not None:
        return (yield from release(context, hold) if released else commit(context, hold, amount))

    def settlement_of(record: HoldRecord) -> SettlingOperation:
        key, windows, known = context.state.keys.hold(hold_id), context.windows_of(record), record.render()
        if released:
            mode = ReleaseMode.BY_OPERATOR if by_operator else ReleaseMode.BY_ID
            return Release(hold_id, key, windows, mode, known=known)
        segments = {s.budget: (s.flag, s.reserved, s.accrued) for s in record.segments}
        return Commit(hold_id, key, windows, commit_amounts(segments, amount, record.units), known=known)

    contents = "operator" if by_operator else "release" if released else repr(amount)
    fact = PreparedFact(hold_id, context.state.keys.hold(hold_id), contents, settlement_of)
    try:
        record = yield from context.read_hold(hold_id, fact)
    except UnknownHold:
        if not released:
            logger.error("commit of hold %s not recorded: %s", hold_id, _UNKNOWN)
        raise
    except StoreError:
        raise
    except StoreUnavailable:
        journalled = context.state.journal.open_hold(hold_id) if context.policy.defers else None
        if journalled is None:  # the windows of the hold are not known here
            raise
        record = journalled
    return (yield from _send(context, settlement_of(record), context.parts_of(record)))


# -- spend without a reservation ---------------------------------------------------------------------------------------


def record(
    context: CallContext,
    budget: str | Mapping[str, AmountIn],
    amount: AmountIn | None,
    hold_id: str | None,
    operation: str,
) -> Flow[Settlement]:
    """Record spend without a reservation. A record is never refused for lack of budget."""
    state = context.state
    wanted = context.wanted(budget, amount, positive=False)
    for name, _ in wanted:
        if state.budgets[name].kind == "slots":
            raise InvalidArgument(f"{name!r} is of kind 'slots': it can only be reserved")
    digest = ""
    if hold_id is None:
        hold_id = state.new_id()
    else:
        check_name(hold_id, "id")
        digest = request_digest("record", context.given(wanted))
    operation, trace_id = checked_label(operation), context.trace_id
    while True:
        parts = [(state.current_window(name), units) for name, units in wanted]
        key = state.keys.hold(hold_id)
        op = RecordSpend(hold_id, key, parts, operation=operation, trace_id=trace_id, digest=digest)
        if context.policy.owns(hold_id) and (known := context.policy.record(op, ambiguous=False)) is not None:
            return known
        try:
            reply, head = yield op
        except StoreError:
            raise
        except StoreUnavailable as error:
            recorded = context.policy.record(op, ambiguous=error.ambiguous)
            if recorded is None:
                raise
            return recorded
        if isinstance(reply, Settled):
            state.journal_settlement(op, reply, head.now_us // 1000)
            amounts = {name: from_units(units, state.budgets[name].unit) for name, units in wanted}
            return Settlement(hold_id, "recorded", amounts, replayed=reply.replayed)
        if not isinstance(reply, StaleWindow):
            raise error_for(context, op, reply, head.now_us)
