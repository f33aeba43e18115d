"""Reservations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ktrdr_budget.engine.calls.context import RETIRE_ROUNDS_MAX, CallContext, Flow
from ktrdr_budget.engine.calls.refusals import refusal
from ktrdr_budget.engine.calls.results import amounts_text
from ktrdr_budget.engine.outage.policy import OfflineReservation, release_unreceived
from ktrdr_budget.engine.protocol.codes import POLICY_CODES, ReleaseMode
from ktrdr_budget.engine.protocol.digest import request_digest
from ktrdr_budget.engine.protocol.hold_record import digest_of, join_scope
from ktrdr_budget.engine.protocol.operations import Labels, Release, Reserve
from ktrdr_budget.engine.protocol.replies import Conflict, Denied, Granted, Replayed, Settled, StaleWindow
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.errors import HoldConflict, InvalidArgument, StoreError, StoreUnavailable, shown
from ktrdr_budget.models import OnExpiry, check_name, check_ttl_ms
from ktrdr_budget.money import AmountIn

__all__ = ["release_grant", "reserve", "reserve_units"]


def reserve(
    context: CallContext,
    budget: str | Mapping[str, AmountIn],
    amount: AmountIn | None,
    hold_id: str | None,
    ttl: float,
    on_expiry: OnExpiry,
    operation: str,
    owner: str,
) -> Flow[Any]:
    """Reserve the amounts, all or none; return the hold."""
    wanted = context.wanted(budget, amount)
    context.policy.begin()
    has_own_id = hold_id is not None
    hold_id = context.state.new_id() if hold_id is None else check_name(hold_id, "id")
    ttl_ms = check_ttl_ms(ttl)
    try:
        policy = POLICY_CODES[on_expiry]
    except (KeyError, TypeError):
        raise InvalidArgument(f"on_expiry must be 'charge', 'accrued' or 'release', not {shown(on_expiry)}") from None
    request = ""
    if has_own_id:  # a generated id also names the request; other requests may use an id that the caller chose
        request = f"{request_digest('reserve', context.given(wanted), policy=policy)}.{context.state.new_id()}"
        if (known := _offline_replay(context, hold_id, wanted, policy, ttl_ms, request)) is not None:
            return known
    labels = context.labels(owner, operation)
    return (yield from reserve_units(context, wanted, hold_id, ttl_ms, policy, labels, request))


def reserve_units(
    context: CallContext,
    wanted: Sequence[tuple[str, int]],
    hold_id: str,
    ttl_ms: int,
    policy: str,
    labels: Labels,
    request: str = "",
    *,
    store_only: bool = False,
) -> Flow[Any]:
    """Reserve whole units, all or none; return the hold.

    Args:
        request: this request if the caller chose the id of the hold, with its digest
            (:attr:`~..protocol.hold_record.HoldRecord.request`); empty if the id was generated.
        store_only: whether only the store may grant the hold. If not, the outage policy may grant it offline.
    """
    state = context.state
    key = state.keys.hold(hold_id)
    rounds = 0
    while True:
        parts = [(state.current_window(name), units) for name, units in wanted]
        op = Reserve(hold_id, key, parts, ttl_ms, policy, labels, state.now_ms(), request)
        try:
            reply, head = yield op
        except StoreUnavailable as error:
            # The policy may grant only if the store cannot be reached, not if the store replies with an error.
            if not error.reached and not store_only:
                known = _offline_replay(context, hold_id, wanted, policy, ttl_ms, request)  # granted meanwhile
                offline = OfflineReservation(hold_id, parts, ttl_ms, policy, labels, request, error.ambiguous)
                hold = known or context.policy.reserve(offline)
                if hold is not None:
                    return hold
            if not request and error.ambiguous:  # the hold may be granted, and no caller knows its id
                context.release_later(hold_id, op.windows, request)
            raise
        if isinstance(reply, Granted):
            deadline_ms = head.now_us // 1000 + ttl_ms
            granted = op.granted(head.now_us, deadline_ms)
            state.journal.granted(hold_id, op.windows, granted, head.now_us)
            return context.new_hold(
                hold_id, parts, ttl_ms, deadline_ms, request, head.now_us, granted, scope=labels.scope
            )
        rounds += 1
        if isinstance(reply, Denied) and head.due and rounds < RETIRE_ROUNDS_MAX:
            yield from context.retire(head.due)
        elif isinstance(reply, Replayed):
            record = reply.record
            if not record.is_due(head.now_us // 1000):
                windows = context.windows_of(record)
                state.journal.extended(hold_id, reply.text, windows, head.now_us)
                parts, created_us = context.parts_of(record), record.created_us
                scope = join_scope(record.scope, record.units)
                hold = context.new_hold(
                    hold_id, parts, ttl_ms, record.deadline_ms, record.request, created_us, scope=scope
                )
                hold.resume(record)
                # A hold that was granted to an earlier attempt of this request is not a replay.
                hold.replayed = record.request != request or record.unreceived
                return hold
            yield from context.retire_records({hold_id: record})
        elif isinstance(reply, Conflict) and reply.is_tombstone:
            yield Release(hold_id, key, op.windows, ReleaseMode.LIFT)  # the tombstone is to refuse another request
        elif not isinstance(reply, StaleWindow):
            raise (yield from refusal(context, op, reply, head.now_us))


def _offline_replay(
    context: CallContext, hold_id: str, wanted: Sequence[tuple[str, int]], policy: str, ttl_ms: int, request: str
) -> HoldBase | None:
    """A copy of the hold with this id if the hold was granted offline, otherwise ``None`` (P3).

    Raises:
        HoldConflict: the hold with this id has other contents.
    """
    known = context.offline_hold(hold_id)
    if known is None:
        return None
    context.policy.expire()
    record = known.offline_record
    assert record is not None
    if record.digest and (digest := digest_of(request)):
        same = record.digest == digest
    else:
        before = sorted((segment.budget, segment.reserved) for segment in record.segments)
        same = before == sorted(wanted) and record.policy == policy and known.state != "recorded"
    if not same:
        amounts = {s.budget: (s.reserved, known.unit_of(s.budget)) for s in record.segments}
        found = f"hold {hold_id!r} was reserved at {amounts_text(amounts)} and is {known.state}"
        raise HoldConflict(f"{found}; its id cannot be used again with other contents", state=known.state)
    scope = join_scope(record.scope, record.units)
    copy = context.new_hold(hold_id, known.parts, ttl_ms, known.deadline_ms, offline=known.offline, scope=scope)
    copy.request, copy.created_us, copy.offline_record = known.request, record.created_us, record
    copy.replayed, copy.state = True, known.state
    copy.adjust({w.budget: accrued for (w, _), accrued in zip(known.parts, known.accrued_units, strict=True)})
    return copy  # type: ignore[no-any-return]


def release_grant(context: CallContext, hold: HoldBase) -> Flow[None]:
    """Release a grant that the caller has not received.

    If the store does not reply now, the release is sent again once the store replies.
    """
    state, windows = context.state, hold.window_list
    op = release_unreceived(hold.id, state.keys.hold(hold.id), windows, hold.request)
    try:
        reply, head = yield op
    except StoreError:
        raise
    except StoreUnavailable:
        context.release_later(hold.id, windows, hold.request)
    else:
        if isinstance(reply, Settled):
            state.journal.settled(op, reply, head.now_us // 1000)
