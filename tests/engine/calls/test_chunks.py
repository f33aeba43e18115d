"""The calls of leases: a chunk is a hold that only the store can reserve; in an outage, its settlement is queued."""

from __future__ import annotations

import pytest

from ktrdr_budget import Budget, StoreUnavailable
from ktrdr_budget.engine.calls.chunks import LeaseCalls
from ktrdr_budget.engine.calls.context import CallContext
from ktrdr_budget.engine.outage.allow import AllowPolicy
from ktrdr_budget.engine.protocol.codes import ExtendMode
from ktrdr_budget.engine.protocol.operations import Commit, ExtendAmount, Release
from ktrdr_budget.engine.protocol.replies import Extended, Granted, Settled

from ...helpers.calls import NOT_SENT, NOW_MS, answer, call_context, drive, granted_hold, hold_record, queued

TOKENS = Budget("tokens", 1000, unit="tokens")


@pytest.fixture
def context() -> CallContext:
    return call_context(TOKENS, policy=AllowPolicy)


@pytest.fixture
def calls(context) -> LeaseCalls:
    return LeaseCalls(context, timeout_s=1.0)


def test_a_chunk_is_reserved_as_a_hold_with_the_expiry_policy_charge(calls):
    [request], hold = drive(calls.reserve("tokens", 100, 60, "lease"), answer(Granted()))
    assert (request.policy, request.ttl_ms) == ("c", 60_000)
    assert " lease " in request.granted(0, NOW_MS), "the label in the ledger"
    assert hold.reserved_units == {"tokens": 100}


def test_a_chunk_is_never_granted_offline_even_if_the_outage_policy_is_allow(calls):
    drive(calls.reserve("tokens", 100, 60, "lease"), NOT_SENT, raises=StoreUnavailable)


def test_the_heartbeat_of_a_chunk_sends_its_spend_and_the_growth_of_a_chunk_sends_its_new_total(calls, context):
    hold = granted_hold(context, tokens=100)
    extended = answer(Extended(hold_record(context, tokens=120).render()))
    [heartbeat], _ = drive(calls.extend(hold, 7, 5000), extended)
    [growth], _ = drive(calls.grow(hold, 120, 5000), extended)
    assert (heartbeat.mode, heartbeat.amounts) == (ExtendMode.HEARTBEAT, [ExtendAmount(accrued=7)])
    assert (growth.mode, growth.amounts) == (ExtendMode.GROW, [ExtendAmount(reserved=120)])


@pytest.mark.parametrize(("spent", "kind"), [(7, Commit), (0, Release)])
def test_a_chunk_is_committed_with_its_spend_or_released_if_nothing_was_spent(calls, context, spent, kind):
    hold = granted_hold(context, tokens=100)
    [request], _ = drive(calls.settle(hold, spent), answer(Settled((spent,))))
    calls.settle_later(hold, spent)
    [(deferred, later)] = queued(context)
    assert (type(request), type(later), deferred) == (kind, kind, "deferred")
    assert request.units == later.units == (spent,)


def test_the_spend_of_a_chunk_that_was_released_elsewhere_is_recorded_later_in_the_window_of_the_chunk(calls, context):
    hold = granted_hold(context, "chunk", tokens=100)
    calls.record_later(hold, 7, "lease")
    [(_, request)] = queued(context)
    assert (request.hold_id, request.units, request.windows) == ("chunk:spent", (7,), hold.window_list)
    assert request.is_late, "the window may have ended"
