"""The types of replies to operations. An operation parses its reply by :meth:`~.operations.Operation.parse`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from ktrdr_budget.engine.protocol import codes
from ktrdr_budget.engine.protocol.hold_record import HoldRecord, is_tombstone, parse_record
from ktrdr_budget.engine.protocol.keys import split_name

__all__ = [
    "Conflict",
    "Denied",
    "Extended",
    "Granted",
    "MissingWindow",
    "NotFast",
    "OtherDefinition",
    "OtherWindows",
    "Outgrown",
    "Recovering",
    "Replayed",
    "Reply",
    "Restored",
    "Retired",
    "Settled",
    "StaleWindow",
    "TooManyBudgetsReply",
    "TooManyHoldsReply",
    "UnexpectedReply",
    "UnknownHoldReply",
    "UnknownLimit",
    "Unreadable",
    "WindowFull",
    "parse_common",
    "parse_settled",
]


class Granted(NamedTuple):
    """The reservation was granted: its amounts are held."""


class Replayed(NamedTuple):
    """The same reservation was granted before; nothing changed."""

    text: str
    """The record of the hold."""

    @property
    def record(self) -> HoldRecord:
        """The hold as it is now."""
        return parse_record(self.text)


class Settled(NamedTuple):
    """A commit, a release, a record of spend or a subtotal was executed, now or by an earlier request."""

    units: tuple[int, ...]
    """The units that count as spent, for each window in the order of the hold's record."""
    replayed: bool = False
    overrun: bool = False
    late: bool = False
    replica: str = ""
    """For a replay: the id of a replica. The settlement counts in the subtotals of this replica."""
    windows: tuple[tuple[str, str], ...] = ()
    """For the replay of a record of spend: each budget and the window in which the spend was first recorded."""


class Extended(NamedTuple):
    """The hold after the extension."""

    text: str

    @property
    def record(self) -> HoldRecord:
        """The hold as it is now."""
        return parse_record(self.text)


class Outgrown(NamedTuple):
    """The reservation is larger than expected, because another caller has grown the hold; nothing changed."""

    text: str

    @property
    def record(self) -> HoldRecord:
        """The hold as it is now."""
        return parse_record(self.text)


class Retired(NamedTuple):
    """A hold that was open past its deadline is now unconfirmed; any other hold is unchanged."""


class Restored(NamedTuple):
    """An open hold or a limit was restored, or had not been lost."""

    changed: bool


class Denied(NamedTuple):
    """A window has no room for the request; nothing changed. Amounts are whole units."""

    window: str
    """``budget:window``."""
    limit: int | None
    """The limit in force. ``None``: the budget is uncapped, but the window's sum would exceed the largest exact sum."""
    spent: int
    held: int
    unconfirmed: int
    requested: int
    first_deadline_ms: int
    """The first deadline of any open hold of the tenant; 0 if there is none."""
    total: int = 0
    """For growth: the total amount that the hold would have after the growth; else 0."""


class Conflict(NamedTuple):
    """The id belongs to a hold with other contents, or to a hold that was settled differently."""

    text: str

    @property
    def record(self) -> HoldRecord:
        """The hold as it is now."""
        return parse_record(self.text)

    @property
    def is_tombstone(self) -> bool:
        """Whether the record is a tombstone, which refuses a reservation that arrives after its caller is gone."""
        return is_tombstone(self.text)


class UnknownHoldReply(NamedTuple):
    """The store has no hold of this id."""


class OtherWindows(NamedTuple):
    """The request does not name all windows of the hold. The reply contains the hold's record."""

    text: str


class StaleWindow(NamedTuple):
    """A window does not contain the store's time; nothing changed."""


class MissingWindow(NamedTuple):
    """The key of a window is missing, although the window was created before; nothing changed."""

    window: str


class OtherDefinition(NamedTuple):
    """Another definition of the budget is registered; nothing changed."""

    budget: str
    registered: str


class Recovering(NamedTuple):
    """Replicas may still replay data that the store has lost; nothing changed."""

    until_ms: int


class TooManyHoldsReply(NamedTuple):
    """The tenant has the maximum number of holds; nothing changed."""

    holds: int
    first_deadline_ms: int


class TooManyBudgetsReply(NamedTuple):
    """The tenant has the maximum number of budgets; nothing changed."""

    budget: str


class UnknownLimit(NamedTuple):
    """Neither the store nor this replica has a limit for the budget; nothing changed."""

    budget: str


class WindowFull(NamedTuple):
    """The request would raise the sum of a window to 2**62 units or more; nothing changed."""

    window: str


class Unreadable(NamedTuple):
    """A key of the request has an unexpected Redis type; nothing changed."""

    error: str


class NotFast(NamedTuple):
    """The fast path does not support this batch; nothing changed."""


class UnexpectedReply(NamedTuple):
    """A reply that this version does not know."""

    line: str


Reply = (
    Granted
    | Replayed
    | Settled
    | Extended
    | Outgrown
    | Retired
    | Restored
    | Denied
    | Conflict
    | UnknownHoldReply
    | OtherWindows
    | StaleWindow
    | MissingWindow
    | OtherDefinition
    | Recovering
    | TooManyHoldsReply
    | TooManyBudgetsReply
    | UnknownLimit
    | WindowFull
    | Unreadable
    | NotFast
    | UnexpectedReply
)

GRANTED: Final = Granted()
RETIRED: Final = Retired()
_UNKNOWN_HOLD: Final = UnknownHoldReply()
_STALE_WINDOW: Final = StaleWindow()
_NOT_FAST: Final = NotFast()


def _denied(fields: str) -> Denied:
    window, limit, *figures = fields.split(" ")
    return Denied(window, None if limit == "-" else int(limit), *map(int, figures))


def _other_definition(fields: str) -> OtherDefinition:
    budget, _, registered = fields.partition(" ")
    return OtherDefinition(budget, registered)


def _too_many_holds(fields: str) -> TooManyHoldsReply:
    count, deadline_ms = fields.split(" ")
    return TooManyHoldsReply(int(count), int(deadline_ms))


_COMMON: Final[dict[str, Callable[[str], Reply]]] = {
    codes.DENIED: _denied,
    codes.CONFLICT: Conflict,
    codes.UNKNOWN_HOLD: lambda _: _UNKNOWN_HOLD,
    codes.OTHER_WINDOWS: OtherWindows,
    codes.STALE_WINDOW: lambda _: _STALE_WINDOW,
    codes.MISSING_WINDOW: MissingWindow,
    codes.OTHER_DEFINITION: _other_definition,
    codes.RECOVERING: lambda fields: Recovering(int(fields)),
    codes.TOO_MANY_HOLDS: _too_many_holds,
    codes.TOO_MANY_BUDGETS: lambda fields: TooManyBudgetsReply(split_name(fields)[0]),
    codes.UNKNOWN_LIMIT: lambda fields: UnknownLimit(split_name(fields)[0]),
    codes.WINDOW_FULL: WindowFull,
    codes.UNREADABLE: Unreadable,
    codes.NOT_FAST: lambda _: _NOT_FAST,
}


def parse_common(line: str) -> Reply:
    """Parse a reply whose form is the same for all operations. Return :class:`UnexpectedReply` for other replies."""
    parse = _COMMON.get(line[:1])
    return UnexpectedReply(line) if parse is None else parse(line[2:])


def parse_settled(line: str) -> Settled:
    """Parse the reply to a settlement: ``DONE`` or ``REPLAYED``, then flags and units.

    After ``REPLAYED``, the reply also has the replica and the windows of the first attempt.
    """
    words = line.split(" ")
    flags = words[1] if len(words) > 1 else ""
    units = tuple(map(int, words[2].split(","))) if len(words) > 2 and words[2] else ()
    replica = words[3] if len(words) > 3 and words[3] != "-" else ""
    windows = tuple(split_name(name) for name in words[4].split(",")) if len(words) > 4 else ()
    return Settled(units, words[0] == codes.REPLAYED, codes.OVERRUN in flags, codes.LATE in flags, replica, windows)
