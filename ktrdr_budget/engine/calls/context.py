"""The state and helpers that all calls of one limiter share.

A call is a generator: it yields what to send to the store (:class:`~..protocol.operations.Operation`,
:class:`~..protocol.requests.Read` or :class:`~..protocol.requests.Command`), receives the typed reply, and returns the
result. The generator validates before it yields, so that bad input is refused before anything is sent. The reply to a
read is used only if the store has lost no data, or if this replica has repaired the loss. If there is no reply within
the deadline, :class:`~ktrdr_budget.errors.StoreUnavailable` is thrown into the generator. Sync and async limiters share
all calls.

An open hold whose deadline has passed is *due*. To retire a hold is to make a due hold unconfirmed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ktrdr_budget.engine.outage.policy import OutagePolicy, release_unreceived
from ktrdr_budget.engine.protocol.hold_record import HoldRecord
from ktrdr_budget.engine.protocol.operations import Labels, Operation, Retire
from ktrdr_budget.engine.protocol.requests import (
    Command,
    PreparedFact,
    Read,
    parse_hold_records,
    record_read,
    records_read,
)
from ktrdr_budget.engine.protocol.window import Window
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.engine.replica.outbox import Entry, Outbox
from ktrdr_budget.engine.replica.state import ReplicaState
from ktrdr_budget.errors import InvalidAmount, InvalidArgument, StoreError, UnknownHold, shown
from ktrdr_budget.money import AmountIn, to_units

__all__ = ["RETIRE_ROUNDS_MAX", "CallContext", "Flow", "checked_label"]

logger = logging.getLogger("ktrdr_budget")

Result = TypeVar("Result")
Flow = Generator[Operation | Read | Command, Any, Result]

RETIRE_ROUNDS_MAX = 64
_LABEL_CHARACTERS_MAX = 256
_NO_LABELS = Labels()


class CallContext:
    """The state that calls read and change.

    Args:
        new_hold: a function that makes a hold, sync or async like the limiter.
        trace_id: a function that returns the id of the current trace, for the ledger; ``""`` if there is no trace.
    """

    def __init__(
        self,
        state: ReplicaState,
        outbox: Outbox,
        policy: OutagePolicy,
        new_hold: Callable[..., Any],
        trace_id: Callable[[], str],
    ) -> None:
        self.state = state
        self.outbox = outbox
        self.policy = policy
        self.new_hold = new_hold
        self._trace_id = trace_id
        self.denials = DenialCache()

    def labels(self, owner: str, operation: str, scope: str = "") -> Labels:
        """The labels of a hold, with the current trace.

        Args:
            scope: in the form of :func:`~..protocol.hold_record.join_scope`.

        Raises:
            InvalidArgument: a label is too long, or is not a text.
        """
        trace_id = self._trace_id()
        if not owner and not operation and not trace_id and not scope:  # the usual case
            return _NO_LABELS
        return Labels(checked_label(owner), checked_label(operation), checked_label(trace_id), scope)

    @property
    def trace_id(self) -> str:
        """The current trace, as a label."""
        return checked_label(self._trace_id())

    def windows_of(self, record: HoldRecord) -> list[Window]:
        """The windows of a hold's record."""
        return [self.state.window(s.budget, s.window, s.flag) for s in record.segments]

    def parts_of(self, record: HoldRecord) -> list[tuple[Window, int]]:
        """The windows of a hold's record, each with the whole units reserved."""
        return [(self.state.window(s.budget, s.window, s.flag), s.reserved) for s in record.segments]

    def wanted(
        self, budget: str | Mapping[str, AmountIn], amount: AmountIn | None, positive: bool = True
    ) -> list[tuple[str, int]]:
        """The budgets of a request, each with its whole units."""
        state = self.state
        if isinstance(budget, str):
            if amount is None:
                raise InvalidAmount(f"no amount given for {budget!r}")
            return [(budget, to_units(amount, state.budget(budget).unit, positive=positive))]
        if not isinstance(budget, Mapping) or not budget:
            raise InvalidArgument("budget must be a name, or a mapping of names to amounts")
        if amount is not None:
            raise InvalidArgument("the mapping has the amounts; give no further amount")
        return [(name, to_units(value, state.budget(name).unit, positive=positive)) for name, value in budget.items()]

    def given(self, wanted: Iterable[tuple[str, int]]) -> list[tuple[str, int, str]]:
        """The budgets of a request, each with its whole units and their unit."""
        return [(name, units, self.state.budgets[name].unit) for name, units in wanted]

    def release_later(self, hold_id: str, windows: Iterable[Window], request: str) -> None:
        """Queue the release of a grant that no caller has received, to be sent once the store replies.

        If the reservation arrives after the release, the store refuses the reservation.
        """
        op = release_unreceived(hold_id, self.state.keys.hold(hold_id), windows, request)
        self.outbox.add(Entry(op, "release", self.state.now_ms() * 1000))

    # -- holds by id ---------------------------------------------------------------------------------------------------

    def retire(self, due: Iterable[str]) -> Flow[None]:
        """Retire holds: make them unconfirmed, because their deadline has passed."""
        ids = list(due)
        yield from self.retire_records(dict(zip(ids, (yield from self.read_records(ids)), strict=True)))

    def retire_records(self, records: Mapping[str, HoldRecord | None]) -> Flow[None]:
        """Retire the holds that are past their deadline.

        Args:
            records: the records of the holds, which were read before; ``None`` for an unknown hold.
        """
        for hold_id, record in records.items():
            windows = self.windows_of(record) if record else []
            try:
                yield Retire(hold_id, self.state.keys.hold(hold_id), windows)
            except StoreError as error:  # one hold or window that cannot be read does not fail other calls
                logger.warning("retirement of hold %s failed: %s", hold_id, error)

    def read_records(self, hold_ids: Sequence[str]) -> Flow[list[HoldRecord | None]]:
        """The records of holds; ``None`` for an unknown hold."""
        _, items = yield records_read(self.state.keys, self.state.replica_id, hold_ids)
        return parse_hold_records(items)

    def read_hold(self, hold_id: str, fact: PreparedFact | None = None) -> Flow[HoldRecord]:
        """Read the record of a hold. A hold past its deadline is retired first.

        Args:
            fact: the settlement or report that needs the record; ``None`` if no settlement or report needs it.

        Raises:
            UnknownHold: no hold has this id.
        """
        retired = False
        state = self.state
        while True:
            read = record_read(state.keys, state.replica_id, hold_id)
            head, items = yield read._replace(prepares=fact)
            [record] = parse_hold_records(items)
            if record is None:
                raise UnknownHold(f"unknown hold {hold_id!r}")
            if retired or not record.is_due(head.now_ms):
                return record
            yield from self.retire_records({hold_id: record})
            retired = True

    def offline_hold(self, hold_id: str) -> HoldBase | None:
        """The hold with this id if the hold was granted offline, without the store; otherwise ``None``."""
        return self.policy.holds.get(hold_id)


class DenialCache:
    """A cache of the time at which a denied caller can retry, for each window.

    The time is read once for all callers that are denied within a second.
    """

    _LIFETIME_MS = 1_000
    _ENTRIES_MAX = 1_000

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, int, int]] = {}
        """For each window key: the first deadline of any open hold, the time of the search, and the deadline found."""

    def get(self, window: Window, first_deadline_ms: int, now_ms: int) -> int | None:
        """The cached deadline of this window; ``None`` if there is none, or if the first deadline has changed since."""
        entry = self._entries.get(window.key)
        if entry is None or entry[0] != first_deadline_ms or not 0 <= now_ms - entry[1] < self._LIFETIME_MS:
            return None
        return entry[2]

    def put(self, window: Window, first_deadline_ms: int, now_ms: int, found_ms: int) -> None:
        """Cache the deadline that was read for this window."""
        if len(self._entries) >= self._ENTRIES_MAX:
            self._entries.clear()
        self._entries[window.key] = first_deadline_ms, now_ms, found_ms


def checked_label(text: str) -> str:
    """Check a text that goes into the ledger.

    Raises:
        InvalidArgument: the label is too long, or is not a text.
    """
    if not text:
        return ""
    if not isinstance(text, str) or len(text) > _LABEL_CHARACTERS_MAX:
        raise InvalidArgument(f"a label is a string of at most {_LABEL_CHARACTERS_MAX} characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"a label must be text that UTF-8 can encode, not {shown(text)}") from None
    return text
