"""A call of the limiter while it is under way, and what a hook is told of it when it has ended."""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ktrdr_budget.engine.calls.reads import Flow

__all__ = ["Call", "Observation", "Observer"]


@dataclass(frozen=True, slots=True)
class Observation:
    """What a hook is told of each finished call, and of spend whose call has ended before it was recorded.

    A settlement is ``replayed`` here if it was reported before: not if it is a retry's, and the first reply was lost.
    """

    operation: str
    """``reserve``, ``commit``, ``release``, ``extend``, ``grow``, ``record``, ``status``, …; or ``resolve``: a commit
    or record whose call has ended without a reply, and that this replica has made all the same."""
    result: Any
    error: BaseException | None
    seconds: float
    context: contextvars.Context
    """The caller's, as it was when it called."""


Observer = Callable[[Observation], None]


class Call:
    """One flow, and whoever awaits its result."""

    __slots__ = (
        "context",
        "deadline",
        "delayed",
        "flow",
        "future",
        "kept",
        "operation",
        "request",
        "sent",
        "stalled_max_s",
        "started",
        "unacknowledged",
    )

    def __init__(
        self,
        flow: Flow[Any],
        future: Any,
        operation: str,
        started: float,
        deadline: float,
        stalled_max_s: float = math.inf,
        *,
        kept: bool = False,
    ) -> None:
        self.flow = flow
        self.future = future
        self.operation = operation
        self.started = started
        self.deadline = deadline
        self.stalled_max_s = stalled_max_s
        """Once the event loop stood still for so long in sum, that the call got no reply says nothing of the store."""
        self.delayed = False
        """Its time has begun anew, for the event loop stood still."""
        self.kept = kept
        """The caller will not retry: the limiter sends a settlement that fails again, as if the caller were gone."""
        self.context = contextvars.copy_context()
        self.request: Any = None
        self.sent = False
        """Whether an attempt that brought no answer may have been executed all the same."""
        self.unacknowledged = False
        """Whether that attempt may have been the first of a settlement: then its replay is the first reply."""
