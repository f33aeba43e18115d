"""Prepaid slabs: money that the store has admitted as a hold, and that one process decides about by itself.

Whole units, a lock, and no I/O: a decision takes about a microsecond. What keeps the slabs filled is :mod:`.leases`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from ktrdr_budget.errors import BudgetError, BudgetExceeded, HoldConflict, StoreUnavailable
from ktrdr_budget.models import Denial
from ktrdr_budget.money import MAX_UNITS, Amount, AmountIn, format_amount, from_units, to_units

if TYPE_CHECKING:
    from ktrdr_budget.engine.replica.hold import HoldBase

__all__ = ["Grant", "Slab", "Slabs"]

NEVER: Final = -MAX_UNITS
REMEMBERED_AMOUNTS: Final = 4096


class Slab:
    """One hold, and how much of it is left to decide about."""

    __slots__ = ("beat_at_s", "ends_ms", "hold", "left", "open", "promised", "reserved", "settled", "settling")

    def __init__(self, hold: HoldBase | None, reserved: int, ends_ms: float) -> None:
        self.hold = hold
        self.reserved = reserved
        self.left = reserved
        """Units that nobody was granted. Less than 0 after a commit above its grant, which is a fact."""
        self.promised = 0
        """Units of the grants that are not settled."""
        self.open = 0
        """How many those are."""
        self.ends_ms = ends_ms
        """By the store's clock: from then on nothing is granted from this, for it belongs to another window."""
        self.beat_at_s = 0.0
        """When the next heartbeat is due, by the event loop's clock."""
        self.settling = False
        self.settled = False

    @property
    def spent(self) -> int:
        """Units that were spent for certain."""
        return self.reserved - self.left - self.promised


class Grant:
    """A reservation within a lease: settle it with :meth:`commit` or :meth:`release`, or use it as a context manager.

    A block that ends normally commits all that was reserved if it did not settle; one that raises releases it.
    """

    __slots__ = ("_slab", "_slabs", "_spent", "_units")

    def __init__(self, slabs: Slabs, slab: Slab, units: int) -> None:
        self._slabs = slabs
        self._slab = slab
        self._units = units
        self._spent: int | None = None

    def __repr__(self) -> str:
        slabs, spent = self._slabs, self._spent
        state = "open" if spent is None else f"committed {slabs.show(spent)}"
        return f"<{type(self).__name__} {slabs.name} {slabs.show(self._units)} {state}>"

    @property
    def amount(self) -> Amount:
        """What was reserved."""
        return self._slabs.out(self._units)

    @property
    def settled(self) -> bool:
        """Whether this was committed or released."""
        return self._spent is not None

    def commit(self, amount: AmountIn | None = None) -> None:
        """Says what it really cost (by default all that was reserved); what is left returns to the lease.

        Spend is a fact: an amount above the grant is taken from the slab, and overruns it if that has too little.

        Raises:
            InvalidAmount: not a non-negative amount.
            HoldConflict: it was settled with another amount.
        """
        self._settle(self._units if amount is None else self._slabs.units(amount))

    def release(self) -> None:
        """Gives everything back. Errors as for :meth:`commit`."""
        self._settle(0)

    def _settle(self, spent: int) -> None:
        slabs, slab = self._slabs, self._slab
        with slabs.lock:
            if self._spent is not None:
                if self._spent != spent:
                    raise HoldConflict(
                        f"a grant of {slabs.name!r} was already settled at another amount; nothing was changed"
                    )
                return
            if slab.settled and spent != self._units:
                raise HoldConflict(f"a grant of {slabs.name!r} was charged in full when its limiter was closed")
            self._spent = spent
            if slab.settled:
                return
            slab.open -= 1
            slab.promised -= self._units
            slab.left += self._units - spent
            retired = slab is not slabs.slab and slab is not slabs.spare
            if (retired and not slab.open) or slab.left < 0:
                slabs.alert()  # it waited for this, to be committed; or more was spent than the store knows of

    def __enter__(self) -> Grant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._spent is None:
            self._settle(self._units if kind is None else 0)


class Slabs:
    """The slabs of one lease: the one that is spent, and at most one that is next. Safe to share between threads.

    Args:
        name: of the budget.
        unit: of its amounts.
        size: units of a whole slab.
        low: when fewer units are left, the next slab is asked for.
        now_ms: tells the store's clock.
    """

    def __init__(self, name: str, unit: str, size: int, low: int, now_ms: Callable[[], int]) -> None:
        self.name = name
        self.unit = unit
        self.size = size
        self.low = low
        self.lock = threading.Lock()
        """Held for arithmetic only."""
        self.slab = self._nothing = Slab(None, -1, 0)
        self.spare: Slab | None = None
        self.retired: list[Slab] = []
        """Slabs that grant nothing any more, until they are settled."""
        self.alarm = NEVER
        """Below this the current slab calls for the next."""
        self.needed = 0
        """The largest amount that was refused for want of room since the last slab came."""
        self.uses = 0
        """How many grants were given."""
        self.trouble: Exception | None = None
        """Why the last attempt to get a slab brought none; ``None`` if it did."""
        self.over: str | None = None
        """Why nothing is granted any more."""
        self._spent_before = 0
        self._now_ms = now_ms
        self._known: dict[Any, int] = {}
        """Units of texts and decimals; more than 0."""

    # -- amounts -------------------------------------------------------------------------------------------------------

    def units(self, amount: AmountIn, *, positive: bool = False) -> int:
        """Whole units of an amount; those of texts and decimals are remembered.

        Raises:
            InvalidAmount: not a non-negative amount.
        """
        # Numbers of other types may equal a Decimal and mean something else: 0.1 is read through its repr.
        kind = amount.__class__
        plain = kind is str or kind is Decimal
        if plain and (known := self._known.get(amount)) is not None:
            return known
        units = to_units(amount, self.unit, positive=positive)
        if plain and units:
            if len(self._known) >= REMEMBERED_AMOUNTS:
                self._known = {}
            self._known[amount] = units
        return units

    def out(self, units: int) -> Amount:
        """Units for the outside."""
        return from_units(units, self.unit)

    def show(self, units: int) -> str:
        """Units for a person."""
        return format_amount(self.out(units), self.unit)

    @property
    def remaining(self) -> Amount:
        """What can be granted at once, without the store."""
        with self.lock:
            return self.out(self.room())

    @property
    def held(self) -> Amount:
        """What open grants have reserved."""
        with self.lock:
            return self.out(sum(slab.promised for slab in self.slabs()))

    @property
    def spent(self) -> Amount:
        """What was spent through this lease so far."""
        with self.lock:
            return self.out(self._spent_before + sum(slab.spent for slab in self.slabs()))

    # -- decisions -----------------------------------------------------------------------------------------------------

    def spend(self, amount: AmountIn) -> None:
        """Spends at once, without the store: all of it, or nothing.

        Raises:
            BudgetExceeded: no room here; nothing changed. ``reason`` ``lease_refilling``: the store was not asked yet,
                or has not answered; any other: it has no room either.
            StoreUnavailable: no room here, and the store does not answer.
            InvalidAmount: not a non-negative amount.
        """
        kind = amount.__class__
        units = self._known.get(amount) if kind is str or kind is Decimal else None
        if units is None:
            units = self.units(amount)
        with self.lock:
            slab = self.slab
            left = slab.left - units
            if left < 0 or self._now_ms() >= slab.ends_ms:
                slab = self._find(units)
                left = slab.left - units
            slab.left = left
            if left < self.alarm:
                self.alert()

    def reserve(self, amount: AmountIn) -> Grant:
        """Reserves above 0 at once, without the store; see :class:`Grant`. Errors as for :meth:`spend`."""
        kind = amount.__class__
        units = self._known.get(amount) if kind is str or kind is Decimal else None
        if units is None:
            units = self.units(amount, positive=True)
        with self.lock:
            slab = self.slab
            left = slab.left - units
            if left < 0 or self._now_ms() >= slab.ends_ms:
                slab = self._find(units)
                left = slab.left - units
            slab.left = left
            slab.promised += units
            slab.open += 1
            self.uses += 1
            if left < self.alarm:
                self.alert()
        return Grant(self, slab, units)

    def try_reserve(self, units: int) -> Grant | None:
        """The same in units; ``None`` where there is no room."""
        with self.lock:
            try:
                slab = self._find(units)
            except BudgetError:
                return None
            slab.left -= units
            slab.promised += units
            slab.open += 1
            self.uses += 1
            if slab.left < self.alarm:
                self.alert()
        return Grant(self, slab, units)

    def _find(self, units: int) -> Slab:
        """The slab that has room, moving on to the next if that has; whoever calls holds the lock."""
        if self.over is not None:
            raise RuntimeError(self.over)
        now_ms = self._now_ms()
        self.leave_ended(now_ms)
        if self.slab.left < units and self.spare is not None:
            self.retire()
        if self.slab.left >= units or not units:
            return self.slab
        self.needed = max(self.needed, units)
        self.alert()
        raise self.refusal(units)

    # -- slabs ---------------------------------------------------------------------------------------------------------

    def alert(self) -> None:
        """Something is to be done about the slabs. Called with the lock, from any thread."""

    def slabs(self) -> list[Slab]:
        """Those that count: the current one, the next, and those that are not settled yet."""
        current = [self.slab] if self.slab.hold is not None else []
        return [*current, *([self.spare] if self.spare is not None else []), *self.retired]

    def room(self) -> int:
        """Units that can be granted."""
        now_ms = self._now_ms()
        granting = (self.slab, self.spare)
        return sum(slab.left for slab in granting if slab is not None and slab.left > 0 and now_ms < slab.ends_ms)

    def add(self, slab: Slab) -> None:
        """A slab that the store has just admitted."""
        with self.lock:
            if self.over is not None:
                self.retired.append(slab)
            elif self.slab.hold is None:
                self.slab, self.alarm = slab, self.low
            else:
                if self.spare is not None:
                    self.retire()
                self.spare, self.alarm = slab, NEVER

    def retire(self) -> None:
        """The next slab takes the place of the current one, which is settled once its grants are. Needs the lock."""
        if self.slab.hold is not None:
            self.retired.append(self.slab)
        self.slab, self.spare = self.spare or self._nothing, None
        self.alarm = NEVER if self.slab.hold is None else self.low

    def leave_ended(self, now_ms: float) -> None:
        """Grants nothing from slabs of a window that has ended. Needs the lock."""
        if self.spare is not None and now_ms >= self.spare.ends_ms:
            self.retired.append(self.spare)
            self.spare = None
        if self.slab.hold is not None and now_ms >= self.slab.ends_ms:
            self.retire()

    def leave(self, slab: Slab) -> None:
        """Grants nothing from this slab any more."""
        with self.lock:
            if slab is self.spare:
                self.retired.append(slab)
                self.spare = None
            elif slab is self.slab:
                self.retire()

    def forget(self, slab: Slab) -> None:
        """It was settled."""
        with self.lock:
            slab.settled = True
            self._spent_before += slab.spent
            self.retired.remove(slab)

    def stop(self, why: str) -> None:
        """Grants nothing any more."""
        with self.lock:
            self.over = self.over or why
            self.retire()
            self.retire()

    # -- refusals ------------------------------------------------------------------------------------------------------

    def refusal(self, units: int) -> Exception:
        """Why so much is not granted: what the store said when it was asked last, or else that it was not asked yet."""
        left = self.room()
        if isinstance(self.trouble, StoreUnavailable):
            return StoreUnavailable(f"the lease of {self.name!r} has {self.show(left)} left: {self.trouble}")
        if isinstance(self.trouble, BudgetExceeded):
            return BudgetExceeded(self._told(self.trouble.denial, units, left))
        if self.trouble is not None:
            return self.trouble
        spent, promised = 0, 0
        for slab in self.slabs():
            spent, promised = spent + slab.spent, promised + slab.promised
        zero, room = self.out(0), self.out(left)
        held, limit = self.out(promised), self.out(max(0, left + promised + spent))
        return BudgetExceeded(
            Denial(
                budget=self.name,
                reason="lease_refilling",
                limit=limit,
                spent=self.out(spent),
                held=held,
                unconfirmed=zero,
                remaining=room,
                requested=self.out(units),
                fits=room,
                retry_after=1,
                unit=self.unit,
            )
        )

    def _told(self, denial: Denial, units: int, left: int) -> Denial:
        """The store's denial of a slab, as one of this amount. What was spent here counts as spent already."""
        limit, spent, held, unconfirmed, fits = (
            to_units(value, self.unit)
            for value in (denial.limit, denial.spent, denial.held, denial.unconfirmed, denial.fits)
        )
        own = min(held, max(0, sum(slab.spent for slab in self.slabs())))
        spent, held = spent + own, held - own
        if units > limit:
            reason = "exceeds_limit"
        else:
            reason = "budget_held" if spent + unconfirmed + units <= limit else "budget_exhausted"
        return replace(
            denial,
            reason=reason,
            spent=self.out(spent),
            held=self.out(held),
            requested=self.out(units),
            fits=self.out(max(left, fits)),
        )
