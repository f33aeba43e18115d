"""Names for the letters of requests, replies and records. ``docs/wire.md`` describes each request and each reply."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from ktrdr_budget.models import HoldState, OnExpiry

__all__ = [
    "FLAGS",
    "POLICIES",
    "POLICY_CODES",
    "STATES",
    "STATE_CODES",
    "CommitMode",
    "ExtendMode",
    "ReleaseMode",
]

# -- requests ----------------------------------------------------------------------------------------------------------

RESERVE: Final = "R"
COMMIT: Final = "D"
COMMIT_WITH_REMARK: Final = "M"
FAST_COMMIT: Final = "C"
RELEASE: Final = "L"
RECORD: Final = "N"
EXTEND: Final = "E"
RETIRE: Final = "X"
RESTORE: Final = "K"
SETTLE_ON_BEHALF: Final = "S"
REPLAY_TOTAL: Final = "T"
REPLAY_LIMIT: Final = "Q"


class CommitMode(StrEnum):
    """How a commit determines the amount of one window."""

    EXACT = "x"
    RESERVED = "r"
    """The reserved amount."""
    ACCRUED = "a"
    """The accrued amount, or the given amount if that is larger."""


class ReleaseMode(StrEnum):
    """Modes of a release: they differ in who releases the hold, and whether the worker can still commit it."""

    BY_WORKER = "0"
    """The release is final."""
    BY_OPERATOR = "1"
    """The release is not final: a later commit by the worker corrects it."""
    BY_ID = "i"
    """As ``BY_OPERATOR`` if the hold is unconfirmed, else as ``BY_WORKER``."""
    FINAL = "f"
    """As ``BY_WORKER``. For an unknown id, the store keeps a tombstone: a record that refuses a late reservation."""
    UNRECEIVED = "s"
    """As ``BY_OPERATOR``, but only a grant to the named request is released. Afterwards, the id is free again."""
    LIFT = "u"
    """No release: remove the tombstone that ``UNRECEIVED`` has left for an unknown id."""


class ExtendMode(StrEnum):
    """The effect of an extension on the deadline."""

    HEARTBEAT = "0"
    """Set the deadline."""
    GROW = "1"
    """Keep the deadline of an open hold."""
    HEARTBEAT_NO_SOONER = "2"
    """Set the deadline if the new deadline is later."""
    REPORT = "3"
    """Keep the deadline, even if it has passed: the hold stays unconfirmed."""


# -- replies -----------------------------------------------------------------------------------------------------------

GRANTED: Final = "g"
DONE: Final = "k"
REPLAYED: Final = "p"
EXTENDED: Final = "e"
OUTGROWN: Final = "a"
RETIRED: Final = "x"
DENIED: Final = "d"
CONFLICT: Final = "c"
UNKNOWN_HOLD: Final = "u"
OTHER_WINDOWS: Final = "v"
STALE_WINDOW: Final = "w"
MISSING_WINDOW: Final = "t"
OTHER_DEFINITION: Final = "m"
RECOVERING: Final = "l"
TOO_MANY_HOLDS: Final = "h"
TOO_MANY_BUDGETS: Final = "b"
UNKNOWN_LIMIT: Final = "q"
WINDOW_FULL: Final = "f"
UNREADABLE: Final = "y"
NOT_FAST: Final = "s"

OVERRUN: Final = "o"
LATE: Final = "l"
"""Flags of ``DONE``."""
DATA_LOSS: Final = "L"
"""Flag in the head of a batch's reply."""

# -- hold records ------------------------------------------------------------------------------------------------------

OPEN: Final = "o"
UNCONFIRMED: Final = "x"
COMMITTED: Final = "c"
RELEASED: Final = "r"
RELEASED_BY_OPERATOR: Final = "z"
RECORDED: Final = "n"

STATES: Final[dict[str, HoldState]] = {
    OPEN: "open",
    UNCONFIRMED: "unconfirmed",
    RELEASED_BY_OPERATOR: "released",
    COMMITTED: "committed",
    RELEASED: "released",
    RECORDED: "recorded",
}
STATE_CODES: Final[dict[str, str]] = {
    "open": OPEN,
    "unconfirmed": UNCONFIRMED,
    "committed": COMMITTED,
    "released": RELEASED,
    "recorded": RECORDED,
}
SETTLED: Final = frozenset((COMMITTED, RELEASED, RECORDED))
"""States that are final: a hold in such a state does not change any more."""

POLICIES: Final[dict[str, OnExpiry]] = {"c": "charge", "a": "accrued", "r": "release"}
POLICY_CODES: Final[dict[str, str]] = {policy: code for code, policy in POLICIES.items()}

DOLLARS: Final = "u"
COUNT: Final = "n"
SLOTS: Final = "s"
FLAGS: Final[dict[str, str]] = {DOLLARS: "usd", COUNT: "count", SLOTS: "slots"}
"""For each unit letter in a hold record, the unit."""
