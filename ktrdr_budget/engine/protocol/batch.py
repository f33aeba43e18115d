"""A batch: the operations in one request of a write script, and the reply to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from ktrdr_budget.engine.protocol import codes
from ktrdr_budget.engine.protocol.keys import Keys
from ktrdr_budget.engine.protocol.operations import Operation, Rendered
from ktrdr_budget.engine.protocol.replies import Reply
from ktrdr_budget.engine.protocol.scripts import FAST_PATH, script_for

__all__ = ["BatchHead", "EncodedBatch", "Header", "Settings", "encode_batch", "parse_batch"]

_ENDLESS_MS: Final = 9_999_999_999_999


class Settings(NamedTuple):
    """Bounds that a replica sends with each batch."""

    id_memory_ms: int
    retention_ms: int
    ledger_entries_max: int
    budgets_max: int
    holds_max: int


class Header:
    """The state of a replica, sent with each batch.

    The epoch is an id that the store replaces after a loss of data.

    Args:
        epoch: the last epoch that this replica has seen; ``None`` if it has seen none.
        acknowledged: how many writes of this replica the store has acknowledged.
        started_us: the start of this replica by the store's clock; ``None`` before the store's first reply.
        age_us: how long ago this replica started.
        proposed_epoch: the epoch that the store adopts if it needs a new one.
    """

    __slots__ = ("acknowledged", "age_us", "epoch", "id_memory_ms", "replica", "settings_word", "started_us")

    def __init__(
        self,
        replica: str,
        epoch: str | None,
        acknowledged: int,
        *,
        started_us: int | None,
        age_us: int,
        proposed_epoch: str,
        settings: Settings,
    ) -> None:
        self.replica = replica
        self.epoch = epoch
        self.acknowledged = acknowledged
        self.started_us = started_us
        self.age_us = age_us
        self.id_memory_ms = settings.id_memory_ms
        # Bounds have a fixed width: a script cuts them out faster than it finds them.
        bounds = f"{settings.ledger_entries_max:012d} {settings.budgets_max:012d} {settings.holds_max:012d}"
        self.settings_word = f"{proposed_epoch} {settings.id_memory_ms} {settings.retention_ms} {bounds}"


class BatchHead(NamedTuple):
    """The first line of a batch's reply."""

    now_us: int
    data_loss: bool
    """Whether the store has lost acknowledged writes of this replica. If so, the store has executed no operation."""
    acknowledged: int
    epoch: str | None
    """The store's epoch if it differs from the epoch of the request, else ``None``."""
    due: tuple[str, ...]
    """The ids of due holds: open holds whose deadline has passed."""


class EncodedBatch(NamedTuple):
    """A script with its keys and arguments."""

    script: str
    keys: list[str]
    args: list[str]


def encode_batch(
    keys: Keys, header: Header, ops: Sequence[Operation], *, use_fast_path: bool = False, repairs: bool = False
) -> EncodedBatch:
    """Render a batch for the smallest script that can execute all of the operations.

    Args:
        use_fast_path: whether to use the script of the fast path if it can execute all of the operations.
        repairs: whether the operations replay data that the store has lost.
    """
    if use_fast_path and all([op.uses_fast_path for op in ops]):  # noqa: C419  # a list is faster
        return _encode_fast(keys, header, ops)
    windows = _Windows()
    hold_keys: list[str] = []
    lines: list[str] = []
    for op in ops:
        lines.append(windows.line(op.render()))
        hold_keys.append(op.key)
    epoch, started = header.epoch or "-", header.started_us
    started_word = f"-{header.age_us}" if started is None else str(started)
    numbers = header.replica, epoch, str(header.acknowledged), started_word, str(len(windows.numbers))
    args = [*numbers, header.settings_word, *windows.words, *lines]
    script = script_for({op.letter for op in ops}, repairs=repairs)
    return EncodedBatch(script, [*keys.of_writes, *windows.keys, *hold_keys], args)


class _Windows:
    """The windows of a batch. Each window is listed once; operations refer to a window by its number."""

    __slots__ = ("keys", "numbers", "words")

    def __init__(self) -> None:
        self.numbers: dict[str, str] = {}
        self.keys: list[str] = []
        self.words: list[str] = []

    def line(self, rendered: Rendered) -> str:
        """Render the line of an operation: the head, then the number and text of each window, then the tail."""
        text, parts, tail = rendered
        numbers = self.numbers
        for window, amounts in parts:
            number = numbers.get(window.key)
            if number is None:
                number = numbers[window.key] = f" {len(numbers) + 1}"
                self.words += window.words
                self.keys += (window.key, window.ledger_key)
            text += number + amounts
        return text + tail


def _encode_fast(keys: Keys, header: Header, ops: Sequence[Operation]) -> EncodedBatch:
    """Render a batch for the fast path. A mark shows in which windows the batch reserves amounts."""
    windows = _Windows()
    hold_keys: list[str] = []
    lines: list[str] = []
    reserved: set[str] = set()
    start_ms, end_ms = 0, _ENDLESS_MS
    line = windows.line
    for op in ops:
        lines.append(line(op.render_fast()))
        hold_keys.append(op.key)
        if op.asks_for_money:
            for window in op.windows:
                if window.key in reserved:
                    continue
                reserved.add(window.key)
                span = window.span
                start_ms = max(start_ms, span.start_ms)
                end_ms = min(end_ms, span.end_ms or _ENDLESS_MS)
    marks = ["!" if key in reserved else "-" for key in windows.numbers]
    replica = header.replica
    claim = f"{header.started_us or 0:016d} {replica}"
    bounds = f"{start_ms:013d}000", f"{end_ms:013d}000"
    numbers = f"r:{replica}", header.epoch or "-", str(header.acknowledged), claim, *bounds, str(header.id_memory_ms)
    args = [*numbers, header.settings_word, str(len(marks)), *marks, *lines]
    return EncodedBatch(FAST_PATH, [*keys.of_writes[:4], *windows.keys, *hold_keys], args)


def parse_batch(reply: bytes | str, ops: Sequence[Operation]) -> tuple[BatchHead, list[Reply]]:
    """Parse a batch's reply: the head, and a reply for each operation. After a data loss, there are no replies."""
    text = reply.decode() if isinstance(reply, bytes) else reply
    first, *lines = text.split("\n")
    now_us, flag, acknowledged, epoch, *due = first.split(" ")
    data_loss = flag == codes.DATA_LOSS
    head = BatchHead(int(now_us), data_loss, int(acknowledged), None if epoch == "-" else epoch, tuple(due))
    if data_loss or not ops:
        return head, []
    return head, [op.parse(line) for op, line in zip(ops, lines, strict=True)]
