"""Three queues of calls that wait to be sent, one for each kind of request.

Each queue has a share of every batch, so that no kind of request starves another. Within a batch, settlements come
first, so that the money that settlements give back can be granted in the same batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator

from ktrdr_budget.engine.batching.pending import PendingCall

__all__ = ["Queues"]

_SHARES = 4
"""A queue with waiting calls gets at least a quarter of a batch."""


class Queues:
    """The waiting calls of one event loop."""

    __slots__ = ("_admissions", "_settlements", "_urgent")

    def __init__(self) -> None:
        self._settlements: deque[PendingCall] = deque()
        self._urgent: deque[PendingCall] = deque()
        """Heartbeats, which keep holds open, and reports. Neither needs room in a budget."""
        self._admissions: deque[PendingCall] = deque()
        """Reservations and growth."""

    def __len__(self) -> int:
        return len(self._settlements) + len(self._urgent) + len(self._admissions)

    def __iter__(self) -> Iterator[PendingCall]:
        yield from self._settlements
        yield from self._urgent
        yield from self._admissions

    def _queue_of(self, call: PendingCall) -> deque[PendingCall]:
        request = call.request
        return self._admissions if request.asks_for_money else self._urgent if request.is_urgent else self._settlements

    def put(self, call: PendingCall) -> None:
        """Append a call to the queue of its kind."""
        self._queue_of(call).append(call)

    def put_back(self, batch: Iterable[PendingCall]) -> None:
        """Return calls to the front of their queues, in their former order."""
        for call in reversed([*batch]):
            self._queue_of(call).appendleft(call)

    def clear(self) -> list[PendingCall]:
        """Remove and return all calls."""
        waiting = [*self]
        for queue in (self._settlements, self._urgent, self._admissions):
            queue.clear()
        return waiting

    @property
    def next_deadline_s(self) -> float:
        """The earliest deadline among the first calls of the queues; infinite if all queues are empty."""
        heads = [queue[0].deadline_s for queue in (self._settlements, self._urgent, self._admissions) if queue]
        return min(heads, default=math.inf)

    def take(self, ops_max: int, windows_max: int) -> list[PendingCall]:
        """Take the next batch.

        Heartbeats and reports are taken first, then settlements, then reservations and growth. Each queue leaves room
        for the shares of the queues after it.

        Args:
            ops_max: the largest number of calls in the batch.
            windows_max: about how many windows all calls of the batch may touch together.
        """
        settlements, urgent, admissions = self._settlements, self._urgent, self._admissions
        share, few = ops_max // _SHARES, windows_max // _SHARES
        for_settlements, for_admissions = min(share, len(settlements)), min(share, len(admissions))
        heartbeats = _take(urgent, ops_max - for_settlements - for_admissions, windows_max - 2 * few)
        ops_left, windows_left = ops_max - len(heartbeats), windows_max - _windows(heartbeats)
        settled = _take(settlements, ops_left - for_admissions, max(few, windows_left - few * bool(admissions)))
        ops_left, windows_left = ops_left - len(settled), windows_left - _windows(settled)
        asked = _take(admissions, ops_left, max(few, windows_left))
        return [*settled, *heartbeats, *asked]


def _windows(calls: list[PendingCall]) -> int:
    return sum([len(call.request.windows) for call in calls])


def _take(queue: deque[PendingCall], ops_max: int, windows_max: int) -> list[PendingCall]:
    taken: list[PendingCall] = []
    windows = 0
    while queue and len(taken) < ops_max and windows < windows_max:
        call = queue.popleft()
        if call.future.cancelled() and not call.was_resent and not call.request.is_fact:
            call.flow.close()  # cancelled before it was sent: nothing to undo
            continue
        windows += len(call.request.windows)
        taken.append(call)
    return taken
