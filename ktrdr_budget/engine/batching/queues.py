"""Calls that wait to be sent, in three queues, each with a share of every batch: no kind of request starves another.

Within a batch, settlements come first, so that the money they give back can be granted in the same batch.
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
        """Heartbeats and reports, which need no room in a budget, and keep holds open."""
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
        """Queue a call behind those of its kind."""
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
        """Take the next batch: heartbeats and reports get their share first, then settlements, then the rest.

        Args:
            windows_max: about how many windows it may touch.
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
            call.flow.close()  # cancelled before it was sent: leaves nothing
            continue
        windows += len(call.request.windows)
        taken.append(call)
    return taken
