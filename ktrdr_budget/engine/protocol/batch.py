"""A batch: the operations in one request of a write script, and the reply to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from ktrdr_budget.engine.protocol import codes
from ktrdr_budget.engine.protocol.keys import Keys
from ktrdr_budget.engine.protocol.operations import Operation
from ktrdr_budget.engine.protocol.replies import Reply
from ktrdr_budget.engine.protocol.scripts import FAST_PATH, script_for
from ktrdr_budget.engine.protocol.window import BatchWindows, Window

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
    windows = BatchWindows()
    lines = [op.render(windows) for op in ops]
    epoch, started = header.epoch or "-", header.started_us
    started_word = f"-{header.age_us}" if started is None else str(started)
    numbers = header.replica, epoch, str(header.acknowledged), started_word, str(len(windows.listed))
    words = [word for window in windows.listed for word in window.words]
    script = script_for({op.letter for op in ops}, repairs=repairs)
    args = [*numbers, header.settings_word, *words, *lines]
    return EncodedBatch(script, [*keys.of_writes, *windows.store_keys, *[op.key for op in ops]], args)


def _encode_fast(keys: Keys, header: Header, ops: Sequence[Operation]) -> EncodedBatch:
    """Render a batch for the fast path. A mark shows in which windows the batch reserves amounts."""
    windows = BatchWindows()
    lines = [op.render_fast(windows) for op in ops]
    reserved: dict[str, Window] = {}
    for op in ops:
        if op.asks_for_money:
            for window in op.windows:
                reserved[window.key] = window
    spans = [window.span for window in reserved.values()]
    start_ms = max([span.start_ms for span in spans], default=0)
    end_ms = min([span.end_ms or _ENDLESS_MS for span in spans], default=_ENDLESS_MS)
    marks = ["!" if window.key in reserved else "-" for window in windows.listed]
    replica = header.replica
    claim = f"{header.started_us or 0:016d} {replica}"
    bounds = f"{start_ms:013d}000", f"{end_ms:013d}000"
    numbers = f"r:{replica}", header.epoch or "-", str(header.acknowledged), claim, *bounds, str(header.id_memory_ms)
    args = [*numbers, header.settings_word, str(len(marks)), *marks, *lines]
    return EncodedBatch(FAST_PATH, [*keys.of_writes[:4], *windows.store_keys, *[op.key for op in ops]], args)


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
