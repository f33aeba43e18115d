"""A call of the limiter in progress, and its observation once it has ended."""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ktrdr_budget.engine.calls.context import Flow

__all__ = ["Observation", "Observer", "PendingCall"]


@dataclass(frozen=True, slots=True)
class Observation:
    """A finished call, or spend that was recorded after its call had ended.

    A settlement is ``replayed`` here only if it was observed before. A retry after a lost reply is the first
    observation.
    """

    operation: str
    """``reserve``, ``commit``, ``release``, ``extend``, ``grow``, ``record``, ``status``, …; or ``resolve``: a commit
    or record whose call has ended without a reply, and that this replica has made all the same."""
    result: Any
    error: BaseException | None
    seconds: float
    context: contextvars.Context
    """The context variables of the caller at the time of the call."""


Observer = Callable[[Observation], None]


class PendingCall:
    """One call, and the future that its caller awaits.

    Args:
        started_s: by the monotonic clock.
        deadline_s: by the event loop's clock.
        stalled_max_s: if the event loop was blocked for longer in total, a missing reply does not indicate an outage.
        kept: the caller will not retry, so the limiter resends a settlement that fails.
    """

    __slots__ = (
        "context",
        "deadline_s",
        "flow",
        "future",
        "kept",
        "operation",
        "request",
        "stalled_max_s",
        "started_s",
        "unacknowledged",
        "was_renewed",
        "was_resent",
    )

    def __init__(
        self,
        flow: Flow[Any],
        future: Any,
        operation: str,
        started_s: float,
        deadline_s: float,
        stalled_max_s: float = math.inf,
        *,
        kept: bool = False,
    ) -> None:
        self.flow = flow
        self.future = future
        self.operation = operation
        self.started_s = started_s
        self.deadline_s = deadline_s
        self.stalled_max_s = stalled_max_s
        self.kept = kept
        self.was_renewed = False
        """Whether the call's deadline was renewed, because the event loop was blocked."""
        self.context = contextvars.copy_context()
        self.request: Any = None
        """The request whose reply the call waits for."""
        self.was_resent = False
        """Whether an attempt without a reply may have been executed."""
        self.unacknowledged = False
        """Whether a resent settlement may have been executed by its first attempt: a replay is then its first reply."""
