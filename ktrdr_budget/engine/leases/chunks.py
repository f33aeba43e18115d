"""Chunks: amounts that the store has reserved for one process, which grants and spends them by itself.

In the store, a chunk is an ordinary hold. In the process, a grant is decided by arithmetic with whole units, under a
lock and without I/O; this takes about a microsecond. To retire a chunk is to stop granting from it; :mod:`.lease`
settles a retired chunk once its grants are settled, and requests new chunks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from types import TracebackType
from typing import Any, Final

from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.errors import BudgetError, BudgetExceeded, HoldConflict, StoreUnavailable
from ktrdr_budget.models import Denial
from ktrdr_budget.money import MAX_UNITS, Amount, AmountIn, format_amount, from_units, to_units

__all__ = ["NEVER", "Chunk", "Chunks", "Grant"]

NEVER: Final = -MAX_UNITS
_CACHED_AMOUNTS: Final = 4096


class Chunk:
    """One hold of the store, with counts of the units that are left, granted and spent.

    Args:
        ends_ms: the time from which the chunk grants nothing, by the store's clock.
    """

    __slots__ = (
        "ends_ms",
        "granted",
        "heartbeat_at_s",
        "hold",
        "is_settled",
        "is_settling",
        "left",
        "open",
        "reserved",
    )

    def __init__(self, hold: HoldBase | None, reserved: int, ends_ms: float) -> None:
        self.hold = hold
        self.reserved = reserved
        self.left = reserved
        """Units that are neither granted nor spent. Less than 0 if more was committed than the chunk had."""
        self.granted = 0
        """Units of grants that are not settled."""
        self.open = 0
        """The number of unsettled grants."""
        self.ends_ms = ends_ms
        self.heartbeat_at_s = 0.0
        """When the next heartbeat is due, by the event loop's clock."""
        self.is_settling = False
        self.is_settled = False

    @property
    def spent(self) -> int:
        """Units that were spent; open grants are not included."""
        return self.reserved - self.left - self.granted


class Grant:
    """A reservation within a lease. Settle it with :meth:`commit` or :meth:`release`, or use it as a context manager.

    If the reservation is still open at the end of the ``with`` block, the reservation is settled: if the block ends
    normally, the whole reservation is committed; if the block raises an error, the reservation is released.
    """

    __slots__ = ("_chunks", "_spent", "_units", "chunk")

    def __init__(self, chunks: Chunks, chunk: Chunk, units: int) -> None:
        self._chunks = chunks
        self.chunk = chunk
        self._units = units
        self._spent: int | None = None

    def __repr__(self) -> str:
        chunks, spent = self._chunks, self._spent
        state = "open" if spent is None else f"committed {chunks.show(spent)}"
        return f"<{type(self).__name__} {chunks.name} {chunks.show(self._units)} {state}>"

    @property
    def amount(self) -> Amount:
        """The amount reserved."""
        return self._chunks.to_amount(self._units)

    @property
    def units(self) -> int:
        """The amount reserved, in whole units."""
        return self._units

    @property
    def settled(self) -> bool:
        """Whether the grant was committed or released."""
        return self._spent is not None

    def commit(self, amount: AmountIn | None = None) -> None:
        """Record what the work cost. The remainder of the reservation returns to the lease.

        If no amount is given, the whole reservation is committed. An amount above the reservation is recorded as well:
        the excess is taken from what the chunk has left, and overruns the chunk if too little is left.

        Raises:
            InvalidAmount: the amount is negative or not an amount.
            HoldConflict: the grant was settled with another amount.
        """
        self.settle(self._units if amount is None else self._chunks.to_units(amount))

    def release(self) -> None:
        """Return the whole amount to the lease. Raises the same errors as :meth:`commit`."""
        self.settle(0)

    def settle(self, spent: int) -> None:
        """Commit whole units. Raises the same errors as :meth:`commit`."""
        chunks, chunk = self._chunks, self.chunk
        with chunks.lock:
            if self._spent is not None:
                if self._spent != spent:
                    raise HoldConflict(
                        f"a grant of {chunks.name!r} was already settled with a different amount; nothing was changed"
                    )
                return
            if chunk.is_settled and spent != self._units:
                raise HoldConflict(f"a grant of {chunks.name!r} was charged in full when its limiter was closed")
            self._spent = spent
            if chunk.is_settled:
                return
            chunk.open -= 1
            chunk.granted -= self._units
            chunk.left += self._units - spent
            retired = chunk is not chunks.chunk and chunk is not chunks.next_chunk
            if (retired and not chunk.open) or chunk.left < 0:
                chunks.alert()  # the retired chunk can be settled now, or the chunk is overrun

    def resize(self, units: int) -> bool:
        """Change the reservation to this many units of the same chunk.

        Return false, and change nothing, if the chunk has no room or the grant is settled.
        """
        chunk, more = self.chunk, units - self._units
        with self._chunks.lock:
            if self._spent is not None or chunk.is_settled or chunk.left < more:
                return False
            chunk.left -= more
            chunk.granted += more
            self._units = units
            return True

    def __enter__(self) -> Grant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._spent is None:
            self.settle(self._units if kind is None else 0)


class Chunks:
    """The chunks of one lease: the current chunk, at most one next chunk, and the retired chunks.

    The object is safe to share between threads.

    Args:
        name: the name of the budget.
        unit: the unit of the budget's amounts.
        size: units of a whole chunk.
        low: if fewer units than this are left, the next chunk is requested.
        now_ms: a function that returns the time by the store's clock.
    """

    def __init__(self, name: str, unit: str, size: int, low: int, now_ms: Callable[[], int]) -> None:
        self.name = name
        self.unit = unit
        self.size = size
        self.low = low
        self.lock = threading.Lock()
        """Held for arithmetic only, never during I/O."""
        self.chunk = self._nothing = Chunk(None, -1, 0)
        self.next_chunk: Chunk | None = None
        self.retired: list[Chunk] = []
        """Chunks that grant nothing more and are not settled yet."""
        self.alarm = NEVER
        """If the current chunk has fewer units left than this, the next chunk is requested."""
        self.needed = 0
        """The largest amount that was refused for lack of room since the last chunk arrived."""
        self.uses = 0
        """The number of grants so far."""
        self.last_refill_error: Exception | None = None
        """The error of the last request for a chunk; ``None`` if that request succeeded."""
        self.closed_reason: str | None = None
        """Why the lease grants nothing more; ``None`` while it is open."""
        self._spent_before = 0
        self._now_ms = now_ms
        self._units_of: dict[Any, int] = {}
        """Cached conversions of texts and decimals to whole units above 0."""

    # -- amounts -------------------------------------------------------------------------------------------------------

    def to_units(self, amount: AmountIn, *, positive: bool = False) -> int:
        """Convert an amount to whole units; conversions of texts and decimals are cached.

        Raises:
            InvalidAmount: the amount is negative or not an amount; with ``positive``, also if the amount is 0.
        """
        # Numbers of other types may equal a Decimal and mean something else: 0.1 is read through its repr.
        kind = amount.__class__
        plain = kind is str or kind is Decimal
        if plain and (known := self._units_of.get(amount)) is not None:
            return known
        units = to_units(amount, self.unit, positive=positive)
        if plain and units:
            if len(self._units_of) >= _CACHED_AMOUNTS:
                self._units_of = {}
            self._units_of[amount] = units
        return units

    def to_amount(self, units: int) -> Amount:
        """Convert whole units to an amount."""
        return from_units(units, self.unit)

    def show(self, units: int) -> str:
        """Format whole units as text."""
        return format_amount(self.to_amount(units), self.unit)

    @property
    def remaining(self) -> Amount:
        """The amount that the lease can grant without the store."""
        with self.lock:
            return self.to_amount(self.room())

    @property
    def held(self) -> Amount:
        """The amount that open grants have reserved."""
        with self.lock:
            return self.to_amount(sum(chunk.granted for chunk in self.chunks()))

    @property
    def spent(self) -> Amount:
        """The amount spent through this lease so far."""
        with self.lock:
            return self.to_amount(self._spent_before + sum(chunk.spent for chunk in self.chunks()))

    # -- decisions -----------------------------------------------------------------------------------------------------

    def spend(self, amount: AmountIn) -> None:
        """Spend the whole amount at once, without the store. If an error is raised, nothing is spent.

        Raises:
            BudgetExceeded: the chunks have no room. If the ``reason`` is ``lease_refilling``, the store has not yet
                decided on another chunk; with any other ``reason``, the store has no room either.
            StoreUnavailable: the chunks have no room, and the store does not reply.
            InvalidAmount: the amount is negative or not an amount.
        """
        kind = amount.__class__
        units = self._units_of.get(amount) if kind is str or kind is Decimal else None
        if units is None:
            units = self.to_units(amount)
        with self.lock:
            chunk = self.chunk
            left = chunk.left - units
            if left < 0 or self._now_ms() >= chunk.ends_ms:
                chunk = self._find(units)
                left = chunk.left - units
            chunk.left = left
            if left < self.alarm:
                self.alert()

    def reserve(self, amount: AmountIn) -> Grant:
        """Reserve an amount above 0 at once, without the store. Raises the same errors as :meth:`spend`."""
        kind = amount.__class__
        units = self._units_of.get(amount) if kind is str or kind is Decimal else None
        if units is None:
            units = self.to_units(amount, positive=True)
        with self.lock:
            chunk = self.chunk
            if chunk.left < units or self._now_ms() >= chunk.ends_ms:
                chunk = self._find(units)
            return self._grant(chunk, units)

    def try_reserve(self, units: int) -> Grant | None:
        """Reserve whole units at once; return ``None`` if the chunks have no room."""
        with self.lock:
            try:
                return self._grant(self._find(units), units)
            except BudgetError:
                return None

    def _grant(self, chunk: Chunk, units: int) -> Grant:
        """Grant units of a chunk with enough room; the caller holds the lock."""
        chunk.left -= units
        chunk.granted += units
        chunk.open += 1
        self.uses += 1
        if chunk.left < self.alarm:
            self.alert()
        return Grant(self, chunk, units)

    def _find(self, units: int) -> Chunk:
        """Return a chunk with room for these units. The caller holds the lock.

        If only the next chunk has room, the next chunk becomes current.
        """
        if self.closed_reason is not None:
            raise RuntimeError(self.closed_reason)
        self.leave_ended(self._now_ms())
        if self.chunk.left < units and self.next_chunk is not None and self.next_chunk.left >= units:
            self.retire()
        if self.chunk.left >= units or not units:
            return self.chunk
        self.needed = max(self.needed, units)
        self.alert()
        raise self.refusal(units)

    # -- chunks --------------------------------------------------------------------------------------------------------

    def alert(self) -> None:
        """Request maintenance of the chunks. Called with the lock held, from any thread."""

    def chunks(self) -> list[Chunk]:
        """All unsettled chunks: the current one, the next one, and the retired ones."""
        current = [self.chunk] if self.chunk.hold is not None else []
        return [*current, *([self.next_chunk] if self.next_chunk is not None else []), *self.retired]

    def room(self) -> int:
        """Units that can be granted."""
        now_ms = self._now_ms()
        granting = (self.chunk, self.next_chunk)
        return sum(chunk.left for chunk in granting if chunk is not None and chunk.left > 0 and now_ms < chunk.ends_ms)

    def add(self, chunk: Chunk) -> None:
        """Add a chunk that the store has just admitted."""
        with self.lock:
            if self.closed_reason is not None:
                self.retired.append(chunk)
            elif self.chunk.hold is None:
                self.chunk, self.alarm = chunk, self.low
            else:
                if self.next_chunk is not None:
                    self.retire()
                self.next_chunk, self.alarm = chunk, NEVER

    def retire(self) -> None:
        """Retire the current chunk, and make the next chunk current. The caller holds the lock."""
        if self.chunk.hold is not None:
            self.retired.append(self.chunk)
        self.chunk, self.next_chunk = self.next_chunk or self._nothing, None
        self.alarm = NEVER if self.chunk.hold is None else self.low

    def leave_ended(self, now_ms: float) -> None:
        """Retire the chunks whose time has ended. The caller holds the lock."""
        if self.next_chunk is not None and now_ms >= self.next_chunk.ends_ms:
            self.retired.append(self.next_chunk)
            self.next_chunk = None
        if self.chunk.hold is not None and now_ms >= self.chunk.ends_ms:
            self.retire()

    def leave(self, chunk: Chunk) -> None:
        """Retire this chunk, so that it grants nothing more."""
        with self.lock:
            if chunk is self.next_chunk:
                self.retired.append(chunk)
                self.next_chunk = None
            elif chunk is self.chunk:
                self.retire()

    def forget(self, chunk: Chunk) -> None:
        """Drop a chunk that is settled."""
        with self.lock:
            chunk.is_settled = True
            self._spent_before += chunk.spent
            self.retired.remove(chunk)

    def stop(self, reason: str) -> None:
        """Close the lease for this reason: retire the chunks, and grant nothing more."""
        with self.lock:
            self.closed_reason = self.closed_reason or reason
            self.retire()
            self.retire()

    # -- refusals ------------------------------------------------------------------------------------------------------

    def refusal(self, units: int) -> Exception:
        """The error for units that the chunks have no room for.

        If the last request for a chunk failed, the error states why. Otherwise its reason is ``lease_refilling``.
        """
        left = self.room()
        error = self.last_refill_error
        if isinstance(error, StoreUnavailable):
            return StoreUnavailable(f"the lease of {self.name!r} has {self.show(left)} left: {error}")
        if isinstance(error, BudgetExceeded):
            return BudgetExceeded(self._denial_of(error.denial, units, left))
        if error is not None:
            return error
        spent = sum(chunk.spent for chunk in self.chunks())
        granted = sum(chunk.granted for chunk in self.chunks())
        room = self.to_amount(left)
        return BudgetExceeded(
            Denial(
                budget=self.name,
                reason="lease_refilling",
                limit=self.to_amount(max(0, left + granted + spent)),
                spent=self.to_amount(spent),
                held=self.to_amount(granted),
                unconfirmed=self.to_amount(0),
                remaining=room,
                requested=self.to_amount(units),
                fits=room,
                retry_after=1,
                unit=self.unit,
            )
        )

    def _denial_of(self, denial: Denial, units: int, left: int) -> Denial:
        """Convert the store's denial of a chunk to a denial of these units.

        In the store's denial, the chunks of this process count as held in full. In the result, the amounts that were
        spent from these chunks count as spent.
        """
        limit, spent, held, unconfirmed, fits = (
            to_units(value, self.unit)
            for value in (denial.limit, denial.spent, denial.held, denial.unconfirmed, denial.fits)
        )
        own = min(held, max(0, sum(chunk.spent for chunk in self.chunks())))
        spent, held = spent + own, held - own
        if units > limit:
            reason = "exceeds_limit"
        else:
            reason = "budget_held" if spent + unconfirmed + units <= limit else "budget_exhausted"
        return replace(
            denial,
            reason=reason,
            spent=self.to_amount(spent),
            held=self.to_amount(held),
            requested=self.to_amount(units),
            fits=self.to_amount(max(left, fits)),
        )
