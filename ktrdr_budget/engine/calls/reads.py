"""How reading and administering go, step by step, for sync and async alike.

A flow is a generator: it yields what to ask the store (:class:`~.protocol.Op`, :class:`~.protocol.Read` or
:class:`~.protocol.Command`), is sent the answer, and returns the result. It validates before it yields, so that bad
input is refused before anything is sent. The driver answers a read only from a store that has lost nothing, or that
this replica has repaired; it throws :class:`~ktrdr_budget.errors.StoreUnavailable` into the flow when the deadline has
passed.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from ktrdr_budget.engine.calls.results import (
    conflict,
    holds_cursor,
    page_size,
    policy_fault,
    refusal_faults,
    status_of,
)
from ktrdr_budget.engine.protocol import (
    Command,
    Op,
    Prepared,
    Read,
    Record,
    Window,
    encode_batch,
    given_up,
    parse_record,
)
from ktrdr_budget.engine.protocol.keys import stored_window
from ktrdr_budget.engine.protocol.ledger import entry_cursor, parse_entry, public_entry
from ktrdr_budget.engine.protocol.scripts import MIGRATE, READ_LEDGER, READINESS, SET_LIMIT, STATUS, WRITE
from ktrdr_budget.errors import (
    BudgetError,
    DefinitionConflict,
    InvalidArgument,
    StoreError,
    StoreUnavailable,
    UnknownHold,
    shown,
)
from ktrdr_budget.models import Budget, HoldView, LedgerEntry, Migration, Page, Status, Statuses
from ktrdr_budget.money import AmountIn, to_units
from ktrdr_budget.periods import to_ms, window_at, window_named

logger = logging.getLogger("ktrdr_budget")

if TYPE_CHECKING:
    from ktrdr_budget.engine.replica.state import Session

__all__ = ["Flow", "Reads"]

Result = TypeVar("Result")
Flow = Generator[Op | Read | Command, Any, Result]

RETIRE_ROUNDS = 64
_PAGE_MAX = 1000
_LOOKED_THROUGH = 128


class Reads:
    """The flows that only look, those that change limits, and the retirement of due holds that looking entails."""

    def __init__(self, session: Session) -> None:
        self.session = session

    # -- due holds -----------------------------------------------------------------------------------------------------

    def retire(self, due: Iterable[str]) -> Flow[None]:
        """Makes holds that are past their deadline unconfirmed."""
        yield from self._retire_records(dict((yield from self._records(list(due)))))

    def _retire_records(self, records: Mapping[str, Record | None]) -> Flow[None]:
        for hold_id, record in records.items():
            parts = [(window, "") for window, _ in self._parts(record)] if record else []
            try:
                yield Op(hold_id, self.session.keys.hold(hold_id), f"X {hold_id}", parts)
            except StoreError as error:  # one hold or window that cannot be read keeps no other call from its answer
                logger.warning("hold %s could not be retired: %s", hold_id, error)

    # -- reads ---------------------------------------------------------------------------------------------------------

    def status(self, names: Sequence[str], *, complete: bool = False) -> Flow[list[Status]]:
        """Budgets now; holds that are due are retired first, so that they show as unconfirmed.

        Args:
            complete: wait while other replicas may still replay what the store has lost.

        Raises:
            DefinitionConflict: another definition of one is registered.
            StoreError: one cannot be read.
        """
        found = yield from self._read_budgets([self.session.budget(name) for name in names], complete)
        for status in found:
            if not isinstance(status, Status):
                raise status
        return [status for status in found if isinstance(status, Status)]

    def statuses(self, *, complete: bool = False) -> Flow[Statuses]:
        """All budgets now; one whose figures are unknown does not hide the others."""
        budgets = self.session.budgets
        found = yield from self._read_budgets([*budgets.values()], complete)
        unavailable = {
            name: status for name, status in zip(budgets, found, strict=True) if not isinstance(status, Status)
        }
        return Statuses([status for status in found if isinstance(status, Status)], unavailable)

    def _read_budgets(self, budgets: Sequence[Budget], complete: bool) -> Flow[list[Status | BudgetError]]:
        """Each budget's figures, or why they are unknown."""
        session = self.session
        rounds, due_before = 0, None
        while True:
            windows = [session.current_window(budget.name) for budget in budgets]
            head, (due, *stored) = yield self._status_read(windows, complete)
            now_us = head.now_us
            if not all(window.span.contains(now_us // 1000) for window in windows):
                continue
            rounds += 1
            if not due or due == due_before or rounds == RETIRE_ROUNDS:
                found = [
                    _status_or_error(budget, window, figures, now_us, head.recovering_until_ms, session.claim)
                    for budget, window, figures in zip(budgets, windows, stored, strict=True)
                ]
                for budget, figures, status in zip(budgets, stored, found, strict=True):
                    if isinstance(status, Status):
                        session.memory.limit_seen(budget, _str(figures[0]), now_us)
                return found
            due_before = due
            yield from self.retire([_str(hold_id) for hold_id in due])

    def _status_read(self, windows: Sequence[Window], complete: bool) -> Read:
        keys = self.session.keys
        budgets, names = [window.budget for window in windows], [window.name for window in windows]
        return Read(
            STATUS,
            [keys.meta, keys.limits, keys.due, keys.budgets, *(window.key for window in windows)],
            [self.session.replica_id, *budgets, *names],
            "waits" if complete else "answers",
        )

    def _read(self, hold_id: str, prepared: Prepared | None = None) -> Flow[Record]:
        """A hold's record, retired if it is due, for the fact that this prepares."""
        retired = False
        while True:
            read = self.session.read("GET", [self.session.keys.hold(hold_id)], while_recovering="answers if found")
            head, [stored] = yield read._replace(prepares=prepared)
            if not stored or given_up(_str(stored)):
                raise UnknownHold(f"unknown hold {hold_id!r}")
            record = parse_record(_str(stored))
            if retired or record.state != "o" or record.deadline_ms > head.now_us // 1000:
                return record
            yield from self._retire_records({hold_id: record})
            retired = True

    def holds(self, name: str, limit: int, cursor: str | None) -> Flow[Page[HoldView]]:
        """Open and unconfirmed holds of a budget, newest deadline first."""
        budget = self.session.budget(name)
        page_size(limit)
        zset, offset = holds_cursor(cursor)
        yield from self._read_budgets([budget], False)  # retires what is due, though figures may be unknown
        found: list[HoldView] = []
        keys = (self.session.keys.due, self.session.keys.unconfirmed)
        while zset < len(keys):
            page = offset, offset + _PAGE_MAX - 1
            _, [ids] = yield self.session.read("ZREVRANGE", [keys[zset]], page, while_recovering="waits")
            records = (yield from self._records(ids)) if ids else []
            for hold_id, record in records:
                if len(found) == limit:
                    return Page(tuple(found), f"{zset}-{offset}")
                offset += 1
                if record and record.state in "ox" and any(s.budget == name for s in record.segments):
                    found.append(record.view(hold_id))
            if len(ids) < _PAGE_MAX:
                zset, offset = zset + 1, 0
        return Page(tuple(found), None)

    def first_return_ms(self, window: Window, but: str, now_ms: int) -> Flow[int]:
        """When the first open hold of a window, ``but`` one, is due; 0 if none is among those that are due first.

        For want of a better answer, of a window without end: when the last of them is.
        """
        try:
            _, [ids] = yield self.session.read("ZRANGE", [self.session.keys.due], (0, _LOOKED_THROUGH - 1))
            records = (yield from self._records(ids)) if ids else []
        except StoreUnavailable:
            return 0
        open_ms = 0
        for hold_id, record in records:
            if record and record.state == "o" and hold_id != but and record.deadline_ms > now_ms:
                open_ms = record.deadline_ms
                if any(s.name == window.name for s in record.segments):
                    return open_ms
        return open_ms if window.span.end_ms is None and len(ids) == _LOOKED_THROUGH else 0

    def _records(self, ids: Sequence[bytes | str]) -> Flow[list[tuple[str, Record | None]]]:
        names = [_str(hold_id) for hold_id in ids]
        _, [stored] = yield self.session.read("MGET", [*map(self.session.keys.hold, names)])
        return [(name, parse_record(_str(value)) if value else None) for name, value in zip(names, stored, strict=True)]

    def ledger(self, name: str, window: str | None, limit: int, cursor: str | None) -> Flow[Page[LedgerEntry]]:
        """A window's ledger, newest first; the current window by default."""
        budget = self.session.budget(name)
        page_size(limit)
        before = entry_cursor(cursor)
        if window is None:
            [status] = yield from self.status([name])
            window = status.window
        window_named(budget.period, budget.timezone, window)
        key = self.session.keys.ledger(name, stored_window(window, budget.definition))
        request = Read(
            READ_LEDGER,
            [self.session.keys.meta, key],
            [self.session.replica_id, before, limit],
            while_recovering="waits",
        )
        _, [trimmed, number, stored] = yield request
        entries = [public_entry(parse_entry(text), number + index, budget.unit) for index, text in enumerate(stored)]
        more = number > 1 and entries and entries[0].entry_id  # neither the first entry nor a summary
        return Page(tuple(reversed(entries)), str(number) if more else None, trimmed=bool(trimmed))

    # -- limits --------------------------------------------------------------------------------------------------------

    def set_limit(self, name: str, limit: AmountIn | None, until: datetime | str | None) -> Flow[Status]:
        """Changes a limit at run time, for all replicas."""
        budget = self.session.budget(name)
        units = "-" if limit is None else str(to_units(limit, budget.unit, round_down=True))
        _check_until(until)
        while True:
            yield from self.status([name])  # the window, and what lies in the past, are matters of the store's clock
            until_ms = self._until_ms(budget, until)
            yield from self._change_limit(budget, units, until_ms)
            [status] = yield from self.status([name])
            if until != "window" or status.resets_at is None or to_ms(status.resets_at) == until_ms:
                return status

    def clear_limit(self, name: str) -> Flow[Status]:
        """Returns to the configured limit."""
        yield from self._change_limit(self.session.budget(name), "", 0)
        return (yield from self.status([name]))[0]

    def _change_limit(self, budget: Budget, units: str, until_ms: int) -> Flow[None]:
        keys = self.session.keys
        reply = yield Command(
            SET_LIMIT, [keys.limits, keys.meta, keys.budgets], [budget.name, units, until_ms, budget.definition]
        )
        word, _, registered = _str(reply).partition(" ")
        if word == "m":
            raise conflict(budget, registered)
        self.session.memory.limit_changed(budget, units, until_ms, int(word))

    def _until_ms(self, budget: Budget, until: datetime | str | None) -> int:
        now_ms = self.session.now_ms()
        if until is None:
            return 0
        if not isinstance(until, datetime):
            return window_at(budget.period, budget.timezone, now_ms).end_ms or 0
        until_ms = to_ms(until.astimezone(UTC))
        if until_ms <= now_ms:
            raise InvalidArgument(f"until lies in the past: {until.isoformat()}")
        return until_ms

    # -- definitions ---------------------------------------------------------------------------------------------------

    def migrate(self, name: str) -> Flow[Migration]:
        """Replaces the registered definition of a budget by this replica's; changes nothing if they are the same."""
        budget, keys = self.session.budget(name), self.session.keys
        before: str | None = None
        while True:
            head, [found] = yield self.session.read("HGET", [keys.budgets], [f"d:{name}"])
            registered = _str(found or "")
            there = _defined(budget, registered)
            before = (registered and there.identity) if before is None else before
            if registered == budget.definition:  # it was before, or this call has done it and the reply was lost
                return Migration(name, before or None, budget.identity)
            span = window_at(there.period, there.timezone, head.now_us // 1000)
            window = keys.window(name, stored_window(span.name, there.definition))
            reply = yield Command(
                MIGRATE,
                [keys.meta, keys.limits, keys.budgets, window],
                [name, registered, budget.definition, span.start_ms, span.end_ms or 0, int(there.unit != budget.unit)],
            )
            if (word := _str(reply)) != "w":
                logger.warning(
                    "definition of budget %s registered: %s; before: %s", name, budget.identity, before or "none"
                )
                return Migration(name, before or None, budget.identity, limit_cleared=word == "cleared")

    # -- readiness -----------------------------------------------------------------------------------------------------

    def check(self) -> Flow[dict[str, str | None]]:
        """What keeps the store from being relied on, per check; ``None`` where nothing does."""
        try:
            store_fault, scripts_fault = yield from self._trial_faults()
            policy_fault = yield from self._policy_fault()
        except StoreUnavailable as error:
            unknown = "unknown: the store does not answer"
            return {"store": str(error), "policy": unknown, "scripts": unknown}
        return {"store": store_fault, "policy": policy_fault, "scripts": scripts_fault}

    def _policy_fault(self) -> Flow[str | None]:
        try:
            return policy_fault((yield Command(None, (), ("INFO", "memory"))))
        except StoreError as error:
            return f"unknown: {error}"

    def _trial_faults(self) -> Flow[tuple[str | None, str | None]]:
        """What the store refuses of all that a reservation needs, and what its scripts refuse: each command is tried,
        then the scripts with nothing to do, one that reads and all that write, these as durably as a reservation.
        """
        session = self.session
        try:
            words = [_str(word) for word in (yield Command(READINESS, session.keys.trial, ()))]
            if words:
                return refusal_faults(list(zip(words[::2], words[1::2], strict=True)))
            _, keys, args = encode_batch(session.keys, session.header, [])
            yield self._status_read((), False)
            yield Command(WRITE, keys, args)
        except StoreError as error:
            if error.fault == "login":
                return str(error), "unknown: the store refuses its user"
            return (str(error), "unknown: it is not a store") if error.fault == "protocol" else (None, str(error))
        return None, None

    def watch_policy(self) -> Flow[None]:
        """Report an eviction policy by which budgets may vanish; what cannot be read now is not reported."""
        self.session.policy_watched = True
        try:
            fault = policy_fault((yield Command(None, (), ("INFO", "memory"))))
        except StoreUnavailable:
            return
        if fault is not None and self.session.on_policy is not None:
            self.session.on_policy(fault)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _parts(self, record: Record) -> list[tuple[Window, int]]:
        return [(self.session.window(s.budget, s.window, s.flag), s.reserved) for s in record.segments]


def _status_or_error(
    budget: Budget,
    window: Window,
    stored: Sequence[bytes | str] | bytes | str,
    now_us: int,
    repaired_ms: int,
    claim: tuple[int, str],
) -> Status | BudgetError:
    if isinstance(stored, (bytes, str)):
        return StoreError(f"budget {budget.name!r} cannot be read: {_str(stored)}")
    try:
        return status_of(budget, window, stored, now_us, repaired_ms, claim)
    except DefinitionConflict as error:
        return error


def _defined(budget: Budget, registered: str) -> Budget:
    """The budget as it is registered; as this replica defines it, if it is not."""
    if not registered:
        return budget
    try:
        unit, period, timezone, kind = registered.split(",")
        return Budget(budget.name, None, unit=unit, period=period, timezone=timezone, kind=kind)
    except ValueError:
        raise conflict(budget, registered, "a version that knows the registered definition can replace it") from None


def _check_until(until: object) -> None:
    if until is not None and until != "window" and (not isinstance(until, datetime) or until.utcoffset() is None):
        raise InvalidArgument(f"until must be an aware datetime, 'window' or None, not {shown(until)}")


def _str(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
