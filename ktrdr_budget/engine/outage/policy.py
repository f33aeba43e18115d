"""The interface of outage policies, and policy ``deny`` (P12).

An outage policy decides how a call ends that cannot reach the store.
"""

from __future__ import annotations

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


_OFFLINE_HOLDS_MAX = 10_000


class OfflineReservation(NamedTuple):
    """A reservation on which the store has not decided."""

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
    """The base class of outage policies.

    The base class itself is policy ``deny``, which grants and records nothing without the store.

    Args:
        new_hold: creates the hold that the caller receives.
        trace_id: returns the id of the current trace, for the ledger.
    """

    defers = False
    """Whether a settlement without a reply is deferred: queued until the store replies, while its caller continues."""
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
        """Holds that this policy granted without the store, by id."""

    # -- the interface -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Prepare for an outage. Each reservation calls this method on the event loop."""

    def reserve(self, request: OfflineReservation) -> HoldBase | None:
        """Grant a reservation without the store. Return ``None`` if the policy does not grant the reservation."""
        return None

    def record(self, op: RecordSpend, *, ambiguous: bool) -> Settlement | None:
        """Record spend without the store. Return ``None`` if the policy does not record the spend.

        Args:
            ambiguous: whether the store may have recorded the spend.
        """
        return None

    def owns(self, hold_id: str) -> bool:
        """Whether this policy settles the hold in this process, without the store.

        So the settlement does not show whether the store has received an earlier request with the same id.
        """
        return False

    def give_up(self, hold: HoldBase) -> None:
        """Cancel a grant that its caller did not receive."""
        self.holds.pop(hold.id, None)

    def expire(self) -> None:
        """Expire holds past their deadline."""

    def store_replies(self) -> None:
        """Return to normal operation, because the store replies again."""

    @property
    def remaining(self) -> Mapping[str, Amount]:
        """The amount that could be granted now without the store, per budget."""
        return {}

    def clear(self) -> None:
        """Drop all holds in a forked child, because they belong to the parent."""
        self.holds.clear()

    # -- for the policies ----------------------------------------------------------------------------------------------

    def defer(self, op: SettlingOperation, *, ambiguous: bool = False) -> Settlement:
        """Queue a settlement until the store replies. Return the result that the caller receives at once.

        Args:
            ambiguous: whether the store may have executed the settlement.
        """
        recorded = isinstance(op, RecordSpend)
        state: HoldState = "recorded" if recorded else "released" if op.is_release else "committed"
        maybe_executed_us = self._state.now_ms() * 1000 if ambiguous else None
        self._outbox.add(Entry(op, "deferred", maybe_executed_us))
        if (hold := self.holds.get(op.hold_id)) is not None:
            hold.state = state
        amounts = {w.budget: from_units(units, w.unit) for w, units in zip(op.windows, op.units, strict=True)}
        return Settlement(op.hold_id, state, amounts, deferred=True)

    def _keep(self, hold: HoldBase, request: OfflineReservation) -> None:
        """Add a hold to :attr:`holds`, because the hold was granted without the store."""
        hold.keep_offline(request.policy, self._state.now_ms() * 1000, request.labels)
        self.holds[hold.id] = hold
        if len(self.holds) > _OFFLINE_HOLDS_MAX:
            self.holds.popitem(last=False)


def release_unreceived(hold_id: str, key: str, windows: Iterable[Window], request: str) -> Release:
    """Return the operation that releases a grant which no caller has received.

    If the id was generated (``request`` is empty), the id cannot be reserved again. If the caller chose the id, only
    the grant to ``request`` is released: the id can be reserved again, and a worker that received the hold by a replay
    can still commit the hold.
    """
    mode = ReleaseMode.UNRECEIVED if request else ReleaseMode.FINAL
    return Release(hold_id, key, list(windows), mode, request=request)
