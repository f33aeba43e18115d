"""Policy ``lease``: while the store is unreachable, only prepaid amounts are granted, so that the cap holds (P12).

The policy keeps one lease for each budget. A lease has chunks: amounts that the store has reserved for this process in
advance. In an outage, this process grants and settles holds within its chunks. The ids of these holds are known in this
process only, and none of these holds is transferred to the store.

In the store, a chunk is an ordinary hold. The commit of a chunk writes everything that was spent from the chunk as one
ledger entry. If the process dies, the store charges the whole chunk.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

from ktrdr_budget.engine.leases.chunks import Chunk, Grant
from ktrdr_budget.engine.leases.lease import LEASE_TTL_DEFAULT_S, ChunkCalls, LeaseBase
from ktrdr_budget.engine.outage.policy import OfflineReservation, OutagePolicy, release_unreceived
from ktrdr_budget.engine.protocol.hold_record import digest_of, split_scope
from ktrdr_budget.engine.protocol.operations import LONGEST_HOLD_MS, CommitAmount, Labels, RecordSpend, Reserve
from ktrdr_budget.engine.protocol.window import Window
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.engine.replica.outbox import Entry
from ktrdr_budget.engine.replica.state import ReplicaState
from ktrdr_budget.errors import HoldConflict, InvalidArgument, StoreUnavailable
from ktrdr_budget.models import HoldState, Settlement
from ktrdr_budget.money import Amount, AmountIn, format_amount, from_units

__all__ = ["PrepaidPolicy", "check_slabs"]

logger = logging.getLogger("ktrdr_budget")


def check_slabs(state: ReplicaState, slabs: AmountIn | Mapping[str, AmountIn] | None) -> Mapping[str, AmountIn]:
    """Check the amounts to prepay (slabs), and return the amount for each budget.

    A single amount applies to every budget in dollars.

    Raises:
        InvalidArgument: no amount is given, or a budget is unknown.
    """
    if slabs is None:
        raise InvalidArgument("on_store_error='lease' needs lease_slab, the amount to prepay")
    if not isinstance(slabs, Mapping):
        slabs = {name: slabs for name, budget in state.budgets.items() if budget.unit == "usd"}
    if not slabs:
        raise InvalidArgument("lease_slab contains no budget that can be prepaid")
    return dict(slabs)


class KeptLease(LeaseBase):
    """The lease of one budget. While the store replies, the lease is kept full.

    Args:
        expire: a function that expires the holds past their deadline. The function is called at intervals.
    """

    def __init__(self, calls: ChunkCalls, budget: str, slab: AmountIn, expire: Callable[[], None]) -> None:
        super().__init__(calls, budget, slab, ttl=LEASE_TTL_DEFAULT_S, idle=None, eager=True)
        self._expire = expire

    def _tick(self) -> None:
        self._expire()
        super()._tick()

    def _wanted(self) -> int | None:
        self.needed = 0  # a refused amount above one chunk does not enlarge the next chunk
        return super()._wanted()

    def heartbeat_acknowledged(self) -> None:
        """Replace used chunks, because the store replies again.

        Holds may have used the chunks in an outage too short for the circuit breaker, or at the end of an outage.
        """
        self.renew()

    def renew(self) -> None:
        """Replace each chunk that has made grants. The old chunk is committed once its grants are settled."""
        with self.lock:
            for chunk in (self.chunk, self.next_chunk):
                if chunk is not None and chunk.hold is not None and (chunk.spent or chunk.open):
                    self._retire(chunk)
            self.alert()

    def _retire(self, chunk: Chunk) -> None:
        if chunk is self.next_chunk:
            self.retired.append(chunk)
            self.next_chunk = None
        else:
            self.retire()


class PrepaidHold:
    """The lease grants of one hold that was granted without the store: one grant for each budget of the hold."""

    cap_checked = True

    def __init__(
        self, policy: PrepaidPolicy, request: OfflineReservation, grants: Sequence[Grant], now_ms: int
    ) -> None:
        self._policy = policy
        self.replica_id = policy.replica_id
        self.grants = grants
        self.on_expiry = request.policy
        self.labels = request.labels
        self.deadline_ms = now_ms + request.ttl_ms
        """The hold's deadline, by the store's clock."""
        self.latest_ms = now_ms + LONGEST_HOLD_MS
        self.is_expired = False
        self.settled: tuple[HoldState, list[int]] | None = None
        """The hold's state and the units spent, once it is settled."""

    @property
    def parts(self) -> list[tuple[Window, int]]:
        """The windows to which the grants are charged, each with the whole units granted."""
        return [(_window_of(grant), grant.units) for grant in self.grants]

    def settle(self, hold: HoldBase, amounts: Sequence[CommitAmount] | None, remark: str) -> Settlement:
        """Settle the hold in its chunks, without the store."""
        return self._policy.settle(hold, self, None if amounts is None else [units for _, units in amounts])

    def extend(self, hold: HoldBase, parts: Callable[[], Sequence[tuple[Window, int]]], ttl_ms: int | None) -> bool:
        """Extend the hold in this process.

        Growth is taken from the chunks of the hold. If one chunk has no room, the hold does not grow in any budget.
        """
        # Another object of the same hold may have grown the hold, and expiry may have reduced the grants.
        hold.parts = [
            (window, max(units, grant.units)) for (window, units), grant in zip(hold.parts, self.grants, strict=True)
        ]
        self._policy.extend(hold, self, [units for _, units in parts()], ttl_ms)
        return True


class PrepaidPolicy(OutagePolicy):
    """The policy that grants prepaid amounts only."""

    defers = True

    def prepay(self, calls: ChunkCalls, slabs: AmountIn | Mapping[str, AmountIn] | None) -> None:
        """Set the prepaid amounts.

        Args:
            slabs: the amount to prepay for each budget, or a single amount for each budget whose unit is dollars.

        Raises:
            InvalidArgument: no amount is given, or a budget or an amount cannot be prepaid.
            UnknownBudget: an amount is given for a budget that does not exist.
        """
        self._calls = calls
        self._slabs = check_slabs(self._state, slabs)
        self.replica_id = ""
        """The replica whose leases are kept; empty before the first call."""
        self._leases: dict[str, KeptLease] = self._new_leases()
        self._open: dict[str, HoldBase] = {}
        """Holds that are neither settled nor expired, by id."""
        self._next_expiry_ms = 0.0
        """The earliest time at which an open hold may expire."""

    def _new_leases(self) -> dict[str, KeptLease]:
        return {name: KeptLease(self._calls, name, slab, self.expire) for name, slab in self._slabs.items()}

    def begin(self) -> None:
        if self.replica_id != self._state.replica_id:  # at the start, and in the child after a fork
            self.replica_id = self._state.replica_id
            self._leases = self._new_leases()
            for lease in self._leases.values():
                lease.begin()

    @property
    def remaining(self) -> Mapping[str, Amount]:
        return {name: lease.remaining for name, lease in self._leases.items()}

    def clear(self) -> None:
        super().clear()
        self._open.clear()

    def store_replies(self) -> None:
        if self.replica_id == self._state.replica_id:
            self.expire()
            for lease in self._leases.values():
                lease.renew()

    # -- granting ------------------------------------------------------------------------------------------------------

    def _draw(self, wanted: Sequence[tuple[str, int]]) -> list[Grant] | None:
        """Take a grant from the lease of each budget. If one lease has no room, take nothing and return ``None``."""
        grants: list[Grant] = []
        for name, units in wanted:
            lease = self._leases.get(name)
            grant = None if lease is None or lease.closed_reason else lease.try_reserve(units)
            if grant is not None:
                grants.append(grant)
            if grant is None or grant.chunk.hold is None:  # no chunk has been granted yet: not even 0 units
                for each in grants:
                    each.release()
                return None
        return grants

    def reserve(self, request: OfflineReservation) -> HoldBase | None:
        hold_id = request.hold_id
        if request.request and self._is_in_store(hold_id):  # only the store can reply to this request
            return None
        self.expire()  # expired holds may return money to the leases
        grants = self._draw([(window.budget, units) for window, units in request.parts])
        if grants is None:
            return None
        logger.warning("hold %s granted from a lease: store unreachable", hold_id)
        hold = self._drawn(request, grants)
        self._open[hold_id] = hold
        self._next_expiry_ms = min(self._next_expiry_ms, hold.deadline_ms)
        self._release_in_store(request)
        return hold

    def _is_in_store(self, hold_id: str) -> bool:
        """Whether the store has confirmed to this replica that the id has an open hold or a settlement."""
        journal = self._state.journal
        record = journal.open_hold(hold_id)
        return journal.has_settled(hold_id) or (record is not None and record.is_open)

    def _release_in_store(self, request: OfflineReservation) -> None:
        """Queue the release of grants that the store may have made.

        These are grants to this request, or to earlier requests with the same id.
        """
        requests = {request.request} if request.ambiguous else set()
        requests |= {e.request.request for e in self._outbox.of(request.hold_id) if isinstance(e.request, Reserve)}
        key, windows = self._state.keys.hold(request.hold_id), [window for window, _ in request.parts]
        for each in requests:
            op = release_unreceived(request.hold_id, key, windows, each)
            self._outbox.add(Entry(op, "release", self._state.now_ms() * 1000))

    def owns(self, hold_id: str) -> bool:
        return hold_id in self.holds

    def _drawn(self, request: OfflineReservation, grants: Sequence[Grant]) -> HoldBase:
        backing = PrepaidHold(self, request, grants, self._state.now_ms())
        hold = self._new_hold(
            request.hold_id,
            backing.parts,
            request.ttl_ms,
            backing.deadline_ms,
            offline=backing,
            request=request.request,
            scope=request.labels.scope,
        )
        self._keep(hold, request)
        return hold

    def record(self, op: RecordSpend, *, ambiguous: bool) -> Settlement | None:
        units = list(op.units)
        if (known := self.holds.get(op.hold_id)) is not None:
            before = digest_of(known.request)
            if before and op.digest:
                same = before == op.digest
            else:
                same = [(w.budget, n) for w, n in known.parts] == [(w.budget, n) for w, n in op.parts]
            if known.state != "recorded" or not same:
                found = f"hold {op.hold_id!r} is {known.state}"
                raise HoldConflict(f"{found}; its id cannot be used again with other contents", state=known.state)
            return _settlement(known, "recorded", units, replayed=True)
        if ambiguous or self._outbox.of(op.hold_id) or self._state.journal.has_settled(op.hold_id):
            # The store may have recorded this spend: only a request with the same id cannot charge it twice.
            return self.defer(op.as_late(), ambiguous=ambiguous)
        grants = self._draw([(window.budget, amount) for window, amount in op.parts])
        if grants is None:
            return None
        labels, request = Labels("", op.operation, op.trace_id, op.scope), f"{op.digest}." if op.digest else ""
        hold = self._drawn(OfflineReservation(op.hold_id, op.parts, 0, "c", labels, request, False), grants)
        for grant in grants:
            grant.commit()
        hold.state = "recorded"
        assert isinstance(hold.offline, PrepaidHold)
        hold.offline.settled = "recorded", units
        return _settlement(hold, "recorded", units)

    def give_up(self, hold: HoldBase) -> None:
        super().give_up(hold)
        self._open.pop(hold.id, None)
        backing = hold.offline
        if isinstance(backing, PrepaidHold) and backing.settled is None:
            for grant in backing.grants:
                if not grant.settled:
                    grant.release()

    # -- holds ---------------------------------------------------------------------------------------------------------

    def expire(self) -> None:
        """Expire holds past their deadline.

        Expired holds keep or return their money according to their expiry policy.
        """
        now_ms = self._state.now_ms()
        if now_ms < self._next_expiry_ms:
            return
        self._next_expiry_ms = math.inf
        for hold in list(self._open.values()):
            backing = hold.offline
            assert isinstance(backing, PrepaidHold)
            if backing.deadline_ms > now_ms:
                self._next_expiry_ms = min(self._next_expiry_ms, backing.deadline_ms)
                continue
            backing.is_expired, hold.state = True, "unconfirmed"
            del self._open[hold.id]
            for grant, accrued in zip(backing.grants, hold.accrued_units, strict=True):
                if backing.on_expiry == "c" or (backing.on_expiry == "a" and accrued):
                    grant.resize(accrued if backing.on_expiry == "a" else max(grant.units, accrued))
                else:
                    grant.release()

    def extend(self, hold: HoldBase, backing: PrepaidHold, totals: Sequence[int], ttl_ms: int | None) -> None:
        """Extend a hold, and raise its grants to the given totals.

        Args:
            totals: whole units for each budget.
            ttl_ms: the ttl if this call is a heartbeat; ``None`` if this call is growth, which keeps the deadline.

        Raises:
            StoreUnavailable: a chunk has no room for the growth.
            HoldConflict: the hold is settled.
        """
        self._check_process(hold, backing)
        if backing.settled is not None:
            raise HoldConflict(f"hold {hold.id!r} is settled; it cannot be extended", state=backing.settled[0])
        grants = backing.grants
        before = [grant.units for grant in grants]
        for n, (grant, units) in enumerate(zip(grants, totals, strict=True)):
            if not grant.resize(max(units, grant.units)):
                for other, earlier in zip(grants[:n], before, strict=False):
                    other.resize(earlier)
                raise StoreUnavailable(f"hold {hold.id!r} was granted from a lease, which has no room for more")
        hold.state, backing.is_expired = "open", False
        self._open[hold.id] = self.holds.get(hold.id, hold)
        hold.parts = backing.parts
        if ttl_ms is not None:
            backing.deadline_ms = min(self._state.now_ms() + ttl_ms, backing.latest_ms)
        hold.deadline_ms = backing.deadline_ms
        self._next_expiry_ms = min(self._next_expiry_ms, backing.deadline_ms)

    def _check_process(self, hold: HoldBase, backing: PrepaidHold) -> None:
        if backing.replica_id != self._state.replica_id:
            raise HoldConflict(
                f"hold {hold.id!r} was granted from a lease of the parent process, which alone can settle it",
                state=hold.state,
            )

    def settle(self, hold: HoldBase, backing: PrepaidHold, spent: list[int] | None) -> Settlement:
        """Settle a hold in its chunks.

        If the hold has expired and its money was returned, the spend is recorded as a separate ledger entry.

        Args:
            spent: whole units for each budget; ``None`` releases the hold.

        Raises:
            HoldConflict: the hold was settled differently before.
        """
        self._check_process(hold, backing)
        state: HoldState = "released" if spent is None else "committed"
        units = [0] * len(backing.grants) if spent is None else spent
        if backing.settled is not None:
            if backing.settled != (state, units):
                raise _conflict(hold, *backing.settled, state)
            return _settlement(hold, state, units, replayed=True)
        given_back = []
        for grant, (window, _), amount in zip(backing.grants, hold.parts, units, strict=True):
            if not grant.settled:
                grant.settle(amount)
            elif amount:
                given_back.append((window, amount))
        if given_back:
            # The entry has an id of its own: the store may have the hold's id from a request of another process.
            late_id, labels = self._state.new_id(), backing.labels
            key = self._state.keys.hold(late_id)
            named = {"operation": labels.operation, "trace_id": labels.trace_id, "scope": split_scope(labels.scope)[0]}
            self.defer(RecordSpend(late_id, key, given_back, is_late=True, **named))
        backing.settled = state, units
        self._open.pop(hold.id, None)
        if (known := self.holds.get(hold.id)) is not None:
            known.state = state
        return _settlement(hold, state, units, late=backing.is_expired)


def _window_of(grant: Grant) -> Window:
    """The window to which the spend of a grant is charged."""
    assert grant.chunk.hold is not None
    return grant.chunk.hold.parts[0][0]


def _conflict(hold: HoldBase, before: HoldState, charged: Sequence[int], wanted: HoldState) -> HoldConflict:
    shown = ", ".join(
        f"{window.budget} {format_amount(from_units(units, hold.unit_of(window.budget)), hold.unit_of(window.budget))}"
        for (window, _), units in zip(hold.parts, charged, strict=True)
    )
    found = f"committed at {shown}" if before == "committed" else before
    refused = "released" if wanted == "released" else "committed at another amount"
    return HoldConflict(f"hold {hold.id!r} was already {found}; it cannot be {refused}", state=before)


def _settlement(
    hold: HoldBase, state: HoldState, units: Sequence[int], *, replayed: bool = False, late: bool = False
) -> Settlement:
    overruns = tuple(w.budget for (w, held), amount in zip(hold.parts, units, strict=True) if amount > held)
    return Settlement(
        hold.id,
        state,
        {w.budget: from_units(amount, w.unit) for (w, _), amount in zip(hold.parts, units, strict=True)},
        replayed=replayed,
        overrun=bool(overruns),
        overruns=overruns,
        late=late,
        deferred=True,
    )
