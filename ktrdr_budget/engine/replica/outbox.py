"""The outbox of a replica: requests to send once the store replies again.

A settlement is *deferred* if the caller continued without the store (policies ``allow`` and ``lease``). A request is
*in doubt* if its reply was lost. A *report* sends the accrued amount of a hold. A settlement or report that failed in
another way is also in doubt if its caller will not retry it.

A settlement or report is sent again. This is harmless, because the request has the id of the hold. A reservation in
doubt is not sent again:

- If the id was generated, the hold is released. If the reservation arrives at the store later, the store refuses it.
- If the caller chose the id, the hold is only looked up, because the caller may retry and then receives the hold.
- If that caller is gone, the hold is released, but only if it was granted to this very request.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Literal

from ktrdr_budget.engine.protocol.operations import Operation
from ktrdr_budget.engine.protocol.requests import PreparedFact

__all__ = ["DEFERRED_MAX", "FACTS", "IN_DOUBT_MAX", "OUTCOMES", "Entry", "Kind", "Outbox"]

logger = logging.getLogger("ktrdr_budget")

DEFERRED_MAX = 100_000
IN_DOUBT_MAX = 10_000

Kind = Literal["deferred", "settlement", "report", "by id", "release", "look up"]
"""Kinds of entries.

``by id``: a settlement or report by id, for which the hold's record must be read first. ``release``: the release of a
hold whose caller did not receive the grant. ``look up``: a reservation whose hold is looked up.
"""
FACTS = frozenset({"settlement", "report", "by id"})
OUTCOMES = ("executed", "sent_again", "superseded", "released", "granted", "absent", "retried", "refused", "dropped")
"""Outcomes of a request in doubt.

``executed``: the store had executed the first attempt. ``sent_again``: the request was sent again, because the store
had not executed it, or because it was a report. ``superseded``: the hold was settled in another way meanwhile.
``released``: no caller had the granted hold, which was released. ``granted``: the hold is open under an id that the
caller chose, and is left to the caller. ``absent``: the store has no such hold. ``retried``: the caller received a
reply to another attempt. ``refused``: the store did not accept the request. ``dropped``: the outbox was full, or the
request was too old to be sent again safely.
"""


class Entry:
    """One request in the outbox.

    Args:
        request: the operation to send; or, before the hold's record is read, a prepared settlement or report.
        maybe_executed_us: when the first attempt may have been executed, by the store's clock, in microseconds;
            ``None`` if no attempt was sent.
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
    """The outbox of one replica. It does no I/O."""

    def __init__(self) -> None:
        self._in_doubt: dict[str, list[Entry]] = {}
        """Requests in doubt by the ids of their holds."""
        self._deferred: dict[str, list[Entry]] = {}
        self.deferred = 0
        """The number of deferred settlements."""
        self.in_doubt = 0
        """The number of requests in doubt."""
        self.deferred_lost = 0
        """The number of deferred settlements that were dropped: the outbox was full, or a resend was no longer safe."""
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        """How many requests in doubt have ended, by outcome."""

    def __len__(self) -> int:
        return self.deferred + self.in_doubt

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over the requests in doubt, then over the deferred settlements.

        Each group begins with its oldest id.
        """
        for queue in (self._in_doubt, self._deferred):
            for entries in list(queue.values()):
                yield from list(entries)

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._queue(entry.kind).get(entry.hold_id, ())

    def _queue(self, kind: Kind) -> dict[str, list[Entry]]:
        return self._deferred if kind == "deferred" else self._in_doubt

    def add(self, entry: Entry) -> Entry | None:
        """Add a request unless an equivalent request is queued; return the request evicted to make room, if any."""
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
        """Whether ``entry`` need not be added, because ``other`` is equivalent or was replaced by ``entry``."""
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
        if oldest.kind == "deferred":
            logger.error("outbox full: deferred spend of %s dropped", oldest.hold_id)
        else:
            logger.error("outbox full: dropped a request with id %s; its outcome is unknown", oldest.hold_id)
        return oldest

    def end(self, entry: Entry, outcome: str) -> bool:
        """Remove an entry, and count its outcome; return whether the entry was still queued."""
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
        """Remove the requests in doubt of this id, because a retry by the caller has received a reply.

        Args:
            settled: whether the retry was a settlement. If not, settlements and reports stay in the outbox.

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
    """The name of the reservation request that the entry repeats or releases; empty for a settlement or report."""
    return getattr(entry.request, "request", "")
