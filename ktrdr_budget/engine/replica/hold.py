"""A hold in the hands of the worker that reserved it: what it reserved, what it reports, and how it settles."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar, Token
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

from ktrdr_budget.engine.calls.growth import Growth, added
from ktrdr_budget.engine.protocol import STATES, Granted, Record, Window
from ktrdr_budget.engine.protocol.amounts import Amounts, check_amounts, commit_modes, spread
from ktrdr_budget.errors import HoldConflict, InvalidArgument, StoreUnavailable, UnknownHold, shown
from ktrdr_budget.models import HoldState, Settlement, check_ttl_ms
from ktrdr_budget.money import MAX_UNITS, Amount, from_units, to_units
from ktrdr_budget.periods import from_ms

if TYPE_CHECKING:
    from ktrdr_budget.engine.calls.flows import Core
    from ktrdr_budget.engine.calls.reads import Flow
    from ktrdr_budget.engine.outage.prepaid import Draw

__all__ = ["AsyncHold", "HoldBase", "OnError", "check_on_error", "current_hold", "restore_hold"]

OnError = Literal["release", "charge"]

current_hold: ContextVar[HoldBase | None] = ContextVar("ktrdr_budget_current_hold", default=None)
"""The hold that the work of this task or thread draws from: the innermost ``limiter.hold(...)`` around it."""


class HoldBase:
    """What sync and async holds share: all but the waiting."""

    __slots__ = (
        "_accrued",
        "_claimed",
        "_core",
        "_deadline_ms",
        "_grower",
        "_notes",
        "_settling",
        "_ttl_ms",
        "admitted",
        "as_granted",
        "created_us",
        "drawn",
        "granted_in",
        "growth",
        "guarded",
        "id",
        "lock",
        "parts",
        "prepaid",
        "released_by_operator",
        "replayed",
        "request",
        "state",
    )

    def __init__(
        self,
        core: Core,
        hold_id: str,
        parts: list[tuple[Window, int]],
        ttl_ms: int,
        deadline_ms: int,
        *,
        as_granted: Granted | None = None,
        record: Record | None = None,
        guarded: bool = True,
        prepaid: Draw | None = None,
        request: str = "",
        created_us: int = 0,
    ) -> None:
        self._core = core
        self.request = request
        """Names the reservation that it was granted to, if its id is the caller's own."""
        self.id = hold_id
        self.parts = parts
        self._ttl_ms = ttl_ms
        self._deadline_ms = deadline_ms
        self.as_granted = as_granted
        """What the store has of it, until it is extended or grows."""
        self._accrued: dict[str, int] = {}
        self._settling = False
        self._claimed: Sequence[tuple[str, int]] | None = None
        """What a commit said that the store did not answer: spend is a fact, so leaving says it again."""
        self._notes: dict[str, None] = {}
        self.drawn: dict[str, int] = {}
        """What calls in progress inside this hold may yet cost, in whole units per budget."""
        self.growth: Any = None
        """What such calls queue up at when the hold must grow for them."""
        self._grower: Growth | None = None
        self.lock = threading.Lock()
        """Held for arithmetic only: threads may share a hold."""
        self.state: HoldState = "open"
        self.guarded = guarded
        """False if the store was unreachable and policy ``allow`` admitted: no cap was checked."""
        self.prepaid = prepaid
        """Set if it was granted from a slab while the store was away (policy ``lease``); that counts until the store is
        told."""
        self.created_us = created_us if record is None else record.created_us
        """When the store granted it, by its clock, in microseconds since the epoch; 0 if it did not."""
        self.granted_in = core.session.epoch
        """The epoch of the store that granted it, or was seen to know it."""
        self.admitted: Record | None = None
        """As it was admitted, if that was done without the store."""
        self.replayed = record is not None
        """The same reservation had been granted before; this is that hold, as it is now."""
        self.released_by_operator = record is not None and record.state == "z"
        """By hand: what it costs is still to be told."""
        if record is not None:
            self.state = STATES[record.state]
            self._accrued = {s.budget: s.accrued for s in record.segments if s.accrued}

    def __repr__(self) -> str:
        # A Decimal of a few nano-dollars would show itself as 1E-9.
        shown_amounts = (
            (name, amount if isinstance(amount, int) else f"{amount:f}") for name, amount in self.amounts.items()
        )
        amounts = ", ".join(f"{name}={amount}" for name, amount in shown_amounts)
        return f"<{type(self).__name__} {self.id} {self.state} {amounts}>"

    # -- figures -------------------------------------------------------------------------------------------------------

    @property
    def amounts(self) -> Mapping[str, Amount]:
        """Reserved, per budget."""
        return {window.budget: from_units(units, window.unit) for window, units in self.parts}

    @property
    def accrued(self) -> Mapping[str, Amount]:
        """Used so far as far as this process knows, per budget; told to the store by the next :meth:`extend`."""
        return {window.budget: from_units(self._accrued.get(window.budget, 0), window.unit) for window, _ in self.parts}

    @property
    def windows(self) -> Mapping[str, str]:
        """The windows that admitted this hold, and pay for it."""
        return {window.budget: window.span.name for window, _ in self.parts}

    @property
    def expires_at(self) -> datetime:
        """The deadline, by the store's clock, as an aware UTC datetime."""
        return from_ms(self._deadline_ms)

    @property
    def deadline_ms(self) -> int:
        """The same in milliseconds since the epoch."""
        return self._deadline_ms

    @property
    def ttl(self) -> float:
        """Seconds that a heartbeat prolongs this hold by."""
        return self._ttl_ms / 1000

    @property
    def settled(self) -> bool:
        """Whether this hold was committed or released, for good."""
        return self.state not in ("open", "unconfirmed") and not self.released_by_operator

    @property
    def settling(self) -> bool:
        """Whether its settlement is under way: what is accrued from now on is too late for it."""
        return self._settling

    def accrue(self, amount: Amounts) -> None:
        """Adds to what was used. Local; carried by the next heartbeat, and committed by ``commit()``.

        A scalar applies to every ``usd`` budget of the hold.

        Raises:
            InvalidAmount: not a non-negative amount, or the sum would reach 2**53 units.
            UnknownBudget: a mapping names a budget that the hold does not have.
        """
        check_amounts(amount)
        more = spread(amount, self._flags())
        with self.lock:
            self._accrued |= added(self._accrued, more, self.unit_of)

    def adjust(self, changes: Mapping[str, int]) -> None:
        """Adds whole units to what was used, or takes back what was too much (which a heartbeat may have told)."""
        with self.lock:
            self.adjust_locked(changes)

    def adjust_locked(self, changes: Mapping[str, int]) -> None:
        """The same for whoever has the lock."""
        for name, units in changes.items():
            self._accrued[name] = min(max(0, self._accrued.get(name, 0) + units), MAX_UNITS - 1)

    def note(self, remark: str, *, first: bool = False) -> None:
        """Adds words to what the ledger says of this hold, once each: told when it commits, cut where it is too long.

        Args:
            first: they are not to be cut off.
        """
        self._notes = {remark: None, **self._notes} if first else {**self._notes, remark: None}

    def belongs_to(self, limiter: object) -> bool:
        """Whether this limiter granted it."""
        return getattr(limiter, "_core", None) is self._core

    def accrue_to(self, totals: Amounts | None) -> None:
        """Raises what was used to these totals; errors as for :meth:`accrue`."""
        units_by_name = {} if totals is None else spread(totals, self._flags())
        with self.lock:
            for name, units in units_by_name.items():
                self._accrued[name] = max(self._accrued.get(name, 0), units)

    def unit_of(self, name: str) -> str:
        """The unit of one of its budgets; ``count`` for a count that is not configured here."""
        budget = self._core.session.budgets.get(name)
        return budget.unit if budget else next(window.unit for window, _ in self.parts if window.budget == name)

    @property
    def accrued_units(self) -> list[int]:
        """What was used so far, in whole units, in the order of the parts."""
        return [self._accrued.get(window.budget, 0) for window, _ in self.parts]

    def _flags(self) -> dict[str, str]:
        return {window.budget: window.flag for window, _ in self.parts}

    # -- flows ---------------------------------------------------------------------------------------------------------

    def extend_flow(self, ttl: float | None) -> Flow[None]:
        """A heartbeat: a new deadline, and what was accrued."""
        ttl_ms = self._ttl_ms if ttl is None else check_ttl_ms(ttl)
        yield from self._extended(self._core.extend(self.id, self._used(), ttl_ms), lambda: self.parts, ttl_ms)
        self._ttl_ms = ttl_ms

    def _report_flow(self) -> Flow[Any]:
        """What was accrued, for a hold that is left to its deadline: it counts no less than that.

        Raises:
            StoreUnavailable: no answer, whatever the policy: a report is a fact, so the limiter sends it again.
        """
        if self.prepaid is not None and self._core.prepaid is not None and not self.prepaid.handed:
            return  # it is accrued here, and handed over with the hold
        if not self.guarded:  # the store does not know this hold, and nothing would come due there
            yield from self.commit_flow(None)
            return
        self._renewed((yield from self._core.report(self.id, self._used(), self._ttl_ms)))

    def _used(self) -> list[tuple[Window, int, int]]:
        return [(window, self._accrued.get(window.budget, 0), 0) for window, _ in self.parts]

    def grow_flow(self, amount: Amounts) -> Flow[None]:
        """A larger reservation, in all budgets or in none."""
        check_amounts(amount)
        more = spread(amount, self._flags())
        self._more(more)
        with self.lock:
            self._grower = self._grower or Growth()
        return self._extended(self._grower.flow(self._core, self, more, self._ttl_ms), lambda: self._more(more))

    def _more(self, more: Mapping[str, int]) -> list[tuple[Window, int]]:
        sums = added({window.budget: units for window, units in self.parts}, more, self.unit_of)
        return [(window, sums.get(window.budget, units)) for window, units in self.parts]

    def grow_to_flow(self, totals: Amounts) -> Flow[None]:
        """A reservation of at least these totals."""
        check_amounts(totals)
        given = spread(totals, self._flags())
        grown = [(window, max(units, given.get(window.budget, 0))) for window, units in self.parts]
        parts = [(window, 0, units) for window, units in grown]
        return self._extended(self._core.extend(self.id, parts, self._ttl_ms, keep=True), lambda: grown)

    def _extended(
        self, flow: Flow[Record], otherwise: Callable[[], list[tuple[Window, int]]], ttl_ms: int | None = None
    ) -> Flow[None]:
        if self.prepaid is not None and self._core.prepaid is not None and not self.prepaid.handed:
            flow.close()
            parts = otherwise()
            self._core.prepaid.extend(self, self.prepaid, parts, ttl_ms)
            self.parts, self._deadline_ms = parts, self.prepaid.deadline_ms
            return
        try:
            record = yield from flow
        except HoldConflict as error:
            if error.released_by_operator:
                self.state, self.released_by_operator = "released", True
            raise
        except StoreUnavailable as error:
            if not self._core.allow or error.reached:
                raise
            self.parts = otherwise()
            return
        except UnknownHold:
            # Policy allow: the store was never told of it, so a heartbeat goes on without it.
            if not self._core.allow or self.guarded:
                raise
            if otherwise() != self.parts:
                raise StoreUnavailable(
                    f"hold {self.id!r} was admitted while the store was away, which answers now: reserve more instead",
                    reached=True,
                ) from None
            return
        self._renewed(record)

    def _renewed(self, record: Record) -> None:
        """Take over what the store says of it now."""
        self.state = STATES[record.state]
        self.as_granted = None
        self._deadline_ms = record.deadline_ms
        reserved = {s.budget: s.reserved for s in record.segments}
        # Of two answers, the older may come last.
        self.parts = [(window, max(units, reserved[window.budget])) for window, units in self.parts]

    def commit_flow(self, amount: Amounts | None) -> Flow[Settlement]:
        """Commits ``amount``, or what was accrued."""
        if len(self.parts) == 1 and isinstance(amount, (str, Decimal)):
            window, _ = self.parts[0]
            if window.flag != "s":
                return self._settled([("x", to_units(amount, window.unit))])
        check_amounts(amount)
        accrued = self._accrued
        segments = {w.budget: (w.flag, units, accrued.get(w.budget, 0)) for w, units in self.parts}
        return self._settled(commit_modes(segments, amount))

    def release_flow(self) -> Flow[Settlement]:
        """Gives everything back."""
        return self._settled(None)

    def exit_flow(self, failed: bool, on_error: OnError) -> Flow[Any] | None:
        """What leaving ``with limiter.hold(...)`` does; ``None`` for nothing."""
        if self.settled or self._settling:  # a settlement that was begun completes, though its caller was cancelled
            return None
        if self._claimed is not None:
            return self._settled(self._claimed)
        if any(self._accrued.values()):
            return self._report_flow() if failed and on_error == "charge" else self.commit_flow(None)
        if not failed and not self.drawn:
            return self._left([("r", units) for _, units in self.parts])
        # Metered calls were made or denied here, and cost nothing: that is what it cost.
        return None if failed and on_error == "charge" else self._left(None)

    def _left(self, amounts: Sequence[tuple[str, int]] | None) -> Flow[Any]:
        """A settlement that nobody has asked for: none is needed where somebody has settled the hold by its id."""
        try:
            yield from self._settled(amounts)
        except HoldConflict as error:
            if error.state not in ("committed", "released"):
                raise
            self.state = error.state

    @property
    def busy(self) -> bool:
        """Whether calls are under way that draw from it: it is not to be settled before they have ended."""
        return self.growth is not None and self.growth.open > 0

    def leave_to_calls(self, failed: bool, on_error: OnError, stop: Callable[[], object]) -> bool:
        """Leaves it open for the calls under way, if there are any: the last one ends heartbeats, and settles it."""
        with self.lock:
            if not self.busy or self.settled or self._settling or self._claimed is not None:
                return False
            self.growth.left = failed, on_error, stop
            return True

    def _settled(self, amounts: Sequence[tuple[str, int]] | None) -> Flow[Settlement]:
        if self.busy:
            raise HoldConflict(
                f"calls inside of hold {self.id!r} are under way, and may cost what it holds: settle it after them, or "
                "leave its block, and the last of them settles it"
            )
        self._settling = True
        try:
            settlement = yield from self._core.settle_hold(self, amounts, " ".join(self._notes))
        except StoreUnavailable:
            self._claimed = self._claimed if amounts is None else amounts
            raise
        except UnknownHold:
            if self.guarded:
                raise
            settlement = Settlement(
                self.id, "released", {window.budget: from_units(0, window.unit) for window, _ in self.parts}
            )
        finally:
            self._settling = False
        self.state, self.released_by_operator = settlement.state, False
        return settlement


class AsyncHold(HoldBase):
    """An open reservation. Settle it with :meth:`commit` or :meth:`release`; prolong it with :meth:`extend`."""

    __slots__ = ()

    async def extend(self, ttl: float | None = None) -> None:
        """Heartbeat: a new deadline ``ttl`` seconds from now (as reserved, by default), and what was accrued.

        Revives a hold that had expired, but none that an operator has released. No hold lives longer than 24 h after it
        was granted.

        Raises:
            BudgetExceeded: it had expired, had given money back, and that money is gone.
            HoldConflict: it is settled, or an operator has released it (``released_by_operator``).
            UnknownHold: the store does not know it.
            StoreUnavailable: no answer within the deadline.
        """
        await self._core.driver.run(self.extend_flow(ttl), "extend")

    async def grow(self, amount: Amounts) -> None:
        """Adds to the reservation, in all budgets or in none; also to what others have added to it at the same time.

        After an ambiguous ``StoreUnavailable``, growing by the same amount is a retry, and adds it once.

        Raises:
            BudgetExceeded: a budget has no room; nothing changed.
            HoldConflict, UnknownHold, StoreUnavailable: as for :meth:`extend`.
        """
        await self._core.driver.run(self.grow_flow(amount), "grow")

    async def commit(self, amount: Amounts | None = None) -> Settlement:
        """Records what it really cost: never refused for lack of budget, for being late or above the reservation.

        Args:
            amount: a scalar for every ``usd`` budget (counts then commit what was reserved), or a mapping (what it
                leaves out is 0); by default what was accrued.

        Raises:
            HoldConflict: it was settled otherwise before, or metered calls inside are under way.
            StoreUnavailable: no answer within the deadline. Trying again is safe.
        """
        return await self._core.driver.run(self.commit_flow(amount), "commit")  # type: ignore[no-any-return]

    async def release(self) -> Settlement:
        """Gives everything back. Errors as for :meth:`commit`."""
        return await self._core.driver.run(self.release_flow(), "release")  # type: ignore[no-any-return]


def check_on_error(value: object) -> None:
    """Raises :class:`~ktrdr_budget.errors.InvalidArgument` if it is no :data:`OnError`."""
    if value not in ("release", "charge"):
        raise InvalidArgument(f"on_error must be 'release' or 'charge', not {shown(value)}")


def restore_hold(outer: Token[HoldBase | None]) -> None:
    """Makes the hold current that was so before. A generator may be ended in another context than it was begun in."""
    with suppress(ValueError):
        current_hold.reset(outer)
