"""Policy ``allow``: while the store is unreachable, everything is granted, and the spend is recorded later (P12)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from ktrdr_budget.engine.outage.policy import OfflineReservation, OutagePolicy
from ktrdr_budget.engine.protocol.codes import ReleaseMode
from ktrdr_budget.engine.protocol.operations import CommitAmount, RecordSpend, Release, SettlingOperation
from ktrdr_budget.engine.protocol.window import Window
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.models import Settlement

__all__ = ["AllowPolicy"]

logger = logging.getLogger("ktrdr_budget")


class AllowPolicy(OutagePolicy):
    """The policy that grants every reservation without a check of the cap.

    Once the store replies again, the holds are settled in the store by their ids.
    """

    defers = True
    extends = True
    cap_checked = False

    def reserve(self, request: OfflineReservation) -> HoldBase | None:
        logger.warning("hold %s granted without a check of the cap: store unreachable", request.hold_id)
        deadline_ms = self._state.now_ms() + request.ttl_ms
        terms = {"request": request.request, "scope": request.labels.scope}
        hold = self._new_hold(request.hold_id, request.parts, request.ttl_ms, deadline_ms, offline=self, **terms)
        self._keep(hold, request)
        return hold

    def record(self, op: RecordSpend, *, ambiguous: bool) -> Settlement | None:
        return self.defer(op.as_late(), ambiguous=ambiguous)

    # -- behind a hold -------------------------------------------------------------------------------------------------

    def settle(self, hold: HoldBase, amounts: Sequence[CommitAmount] | None, remark: str) -> SettlingOperation:
        """Return the operation that settles the hold by its id."""
        if amounts is None:
            # The store may grant this hold later, from a request whose reply was lost.
            key = self._state.keys.hold(hold.id)
            return Release(hold.id, key, hold.window_list, ReleaseMode.FINAL)
        return hold.restored_commit([amount.units for amount in amounts], remark, self._trace_id() if remark else "")

    def extend(self, hold: HoldBase, parts: Callable[[], Sequence[tuple[Window, int]]], ttl_ms: int | None) -> bool:
        """Return false, so that the call extends the hold in the store.

        The store may have the hold, from a request whose reply was lost.
        """
        return False
