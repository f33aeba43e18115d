"""Claims on a hold: the calls inside a hold's block share the hold.

A claim sets a part of the hold aside for one call. Each call claims its worst case, and accrues its cost on the hold.

Invariant, for every budget of the hold and any number of tasks or threads: ``accrued + claimed <= reserved``. If a
claim does not fit, the hold grows first. Only a call that costs more than its worst case can break the invariant:
the money is spent, so the cost is recorded.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ktrdr_budget.engine.replica.hold import HoldBase, OnError, current_hold
from ktrdr_budget.errors import HoldConflict, StoreUnavailable
from ktrdr_budget.limiter import AsyncHold
from ktrdr_budget.metering.dual_flow import DualFlow
from ktrdr_budget.money import AmountIn, from_units

__all__ = ["BlockExit", "HoldClaim", "claimable_hold"]

BlockExit = tuple[bool, OnError, Callable[[], object]]
"""The end of a hold's block, as a tuple: whether the block failed, the hold's ``on_error``, and a function that stops
the hold's heartbeats."""


def claimable_hold(limiter: object) -> HoldBase | None:
    """Return the hold from which a new call of this limiter must claim; ``None`` if the call needs its own reservation.

    This is the innermost hold around the calling code. It must be granted by this limiter, and be open to new calls.
    """
    hold = current_hold.get()
    if hold is None or hold.settled or hold.settling or not hold.belongs_to(limiter):
        return None
    if hold.growth is not None and hold.growth.left is not None:
        return None  # its block has ended; it stays open only for the calls that were in progress
    return hold


class _SharedClaims:
    """State shared by all claims on one hold.

    Only one claim at a time grows the hold. So a denial affects only the call whose worst case is too large.
    """

    __slots__ = ("closed", "failures", "left", "lock", "open", "wanted")

    def __init__(self, hold: HoldBase) -> None:
        self.wanted: Mapping[str, int] = {}
        """The claim for which the hold is growing now."""
        self.lock: Any = asyncio.Lock() if isinstance(hold, AsyncHold) else threading.Lock()
        self.failures = 0
        """Number of requests to grow the hold to which the store did not reply."""
        self.open = 0
        """Number of calls in progress."""
        self.left: BlockExit | None = None
        """Set if the hold's block ends while calls are in progress. The last of these calls then settles the hold."""
        self.closed = False
        """Whether the last call is settling the hold, so that no further call can claim."""


class HoldClaim:
    """The claim of one call on a hold, in whole units per budget.

    Args:
        worst: the worst case of the call, claimed until the call ends.
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
        """The hold that pays for the call."""
        return self._hold

    def claim(self) -> DualFlow[None]:
        """Claim the call's worst case. If it does not fit, grow the hold first.

        Raises:
            BudgetExceeded: the hold cannot grow far enough; nothing is claimed.
            HoldConflict, UnknownHold, StoreUnavailable: as for :meth:`AsyncHold.grow`.
        """
        hold = self._hold
        with hold.lock:
            for name in self._worst:  # mark the hold: from now on calls decide its cost, not its estimate
                hold.drawn.setdefault(name, 0)
            if hold.growth is None:
                hold.growth = _SharedClaims(hold)
            shared = hold.growth
            if self._fits():
                self._begin()
                return
        failures = shared.failures
        yield shared.lock.acquire
        try:
            if shared.failures != failures:
                # This call has already waited for one timeout; waiting for another would exceed its deadline.
                raise StoreUnavailable("the store did not reply while another call was growing the hold")
            yield from self._grow(shared)
        finally:
            shared.lock.release()

    def _grow(self, shared: _SharedClaims) -> DualFlow[None]:
        hold = self._hold
        try:
            while True:
                with hold.lock:
                    missing = self._missing(self._worst)
                    if not missing and hold.state == "open":
                        self._begin()
                        return
                    shared.wanted = self._worst  # keeps other claims from taking the new room
                units = {window.budget: window.unit for window, _ in hold.parts}
                amounts: dict[str, AmountIn] = {name: from_units(more, units[name]) for name, more in missing.items()}
                yield partial(hold.grow, amounts)  # type: ignore[attr-defined]
        except StoreUnavailable:
            shared.failures += 1
            raise
        finally:
            shared.wanted = {}

    def _begin(self) -> None:
        shared = self._hold.growth
        if shared.closed:
            raise HoldConflict(f"the block of hold {self._hold.id!r} has ended, and the hold is being settled")
        shared.open += 1
        self._open = True
        self._set_claimed(self._worst)

    def _fits(self) -> bool:
        wanted = dict(self._worst)
        for name, units in self._hold.growth.wanted.items():
            wanted[name] = wanted.get(name, 0) + units
        return self._hold.state == "open" and not self._missing(wanted)

    def _missing(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """The units by which ``accrued + claimed + wanted`` exceeds the reservation, per budget."""
        hold = self._hold
        missing = {}
        for (window, reserved), accrued in zip(hold.parts, hold.accrued_units, strict=True):
            name = window.budget
            if name in wanted and (more := accrued + hold.drawn.get(name, 0) + wanted[name] - reserved) > 0:
                missing[name] = more
        return missing

    def use(self, used: Mapping[str, int], *, final: bool = False) -> dict[str, int]:
        """Accrue the call's total usage so far.

        The rest of the call's worst case stays claimed. If ``final`` is true, nothing stays claimed.

        Returns:
            The units, per budget, that could not be accrued, because the hold was settled in the meantime.
        """
        hold = self._hold
        with hold.lock:
            change = {name: used.get(name, 0) - before for name, before in self._used.items()}
            rest = {} if final else {name: max(0, worst - used.get(name, 0)) for name, worst in self._worst.items()}
            self._set_claimed(rest)
            if hold.settled or hold.settling:
                return {name: units for name, units in change.items() if units > 0}
            hold.adjust_locked(change)
            self._used = {name: used.get(name, 0) for name in self._used}
            return {}

    def close(self) -> BlockExit | None:
        """Drop the claim, whether or not the call began.

        Returns:
            The end of the hold's block, if the caller must now settle the hold: the block has ended, and this was the
            last call in progress. Otherwise ``None``.
        """
        with self._hold.lock:
            self._set_claimed({})
            shared = self._hold.growth
            if not self._open:
                return None
            self._open = False
            shared.open -= 1
            shared.closed = shared.open == 0 and shared.left is not None
            return shared.left if shared.closed else None

    def _set_claimed(self, claimed: Mapping[str, int]) -> None:
        drawn = self._hold.drawn
        for name in self._worst:
            drawn[name] = drawn.get(name, 0) + claimed.get(name, 0) - self._claimed.get(name, 0)
        self._claimed = dict(claimed)
