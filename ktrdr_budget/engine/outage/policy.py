"""How a call ends that cannot reach the store: the interface of outage policies, and policy ``deny`` (P12)."""

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
    """Its expiry policy, a code of :data:`~..protocol.codes.POLICIES`."""
    labels: Labels
    request: str
    ambiguous: bool
    """The store may have granted it."""


class OutagePolicy:
    """Policy ``deny``: nothing is granted or recorded without the store.

    Args:
        new_hold: makes a hold for the caller.
        trace_id: the current trace, for the ledger.
    """

    defers = False
    """Whether a settlement without a reply is deferred, and its caller continues."""
    extends = False
    """Whether a hold of the store is extended here if the store is unreachable."""

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
        """Prepare for an outage. Called on the event loop, by each reservation."""

    def reserve(self, request: OfflineReservation) -> HoldBase | None:
        """Grant a reservation without the store; ``None`` denies."""
        return None

    def record(self, op: RecordSpend, *, ambiguous: bool) -> Settlement | None:
        """Record spend without the store; ``None`` if that must fail.

        Args:
            ambiguous: the store may have recorded it.
        """
        return None

    def owns(self, hold_id: str) -> bool:
        """Whether this hold is settled here: a result of it says nothing of requests that the store may have."""
        return False

    def give_up(self, hold: HoldBase) -> None:
        """Take back a grant that its caller did not receive."""
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
        """In the child after a fork: the holds are the parent's."""
        self.holds.clear()

    # -- for the policies ----------------------------------------------------------------------------------------------

    def defer(self, op: SettlingOperation, *, ambiguous: bool = False) -> Settlement:
        """Send a settlement once the store replies; return what its caller continues with.

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
        """Keep a hold that was granted without the store, to be found by its id."""
        hold.keep_offline(request.policy, self._state.now_ms() * 1000, *request.labels)
        self.holds[hold.id] = hold
        if len(self.holds) > _OFFLINE_HOLDS_MAX:
            self.holds.popitem(last=False)


def release_unreceived(hold_id: str, key: str, windows: Iterable[Window], request: str) -> Release:
    """Release a grant that no caller has received.

    An id of the limiter's own is closed for good. Under the caller's own id, only the grant to this very request is
    released, and not for good: a worker that has the hold by a replay may yet commit it, and the id is free again.
    """
    mode = ReleaseMode.UNRECEIVED if request else ReleaseMode.FINAL
    return Release(hold_id, key, list(windows), mode, request=request)
