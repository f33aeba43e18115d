"""A call inside a hold draws from it: it claims its worst case there, and accrues what it costs.

``accrued + claimed <= reserved`` holds at all times for every budget of the hold, however many tasks or threads draw: a
claim that does not fit grows the hold first. Only an actual cost above its worst case can break that: spend is a fact.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ktrdr_budget.engine.replica.hold import HoldBase, OnError
from ktrdr_budget.errors import HoldConflict, StoreUnavailable
from ktrdr_budget.limiter import AsyncHold
from ktrdr_budget.metering.steps import Steps
from ktrdr_budget.money import AmountIn, from_units

__all__ = ["Draw", "Left"]

Left = tuple[bool, OnError, Callable[[], object]]
"""Whether the block failed, what then becomes of its hold, and what ends the heartbeats."""


class _Growth:
    """What the calls inside of a hold share.

    Lets one call at a time grow it: a denial is then told to the call that was too large, and to no other.
    """

    __slots__ = ("closed", "failures", "left", "lock", "open", "wanted")

    def __init__(self, hold: HoldBase) -> None:
        self.wanted: Mapping[str, int] = {}
        """What the one that is growing it will claim."""
        self.lock: Any = asyncio.Lock() if isinstance(hold, AsyncHold) else threading.Lock()
        self.failures = 0
        self.open = 0
        """Calls under way."""
        self.left: Left | None = None
        """How the hold's block was left meanwhile: the last of these calls settles it."""
        self.closed = False
        """That has begun: nothing more is claimed."""


class Draw:
    """What one call claims of a hold, in whole units per budget.

    Args:
        worst: claimed until the call ends.
    """

    __slots__ = ("_claimed", "_hold", "_open", "_used", "_worst")

    def __init__(self, hold: HoldBase, worst: Mapping[str, int]) -> None:
        self._hold = hold
        self._worst = worst
        self._claimed: dict[str, int] = {}
        self._used = dict.fromkeys(worst, 0)
        self._open = False

    @property
    def hold(self) -> HoldBase:
        """Where it is drawn from."""
        return self._hold

    def claim(self) -> Steps[None]:
        """Claims the worst case, and grows the hold if it does not fit.

        Raises:
            BudgetExceeded: the hold cannot grow so far; nothing is claimed.
            HoldConflict, UnknownHold, StoreUnavailable: as for :meth:`AsyncHold.grow`.
        """
        hold = self._hold
        with hold.lock:
            for name in self._worst:  # it is known from now on that calls tell what this hold costs
                hold.drawn.setdefault(name, 0)
            if hold.growth is None:
                hold.growth = _Growth(hold)
            growth = hold.growth
            if self._fits():
                self._begin()
                return
        failures = growth.failures
        yield growth.lock.acquire
        try:
            if growth.failures != failures:
                # Who has waited for a call that got no answer has waited long enough.
                raise StoreUnavailable("the store gave no answer while another call was growing the hold")
            yield from self._grow(growth)
        finally:
            growth.lock.release()

    def _grow(self, growth: _Growth) -> Steps[None]:
        hold = self._hold
        try:
            while True:
                with hold.lock:
                    missing = self._missing(self._worst)
                    if not missing and hold.state == "open":
                        self._begin()
                        return
                    growth.wanted = self._worst  # nobody else may take the room that is made
                units = {window.budget: window.unit for window, _ in hold.parts}
                amounts: dict[str, AmountIn] = {name: from_units(more, units[name]) for name, more in missing.items()}
                yield partial(hold.grow, amounts)  # type: ignore[attr-defined]
        except StoreUnavailable:
            growth.failures += 1
            raise
        finally:
            growth.wanted = {}

    def _begin(self) -> None:
        growth = self._hold.growth
        if growth.closed:
            raise HoldConflict(f"hold {self._hold.id!r} was left, and is being settled")
        growth.open += 1
        self._open = True
        self._move(self._worst)

    def _fits(self) -> bool:
        wanted = dict(self._worst)
        for name, units in self._hold.growth.wanted.items():
            wanted[name] = wanted.get(name, 0) + units
        return self._hold.state == "open" and not self._missing(wanted)

    def _missing(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """By how much what is accrued, claimed and wanted is more than what is reserved."""
        hold = self._hold
        missing = {}
        for (window, reserved), accrued in zip(hold.parts, hold.accrued_units, strict=True):
            name = window.budget
            if name in wanted and (more := accrued + hold.drawn.get(name, 0) + wanted[name] - reserved) > 0:
                missing[name] = more
        return missing

    def use(self, used: Mapping[str, int], *, final: bool = False) -> dict[str, int]:
        """Accrues the total that this call has used, and leaves the rest of its worst case claimed unless it is final.

        Returns:
            What could not be accrued, because the hold was settled in the meantime.
        """
        hold = self._hold
        with hold.lock:
            change = {name: used.get(name, 0) - before for name, before in self._used.items()}
            rest = {} if final else {name: max(0, worst - used.get(name, 0)) for name, worst in self._worst.items()}
            self._move(rest)
            if hold.settled or hold.settling:
                return {name: units for name, units in change.items() if units > 0}
            hold.adjust_locked(change)
            self._used = {name: used.get(name, 0) for name in self._used}
            return {}

    def close(self) -> Left | None:
        """Claims nothing more, once it has ended or was not begun.

        Returns:
            How the hold was left, if this was the last call under way, and so has to settle it.
        """
        with self._hold.lock:
            self._move({})
            growth = self._hold.growth
            if not self._open:
                return None
            self._open = False
            growth.open -= 1
            growth.closed = growth.open == 0 and growth.left is not None
            return growth.left if growth.closed else None

    def _move(self, claimed: Mapping[str, int]) -> None:
        drawn = self._hold.drawn
        for name in self._worst:
            drawn[name] = drawn.get(name, 0) + claimed.get(name, 0) - self._claimed.get(name, 0)
        self._claimed = dict(claimed)
