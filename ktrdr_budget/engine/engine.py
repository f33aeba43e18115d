"""The engine of a limiter: it creates and connects the parts. Each limiter, sync or async, has one engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from ktrdr_budget.engine.batching.dispatcher import Dispatcher
from ktrdr_budget.engine.batching.pending import Observer
from ktrdr_budget.engine.calls.chunks import LeaseCalls
from ktrdr_budget.engine.calls.context import CallContext
from ktrdr_budget.engine.outage.allow import AllowPolicy
from ktrdr_budget.engine.outage.policy import OutagePolicy
from ktrdr_budget.engine.outage.prepaid import PrepaidPolicy
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.engine.replica.outbox import Outbox
from ktrdr_budget.engine.replica.state import ReplicaState
from ktrdr_budget.engine.transport.store import Store
from ktrdr_budget.errors import InvalidArgument, shown
from ktrdr_budget.models import Budget
from ktrdr_budget.money import AmountIn

__all__ = ["Engine"]

logger = logging.getLogger("ktrdr_budget")

_POLICIES: dict[str, type[OutagePolicy]] = {"deny": OutagePolicy, "allow": AllowPolicy, "lease": PrepaidPolicy}


on_creation: list[Callable[[Engine], None]] = []
"""Callbacks that receive each new engine of this process; for tests."""


class Engine:
    """Everything behind a limiter. Its attributes are for tests and for the package, not for users.

    Args:
        hold_class: the hold class of the sync or async limiter.
        options: options of :class:`~.replica.state.ReplicaState`.
    """

    def __init__(
        self,
        tenant: str,
        budgets: Iterable[Budget],
        store: Callable[[ReplicaState], Store],
        hold_class: type[HoldBase],
        *,
        timeout_s: float,
        on_store_error: str,
        lease_slab: AmountIn | Mapping[str, AmountIn] | None,
        observer: Observer | None,
        trace_id: Callable[[], str] | None,
        **options: int,
    ) -> None:
        if on_store_error not in _POLICIES:
            raise InvalidArgument(f"on_store_error must be 'deny', 'allow' or 'lease', not {shown(on_store_error)}")
        self.state = ReplicaState(tenant, budgets, **options)
        self.outbox = Outbox()
        trace_id = trace_id or _no_trace
        new_hold = partial(hold_class, self)
        self.policy = _POLICIES[on_store_error](self.state, self.outbox, new_hold, trace_id)
        self.context = CallContext(self.state, self.outbox, self.policy, new_hold, trace_id)
        self.lease_calls = LeaseCalls(self.context, timeout_s)
        if isinstance(self.policy, PrepaidPolicy):
            self.policy.prepay(self.lease_calls, lease_slab)
        elif lease_slab is not None:
            raise InvalidArgument(f"lease_slab requires on_store_error='lease', not {on_store_error!r}")
        self.store = store(self.state)
        self.state.on_loss = self._report_loss
        self.dispatcher = self.lease_calls.driver = Dispatcher(self.context, self.store, timeout_s, observer)
        self.runner: Any = None
        """Runs the calls of the limiter and of its holds; the limiter sets it, because it is sync or async."""
        for callback in on_creation:
            callback(self)

    def set_timeout(self, timeout_s: float) -> None:
        """Change the deadline of all later calls."""
        self.dispatcher.timeout_s = self.dispatcher.background.timeout_s = self.lease_calls.timeout_s = timeout_s

    def _report_loss(self) -> None:
        names = self.store.shown, self.state.replica_id, self.state.tenant
        logger.error("data loss detected at %s: replica %s (tenant %s) is replaying its journal", *names)


def _no_trace() -> str:
    return ""
