"""Cycles as all replicas see them: their records are in the store, not in the memory of whoever runs them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from ktrdr_budget.engine.protocol import Command
from ktrdr_budget.engine.protocol.scripts import CYCLES
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.periods import from_ms

__all__ = ["CycleStatus", "CycleView", "CyclesPage", "CycleStore", "Progress"]

CycleStatus = Literal["running", "cancelling", "completed", "failed", "cancelled"]
Outcome = Literal["completed", "failed", "cancelled"]

KEPT_MAX = 1000
"""How many ended cycles are remembered."""
KEPT_MS = 35 * 86_400_000
"""How long they are, once nothing happens any more."""


@dataclass
class Progress:
    """What a cycle tells of itself; whoever runs it keeps it up to date."""

    phase: str = "designing"
    spend: str = "0"
    """Dollars used so far."""
    estimate: str = "0"
    tokens: dict[str, int] = field(default_factory=lambda: {"design": 0, "assessment": 0})
    strategy_name: str | None = None
    model: str | None = None
    """The language model that is asked."""
    request: dict[str, Any] = field(default_factory=dict)
    """What the trigger asked for: the fields of :class:`~ktrdr_budget.agent.options.CycleOptions`."""
    gates: list[dict[str, Any]] = field(default_factory=list)
    """Each with ``gate``, ``passed``, ``reason`` and ``bypassed``."""
    results: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    replica: str = ""
    trace_id: str = ""

    def document(self) -> str:
        """For the store."""
        return json.dumps(vars(self), separators=(",", ":"), allow_nan=False, default=str)


@dataclass(frozen=True)
class CycleView:
    """A cycle as the store knows it."""

    operation_id: str
    status: CycleStatus
    started_at: datetime
    ended_at: datetime | None
    elapsed_s: float
    reason: str | None
    """Why it did not complete: ``worker_lost``, ``gate_failed``, ``budget_exhausted``, ``cancelled``, ``error``, …"""
    progress: Mapping[str, Any]
    """The fields of :class:`Progress`."""

    @property
    def active(self) -> bool:
        """Whether it has not ended."""
        return self.ended_at is None

    @property
    def outcome(self) -> str | None:
        """How it ended; ``None`` if it has not."""
        return None if self.active else self.status


@dataclass(frozen=True)
class CyclesPage:
    """The active cycles, oldest first, and some that have ended, newest first."""

    as_of: datetime
    active: Sequence[CycleView]
    ended: Sequence[CycleView]
    """By when they were begun."""
    last: CycleView | None
    """The one that ended last."""


class CycleStore:
    """Reads and writes the records. Errors are those of the store (``StoreUnavailable``).

    A cycle whose worker has been silent for too long is written down as lost by the call that finds it so.
    """

    def __init__(self, limiter: AsyncBudgetLimiter) -> None:
        self._limiter = limiter
        self.on_lost: Callable[[str, float], None] = _ignore
        """Is told the id of each cycle that a call from here has written down as lost, and how many seconds it took."""

    async def _ask(self, action: str, *args: str | int) -> Any:
        keys = (*self._limiter.keys.cycles, self._limiter.keys.due)
        command = Command(CYCLES, keys, (action, KEPT_MAX, KEPT_MS, *args))
        lost, said = await self._limiter.ask(command, f"cycle {action}")
        for operation_id, elapsed_ms in zip(lost[::2], lost[1::2], strict=True):
            self.on_lost(_text(operation_id), int(elapsed_ms) / 1000)
        return said

    async def start(self, operation_id: str, owner: str, ttl_ms: int, progress: Progress) -> bool:
        """Writes down a cycle that begins; false if there is one of this id.

        Its deadline is that of the open hold of its id, and ``ttl_ms`` from now if there is none.
        """
        return bool(await self._ask("start", operation_id, owner, ttl_ms, progress.document()))

    async def beat(self, operation_id: str, owner: str, progress: Progress) -> str:
        """Tells how far it is; returns its status, empty if it is this owner's no more."""
        return _text(await self._ask("beat", operation_id, owner, progress.document()))

    async def end(
        self, operation_id: str, owner: str, outcome: Outcome, reason: str | None, progress: Progress
    ) -> bool:
        """Writes down how it ended, also if it had been given up for lost; returns whether it had."""
        return int(await self._ask("end", operation_id, owner, outcome, reason or "-", progress.document())) == 2

    async def cancel(self, operation_id: str) -> str:
        """Asks a cycle to stop, wherever it runs; returns its status, empty if there is none of this id."""
        return _text(await self._ask("cancel", operation_id))

    async def get(self, operation_id: str) -> CycleView | None:
        """One cycle."""
        now_ms, record = await self._ask("get", operation_id)
        return _view(operation_id, _text(record), int(now_ms)) if record else None

    async def list(self, count: int = 0, after: str = "") -> CyclesPage:
        """The active cycles, and at most ``count`` ended ones that were begun before the one ``after``."""
        now, active, ended, last = await self._ask("list", count, after)
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
        status=status,  # type: ignore[arg-type]  # one of the words of lua/cycles.lua
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
