"""Policy ``lease``: while the store is away, only what was prepaid is granted, so that the cap still holds (P12).

A slab is kept for each budget. What is granted from it stands under it in the store until it is settled; then the spend
is told by its own id, into the window that admitted the slab, together with the slab's smaller reservation (H). So the
store counts no less than what was granted at any moment, and nothing twice; if this process dies, the slab is charged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ktrdr_budget.engine.leases import LEASE_TTL_DEFAULT_S, LeaseBase
from ktrdr_budget.engine.protocol import Commit, LostCommit, Op, Window, word
from ktrdr_budget.engine.slabs import Slab
from ktrdr_budget.errors import HoldConflict, InvalidArgument, StoreUnavailable
from ktrdr_budget.models import HoldState, Settlement
from ktrdr_budget.money import Amount, AmountIn, from_units

if TYPE_CHECKING:
    from ktrdr_budget.engine.flows import Core
    from ktrdr_budget.engine.holds import HoldBase
    from ktrdr_budget.engine.reads import Flow

__all__ = ["Draw", "Prepaid", "check_slabs"]

logger = logging.getLogger("ktrdr_budget")


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


class Draw:
    """What one hold was granted from slabs."""

    __slots__ = ("ambiguous", "labels", "settled", "taken")

    def __init__(self, taken: list[tuple[_Keeper, Slab, int]], labels: tuple[str, str], ambiguous: bool) -> None:
        self.taken = taken
        """Per budget, in the order of the hold's parts: from which slab, and how many units."""
        self.labels = labels
        self.ambiguous = ambiguous
        """The store may have granted the hold as well, in a request whose reply was lost."""
        self.settled: list[int] | None = None


class _Keeper(LeaseBase):
    """The slab of one budget, kept full while the store answers."""

    def __init__(self, core: Core, budget: str, slab: AmountIn) -> None:
        super().__init__(core, budget, slab, ttl=LEASE_TTL_DEFAULT_S, idle=None, eager=True)

    def draw(self, units: int) -> Slab | None:
        """Takes units from a slab of the window that is now; ``None`` if none has them."""
        with self.lock:
            self.leave_ended(self._now_ms())
            if self.slab.left < units and self.spare is not None:
                self.retire()
            slab = self.slab
            if slab.hold is None or slab.left < units:
                return None
            slab.left -= units
            slab.promised += units
            slab.open += 1
            return slab

    def more(self, slab: Slab, units: int) -> bool:
        """Takes more from the same slab."""
        with self.lock:
            if slab.left < units:
                return False
            slab.left -= units
            slab.promised += units
            return True

    def put_back(self, slab: Slab, drawn: int, spent: int) -> Op | None:
        """What was drawn is settled; returns how the store is told of the slab that is left, if it is another."""
        with self.lock:
            slab.open -= 1
            slab.promised -= drawn
            slab.left += drawn - spent
            slab.reserved -= spent
            self.alert()
        return self.shrunk(slab, slab.reserved) if spent else None

    def shrunk(self, slab: Slab, reserved: int) -> Op:
        """Tells that so much of a slab is left."""
        assert slab.hold is not None
        hold_id = slab.hold.id
        parts = [(window, f":{max(0, reserved)}") for window, _ in slab.hold.parts]
        return Op(hold_id, self._core.session.keys.hold(hold_id), f"H {hold_id}", parts)

    async def closed(self, *, all_grants: bool = False) -> None:
        """Gives the rest back; what open holds reserved stays, and is charged at its deadline."""
        self.stop("this limiter is closed")
        for slab in [slab for slab in self.slabs() if slab.open]:
            self._core.defer(self.shrunk(slab, slab.promised))
            self.forget(slab)
        await super().closed()
        self._end()

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

    def begin(self) -> None:
        """Keeps slabs from now on; a forked child has its own. Called on the event loop of the limiter."""
        session = self._core.session
        if self._replica != session.replica_id:
            self._replica = session.replica_id
            self._keepers = {name: _Keeper(self._core, name, slab) for name, slab in self._slabs.items()}
            for keeper in self._keepers.values():
                keeper.begin()

    @property
    def remaining(self) -> dict[str, Amount]:
        """What could be granted without the store, per budget."""
        return {name: keeper.remaining for name, keeper in self._keepers.items()}

    # -- granting ------------------------------------------------------------------------------------------------------

    def draw(self, wanted: Sequence[tuple[str, int]], labels: tuple[str, str], ambiguous: bool) -> Draw | None:
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
        return Draw(taken, labels, ambiguous)

    def admit(
        self,
        hold_id: str,
        wanted: Sequence[tuple[str, int]],
        ttl_ms: int,
        policy: str,
        labels: tuple[str, str, str],
        *,
        ambiguous: bool,
    ) -> Any:
        """A hold of what was prepaid, if all slabs have room for it; the same id and contents are granted once.

        Args:
            labels: owner, operation and trace.

        Raises:
            HoldConflict: the id was granted with other contents.
        """
        core = self._core
        known = core.unguarded.get(hold_id)
        if known is not None:
            hold, record = known
            before = sorted((segment.budget, segment.reserved) for segment in record.segments)
            if before != sorted(wanted) or record.policy != policy:
                raise HoldConflict(f"hold {hold_id!r} was granted with other contents; nothing was changed")
            replayed = core.make_hold(core, hold_id, hold.parts, ttl_ms, hold.deadline_ms, prepaid=hold.prepaid)
            replayed.replayed, replayed.state, replayed.created_us = True, hold.state, record.created_us
            return replayed
        _, operation, trace = labels
        draw = self.draw(wanted, (core.label(operation), core.label(trace)), ambiguous)
        if draw is None:
            return None
        logger.warning("hold %s is granted from what was prepaid: the store does not answer", hold_id)
        deadline_ms = core.session.now_ms() + ttl_ms
        hold = core.make_hold(core, hold_id, self.parts(draw), ttl_ms, deadline_ms, prepaid=draw)
        core.keep(hold, policy, labels)
        return hold

    def record(self, hold_id: str, wanted: Sequence[tuple[str, int]], labels: str) -> Settlement | None:
        """Spend that what was prepaid covers; ``None`` if it does not."""
        draw = self.draw(wanted, ("-", "-"), False)
        if draw is None:
            return None
        parts = [(window, f":{units}") for window, units in self.parts(draw)]
        key = self._core.session.keys.hold(hold_id)
        recorded = self._core.deferral(Op(hold_id, key, f"N {hold_id} 1 {labels}", parts), "recorded")
        self._settled(draw, [units for _, units in wanted])
        return recorded

    def parts(self, draw: Draw) -> list[tuple[Window, int]]:
        """The windows that admitted it, each with its units."""
        return [(slab.hold.parts[0][0], units) for _, slab, units in draw.taken if slab.hold is not None]

    def extend(self, hold: HoldBase, draw: Draw, parts: Sequence[tuple[Window, int]]) -> None:
        """A heartbeat needs nothing; growth comes from the same slabs, in all budgets or in none.

        Raises:
            StoreUnavailable: a slab has no room for it.
            HoldConflict: the hold is settled.
        """
        if draw.settled is not None:
            raise HoldConflict(f"hold {hold.id!r} is settled; nothing was changed")
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
                raise HoldConflict(f"hold {hold.id!r} was settled otherwise; nothing was changed", state=state)
            return settlement
        if amounts is None:
            if draw.ambiguous:
                nothing = [(window, ":x0") for window, _ in hold.parts]
                self._core.defer(Op(hold.id, self._core.session.keys.hold(hold.id), f"L {hold.id} f", nothing))
        else:
            operation, trace = draw.labels
            if remark:
                operation = word(remark) if operation == "-" else f"{operation}%20{word(remark)}"
            self._core.defer(self._told(hold, spent, f"{operation} {trace}"))
        self._settled(draw, spent)
        return settlement

    def _settled(self, draw: Draw, spent: list[int]) -> None:
        """What was spent leaves the slabs, and what was not returns to them."""
        draw.settled = spent
        for (keeper, slab, drawn), units in zip(draw.taken, spent, strict=True):
            if (op := keeper.put_back(slab, drawn, units)) is not None:
                self._core.defer(op)

    def _told(self, hold: HoldBase, spent: Sequence[int], labels: str) -> Op:
        exactly = [(window, f":x{units}") for (window, _), units in zip(hold.parts, spent, strict=True)]
        commit = Commit(hold.id, self._core.session.keys.hold(hold.id), exactly, True, *labels.split(" "))
        recorded = [(window, f":{units}") for (window, _), units in zip(hold.parts, spent, strict=True)]
        return LostCommit(commit, recorded)
