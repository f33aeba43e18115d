"""The calls of the engine without a store: a call is a generator of requests, and the test sends the replies."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from ktrdr_budget import Budget, StoreUnavailable
from ktrdr_budget.engine.calls.context import CallContext, Flow
from ktrdr_budget.engine.calls.reserve import reserve_units
from ktrdr_budget.engine.outage.policy import OutagePolicy
from ktrdr_budget.engine.protocol.batch import BatchHead
from ktrdr_budget.engine.protocol.codes import OPEN
from ktrdr_budget.engine.protocol.hold_record import HoldRecord, segments_of
from ktrdr_budget.engine.protocol.operations import Labels
from ktrdr_budget.engine.protocol.replies import Granted, Reply
from ktrdr_budget.engine.protocol.requests import ReadHead
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.engine.replica.outbox import Outbox
from ktrdr_budget.engine.replica.state import ReplicaState

NOW_MS = 1_764_590_400_000
"""The store's clock in these tests: 2025-12-01 12:00 UTC."""
NOW_US = NOW_MS * 1000
TTL_MS = 60_000

NO_REPLY = StoreUnavailable("no reply", ambiguous=True)
NOT_SENT = StoreUnavailable("connection refused")
NOT_READY = StoreUnavailable("under repair", reached=True)


class Driven(NamedTuple):
    """The requests of a call, and its result: a value, or the exception that it raised."""

    requests: list[Any]
    result: Any


def drive(flow: Flow[Any], *replies: Any, raises: type[Exception] | None = None) -> Driven:
    """Run a call to its end with these replies.

    Args:
        replies: an exception is raised in the call; a function receives the request and returns the reply.
        raises: the exception that the call must end with.
    """
    requests: list[Any] = []
    left, reply, result = list(replies), None, None
    try:
        while True:
            requests.append(flow.throw(reply) if isinstance(reply, Exception) else flow.send(reply))
            assert left, f"the test has no reply to {requests[-1]}"
            reply = left.pop(0)
            reply = reply(requests[-1]) if callable(reply) else reply
    except StopIteration as end:
        result = end.value
        assert raises is None, f"{raises} was not raised"
    except Exception as error:
        if raises is None or not isinstance(error, raises):
            raise
        result = error
    assert not left, f"the call has ended without a request for {left}"
    return Driven(requests, result)


def answer(reply: Reply, *due: str, now_us: int = NOW_US) -> tuple[Reply, BatchHead]:
    """A reply to an operation, and the head of its batch; ``due``: the ids of overdue holds that the head lists."""
    return reply, BatchHead(now_us, False, 1, None, due)


def found(*items: Any, now_us: int = NOW_US, recovering_until_ms: int = 0) -> tuple[ReadHead, tuple[Any, ...]]:
    """The reply to a read."""
    return ReadHead(now_us, "epoch", 1, recovering_until_ms), items


def call_context(
    *budgets: Budget, policy: type[OutagePolicy] = OutagePolicy, trace_id: str = "", tenant: str = "default"
) -> CallContext:
    """The context of a limiter whose store's clock shows :data:`NOW_MS`."""
    state, outbox = ReplicaState(tenant, budgets), Outbox()
    state.set_clock(NOW_US, 0)
    new_hold = partial(HoldBase, SimpleNamespace(state=state))
    return CallContext(state, outbox, policy(state, outbox, new_hold, lambda: trace_id), new_hold, lambda: trace_id)


def granted_hold(context: CallContext, hold_id: str = "a", **units: int) -> HoldBase:
    """A hold that the store has granted; ``units``: the whole units by budget."""
    flow = reserve_units(context, [*units.items()], hold_id, TTL_MS, "c", Labels())
    hold = drive(flow, answer(Granted())).result
    assert isinstance(hold, HoldBase)
    return hold


def offline_hold(context: CallContext, hold_id: str = "a", **units: int) -> HoldBase:
    """A hold that the outage policy has granted, because the store did not reply."""
    flow = reserve_units(context, [*units.items()], hold_id, TTL_MS, "c", Labels())
    hold = drive(flow, NOT_SENT).result
    assert isinstance(hold, HoldBase)
    return hold


def hold_record(context: CallContext, state: str = OPEN, *, due: bool = False, **units: int) -> HoldRecord:
    """The store's record of a hold; ``due``: its deadline has passed."""
    segments = segments_of((context.state.current_window(name), each) for name, each in units.items())
    deadline_ms = NOW_MS - 1 if due else NOW_MS + TTL_MS
    return HoldRecord(state, "c", deadline_ms, NOW_US, 0, "", "", "", segments)


def units_of(hold: HoldBase) -> dict[str, int]:
    """The reserved whole units of a hold, per budget."""
    return {window.budget: units for window, units in hold.parts}


def queued(context: CallContext) -> list[tuple[str, Any]]:
    """The kind and the request of each entry in the outbox."""
    return [(entry.kind, entry.request) for entry in context.outbox]


def errors_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages that were logged as errors."""
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


def answer_status(
    *, due: tuple[str, ...] = (), runtime: str = "", registered: str = "", now_us: int = NOW_US, **sums: int
) -> tuple[ReadHead, tuple[Any, ...]]:
    """The reply to a read of one budget's status.

    Args:
        runtime: the stored record of a limit that was set at run time.
        sums: ``spent``, ``held`` and other figures, in whole units.
    """
    figures = [str(sums.get(name, "")) for name in ("limit", "spent", "held", "unconfirmed", "events", "overruns")]
    return found([*due], [runtime, registered, *figures, ""], now_us=now_us)
