"""Records of research cycles in the store, shared by all replicas."""

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
"""Milliseconds after the last change until the records expire."""


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
    """Each with ``gate``, ``passed``, ``reason`` and ``bypassed``."""
    results: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    replica: str = ""
    trace_id: str = ""

    def document(self) -> str:
        """Serialize for the store."""
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
    """Reason of a failure or cancellation: ``worker_lost``, ``gate_failed``, ``budget_exhausted``, ``error``, …"""
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
    """The active cycles, oldest first, and a page of ended ones, newest first."""

    as_of: datetime
    active: Sequence[CycleView]
    ended: Sequence[CycleView]
    """Sorted by start."""
    last: CycleView | None
    """The most recently ended cycle."""


class CycleStore:
    """Reads and writes the records of cycles. Raises the errors of the store (``StoreUnavailable``).

    Any call marks a cycle as lost if its deadline has passed without a report from its worker.
    """

    def __init__(self, limiter: AsyncBudgetLimiter) -> None:
        self._limiter = limiter
        self.on_lost: Callable[[str, float], None] = _ignore
        """Called with id and duration in seconds for each cycle that a call of this object marks as lost."""

    async def _execute(self, action: str, *args: str | int) -> Any:
        keys = (*self._limiter.keys.cycles, self._limiter.keys.due)
        command = Command(CYCLES, keys, (action, KEPT_MAX, KEPT_MS, *args))
        lost, reply = await self._limiter.execute(command, f"cycle {action}")
        for operation_id, elapsed_ms in zip(lost[::2], lost[1::2], strict=True):
            self.on_lost(_text(operation_id), int(elapsed_ms) / 1000)
        return reply

    async def start(self, operation_id: str, owner: str, ttl_ms: int, progress: Progress) -> bool:
        """Write the record of a new cycle; return false if the id is in use.

        The cycle's deadline is that of the open hold with its id, else ``ttl_ms`` from now.
        """
        return bool(await self._execute("start", operation_id, owner, ttl_ms, progress.document()))

    async def beat(self, operation_id: str, owner: str, progress: Progress) -> str:
        """Report progress; return the cycle's status, or an empty text if the cycle no longer belongs to this owner."""
        return _text(await self._execute("beat", operation_id, owner, progress.document()))

    async def end(
        self, operation_id: str, owner: str, outcome: Outcome, reason: str | None, progress: Progress
    ) -> bool:
        """Write the final status; return whether the cycle had been marked as lost before."""
        return int(await self._execute("end", operation_id, owner, outcome, reason or "-", progress.document())) == 2

    async def cancel(self, operation_id: str) -> str:
        """Request the cancellation of a cycle on any replica; return its status, empty for an unknown id."""
        return _text(await self._execute("cancel", operation_id))

    async def get(self, operation_id: str) -> CycleView | None:
        """Return one cycle; ``None`` if the id is unknown."""
        now_ms, record = await self._execute("get", operation_id)
        return _view(operation_id, _text(record), int(now_ms)) if record else None

    async def list(self, count: int = 0, after: str = "") -> CyclesPage:
        """Return the active cycles, and at most ``count`` ended ones that began before the ended cycle ``after``.

        Raises:
            InvalidArgument: no ended cycle ``after`` is recorded.
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
