"""All requests that are not batches, and their replies: scripts that read or administer, and plain commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from ktrdr_budget.engine.protocol.hold_record import HoldRecord, is_tombstone, parse_record, word
from ktrdr_budget.engine.protocol.keys import Keys
from ktrdr_budget.engine.protocol.operations import Operation
from ktrdr_budget.engine.protocol.replies import OtherDefinition
from ktrdr_budget.engine.protocol.scripts import (
    MIGRATE,
    READ,
    READ_CHANGES,
    READ_LEDGER,
    READINESS,
    SET_LIMIT,
    STATUS,
    WRITE,
)
from ktrdr_budget.engine.protocol.window import Window

__all__ = [
    "Command",
    "PreparedFact",
    "Read",
    "ReadHead",
    "RuntimeLimit",
    "WhileRecovering",
    "WindowFigures",
    "changes_read",
    "definition_read",
    "due_read",
    "index_read",
    "info_memory",
    "ledger_read",
    "migrate",
    "parse_changes_page",
    "parse_eviction_policy",
    "parse_hold_records",
    "parse_hold_texts",
    "parse_ids",
    "parse_ledger_page",
    "parse_migrate",
    "parse_read",
    "parse_refused",
    "parse_set_limit",
    "parse_status",
    "parse_text",
    "readiness",
    "record_read",
    "records_read",
    "set_limit",
    "status_read",
    "trial_write",
]

WhileRecovering = Literal["answers", "answers if found", "waits"]


class Command(NamedTuple):
    """A script, or a plain command, whose reply contains no figures of budgets or holds."""

    script: str | None
    keys: Sequence[str]
    args: Sequence[str | int]


class PreparedFact(NamedTuple):
    """A settlement or report by id, before the hold's record is read.

    The record shows the windows of the hold. With the record, ``complete`` creates the operation.
    """

    hold_id: str
    key: str
    contents: str
    """A text that is equal for equal requests."""
    complete: Callable[[HoldRecord], Operation]


class Read(NamedTuple):
    """A script that reads budgets or holds. Its reply begins with a :class:`ReadHead`."""

    script: str
    keys: Sequence[str]
    args: Sequence[str | int]
    while_recovering: WhileRecovering = "answers"
    """Which replies are used while replicas may still replay lost data: all, only those with a result, or none."""
    prepares: PreparedFact | None = None
    """The settlement or report that needs this read; ``None`` if there is none."""


class ReadHead(NamedTuple):
    """The state of the store, from the reply to a read."""

    now_us: int
    epoch: str | None
    """The store's epoch; ``None`` if nothing was ever written."""
    acknowledged: int
    recovering_until_ms: int
    """Until when replicas may replay lost data; 0 if no replay is pending."""

    @property
    def now_ms(self) -> int:
        """The store's time in milliseconds."""
        return self.now_us // 1000


class RuntimeLimit(NamedTuple):
    """A limit that was set at run time."""

    units: int | None
    """The limit in whole units; ``None``: uncapped."""
    until_ms: int
    """The end of the limit in milliseconds; 0: it has no end."""
    changed_us: int = 0

    def is_in_force(self, now_ms: int) -> bool:
        """Whether the limit has not ended."""
        return self.until_ms == 0 or self.until_ms > now_ms


class WindowFigures(NamedTuple):
    """The store's figures of a window. Sums are whole units."""

    runtime: RuntimeLimit | None
    registered: str
    """The registered definition of the budget; empty if there is none."""
    limit: int | None
    has_limit: bool
    """Whether a reservation has written a configured limit to the window."""
    spent: int
    held: int
    unconfirmed: int
    events: int
    overruns: int
    claim: tuple[int, str] | None
    """The start time and the id of the replica that wrote the configured limit."""


def _text(value: bytes | str | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""


# -- reads -------------------------------------------------------------------------------------------------------------


def parse_read(reply: Sequence[Any]) -> tuple[ReadHead, Sequence[Any]]:
    """Parse a read's reply: its head, and the items after it."""
    now_us, epoch, acknowledged, recovering_until_ms = _text(reply[0]).split(" ")
    head = ReadHead(int(now_us), None if epoch == "-" else epoch, int(acknowledged), int(recovering_until_ms))
    return head, reply[1:]


def _read(
    keys: Keys,
    replica: str,
    command: str,
    of: Sequence[str],
    args: Sequence[str | int] = (),
    *,
    while_recovering: WhileRecovering = "answers",
) -> Read:
    """A read that runs one command and returns its result as the only item.

    Args:
        of: the keys, which are the first arguments of the command.
        args: the further arguments.
    """
    return Read(READ, [keys.meta, *of], [replica, command, *args], while_recovering)


def records_read(keys: Keys, replica: str, hold_ids: Sequence[str]) -> Read:
    """Read the records of these holds; :func:`parse_hold_texts` reads the reply."""
    return _read(keys, replica, "MGET", [*map(keys.hold, hold_ids)])


def record_read(keys: Keys, replica: str, hold_id: str) -> Read:
    """Read the record of one hold.

    If the key has another Redis type, the read fails; for :func:`records_read`, such a hold is unknown.
    """
    return _read(keys, replica, "GET", [keys.hold(hold_id)], while_recovering="answers if found")


def parse_hold_texts(items: Sequence[Any]) -> list[str | None]:
    """The records of holds as text; ``None`` for an unknown hold."""
    [stored] = items
    texts = [_text(value) if value else None for value in (stored if isinstance(stored, list) else [stored])]
    return [None if text is None or is_tombstone(text) else text for text in texts]


def parse_hold_records(items: Sequence[Any]) -> list[HoldRecord | None]:
    """The records of holds; ``None`` for an unknown hold."""
    return [None if text is None else parse_record(text) for text in parse_hold_texts(items)]


def due_read(keys: Keys, replica: str, count: int) -> Read:
    """Read the ids of the open holds with the earliest deadlines; :func:`parse_ids` reads the reply."""
    return _read(keys, replica, "ZRANGE", [keys.due], (0, count - 1))


def index_read(keys: Keys, replica: str, index: str, offset: int, count: int) -> Read:
    """Read a part of an index of holds: ``count`` ids from an offset, with the latest deadline first."""
    args = (offset, offset + count - 1)
    return _read(keys, replica, "ZREVRANGE", [index], args, while_recovering="waits")


def parse_ids(items: Sequence[Any]) -> list[str]:
    """Parse a list of ids."""
    [ids] = items
    return [_text(hold_id) for hold_id in ids]


def definition_read(keys: Keys, replica: str, budget: str) -> Read:
    """Read the registered definition of a budget; :func:`parse_text` reads the reply."""
    return _read(keys, replica, "HGET", [keys.budgets], [f"d:{budget}"])


def parse_text(items: Sequence[Any]) -> str:
    """Parse a reply with one text; return an empty text if the store has none."""
    [value] = items
    return _text(value)


def status_read(keys: Keys, replica: str, windows: Sequence[Window], *, complete: bool = False) -> Read:
    """Read the figures of windows; :func:`parse_status` reads the reply.

    Args:
        complete: whether to wait while replicas may still replay data that the store has lost. If false, figures may be
            incomplete.
    """
    budgets, names = [window.budget for window in windows], [window.name for window in windows]
    of = [keys.meta, keys.limits, keys.due, keys.budgets, *(window.key for window in windows)]
    return Read(STATUS, of, [replica, *budgets, *names], "waits" if complete else "answers")


def parse_status(items: Sequence[Any]) -> tuple[list[str], list[WindowFigures | str]]:
    """The ids of due holds (open holds whose deadline has passed), and for each window its figures or an error."""
    due, *stored = items
    return [_text(hold_id) for hold_id in due], [
        _text(figures) if isinstance(figures, (bytes, str)) else _figures([_text(value) for value in figures])
        for figures in stored
    ]


def _figures(words: Sequence[str]) -> WindowFigures:
    runtime, registered, limit, spent, held, unconfirmed, events, overruns, claim = words
    started, _, replica = claim.partition(" ")
    return WindowFigures(
        runtime=_runtime_limit(runtime) if runtime else None,
        registered=registered,
        limit=int(limit) if limit not in ("", "-") else None,
        has_limit=limit != "",
        spent=int(spent or 0),
        held=int(held or 0),
        unconfirmed=int(unconfirmed or 0),
        events=int(events or 0),
        overruns=int(overruns or 0),
        claim=(int(started), replica) if started else None,
    )


def _runtime_limit(text: str) -> RuntimeLimit:
    units, *times = text.split(" ")
    return RuntimeLimit(None if units == "-" else int(units), *map(int, times))


def ledger_read(keys: Keys, replica: str, budget: str, window: str, before: str, count: int) -> Read:
    """Read a page of a window's ledger; :func:`parse_ledger_page` reads the reply.

    Args:
        before: the number of the entry that follows the page; empty for the newest entries.
    """
    of = [keys.meta, keys.ledger(budget, window)]
    return Read(READ_LEDGER, of, [replica, before, count], while_recovering="waits")


def parse_ledger_page(items: Sequence[Any]) -> tuple[bool, int, list[str]]:
    """Parse a page: whether the entries before the cursor were trimmed, the oldest entry's number, and the entries.

    The oldest entry comes first.
    """
    [trimmed, number, stored] = items
    return bool(trimmed), number, [_text(entry) for entry in stored]


def changes_read(keys: Keys, replica: str, before: str, count: int) -> Read:
    """Read a page of the log of changes; :func:`parse_changes_page` reads the reply.

    Args:
        before: the number of the entry that follows the page; empty for the newest entries.
    """
    return Read(READ_CHANGES, [keys.meta, keys.changes], [replica, before, count])


def parse_changes_page(items: Sequence[Any]) -> tuple[bool, bool, list[str]]:
    """Parse a page: whether the cursor's entry is gone, whether older entries follow, and the entries.

    The oldest entry comes first.
    """
    [trimmed, more, stored] = items
    return bool(trimmed), bool(more), [_text(entry) for entry in stored]


# -- commands ----------------------------------------------------------------------------------------------------------


def set_limit(
    keys: Keys, budget: str, units: int | None, until_ms: int, definition: str, by: str, reason: str, *, clear: bool
) -> Command:
    """Set a limit at run time, or clear it; :func:`parse_set_limit` reads the reply."""
    limit = "" if clear else "-" if units is None else str(units)
    of = [keys.limits, keys.meta, keys.budgets, keys.changes]
    return Command(SET_LIMIT, of, [budget, limit, until_ms, definition, word(by), word(reason)])


def parse_set_limit(reply: bytes | str, budget: str) -> int | OtherDefinition:
    """When the store changed the limit, in microseconds.

    If another definition is registered, the result is that definition instead.
    """
    text = _text(reply)
    return OtherDefinition(budget, text[2:]) if text.startswith("m ") else int(text)


def migrate(
    keys: Keys, budget: str, registered: str, definition: str, window: str, *, start_ms: int, end_ms: int, drop: bool
) -> Command:
    """Replace the registered definition of a budget; :func:`parse_migrate` reads the reply.

    Args:
        window: the key of the current window of the registered definition.
        drop: whether to remove the limit that was set at run time, because it is in another unit.
    """
    args: list[str | int] = [budget, registered, definition, start_ms, end_ms, int(drop)]
    return Command(MIGRATE, [keys.meta, keys.limits, keys.budgets, window], args)


def parse_migrate(reply: bytes | str) -> bool | None:
    """Whether a limit was dropped; ``None`` if the given definition or window is no longer the current one."""
    return {"w": None, "cleared": True}.get(_text(reply), False)


def readiness(keys: Keys) -> Command:
    """Try each command that the limiter needs; :func:`parse_refused` reads the reply."""
    return Command(READINESS, keys.trial, ())


def parse_refused(reply: Sequence[bytes | str]) -> list[tuple[str, str]]:
    """The refused commands with their errors; an empty error means that the store's user lacks the permission."""
    words = [_text(word) for word in reply]
    return list(zip(words[::2], words[1::2], strict=True))


def trial_write(keys: Sequence[str], args: Sequence[str]) -> Command:
    """Run a write script without operations, to check that the store accepts writes."""
    return Command(WRITE, keys, args)


def info_memory() -> Command:
    """Read the store's eviction policy from ``INFO memory``; :func:`parse_eviction_policy` reads the reply."""
    return Command(None, (), ("INFO", "memory"))


def parse_eviction_policy(reply: Any) -> str:
    """The eviction policy in the reply to ``INFO memory``; ``unknown`` if the reply has none."""
    if isinstance(reply, (bytes, str)):
        lines = _text(reply).splitlines()
        reply = dict(line.split(":", 1) for line in lines if ":" in line)
    return str(reply.get("maxmemory_policy", "unknown")) if isinstance(reply, dict) else "unknown"
