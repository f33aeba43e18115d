"""A call in progress, as the dispatcher keeps it."""

from __future__ import annotations

import math
from concurrent.futures import Future
from contextvars import ContextVar

from ktrdr_budget.engine.batching.pending import PendingCall

caller: ContextVar[str] = ContextVar("caller", default="nothing")


def call(**options) -> PendingCall:
    return PendingCall((None for _ in ()), Future(), "reserve", 1.0, 2.0, **options)


def test_a_pending_call_keeps_the_context_variables_of_its_caller():
    token = caller.set("first")
    pending = call()
    caller.reset(token)
    assert (pending.context[caller], caller.get()) == ("first", "nothing")


def test_a_new_pending_call_has_sent_no_request_and_has_its_full_deadline():
    pending = call(kept=True)
    assert (pending.request, pending.was_resent, pending.was_renewed, pending.unacknowledged) == (None, *3 * [False])
    assert (pending.started_s, pending.deadline_s, pending.stalled_max_s, pending.kept) == (1.0, 2.0, math.inf, True)
