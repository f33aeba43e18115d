"""The outbox of a replica: requests to send once the store replies again.

A settlement is *deferred* if its caller continued without the store (policies ``allow`` and ``lease``). A request is
*in doubt* if its reply was lost; so is a settlement or report whose caller will not retry it. A settlement or a report
is sent again, which its id makes harmless. A reservation under a generated id is released, or refused if it arrives
late. A reservation under an id that the caller chose is only looked up, because a retry receives the hold; if the
caller is gone, the grant to this request is released.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ktrdr_budget.engine.protocol.operations import Operation
from ktrdr_budget.engine.protocol.requests import PreparedFact

__all__ = ["DEFERRED_MAX", "FACTS", "IN_DOUBT_MAX", "OUTCOMES", "Entry", "Kind", "Outbox"]

DEFERRED_MAX = 100_000
IN_DOUBT_MAX = 10_000

Kind = Literal["deferred", "settlement", "report", "by id", "release", "look up"]
"""``by id``: a settlement or report whose hold was not read yet. ``release``: of a grant that no caller received."""
FACTS = frozenset({"settlement", "report", "by id"})
OUTCOMES = ("executed", "sent_again", "superseded", "released", "granted", "absent", "retried", "refused", "dropped")
"""Outcomes of a request in doubt.

``executed``: the first attempt had been executed. ``sent_again``: it had not, or was a report. ``superseded``: the hold
was settled otherwise meanwhile. ``released``: a grant that no caller had. ``granted``: open under its caller's own id,
and left to it. ``absent``: never granted, or no such hold. ``retried``: its caller received a reply to another attempt.
``refused``: the store does not accept it. ``dropped``: the outbox was full, or the entry too old to resend safely.
"""


class Entry:
    """One request in the outbox.

    Args:
        request: the operation to send; a prepared fact until its hold has been read.
        maybe_executed_us: the time, by the store's clock, since when an attempt may have been executed; ``None`` if no
            attempt was sent.
    """

    __slots__ = ("kind", "maybe_executed_us", "request")

    def __init__(self, request: Operation | PreparedFact, kind: Kind, maybe_executed_us: int | None) -> None:
        self.request = request
        self.kind: Kind = kind
        self.maybe_executed_us = maybe_executed_us

    @property
    def hold_id(self) -> str:
        """The id of the request's hold."""
        return self.request.hold_id

    def equivalent(self, other: Entry) -> bool:
        """Whether both entries request the same change."""
        one, another = self.request, other.request
        if isinstance(one, PreparedFact) or isinstance(another, PreparedFact):
            return (
                isinstance(one, PreparedFact) and isinstance(another, PreparedFact)
                and one.contents == another.contents
            )  # fmt: skip
        return one.same_as(another)


class Outbox:
    """The outbox of one replica. No I/O."""

    def __init__(self) -> None:
        self._in_doubt: dict[str, list[Entry]] = {}
        """Requests in doubt by the ids of their holds."""
        self._deferred: dict[str, list[Entry]] = {}
        self.deferred = 0
        """The number of deferred settlements."""
        self.in_doubt = 0
        """The number of requests in doubt."""
        self.deferred_lost = 0
        """Deferred settlements that were dropped: the outbox was full, or they were too old to resend safely."""
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        """Requests in doubt by outcome."""

    def __len__(self) -> int:
        return self.deferred + self.in_doubt

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over requests in doubt, then deferred ones: oldest id first, per id in the order of arrival."""
        for queue in (self._in_doubt, self._deferred):
            for entries in list(queue.values()):
                yield from list(entries)

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._queue(entry.kind).get(entry.hold_id, ())

    def _queue(self, kind: Kind) -> dict[str, list[Entry]]:
        return self._deferred if kind == "deferred" else self._in_doubt

    def add(self, entry: Entry) -> Entry | None:
        """Add a request unless an equivalent one is queued; return the one evicted to make room, if any."""
        queue = self._queue(entry.kind)
        known = queue.setdefault(entry.hold_id, [])
        for other in known:
            if self._replaces(other, entry, known):
                return None
        known.append(entry)
        if entry.kind == "deferred":
            self.deferred += 1
            return self._evict(queue) if self.deferred > DEFERRED_MAX else None
        self.in_doubt += 1
        return self._evict(queue) if self.in_doubt > IN_DOUBT_MAX else None

    def _replaces(self, other: Entry, entry: Entry, known: list[Entry]) -> bool:
        """Whether the new entry need not be queued: a queued one is equivalent, or was replaced by it."""
        if entry.kind == "deferred":
            same = other.equivalent(entry)
            if same and other.maybe_executed_us is None:
                other.maybe_executed_us = entry.maybe_executed_us
            return same
        if other.kind in FACTS and entry.kind in FACTS:
            return other.equivalent(entry)
        if {other.kind, entry.kind} & FACTS or _request_of(other) != _request_of(entry):
            return False
        if other.kind == "look up":
            known[known.index(other)] = entry
        return True

    def _evict(self, queue: dict[str, list[Entry]]) -> Entry:
        oldest = next(iter(queue.values()))[0]
        self.end(oldest, "dropped")
        return oldest

    def end(self, entry: Entry, outcome: str) -> bool:
        """Remove an entry with this outcome; return whether it was still queued."""
        queue = self._queue(entry.kind)
        entries = queue.get(entry.hold_id, [])
        if entry not in entries:
            return False
        entries.remove(entry)
        if not entries:
            del queue[entry.hold_id]
        if entry.kind != "deferred":
            self.in_doubt -= 1
            self.outcomes[outcome] += 1
        else:
            self.deferred -= 1
            if outcome == "dropped":
                self.deferred_lost += 1
        return True

    def retried(self, hold_id: str, *, settled: bool) -> bool:
        """Remove requests in doubt after a reply to a retry: all with this id, or no facts unless ``settled``.

        Returns:
            Whether a settlement was in doubt.
        """
        settlement = False
        for entry in list(self._in_doubt.get(hold_id, ())):
            if settled or entry.kind not in FACTS:
                settlement |= entry.kind in ("settlement", "by id")
                self.end(entry, "retried")
        return settlement

    def of(self, hold_id: str) -> list[Entry]:
        """The entries of this id."""
        return [*self._in_doubt.get(hold_id, ()), *self._deferred.get(hold_id, ())]

    def clear(self) -> None:
        """Drop all entries in a forked child, because they belong to the parent."""
        self._in_doubt.clear()
        self._deferred.clear()
        self.deferred = self.in_doubt = 0


def _request_of(entry: Entry) -> str:
    """The request that a reservation, or the release of its grant, names."""
    return getattr(entry.request, "request", "")
