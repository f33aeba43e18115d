"""The interface of outage policies (how calls end that cannot reach the store), and policy ``deny`` (P12)."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from ktrdr_budget.engine.protocol.codes import ReleaseMode
from ktrdr_budget.engine.protocol.operations import Labels, RecordSpend, Release, SettlingOperation
from ktrdr_budget.engine.protocol.window import Window
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.engine.replica.outbox import Entry, Outbox
from ktrdr_budget.engine.replica.state import ReplicaState
from ktrdr_budget.models import HoldState, Settlement
from ktrdr_budget.money import Amount, from_units

__all__ = ["OfflineReservation", "OutagePolicy", "release_unreceived"]

logger = logging.getLogger("ktrdr_budget")

_OFFLINE_HOLDS_MAX = 10_000


class OfflineReservation(NamedTuple):
    """A reservation that did not reach the store."""

    hold_id: str
    parts: Sequence[tuple[Window, int]]
    """The current windows, each with the whole units requested."""
    ttl_ms: int
    policy: str
    """The expiry policy, a code of :data:`~..protocol.codes.POLICIES`."""
    labels: Labels
    request: str
    ambiguous: bool
    """Whether the store may have granted the reservation."""


class OutagePolicy:
    """The interface, and policy ``deny``: nothing is granted or recorded without the store.

    Args:
        new_hold: makes a hold for the caller.
        trace_id: the current trace, for the ledger.
    """

    defers = False
    """Whether a settlement without a reply is deferred, and its caller continues."""
    extends = False
    """Whether a hold that the store granted is extended in this process while the store is unreachable."""

    def __init__(
        self,
        state: ReplicaState,
        outbox: Outbox,
        new_hold: Callable[..., HoldBase],
        trace_id: Callable[[], str],
    ) -> None:
        self._state = state
        self._outbox = outbox
        self._new_hold = new_hold
        self._trace_id = trace_id
        self.holds: OrderedDict[str, HoldBase] = OrderedDict()
        """Holds that were granted without the store, by id: the store does not have them."""

    # -- the interface -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Prepare for an outage. Each reservation calls this on the event loop."""

    def reserve(self, request: OfflineReservation) -> HoldBase | None:
        """Grant a reservation without the store; ``None``: the policy does not grant it."""
        return None

    def record(self, op: RecordSpend, *, ambiguous: bool) -> Settlement | None:
        """Record spend without the store; ``None``: the policy does not record it.

        Args:
            ambiguous: the store may have recorded it.
        """
        return None

    def owns(self, hold_id: str) -> bool:
        """Whether this policy settles the hold in this process; such a settlement resolves no request to the store."""
        return False

    def give_up(self, hold: HoldBase) -> None:
        """Cancel a grant that its caller did not receive."""
        self.holds.pop(hold.id, None)

    def expire(self) -> None:
        """Expire holds past their deadline."""

    def store_replies(self) -> None:
        """Return to normal operation."""

    @property
    def remaining(self) -> Mapping[str, Amount]:
        """The amount that could be granted now without the store, per budget."""
        return {}

    def clear(self) -> None:
        """Drop all holds in a forked child, because they belong to the parent."""
        self.holds.clear()

    # -- for the policies ----------------------------------------------------------------------------------------------

    def defer(self, op: SettlingOperation, *, ambiguous: bool = False) -> Settlement:
        """Queue a settlement until the store replies; return the result for the caller.

        Args:
            ambiguous: the store may have executed it.
        """
        recorded = isinstance(op, RecordSpend)
        state: HoldState = "recorded" if recorded else "released" if op.is_release else "committed"
        maybe_executed_us = self._state.now_ms() * 1000 if ambiguous else None
        if evicted := self._outbox.add(Entry(op, "deferred", maybe_executed_us)):
            logger.error("outbox full: deferred spend of %s dropped", evicted.hold_id)
        if (hold := self.holds.get(op.hold_id)) is not None:
            hold.state = state
        amounts = {w.budget: from_units(units, w.unit) for w, units in zip(op.windows, op.units, strict=True)}
        return Settlement(op.hold_id, state, amounts, deferred=True)

    def _keep(self, hold: HoldBase, request: OfflineReservation) -> None:
        """Register a hold that was granted without the store under its id."""
        hold.keep_offline(request.policy, self._state.now_ms() * 1000, *request.labels)
        self.holds[hold.id] = hold
        if len(self.holds) > _OFFLINE_HOLDS_MAX:
            self.holds.popitem(last=False)


def release_unreceived(hold_id: str, key: str, windows: Iterable[Window], request: str) -> Release:
    """Release a grant that no caller has received.

    A generated id is closed for good. Under an id that the caller chose, only the grant to this request is released,
    and the id can be reserved again; a worker that received the hold by a replay can still commit it.
    """
    mode = ReleaseMode.UNRECEIVED if request else ReleaseMode.FINAL
    return Release(hold_id, key, list(windows), mode, request=request)
