"""Records of research cycles. The records are in the store, so all replicas share them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from ktrdr_budget.engine.protocol.requests import Command
from ktrdr_budget.engine.protocol.scripts import CYCLES
from ktrdr_budget.errors import InvalidArgument
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.periods import from_ms

__all__ = ["CycleStatus", "CycleStore", "CycleView", "CyclesPage", "Progress"]

CycleStatus = Literal["running", "cancelling", "completed", "failed", "cancelled"]
Outcome = Literal["completed", "failed", "cancelled"]

NOT_A_CURSOR = "invalid cursor: use the one that the previous page returned"
KEPT_MAX = 1000
"""Maximum number of ended cycles that are kept."""
KEPT_MS = 35 * 86_400_000
"""Milliseconds until the records expire, counted from the last write to any record."""


@dataclass
class Progress:
    """The progress of a cycle, as its worker reports it."""

    phase: str = "designing"
    spend: str = "0"
    """Dollars spent so far."""
    estimate: str = "0"
    tokens: dict[str, int] = field(default_factory=lambda: {"design": 0, "assessment": 0})
    strategy_name: str | None = None
    model: str | None = None
    """The language model in use."""
    request: dict[str, Any] = field(default_factory=dict)
    """The options of the trigger: the fields of :class:`~ktrdr_budget.agent.options.CycleOptions`."""
    gates: list[dict[str, Any]] = field(default_factory=list)
    """The results of the gates so far. Each result has ``gate``, ``passed``, ``reason`` and ``bypassed``."""
    results: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    replica: str = ""
    trace_id: str = ""

    def document(self) -> str:
        """Serialize the progress for the store."""
        return json.dumps(vars(self), separators=(",", ":"), allow_nan=False, default=str)


@dataclass(frozen=True)
class CycleView:
    """The record of a cycle."""

    operation_id: str
    status: CycleStatus
    started_at: datetime
    ended_at: datetime | None
    elapsed_s: float
    reason: str | None
    """Why the cycle failed or was cancelled: ``worker_lost``, ``gate_failed``, ``budget_exhausted``, ``error``, …"""
    progress: Mapping[str, Any]
    """The fields of :class:`Progress`."""

    @property
    def active(self) -> bool:
        """Whether the cycle has not ended."""
        return self.ended_at is None

    @property
    def outcome(self) -> str | None:
        """The final status; ``None`` while the cycle is active."""
        return None if self.active else self.status


@dataclass(frozen=True)
class CyclesPage:
    """All active cycles, and a page of the ended cycles."""

    as_of: datetime
    active: Sequence[CycleView]
    ended: Sequence[CycleView]
    """Sorted by start."""
    last: CycleView | None
    """The most recently ended cycle."""


class CycleStore:
    """Reads and writes the records of cycles. Every method may raise ``StoreUnavailable``.

    While the hold of a cycle is open, the cycle has the deadline of the hold, which heartbeats extend. If the deadline
    passes, the next call of any replica marks the cycle as lost: failed, with the reason ``worker_lost``.
    """

    def __init__(self, limiter: AsyncBudgetLimiter) -> None:
        self._limiter = limiter
        self.on_lost: Callable[[str, float], None] = _ignore
        """A function that is called for each cycle that this object marks as lost.

        The arguments are the id and the duration of the cycle in seconds.
        """

    async def _execute(self, action: str, *args: str | int) -> Any:
        keys = (*self._limiter.keys.cycles, self._limiter.keys.due)
        command = Command(CYCLES, keys, (action, KEPT_MAX, KEPT_MS, *args))
        lost, reply = await self._limiter.execute(command, f"cycle {action}")
        for operation_id, elapsed_ms in zip(lost[::2], lost[1::2], strict=True):
            self.on_lost(_text(operation_id), int(elapsed_ms) / 1000)
        return reply

    async def start(self, operation_id: str, owner: str, ttl_ms: int, progress: Progress) -> bool:
        """Write the record of a new cycle. Return false if another cycle has this id.

        If an open hold has the same id, the cycle has the deadline of the hold. Otherwise, the deadline is ``ttl_ms``
        from now.
        """
        return bool(await self._execute("start", operation_id, owner, ttl_ms, progress.document()))

    async def beat(self, operation_id: str, owner: str, progress: Progress) -> str:
        """Report progress. Return the cycle's status, or an empty text if the cycle has ended or has another owner."""
        return _text(await self._execute("beat", operation_id, owner, progress.document()))

    async def end(
        self, operation_id: str, owner: str, outcome: Outcome, reason: str | None, progress: Progress
    ) -> bool:
        """Write the final status. Return whether the cycle was marked as lost before this call."""
        return int(await self._execute("end", operation_id, owner, outcome, reason or "-", progress.document())) == 2

    async def cancel(self, operation_id: str) -> str:
        """Request the cancellation of a cycle of any replica. Return its status, or an empty text for an unknown id."""
        return _text(await self._execute("cancel", operation_id))

    async def get(self, operation_id: str) -> CycleView | None:
        """Return one cycle, or ``None`` if the id is unknown."""
        now_ms, record = await self._execute("get", operation_id)
        return _view(operation_id, _text(record), int(now_ms)) if record else None

    async def list(self, count: int = 0, after: str = "") -> CyclesPage:
        """Return all active cycles, and a page of the ended cycles.

        Args:
            count: the maximum number of ended cycles.
            after: the id of an ended cycle. The page has only cycles that began earlier. Default: the newest cycles.

        Raises:
            InvalidArgument: no ended cycle has the id ``after``.
        """
        reply = await self._execute("list", count, after)
        if not reply:
            raise InvalidArgument(NOT_A_CURSOR)
        now, active, ended, last = reply
        now_ms = int(now)
        return CyclesPage(
            from_ms(now_ms),
            sorted(_views(active, now_ms), key=lambda cycle: (cycle.started_at, cycle.operation_id)),
            _views(ended, now_ms),
            next(iter(_views(last, now_ms)), None),
        )


def _views(pairs: Sequence[bytes], now_ms: int) -> Sequence[CycleView]:
    found = zip(pairs[::2], pairs[1::2], strict=True)
    return [_view(_text(operation_id), _text(record), now_ms) for operation_id, record in found if record]


def _view(operation_id: str, record: str, now_ms: int) -> CycleView:
    head, _, document = record.partition("\n")
    status, started, _deadline, ended, reason, _owner = head.split(" ")
    started_ms, ended_ms = int(started), int(ended)
    return CycleView(
        operation_id=operation_id,
        status=status,  # type: ignore[arg-type]  # one of the statuses of lua/cycles.lua
        started_at=from_ms(started_ms),
        ended_at=from_ms(ended_ms) if ended_ms else None,
        elapsed_s=((ended_ms or now_ms) - started_ms) / 1000,
        reason=None if reason == "-" else reason,
        progress=json.loads(document),
    )


def _ignore(operation_id: str, elapsed_s: float) -> None:
    pass


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
