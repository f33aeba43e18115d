"""How a hold grows by an amount, exactly once, though several callers and processes may let it grow at the same time.

The store knows totals: the largest wins, so that what is repeated is harmless. To add to one, each attempt says which
totals it found, and the store refuses it if others have added to the hold since; then it is made again from what the
hold has by now. Only where the reply of an attempt was lost, it cannot be told apart from another process that let the
hold grow to the very same totals in this moment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ktrdr_budget.engine.protocol import Op, Record
from ktrdr_budget.errors import InvalidAmount, StoreUnavailable
from ktrdr_budget.money import MAX_UNITS, amount_bound

if TYPE_CHECKING:
    from ktrdr_budget.engine.calls.flows import Core
    from ktrdr_budget.engine.calls.reads import Flow
    from ktrdr_budget.engine.replica.hold import HoldBase

__all__ = ["Growing", "Growth", "added"]

Totals = Mapping[str, int]
"""Whole units per budget."""


class Growing(Op):
    """One attempt to add to a hold."""

    __slots__ = ("in_doubt",)

    def again(self) -> None:
        """It is sent again, for the answer was lost."""
        self.in_doubt = True


class _Doubt(NamedTuple):
    """A growth that ended without an answer: its caller may repeat it."""

    more: Totals
    found: Totals


class Growth:
    """What one hold object knows of its own growth."""

    __slots__ = ("_added", "_doubt")

    def __init__(self) -> None:
        self._added: Totals = {}
        """The totals of the last growth that is done."""
        self._doubt: _Doubt | None = None

    def flow(self, core: Core, hold: HoldBase, more: Totals, ttl_ms: int) -> Flow[Record]:
        """Adds to the reservation, in all budgets or in none."""
        found: Totals = {window.budget: units for window, units in hold.parts if window.budget in more}
        doubt, self._doubt = self._doubt, None
        in_doubt = doubt is not None and doubt.more == more
        if doubt is not None and in_doubt:
            found = doubt.found
        while True:
            totals = added(found, more, hold.unit_of)
            tails = {name: f":0:{units}:{found[name]}" for name, units in totals.items()}
            parts = [(window, tails.get(window.budget, ":0:0")) for window, _ in hold.parts]
            op = Growing(hold.id, core.session.keys.hold(hold.id), f"E {hold.id} {ttl_ms} 1", parts)
            op.in_doubt = in_doubt
            try:
                grown, record = yield from core.extended(op)
            except StoreUnavailable as error:
                grows = core.allow and not error.reached  # it goes on as if it had grown
                if (error.ambiguous or in_doubt) and not grows:
                    self._doubt = _Doubt(more, found)
                raise
            reserved = {segment.budget: segment.reserved for segment in record.segments if segment.budget in more}
            if grown or (op.in_doubt and reserved == totals != self._added):
                self._added = totals
                return record
            found, in_doubt = reserved, False


def added(totals: Totals, more: Totals, unit_of: Callable[[str], str]) -> dict[str, int]:
    """The totals that change, with ``more`` added.

    Args:
        unit_of: the unit of a budget, for the message.

    Raises:
        InvalidAmount: one would reach 2**53 units.
    """
    sums = {name: totals.get(name, 0) + units for name, units in more.items()}
    for name, units in sums.items():
        if units >= MAX_UNITS:
            raise InvalidAmount(f"the sum is too large for {name!r}; it must be below {amount_bound(unit_of(name))}")
    return sums
