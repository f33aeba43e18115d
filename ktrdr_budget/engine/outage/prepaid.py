"""Policy ``lease``: while the store is away, only what was prepaid is granted, so that the cap still holds (P12).

A slab is kept for each budget. What is granted from it stands under it in the store until it is settled; then the spend
is told by its own id, into the window that admitted the slab, together with the slab's smaller reservation (H). A hold
that is still open when the store answers again, or whose deadline has passed, is handed over in the same way: the store
knows it by its own id from then on (P), and it is a hold like any other. So the store counts no less than what was
granted at any moment, and nothing twice; if this process dies, the slab is charged.

A slab is never grown: H may be told late, and again, so it must only ever go down.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ktrdr_budget.engine.calls.results import amounts_text
from ktrdr_budget.engine.leases.chunks import Slab
from ktrdr_budget.engine.leases.lease import LEASE_TTL_DEFAULT_S, LeaseBase
from ktrdr_budget.engine.protocol import LONGEST_HOLD_MS, Op, Record, Window
from ktrdr_budget.errors import BudgetExceeded, HoldConflict, InvalidArgument, StoreUnavailable
from ktrdr_budget.models import HoldState, Settlement
from ktrdr_budget.money import Amount, AmountIn, from_units, to_units

if TYPE_CHECKING:
    from ktrdr_budget.engine.calls.flows import Core
    from ktrdr_budget.engine.calls.reads import Flow
    from ktrdr_budget.engine.replica.hold import HoldBase

__all__ = ["Draw", "Prepaid", "SlabLeft", "check_slabs"]

logger = logging.getLogger("ktrdr_budget")

_TO_BE_TOLD_MAX = 50_000
"""With more than this to be told nothing is granted: what is left of that memory is for what was granted before."""
_ROUNDS = 8


def check_slabs(core: Core, slabs: AmountIn | Mapping[str, AmountIn] | None) -> Mapping[str, AmountIn]:
    """How much is prepaid for each budget; one amount is meant for every budget in dollars.

    Raises:
        InvalidArgument: there is none, or a budget is unknown or of ``slots``.
    """
    if slabs is None:
        raise InvalidArgument("on_store_error='lease' needs lease_slab: how much is prepaid")
    if not isinstance(slabs, Mapping):
        slabs = {name: slabs for name, budget in core.session.budgets.items() if budget.unit == "usd"}
    if not slabs:
        raise InvalidArgument("lease_slab names no budget that could be prepaid")
    for name, slab in slabs.items():
        _Keeper(core, name, slab)
    return dict(slabs)


class SlabLeft(Op):
    """So much of a slab is left (H), once the store has been told what took the rest.

    Args:
        after: the id under which it is told that; what it refuses leaves the slab as large as it was.
    """

    __slots__ = ("after",)

    def __init__(self, hold_id: str, key: str, parts: Sequence[tuple[Window, str]], after: str) -> None:
        super().__init__(hold_id, key, f"H {hold_id}", parts)
        self.after = after


class Draw:
    """What one hold was granted from slabs."""

    __slots__ = ("ambiguous", "deadline_ms", "handed", "settled", "taken")

    def __init__(self, taken: list[tuple[_Keeper, Slab, int]], ambiguous: bool) -> None:
        self.taken = taken
        """Per budget, in the order of the hold's parts: from which slab, and how many units."""
        self.ambiguous = ambiguous
        """The store may have granted the hold as well, in a request whose reply was lost."""
        self.settled: list[int] | None = None
        self.handed = False
        """It is the store's from now on: it knows the hold, or is about to be told."""
        self.deadline_ms = 0
        """Of the hold, by the store's clock."""


class _Keeper(LeaseBase):
    """The slab of one budget, kept full while the store answers."""

    def __init__(self, core: Core, budget: str, slab: AmountIn) -> None:
        super().__init__(core, budget, slab, ttl=LEASE_TTL_DEFAULT_S, idle=None, eager=True)

    def draw(self, units: int) -> Slab | None:
        """Takes units from a slab of the window that is now; ``None`` if none has them."""
        with self.lock:
            self.leave_ended(self._now_ms())
            for slab in (self.slab, self.spare):
                if slab is not None and slab.hold is not None and slab.left >= units:
                    slab.left -= units
                    slab.promised += units
                    slab.open += 1
                    return slab
            return None

    def more(self, slab: Slab, units: int) -> bool:
        """Takes more from the same slab."""
        with self.lock:
            if slab.left < units:
                return False
            slab.left -= units
            slab.promised += units
            return True

    def put_back(self, slab: Slab, drawn: int, spent: int, after: str = "") -> Op | None:
        """What was drawn is settled, or the store's; returns how it is told of the slab that is left, if that changed.

        Args:
            spent: units that do not return to the slab.
            after: the id under which the store is told of those.
        """
        with self.lock:
            slab.open -= 1
            slab.promised -= drawn
            slab.left += drawn - spent
            slab.reserved -= spent
            if slab.left < 0 and slab is self.spare:  # as the current one would be
                self.retired.append(slab)
                self.spare = None
            self.alert()
        return self.shrunk(slab, after) if spent else None

    def shrunk(self, slab: Slab, after: str = "") -> Op:
        """Tells how much of a slab is left."""
        assert slab.hold is not None
        hold_id = slab.hold.id
        parts = [(window, f":{max(0, slab.reserved)}") for window, _ in slab.hold.parts]
        return SlabLeft(hold_id, self._core.session.keys.hold(hold_id), parts, after)

    async def closed(self, *, all_grants: bool = False) -> None:
        """Gives the rest back; holds that are still open are the store's from now on."""
        self.stop("this limiter is closed")
        if self._core.prepaid is not None:
            self._core.prepaid.hand_over()
        await super().closed()
        self._end()

    def _tick(self) -> None:
        prepaid = self._core.prepaid
        if prepaid is not None and prepaid.is_due(anything=not self._core.driver.breaker.open):
            self._submit(prepaid.hand_over_flow(), lambda _: None)
        super()._tick()

    def _wanted(self) -> int | None:
        assert self._loop is not None
        if self.over is not None or self._loop.time() < self._pause_until_s:
            return None
        slabs = [slab for slab in (self.slab, self.spare) if slab is not None and slab.hold is not None]
        return 0 if not slabs or sum(slab.left for slab in slabs) < max(self.low, 1) else None

    def _refill_flow(self, need: int) -> Flow[None]:
        """A whole slab; else what fits, as another one, unless more is given back for it."""
        size = self.size
        refused: BudgetExceeded | None = None
        for _ in range(_ROUNDS):
            try:
                yield from self._reserve_flow(size)
                return
            except BudgetExceeded as denied:
                refused = denied
            size = min(to_units(refused.fits, self.unit), self.size)
            with self.lock:
                given_back = 0 if self.spare is None else self.slab.left
            if size <= given_back:
                break
        assert refused is not None
        raise refused

    def _settle_flow(self, slab: Slab) -> Flow[None]:
        # After all that was spent from it: what waits to be told is told in order.
        assert slab.hold is not None
        self._core.defer_settlement(slab.hold, None)
        return
        yield


class Prepaid:
    """The slabs of one limiter, and what is granted from them.

    Args:
        slabs: how much is prepaid for each budget.
    """

    def __init__(self, core: Core, slabs: Mapping[str, AmountIn]) -> None:
        self._core = core
        self._slabs = slabs
        self._replica = ""
        self._keepers: dict[str, _Keeper] = {}
        self._open: dict[str, tuple[HoldBase, Draw, Record]] = {}
        """What was granted, and is neither settled nor handed over; each as it was granted."""

    def begin(self) -> None:
        """Keeps slabs from now on; a forked child has its own. Called on the event loop of the limiter."""
        session = self._core.session
        if self._replica != session.replica_id:
            self._replica = session.replica_id
            self._open = {}
            self._keepers = {name: _Keeper(self._core, name, slab) for name, slab in self._slabs.items()}
            for keeper in self._keepers.values():
                keeper.begin()

    @property
    def remaining(self) -> dict[str, Amount]:
        """What could be granted without the store, per budget."""
        return {name: keeper.remaining for name, keeper in self._keepers.items()}

    # -- granting ------------------------------------------------------------------------------------------------------

    def draw(self, wanted: Sequence[tuple[str, int]], ambiguous: bool) -> Draw | None:
        """All of it, or nothing."""
        taken: list[tuple[_Keeper, Slab, int]] = []
        for name, units in wanted:
            keeper = self._keepers.get(name)
            slab = keeper.draw(units) if keeper is not None else None
            if keeper is None or slab is None:
                for other, drawn, before in taken:
                    other.put_back(drawn, before, 0)
                return None
            taken.append((keeper, slab, units))
        return Draw(taken, ambiguous)

    def admit(
        self,
        hold_id: str,
        wanted: Sequence[tuple[str, int]],
        ttl_ms: int,
        policy: str,
        labels: tuple[str, str, str, str],
        *,
        ambiguous: bool,
    ) -> Any:
        """A hold of what was prepaid, if all slabs have room for it.

        Args:
            labels: owner, operation, trace and request.
        """
        core = self._core
        if len(core.deferred) > _TO_BE_TOLD_MAX:
            return None
        request = labels[3]
        draw = self.draw(wanted, ambiguous)
        if draw is None and self.is_due(anything=False):  # what has expired may give back
            self.hand_over(due=True)
            draw = self.draw(wanted, ambiguous)
        if draw is None:
            return None
        logger.warning("hold %s is granted from what was prepaid: the store does not answer", hold_id)
        draw.deadline_ms = core.session.now_ms() + ttl_ms
        hold = core.make_hold(core, hold_id, self.parts(draw), ttl_ms, draw.deadline_ms, prepaid=draw, request=request)
        self._open[hold_id] = hold, draw, core.keep(hold, policy, labels)
        return hold

    def record(self, hold_id: str, wanted: Sequence[tuple[str, int]], labels: str) -> Settlement | None:
        """Spend that what was prepaid covers; ``None`` if it does not."""
        draw = self.draw(wanted, False) if len(self._core.deferred) <= _TO_BE_TOLD_MAX else None
        if draw is None:
            return None
        parts = [(window, f":{units}") for window, units in self.parts(draw)]
        key = self._core.session.keys.hold(hold_id)
        recorded = self._core.deferral(Op(hold_id, key, f"N {hold_id} 1 {labels}", parts), "recorded")
        self._settled(hold_id, draw, [units for _, units in wanted])
        return recorded

    def parts(self, draw: Draw) -> list[tuple[Window, int]]:
        """The windows that admitted it, each with its units."""
        return [(slab.hold.parts[0][0], units) for _, slab, units in draw.taken if slab.hold is not None]

    def extend(self, hold: HoldBase, draw: Draw, parts: Sequence[tuple[Window, int]], ttl_ms: int | None) -> None:
        """A heartbeat prolongs; growth comes from the same slabs, in all budgets or in none.

        Args:
            ttl_ms: of a heartbeat; ``None`` for growth, which prolongs nothing.

        Raises:
            StoreUnavailable: a slab has no room for it.
            HoldConflict: the hold is settled.
        """
        if draw.settled is not None:
            raise HoldConflict(f"hold {hold.id!r} is settled; it cannot be extended")
        grown: list[tuple[_Keeper, Slab, int]] = []
        for (keeper, slab, before), (_, units) in zip(draw.taken, parts, strict=True):
            if not keeper.more(slab, max(0, units - before)):
                for (other, drawn, earlier), (_, _, later) in zip(draw.taken, grown, strict=False):
                    other.more(drawn, earlier - later)
                raise StoreUnavailable(
                    f"hold {hold.id!r} was granted from a slab of {keeper.name!r}, which has no room for more"
                )
            grown.append((keeper, slab, max(before, units)))
        draw.taken = grown
        if ttl_ms is not None:
            latest_ms = self._open[hold.id][2].created_us // 1000 + LONGEST_HOLD_MS
            draw.deadline_ms = min(self._core.session.now_ms() + ttl_ms, latest_ms)

    # -- handing over --------------------------------------------------------------------------------------------------

    def is_due(self, *, anything: bool) -> bool:
        """Whether something is to be handed over: of holds whose deadline has passed, or of anything that is open."""
        if anything:
            return bool(self._open)
        now_ms = self._core.session.now_ms()
        return any(draw.deadline_ms <= now_ms for _, draw, _ in self._open.values())

    def hand_over_flow(self) -> Flow[None]:
        """As :meth:`hand_over`: of everything if the store answers."""
        self.hand_over(due=self._core.driver.breaker.open)
        return
        yield

    def hand_over(self, *, due: bool = False) -> None:
        """Makes what is open the store's, as soon as it can be told: there it expires, and is found by its id.

        Args:
            due: only what has expired; what its policy gives back returns to the slabs at once.
        """
        if self._replica != self._core.session.replica_id:
            return  # it is the parent's
        now_ms = self._core.session.now_ms()
        for hold, draw, record in list(self._open.values()):
            if not due or draw.deadline_ms <= now_ms:
                self._hand_over(hold, draw, record, now_ms)

    def _hand_over(self, hold: HoldBase, draw: Draw, record: Record, now_ms: int) -> None:
        core, policy = self._core, record.policy
        del self._open[hold.id]
        draw.handed = True
        counts: list[int] = []
        parts: list[tuple[Window, str]] = []
        expired = draw.deadline_ms <= now_ms
        figures = zip(hold.parts, record.segments, draw.taken, hold.accrued_units, strict=True)
        for (window, _), segment, (_, _, drawn), accrued in figures:
            parts.append((window, f":{segment.reserved}:{drawn}:{accrued}"))
            if not expired or policy == "c":
                counts.append(max(drawn, accrued))
            else:
                counts.append(accrued if policy == "a" else 0)
        if expired:
            hold.state = "unconfirmed"
        head = f"P {hold.id} {policy} {draw.deadline_ms} {record.created_us} {record.labels}"
        core.handed[hold.id] = op = Op(hold.id, core.session.keys.hold(hold.id), head, parts)
        core.defer(op)
        self._leave(hold.id, draw, counts)

    def give_up(self, hold: HoldBase) -> None:
        """Nobody knows of this grant: its units return to the slabs, and the store is told nothing of it here."""
        if (granted := self._open.get(hold.id)) is not None:
            _, draw, _ = granted
            self._settled(hold.id, draw, [0] * len(draw.taken))

    def tell_left(self) -> None:
        """Tells again what is left of the slabs, to a store that may have gone back to a time when it was more."""
        if self._replica == self._core.session.replica_id:
            for keeper in self._keepers.values():
                with keeper.lock:
                    slabs = [slab for slab in keeper.slabs() if slab.hold is not None and not slab.settling]
                for slab in slabs:
                    self._core.defer(keeper.shrunk(slab))

    def told(self, op: Op, line: str) -> None:
        """The store has taken note of what is left of a slab, or of a hold that was handed over."""
        core, memory = self._core, self._core.session.memory
        if op.letter == "H":
            memory.shrunk(op.id, [int(tail[1:]) for _, tail in op.parts])
            return
        core.handed.pop(op.id, None)
        core.unguarded.pop(op.id, None)
        if line == "g":
            _, _, policy, deadline_ms, created_us, labels = op.head.split(" ", 5)
            record = f"o {policy} {deadline_ms} {created_us} 0 {labels}"
            for window, tail in op.parts:
                _, first, reserved, accrued = tail.split(":")
                base = first if first != reserved else ""
                record += f"|{window.flag},{window.name},{base},{reserved},{accrued.lstrip('0')},"
            memory.granted(op.id, op.parts, record, core.session.now_ms() * 1000)

    # -- settling ------------------------------------------------------------------------------------------------------

    def settle(self, hold: HoldBase, draw: Draw, amounts: Sequence[tuple[str, int]] | None, remark: str) -> Settlement:
        """Settles at once here, and tells the store when it answers: by id, and what that leaves of the slabs.

        Raises:
            HoldConflict: it was settled otherwise before.
        """
        spent = [0] * len(draw.taken) if amounts is None else [units for _, units in amounts]
        settlement = Settlement(
            hold.id,
            "released" if amounts is None else "committed",
            {w.budget: from_units(units, w.unit) for (w, _), units in zip(hold.parts, spent, strict=True)},
            replayed=draw.settled is not None,
            overruns=tuple(w.budget for (w, held), units in zip(hold.parts, spent, strict=True) if units > held),
            overrun=any(units > held for (_, held), units in zip(hold.parts, spent, strict=True)),
            deferred=True,
        )
        if draw.settled is not None:
            if draw.settled != spent:
                state: HoldState = "committed" if any(draw.settled) else "released"
                before = {
                    w.budget: (units, hold.unit_of(w.budget))
                    for (w, _), units in zip(hold.parts, draw.settled, strict=True)
                }
                found = f"committed at {amounts_text(before)}" if state == "committed" else state
                cannot = "released" if amounts is None else "committed at another amount"
                raise HoldConflict(f"hold {hold.id!r} was already {found}; it cannot be {cannot}", state=state)
            return settlement
        if amounts is None:
            if draw.ambiguous:
                nothing = [(window, ":x0") for window, _ in hold.parts]
                self._core.defer(Op(hold.id, self._core.session.keys.hold(hold.id), f"L {hold.id} f", nothing))
        else:
            self._core.defer(self._core.commit_admitted(hold, [("x", units) for units in spent], remark))
        self._settled(hold.id, draw, spent)
        if (known := self._core.unguarded.get(hold.id)) is not None:
            known[0].state = settlement.state
        return settlement

    def _settled(self, hold_id: str, draw: Draw, spent: list[int]) -> None:
        """What was spent leaves the slabs, and what was not returns to them."""
        draw.settled = spent
        self._open.pop(hold_id, None)
        self._leave(hold_id, draw, spent)

    def _leave(self, hold_id: str, draw: Draw, counts: Sequence[int]) -> None:
        for (keeper, slab, drawn), units in zip(draw.taken, counts, strict=True):
            if (op := keeper.put_back(slab, drawn, units, hold_id)) is not None:
                self._core.defer(op)
