"""A replica's journal: operations that the store has acknowledged. If the store loses them, they are replayed (P13).

The journal has four kinds of entries:

- *limits* that this replica has set at run time or has read from the store;
- the replica's *subtotal* of the spend in each window;
- *holds* that were granted to the replica;
- a bounded number of recent *settlements*.

Each entry is identified by an id, a time or a total, so that a second replay changes nothing. The replay of a
settlement also restores the id of the hold. If a settlement was evicted from the journal, only its units remain: they
are in the subtotal. An entry for a hold or a settlement contains the hold's whole record, so that a repeated
reservation still gets the original hold after a repair.

Each settlement counts in the subtotal of exactly one replica: the replica that settled the hold. The store's record
names this replica. If a second replica sends the same settlement, the store returns the existing settlement. The second
replica journals that settlement, too. After a data loss, it can restore the settlement on behalf of the first replica,
which may be gone by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain, islice
from typing import NamedTuple

from ktrdr_budget.engine.protocol.codes import RECORDED
from ktrdr_budget.engine.protocol.hold_record import (
    HoldRecord,
    created_us_of,
    deadline_ms_of,
    is_settled,
    join_scope,
    parse_record,
)
from ktrdr_budget.engine.protocol.keys import Keys
from ktrdr_budget.engine.protocol.operations import (
    LONGEST_HOLD_MS,
    Operation,
    RecordSpend,
    Release,
    ReplayLimit,
    ReplayTotal,
    Restore,
    SettleOnBehalf,
    SettlingOperation,
)
from ktrdr_budget.engine.protocol.replies import Reply, Settled
from ktrdr_budget.engine.protocol.requests import RuntimeLimit
from ktrdr_budget.engine.protocol.window import Window
from ktrdr_budget.models import Budget

__all__ = ["Journal", "Repair"]

SETTLEMENTS_MAX = 20_000
"""The maximum number of settlements in the journal. An eviction keeps the newest: at least half this number."""
HOLDS_MAX = 10_000
"""The maximum number of holds in the journal. An eviction keeps the newest: at least half this number.

The number is below :data:`SETTLEMENTS_MAX`. If another replica has settled a hold, the settlement must stay in that
replica's journal for at least as long as the hold stays in this one.
"""
AGE_MAX_MS = LONGEST_HOLD_MS // 2
"""Settlements above this age are not replayed, because the store drops the id of a settled hold after a day."""
_ID_MEMORY_MS = 86_400_000
"""The age after which the store has dropped the id of a settled hold, so that a new hold may have the same id."""
HOLD_AGE_MAX_MS = AGE_MAX_MS
"""Holds above this age are not replayed.

If another replica has settled the hold, that replica replays the settlement up to the same age.
"""
_FRESH_MS = 2000
"""Holds below this age are not checked for a settlement by another replica: this replica soon settles most of them."""
_WINDOWS_MAX = 4096
_CLEARED = 1
"""``until_ms`` of a limit that was cleared."""


class _Limit(NamedTuple):
    limit: RuntimeLimit
    definition: str
    """The definition of the budget. It shows the unit of the limit."""


@dataclass(slots=True)  # a named tuple would take twice the time to create
class _Hold:
    """An open hold."""

    windows: str
    """The keys of the windows, separated by spaces."""
    record: str
    seen_us: int
    """The last time at which the store was seen to have the hold."""


@dataclass(slots=True)
class _Settlement:
    """An acknowledged settlement."""

    windows: str
    """The keys of the windows, separated by spaces."""
    record: str
    """The hold's record after the settlement."""
    units: tuple[int, ...]
    """The units that count as spent in each window."""
    is_own: bool
    """Whether the settlement counts in this replica's subtotals."""
    replica: str
    """The other replica whose subtotals include the settlement, if the store's reply named one; else empty."""
    at_ms: int


@dataclass
class Repair:
    """Counts of what was replayed after a data loss, and of what could not be replayed."""

    settlements: int = 0
    holds: int = 0
    windows: int = 0
    """Windows whose subtotal was raised because of settlements that the journal had evicted."""
    forgotten_settlements: int = 0
    """Settlements that the journal had evicted. The ids are lost; the spend is in the subtotals."""
    forgotten_holds: int = 0
    """Open holds that the journal had evicted. If the store lost such a hold, its amount is free again."""

    def __bool__(self) -> bool:
        return bool(self.settlements or self.holds or self.windows)

    def __str__(self) -> str:
        return f"{self.settlements} settlements, {self.holds} open holds, older spend of {self.windows} windows"

    def add(self, other: Repair) -> None:
        """Add the figures of another repair."""
        for figure in fields(self):
            setattr(self, figure.name, getattr(self, figure.name) + getattr(other, figure.name))


class Journal:
    """The journal of one replica.

    The journal does no I/O. A write must be cheap, because each call of the limiter writes to the journal.
    """

    def __init__(self, replica: str = "") -> None:
        self._replica = replica
        self.clear()

    def clear(self) -> None:
        """Drop everything."""
        self._windows: dict[str, Window] = {}
        """Windows by their keys."""
        self._evicted_units: dict[str, int] = {}
        """For each window, the part of this replica's subtotal that comes from evicted settlements."""
        # Holds and settlements have two generations each: to drop the older generation at once costs nothing.
        self._holds: dict[str, _Hold] = {}
        self._older_holds: dict[str, _Hold] = {}
        self._settlements: dict[str, _Settlement] = {}
        self._older_settlements: dict[str, _Settlement] = {}
        self._limits: dict[str, _Limit] = {}
        """The limits that this replica has set, cleared or read, by budget."""
        self._checked = 0
        """How many of the holds this round has checked for a settlement by another replica."""
        self.forgotten_settlements = 0
        """The number of evicted settlements."""
        self.forgotten_holds = 0
        """The number of holds that were open when they were evicted."""

    def __bool__(self) -> bool:
        settled = self._settlements or self._older_settlements or self._evicted_units
        return bool(settled or self._holds or self._older_holds or self._limits)

    # -- holds ---------------------------------------------------------------------------------------------------------

    def granted(self, hold_id: str, windows: Sequence[Window], record: str, now_us: int) -> None:
        """Journal a granted hold."""
        if len(self._holds) >= HOLDS_MAX // 2:
            self._evict_holds(now_us // 1000)
        self._holds[hold_id] = _Hold(self._keys_of(windows), record, now_us)

    def extended(self, hold_id: str, record: str, windows: Sequence[Window], now_us: int) -> None:
        """Replace the journal's record of a hold by the store's record."""
        self._pop_hold(hold_id)
        if not is_settled(record):
            self._holds[hold_id] = _Hold(self._keys_of(windows), record, now_us)

    def seen(self, hold_id: str, record: str, now_us: int) -> None:
        """Update a hold from the store's record; if the hold is settled, drop it.

        Args:
            now_us: when the store had this record.
        """
        for holds in (self._holds, self._older_holds):
            known = holds.get(hold_id)
            if known is not None and known.seen_us <= now_us:  # else this replica has changed it since
                if is_settled(record):
                    del holds[hold_id]
                else:
                    known.record, known.seen_us = record, now_us

    def open_hold(self, hold_id: str) -> HoldRecord | None:
        """The record of the hold if it was granted to this replica and is open, else ``None``."""
        known = self._holds.get(hold_id) or self._older_holds.get(hold_id)
        return None if known is None else parse_record(known.record)

    def holds_to_check(self, now_ms: int, most: int) -> list[str]:
        """The ids of some open holds that another replica may have settled.

        Args:
            most: how many holds one call goes through. The next call continues after these holds.
        """
        holds = chain(self._older_holds.items(), self._holds.items())
        some = list(islice(holds, self._checked, self._checked + most))
        self._checked = self._checked + most if len(some) == most else 0
        youngest_us = (now_ms - _FRESH_MS) * 1000
        return [hold_id for hold_id, hold in some if created_us_of(hold.record) < youngest_us]

    def _pop_hold(self, hold_id: str) -> _Hold | None:
        hold = self._holds.pop(hold_id, None)
        return hold or (self._older_holds.pop(hold_id, None) if self._older_holds else None)

    def _evict_holds(self, now_ms: int) -> None:
        self.forgotten_holds += sum([deadline_ms_of(hold.record) > now_ms for hold in self._older_holds.values()])
        self._older_holds, self._holds = self._holds, {}
        self._drop_windows(now_ms)

    # -- settlements ---------------------------------------------------------------------------------------------------

    def has_settled(self, hold_id: str) -> bool:
        """Whether the journal has a settlement of this id."""
        return hold_id in self._settlements or hold_id in self._older_settlements

    def settled(
        self, op: SettlingOperation, settled: Settled, now_ms: int, windows: Sequence[Window] | None = None
    ) -> None:
        """Journal an acknowledged settlement.

        Args:
            windows: the windows in which the settlement counts; ``None`` for the windows of the operation.
        """
        hold_id = op.hold_id
        hold = self._pop_hold(hold_id)
        keys = self._keys_of(op.windows if windows is None else windows)
        record = op.record_text(settled, hold.record if hold is not None else "", now_ms)
        if isinstance(op, Release) and op.is_correctable(
            settled
        ):  # the hold stays in the journal: the worker may commit it
            self._holds[hold_id] = _Hold(keys, record, now_ms * 1000)
            return
        if len(self._settlements) >= SETTLEMENTS_MAX // 2:
            self._evict_settlements(now_ms)
        current, older = self._settlements, self._older_settlements
        is_own = not settled.replayed
        if is_own:
            if hold_id in current or hold_id in older:
                earlier = current.get(hold_id) or older.pop(hold_id)
                if now_ms - earlier.at_ms >= _ID_MEMORY_MS:  # else the store has lost one of the two
                    _add_own(self._evicted_units, [earlier])
        elif hold_id in older or hold_id in current:
            return  # the journal has the settlement and the replica for which it counts
        else:
            is_own = self.counts_here(settled)
        replica = "" if is_own else settled.replica
        current[hold_id] = _Settlement(keys, record, settled.units, is_own, replica, now_ms)

    def counts_here(self, settled: Settled) -> bool:
        """Whether a settlement counts in this replica's subtotals.

        The store may have executed an earlier attempt. The settlement then counts for the replica of that attempt.
        """
        return not settled.replayed or settled.replica == self._replica

    def replayed(self, hold_id: str, reply: Reply) -> None:
        """After a replay, set the replica whose subtotals include the settlement, as named by the store's record."""
        if isinstance(reply, Settled) and reply.replayed and reply.replica:
            is_own = reply.replica == self._replica
            for generation in (self._older_settlements, self._settlements):
                if (known := generation.get(hold_id)) is not None:
                    known.is_own, known.replica = is_own, "" if is_own else reply.replica

    def _evict_settlements(self, now_ms: int) -> None:
        """Drop the older generation of settlements; keep their units in the subtotals."""
        _add_own(self._evicted_units, self._older_settlements.values())
        self.forgotten_settlements += len(self._older_settlements)
        self._older_settlements, self._settlements = self._settlements, {}
        self._drop_windows(now_ms)

    # -- windows -------------------------------------------------------------------------------------------------------

    def _keys_of(self, windows: Sequence[Window]) -> str:
        if len(windows) == 1:  # by far the most
            window = windows[0]
            if window.key not in self._windows:
                self._windows[window.key] = window
            return window.key
        self._windows.update((window.key, window) for window in windows)
        return " ".join([window.key for window in windows])

    def _windows_of(self, keys: str) -> list[Window]:
        return [self._windows[key] for key in keys.split(" ")]

    def _drop_windows(self, now_ms: int) -> None:
        """Drop each window that has ended and has no entry."""
        for key in [*self._evicted_units]:
            end_ms = self._windows[key].span.end_ms
            if end_ms is not None and end_ms + LONGEST_HOLD_MS < now_ms:
                del self._evicted_units[key]
        if len(self._windows) > _WINDOWS_MAX:
            settlements = chain(self._older_settlements.values(), self._settlements.values())
            holds = chain(self._older_holds.values(), self._holds.values())
            joined = [*(entry.windows for entry in settlements), *(entry.windows for entry in holds)]
            used = {key for keys in joined for key in keys.split(" ")} | self._evicted_units.keys()
            self._windows = {key: window for key, window in self._windows.items() if key in used}

    # -- limits of run time --------------------------------------------------------------------------------------------

    def limit_changed(self, budget: Budget, units: int | None, until_ms: int, changed_us: int) -> None:
        """Journal a limit that this replica has set.

        Args:
            units: ``None``: uncapped.
            changed_us: the store's time of the change.
        """
        self._limits[budget.name] = _Limit(RuntimeLimit(units, until_ms, changed_us), budget.definition)

    def limit_cleared(self, budget: Budget, changed_us: int) -> None:
        """Journal that this replica has cleared a limit."""
        self._limits[budget.name] = _Limit(RuntimeLimit(None, _CLEARED, changed_us), budget.definition)

    def limit_seen(self, budget: Budget, limit: RuntimeLimit | None, now_us: int) -> None:
        """Journal a limit that was read from the store.

        Args:
            limit: ``None`` if the store had no limit.
            now_us: when the store had this limit.
        """
        known = self._limits.get(budget.name)
        if known is not None and known.limit.changed_us > now_us:
            return  # the journal has a later change
        if limit is not None:
            self._limits[budget.name] = _Limit(limit, budget.definition)
        elif known is not None and known.limit.until_ms != _CLEARED:
            del self._limits[budget.name]

    # -- replay --------------------------------------------------------------------------------------------------------

    def limits(self, keys: Keys, now_ms: int) -> list[Operation]:
        """The operations to replay first. They set the limits in force, and clear the limits that were cleared."""
        return [
            ReplayLimit(keys.hold("-"), name, *limit, definition)
            for name, (limit, definition) in self._limits.items()
            if limit.until_ms == _CLEARED or limit.is_in_force(now_ms)
        ]

    def settlements(self, keys: Keys, now_ms: int) -> list[Operation]:
        """The operations to replay after the limits. They restore recent settlements.

        This method also drops the holds that are too old for a replay.
        """
        oldest_us = (now_ms - HOLD_AGE_MAX_MS) * 1000
        for holds in (self._older_holds, self._holds):
            for hold_id in [hold_id for hold_id, hold in holds.items() if hold.seen_us < oldest_us]:
                del holds[hold_id]
        self._drop_windows(now_ms)
        recent = [
            (hold_id, settlement)
            for hold_id, settlement in (self._older_settlements | self._settlements).items()
            if settlement.at_ms >= now_ms - AGE_MAX_MS
        ]
        recent.sort(key=lambda each: not each[1].is_own)
        return [self._replay(hold_id, keys.hold(hold_id), settlement) for hold_id, settlement in recent]

    def _replay(self, hold_id: str, key: str, settlement: _Settlement) -> Operation:
        windows, record = self._windows_of(settlement.windows), parse_record(settlement.record)
        op: SettlingOperation
        if record.state == RECORDED:
            parts = list(zip(windows, settlement.units, strict=True))
            labels = {"operation": record.operation, "trace_id": record.trace_id, "digest": record.digest}
            scope = join_scope(record.scope, record.units)
            op = RecordSpend(hold_id, key, parts, scope=scope, is_late=True, **labels)
        else:
            op = Restore(hold_id, key, windows, settlement.record)
        return SettleOnBehalf(settlement.replica, op) if settlement.replica else op

    def totals(self, keys: Keys) -> list[ReplayTotal]:
        """The operations to replay after the settlements. They raise the store's subtotals to those of this replica."""
        totals = dict(self._evicted_units)
        for generation in (self._older_settlements, self._settlements):
            _add_own(totals, generation.values())
        key = keys.hold("-")
        return [ReplayTotal(key, self._windows[name], units) for name, units in totals.items() if units]

    def holds(self, keys: Keys) -> list[Restore]:
        """The operations to replay last. They restore open holds."""
        return [
            Restore(hold_id, keys.hold(hold_id), self._windows_of(hold.windows), hold.record)
            for hold_id, hold in (self._older_holds | self._holds).items()
        ]


def _add_own(totals: dict[str, int], settlements: Iterable[_Settlement]) -> None:
    """Add to ``totals``, by window key, the units of this replica's own settlements."""
    for settlement in settlements:
        if settlement.is_own:
            for key, units in zip(settlement.windows.split(" "), settlement.units, strict=False):
                totals[key] = totals.get(key, 0) + units
