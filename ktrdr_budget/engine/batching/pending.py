"""A call in progress, and the observation of a finished call."""

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
    """What an observer receives: a finished call, or spend that was recorded after its call had ended.

    A settlement in ``result`` is ``replayed`` only if the settlement was observed before. If the first reply was lost,
    the retry is the first observation.
    """

    operation: str
    """``reserve``, ``commit``, ``release``, ``extend``, ``grow``, ``record``, ``status``, …; or ``resolve``: a commit
    or record that this replica has completed after the call had ended without a reply."""
    result: Any
    error: BaseException | None
    seconds: float
    context: contextvars.Context
    """The context variables of the caller at the time of the call."""


Observer = Callable[[Observation], None]


class PendingCall:
    """One call, and the future that its caller awaits.

    Args:
        started_s: when the call began, by the monotonic clock.
        deadline_s: when the call ends if there is no reply, by the event loop's clock.
        stalled_max_s: a limit for :attr:`Deadlines.stalled_s`, the total time for which the event loop was blocked.
            Once that time has reached the limit, a missing reply does not indicate an outage.
        kept: whether the limiter resends a failed settlement. Set if the caller will not retry.
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
        """Whether the first attempt of a resent settlement may have been executed.

        If so, even the first reply may mark the settlement as a replay.
        """
