"""The worker's object for a hold: its reserved and accrued amounts, and its state."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar, Token
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal, Protocol

from ktrdr_budget.engine.protocol import codes
from ktrdr_budget.engine.protocol.amounts import Amounts, check_amounts, spread, with_counts
from ktrdr_budget.engine.protocol.hold_record import HoldRecord, Segment, scope_fields, segments_of, split_scope
from ktrdr_budget.engine.protocol.operations import CommitAmount, Labels, Restore, SettlingOperation
from ktrdr_budget.engine.protocol.window import Window
from ktrdr_budget.errors import InvalidAmount, InvalidArgument, shown
from ktrdr_budget.models import HoldState, Settlement
from ktrdr_budget.money import MAX_UNITS, Amount, AmountIn, amount_bound, from_units
from ktrdr_budget.periods import from_ms

__all__ = [
    "HoldBase",
    "OfflineBacking",
    "OnError",
    "added",
    "check_on_error",
    "current_hold",
    "restore_hold",
]

OnError = Literal["release", "charge"]
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_REMARK_CHARACTERS_MAX = 256

current_hold: ContextVar[HoldBase | None] = ContextVar("ktrdr_budget_current_hold", default=None)
"""The hold from which this task or thread draws: the hold of the innermost ``limiter.hold(...)`` block."""


class OfflineBacking(Protocol):
    """The local backing of a hold that was granted while the store was unreachable."""

    cap_checked: bool

    def settle(
        self, hold: HoldBase, amounts: Sequence[CommitAmount] | None, remark: str
    ) -> SettlingOperation | Settlement:
        """Settle the hold at once and return the settlement, or return the operation to send to the store.

        If ``amounts`` is ``None``, release the hold.
        """

    def extend(self, hold: HoldBase, parts: Callable[[], Sequence[tuple[Window, int]]], ttl_ms: int | None) -> bool:
        """Extend the hold in this process; return false if the store must extend the hold.

        Args:
            parts: a function that computes the new totals from the current totals.
            ttl_ms: the new ttl of a heartbeat; ``None`` if the call does not set the ttl, but enlarges the amounts.
        """


class HoldBase:
    """Base class of sync and async holds. The subclasses add only the methods that wait for the store."""

    __slots__ = (
        "_accrued",
        "_notes",
        "_scope",
        "created_us",
        "deadline_ms",
        "drawn",
        "engine",
        "granted",
        "granted_in",
        "growth",
        "id",
        "in_doubt_growth",
        "last_growth",
        "lock",
        "offline",
        "offline_record",
        "parts",
        "released_by_operator",
        "replayed",
        "request",
        "settling",
        "state",
        "ttl_ms",
        "uncertain_commit",
    )

    def __init__(
        self,
        engine: Any,
        hold_id: str,
        parts: Sequence[tuple[Window, int]],
        ttl_ms: int,
        deadline_ms: int,
        request: str = "",
        created_us: int = 0,
        granted: str | None = None,
        offline: OfflineBacking | None = None,
        scope: str = "",
    ) -> None:
        self.engine = engine
        self.id = hold_id
        self.parts = parts
        """The hold's windows, each with the whole units reserved."""
        self.ttl_ms = ttl_ms
        self.deadline_ms = deadline_ms
        """The hold's deadline, by the store's clock."""
        self.request = request
        """The name of the reservation request to which the hold was granted; empty if the hold's id was generated."""
        self.granted = granted
        """The hold's record at the grant; ``None`` if it is unknown, or if the record has changed since the grant."""
        self.offline = offline
        """The local backing of a hold that was granted while the store was unreachable; else ``None``."""
        self.offline_record: HoldRecord | None = None
        """The hold's record at the grant, if the hold was granted offline; else ``None``."""
        self._scope = scope
        """The scope, in the form of :func:`~..protocol.hold_record.join_scope`."""
        self._accrued: dict[str, int] = {}
        self._notes: Mapping[str, None] = _NOTHING
        self.settling = False
        """Whether a settlement is in progress. The settlement does not include amounts that are accrued meanwhile."""
        self.uncertain_commit: Sequence[CommitAmount] | None = None
        """The amounts of a commit that had no reply. The end of the block commits the same amounts again."""
        self.drawn: dict[str, int] = {}
        """The worst-case remaining cost of the calls in progress inside this hold, in whole units per budget."""
        self.growth: Any = None
        """The queue of calls for which the hold must grow."""
        self.in_doubt_growth: tuple[Mapping[str, int], Mapping[str, int]] | None = None
        """If growth had no reply: the increase and the previous totals, for a retry by the caller."""
        self.last_growth: Mapping[str, int] = _NOTHING
        """The totals after the last completed growth."""
        self.lock = threading.Lock()
        """Protects the arithmetic, because threads may share a hold."""
        self.state: HoldState = "open"
        self.created_us = created_us
        """When the store granted the hold, in microseconds since 1970 by the store's clock; 0 for an offline hold."""
        self.granted_in: str | None = engine.state.epoch
        """The store's epoch in which the hold was granted or last seen."""
        self.replayed = False
        """Whether an earlier call with the same id reserved the hold. If so, this object shows its present state."""
        self.released_by_operator = False
        """Whether the hold was released by an operator, or because its caller was gone. A later commit still counts."""

    def __repr__(self) -> str:
        # A Decimal of a few nano-dollars would show itself as 1E-9.
        shown_amounts = (
            (name, amount if isinstance(amount, int) else f"{amount:f}") for name, amount in self.amounts.items()
        )
        amounts = ", ".join(f"{name}={amount}" for name, amount in shown_amounts)
        return f"<{type(self).__name__} {self.id} {self.state} {amounts}>"

    # -- figures -------------------------------------------------------------------------------------------------------

    @property
    def cap_checked(self) -> bool:
        """Whether the cap was checked; false if policy ``allow`` granted the hold while the store was unreachable."""
        return self.offline is None or self.offline.cap_checked

    @property
    def amounts(self) -> Mapping[str, Amount]:
        """The reserved amounts, per budget."""
        return {window.budget: from_units(units, window.unit) for window, units in self.parts}

    @property
    def accrued(self) -> Mapping[str, Amount]:
        """The accrued amounts, per budget, as known in this process.

        The next :meth:`extend` reports them to the store.
        """
        return {window.budget: from_units(self._accrued.get(window.budget, 0), window.unit) for window, _ in self.parts}

    @property
    def scope(self) -> Mapping[str, str]:
        """The fields of the scope in which the hold was reserved; empty if there are none."""
        return scope_fields(split_scope(self._scope)[0])

    @property
    def scope_units(self) -> tuple[str, ...]:
        """For a hold that was reserved by scope, the unit of each part; else empty."""
        return split_scope(self._scope)[1] if self._scope else ()

    @property
    def windows(self) -> Mapping[str, str]:
        """The window of each budget in which the hold was reserved; the cost is charged to this window."""
        return {window.budget: window.span.name for window, _ in self.parts}

    @property
    def expires_at(self) -> datetime:
        """The deadline, by the store's clock, as an aware UTC datetime."""
        return from_ms(self.deadline_ms)

    @property
    def ttl(self) -> float:
        """Seconds from a heartbeat to the new deadline."""
        return self.ttl_ms / 1000

    @property
    def settled(self) -> bool:
        """Whether the hold was committed or released and can no longer change."""
        return self.state not in ("open", "unconfirmed") and not self.released_by_operator

    @property
    def reserved_units(self) -> dict[str, int]:
        """The reserved whole units, per budget."""
        return {window.budget: units for window, units in self.parts}

    @property
    def accrued_units(self) -> list[int]:
        """The accrued whole units, in the order of the parts."""
        return [self._accrued.get(window.budget, 0) for window, _ in self.parts]

    @property
    def flags(self) -> dict[str, str]:
        """For each budget of the hold, the letter for slots, dollars or a count, as in the hold's record."""
        return {window.budget: window.flag for window, _ in self.parts}

    @property
    def window_list(self) -> list[Window]:
        """The windows of the hold's parts."""
        return [window for window, _ in self.parts]

    def unit_of(self, name: str) -> str:
        """The unit of a budget of the hold.

        If this replica does not have the budget, the result is ``usd``, or ``count`` for every other unit.
        """
        for (window, _), unit in zip(self.parts, self.scope_units, strict=False):
            if window.budget == name:
                return unit
        budget = self.engine.state.budgets.get(name)
        return budget.unit if budget else next(window.unit for window, _ in self.parts if window.budget == name)

    def belongs_to(self, limiter: object) -> bool:
        """Whether this limiter granted the hold."""
        return getattr(limiter, "engine", None) is self.engine

    # -- what was used -------------------------------------------------------------------------------------------------

    def accrue(self, amount: Amounts | None = None, **counts: AmountIn) -> None:
        """Add to the accrued amount in this process.

        The next heartbeat reports the total to the store, and ``commit()`` without amounts commits the total. A scalar
        applies to every ``usd`` budget of the hold.

        Args:
            amount: an amount, or a mapping of budgets to amounts; of units, if the hold was reserved by scope.
            counts: more amounts by unit, if the hold was reserved by scope.

        Raises:
            InvalidAmount: not a non-negative amount, or the sum would reach 2**53 units.
            UnknownBudget: a mapping names a budget that the hold does not have.
            InvalidArgument: amounts by unit are given for a hold that was not reserved by scope.
        """
        more = self.spread(amount, counts)
        with self.lock:
            self._accrued |= added(self._accrued, more, self.unit_of)

    def adjust(self, changes: Mapping[str, int]) -> None:
        """Add whole units to the accrued amount. Negative units correct an excess, even if it was reported before."""
        with self.lock:
            self.adjust_locked(changes)

    def adjust_locked(self, changes: Mapping[str, int]) -> None:
        """:meth:`adjust` for a caller that holds the lock."""
        for name, units in changes.items():
            self._accrued[name] = min(max(0, self._accrued.get(name, 0) + units), MAX_UNITS - 1)

    def accrue_to(self, totals: Amounts | None) -> None:
        """Raise the accrued amounts to these totals; the errors are those of :meth:`accrue`."""
        self.accrue_units_to({} if totals is None else self.spread(totals))

    def accrue_units_to(self, totals: Mapping[str, int]) -> None:
        """Raise the accrued whole units to these totals, per budget."""
        with self.lock:
            for name, units in totals.items():
                self._accrued[name] = max(self._accrued.get(name, 0), units)

    def spread(self, amount: Amounts | None, counts: Mapping[str, AmountIn] = _NOTHING) -> dict[str, int]:
        """Convert amounts to whole units per budget; the arguments and errors are those of :meth:`accrue`."""
        units = self.scope_units
        given = with_counts(amount, counts, units)
        if given is None:
            raise InvalidAmount(f"no amount given for hold {self.id!r}")
        check_amounts(given)
        return spread(given, self.flags, units)

    def note(self, remark: str, *, first: bool = False) -> None:
        """Add a remark to the ledger entry of the hold's commit, unless the same remark was added before.

        Args:
            first: put the remark before the others, because a text that is too long is cut at its end.
        """
        self._notes = {remark: None, **self._notes} if first else {**self._notes, remark: None}

    @property
    def remark(self) -> str:
        """All remarks as one text, cut to the length of a label."""
        return " ".join(self._notes)[:_REMARK_CHARACTERS_MAX]

    # -- calls inside --------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether metered calls in progress draw from the hold; the hold must not be settled before they end."""
        return self.growth is not None and self.growth.open > 0

    def leave_to_calls(self, failed: bool, on_error: OnError, stop: Callable[[], object]) -> bool:
        """Leave the hold open for the metered calls in progress; return whether there are any.

        The last of the calls stops the heartbeats and settles the hold.
        """
        with self.lock:
            if not self.busy or self.settled or self.settling or self.uncertain_commit is not None:
                return False
            self.growth.left = failed, on_error, stop
            return True

    # -- the store's record --------------------------------------------------------------------------------------------

    def resume(self, record: HoldRecord) -> None:
        """Take over the state of a hold that the store granted before."""
        self.state = codes.STATES[record.state]
        self.released_by_operator = record.state == codes.RELEASED_BY_OPERATOR
        self.replayed = True
        self._accrued = {s.budget: s.accrued for s in record.segments if s.accrued}

    def update(self, record: HoldRecord) -> None:
        """Update the hold from the store's record."""
        self.state = codes.STATES[record.state]
        self.granted = None
        self.deadline_ms = record.deadline_ms
        reserved = {s.budget: s.reserved for s in record.segments}
        # The older of two replies may arrive last.
        self.parts = [(window, max(units, reserved[window.budget])) for window, units in self.parts]

    def keep_offline(self, policy: str, now_us: int, labels: Labels) -> HoldRecord:
        """Create the record of a hold that was granted without the store, and return it."""
        self.offline_record = self._open_record(policy, now_us, labels)._replace(request=self.request)
        return self.offline_record

    def _open_record(self, policy: str, created_us: int, labels: Labels) -> HoldRecord:
        owner, operation, trace_id, scope = labels
        times, words = (self.deadline_ms, created_us, 0), (owner, operation, trace_id)
        fields, units = split_scope(scope)
        return HoldRecord(codes.OPEN, policy, *times, *words, segments_of(self.parts), scope=fields, units=units)

    def offline_view(self) -> HoldRecord:
        """The current record of a hold that was granted without the store."""
        record = self.offline_record
        assert record is not None
        figures = zip(record.segments, self.parts, self.accrued_units, strict=True)
        segments = tuple(s._replace(reserved=units, accrued=accrued) for s, (_, units), accrued in figures)
        return record._replace(state=codes.STATE_CODES[self.state], deadline_ms=self.deadline_ms, segments=segments)

    def restored_commit(self, charged: Sequence[int], remark: str = "", trace_id: str = "") -> Restore:
        """Return the operation that commits a hold that the store does not have.

        The hold was granted offline, or the store has lost it.
        """
        record = self.offline_record
        if record is None:  # lost
            record = self._open_record("c", self.created_us, Labels(scope=self._scope))
        segments = []
        figures = zip(record.segments, self.parts, self.accrued_units, strict=True)
        for segment, (window, reserved), accrued in figures:
            base = segment.reserved if segment.reserved != reserved else None
            names = window.flag, window.budget, window.stored
            segments.append(Segment(*names, reserved, accrued, base=base))
        record = record._replace(deadline_ms=self.deadline_ms, segments=tuple(segments))
        amounts = [
            0 if window.flag == codes.SLOTS else units for (window, _), units in zip(self.parts, charged, strict=True)
        ]
        settled = record.settled(codes.COMMITTED, amounts, remark=remark, trace_id=trace_id)
        key = self.engine.state.keys.hold(self.id)
        return Restore(self.id, key, self.window_list, settled.render())


def added(totals: Mapping[str, int], more: Mapping[str, int], unit_of: Callable[[str], str]) -> dict[str, int]:
    """Return the new totals after adding ``more``, for the budgets that change.

    Args:
        unit_of: the unit of a budget, for the message.

    Raises:
        InvalidAmount: a total would reach 2**53 units.
    """
    sums = {name: totals.get(name, 0) + units for name, units in more.items()}
    for name, units in sums.items():
        if units >= MAX_UNITS:
            raise InvalidAmount(f"the sum is too large for {name!r}; it must be below {amount_bound(unit_of(name))}")
    return sums


def check_on_error(value: object) -> None:
    """Raise :class:`~ktrdr_budget.errors.InvalidArgument` if the value is no :data:`OnError`."""
    if value not in ("release", "charge"):
        raise InvalidArgument(f"on_error must be 'release' or 'charge', not {shown(value)}")


def restore_hold(outer: Token[HoldBase | None]) -> None:
    """Restore the current hold of the surrounding code.

    If the block belongs to a generator that is closed in another context, this has no effect.
    """
    with suppress(ValueError):
        current_hold.reset(outer)
