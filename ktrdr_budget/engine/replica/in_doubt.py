"""A small, bounded memory of requests whose outcome is unknown, and of facts whose caller will not send them again.

Once the store answers again, they are resolved. A settlement or a report (a *fact*) is sent again, which its id makes
harmless. A reservation whose id no caller knows is given back, or never granted any more. One under the caller's own id
is only looked up: a retry is granted it. If that caller is gone, it is given back, or refused when it arrives late; the
next request for the id is granted it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from ktrdr_budget.engine.protocol import Op, Prepared

__all__ = ["FACTS", "OUTCOMES", "Doubt", "Kind", "Unresolved"]

UNRESOLVED_MAX = 10_000

Kind = Literal["settlement", "report", "by id", "give back", "look up"]
"""``by id``: a settlement or report, of which the hold has not been read yet."""
FACTS = frozenset({"settlement", "report", "by id"})
OUTCOMES = ("executed", "sent_again", "superseded", "released", "granted", "absent", "retried", "refused", "dropped")
"""How a doubt may end.

``executed``: the settlement had arrived. ``sent_again``: it had not, or a report, and has now. ``superseded``: settled
otherwise meanwhile. ``released``: a grant that no caller knew. ``granted``: open under its caller's own id, and left to
it. ``absent``: never granted, or never known. ``retried``: its caller has found out. ``refused``: the store does not
take it. ``dropped``: there were too many, or it is too old.
"""


class Doubt(NamedTuple):
    """One request that may have been executed."""

    op: Op
    kind: Kind
    at_us: int
    """Until when an attempt of it may have been executed, by the store's clock."""
    prepared: Prepared | None = None
    """Set of ``by id``."""


class Unresolved:
    """Of one replica. Does no I/O."""

    def __init__(self) -> None:
        self._doubts: dict[str, list[Doubt]] = {}
        self.count = 0
        """How many there are."""
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        """How many have ended how."""

    def __iter__(self) -> Iterator[Doubt]:
        """Oldest id first; of one id, in the order in which they were asked."""
        for doubts in list(self._doubts.values()):
            yield from list(doubts)

    def add(self, doubt: Doubt) -> Doubt | None:
        """Takes it up, unless what is there already answers it; returns another one that had to be dropped for it."""
        known = self._doubts.setdefault(doubt.op.id, [])
        for other in known:
            if other.kind in FACTS and doubt.kind in FACTS:
                if _same(other.op, doubt.op):
                    return None
            elif not {other.kind, doubt.kind} & FACTS and other.op.request == doubt.op.request:
                if other.kind == "look up":
                    known[known.index(other)] = doubt
                return None
        known.append(doubt)
        self.count += 1
        if self.count <= UNRESOLVED_MAX:
            return None
        oldest = next(iter(self))
        self.end(oldest, "dropped")
        return oldest

    def end(self, doubt: Doubt, outcome: str) -> bool:
        """End a doubt with this outcome; return whether it had not ended already."""
        doubts = self._doubts.get(doubt.op.id, [])
        if doubt not in doubts:
            return False
        doubts.remove(doubt)
        self.count -= 1
        self.outcomes[outcome] += 1
        if not doubts:
            del self._doubts[doubt.op.id]
        return True

    def replace(self, doubt: Doubt, op: Op, kind: Kind | None = None) -> None:
        """It is to be asked in other words."""
        doubts = self._doubts.get(doubt.op.id, [])
        if doubt in doubts:
            doubts[doubts.index(doubt)] = doubt._replace(op=op, kind=kind or doubt.kind, prepared=None)

    def retried(self, hold_id: str, *, settled: bool) -> bool:
        """The caller has an answer for this id now: a settlement, which ends all, or the hold.

        Returns:
            Whether a settlement was in doubt.
        """
        settlement = False
        for doubt in list(self._doubts.get(hold_id, ())):
            if settled or doubt.kind not in FACTS:
                settlement |= doubt.kind in ("settlement", "by id")
                self.end(doubt, "retried")
        return settlement

    def clear(self) -> None:
        """Forgets all of them: in the child after a fork, they are the parent's."""
        self._doubts.clear()
        self.count = 0


def _same(one: Op, other: Op) -> bool:
    tails = [tail for _, tail in one.parts] == [tail for _, tail in other.parts]
    return tails and (one.head, one.tail) == (other.head, other.tail)
