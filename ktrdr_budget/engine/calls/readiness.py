"""Check whether the store can hold budgets safely."""

from __future__ import annotations

import logging

from ktrdr_budget.engine.calls.context import CallContext, Flow
from ktrdr_budget.engine.calls.read import status
from ktrdr_budget.engine.calls.results import eviction_fault, refusal_faults
from ktrdr_budget.engine.protocol.batch import encode_batch
from ktrdr_budget.engine.protocol.requests import (
    info_memory,
    parse_eviction_policy,
    parse_refused,
    readiness,
    status_read,
    trial_write,
)
from ktrdr_budget.errors import StoreError, StoreUnavailable

__all__ = ["begin", "check", "warn_of_eviction"]

logger = logging.getLogger("ktrdr_budget")


def begin(context: CallContext, shown_store: str) -> Flow[None]:
    """Prepare the outage policy, and connect to the store.

    If the store may evict budgets, a warning is logged.
    """
    context.policy.begin()
    yield from status(context, [])
    yield from warn_of_eviction(context, shown_store)


def check(context: CallContext) -> Flow[dict[str, str | None]]:
    """Check the store; return, for each check, the fault found, or ``None`` if the check passes."""
    try:
        store_fault, scripts_fault = yield from _trial_faults(context)
        policy_fault = yield from _policy_fault()
    except StoreUnavailable as error:
        unknown = "unknown: no reply from the store"
        return {"store": str(error), "policy": unknown, "scripts": unknown}
    return {"store": store_fault, "policy": policy_fault, "scripts": scripts_fault}


def _policy_fault() -> Flow[str | None]:
    try:
        return eviction_fault(parse_eviction_policy((yield info_memory())))
    except StoreError as error:
        return f"unknown: {error}"


def _trial_faults(context: CallContext) -> Flow[tuple[str | None, str | None]]:
    """The faults of the store and of its scripts.

    The check tries each command that a reservation needs, then a read script, then an empty write batch with the
    durability of a reservation.
    """
    state = context.state
    try:
        refused = parse_refused((yield readiness(state.keys)))
        if refused:
            return refusal_faults(refused)
        batch = encode_batch(state.keys, state.header, [])
        yield status_read(state.keys, state.replica_id, ())
        yield trial_write(batch.keys, batch.args)
    except StoreError as error:
        if error.fault == "login":
            return str(error), "unknown: the store refuses its user"
        return (str(error), "unknown: it is not a store") if error.fault == "protocol" else (None, str(error))
    return None, None


def warn_of_eviction(context: CallContext, shown_store: str) -> Flow[None]:
    """Log a warning if the store may evict budgets; log nothing if the eviction policy cannot be read."""
    context.state.policy_checked = True
    try:
        fault = eviction_fault(parse_eviction_policy((yield info_memory())))
    except StoreUnavailable:
        return
    if fault is not None:
        logger.warning("store at %s: %s", shown_store, fault)
