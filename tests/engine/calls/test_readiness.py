"""The checks of a store, and the warning at the start."""

from __future__ import annotations

import pytest

from ktrdr_budget import Budget, StoreError
from ktrdr_budget.engine.calls.context import CallContext
from ktrdr_budget.engine.calls.readiness import begin, check, warn_of_eviction
from ktrdr_budget.engine.outage.policy import OutagePolicy
from ktrdr_budget.engine.protocol.requests import Command, Read

from ...helpers.calls import NOT_SENT, call_context, drive, found

NOEVICTION, LRU = "maxmemory_policy:noeviction", "used_memory:1\r\nmaxmemory_policy:allkeys-lru\r\n"
WRITTEN = ""
"""The reply to an empty batch; the check ignores the text of the reply."""


@pytest.fixture
def context() -> CallContext:
    return call_context(Budget("agent", "5.00"))


def test_a_store_that_executes_all_commands_and_evicts_nothing_has_no_faults(context):
    requests, faults = drive(check(context), [], found([]), WRITTEN, NOEVICTION)
    assert [type(request) for request in requests] == [Command, Read, Command, Command]
    assert faults == {"store": None, "policy": None, "scripts": None}


def test_the_eviction_policy_is_reported_as_a_fault_if_the_store_may_evict_keys(context):
    faults = drive(check(context), [], found([]), WRITTEN, LRU).result
    assert faults["policy"] == "maxmemory-policy is allkeys-lru; it must be noeviction, or budgets may vanish"


@pytest.mark.parametrize(
    ("refused", "store", "scripts"),
    [
        (["ZADD", ""], None, "the store's user may not run ZADD"),
        (["SET", "OOM command not allowed"], "it is full, and refuses SET: OOM command not allowed", None),
    ],
)
def test_a_refused_command_is_reported_as_a_fault_of_the_scripts_or_of_the_store(context, refused, store, scripts):
    requests, faults = drive(check(context), refused, NOEVICTION)
    assert len(requests) == 2, "no trial write, which would be refused as well"
    assert (faults["store"], faults["scripts"]) == (store, scripts)


@pytest.mark.parametrize(
    ("fault", "store", "scripts"),
    [
        ("", None, "ERR scripts"),
        ("login", "ERR scripts", "unknown: the store refuses its user"),
        ("protocol", "ERR scripts", "unknown: it is not a store"),
    ],
)
def test_a_login_or_protocol_error_is_a_fault_of_the_store_but_other_errors_are_faults_of_the_scripts(
    context, fault, store, scripts
):
    faults = drive(check(context), StoreError("ERR scripts", fault=fault), NOEVICTION).result
    assert (faults["store"], faults["scripts"]) == (store, scripts)


def test_only_the_policy_check_is_unknown_if_the_eviction_policy_cannot_be_read(context):
    faults = drive(check(context), [], found([]), WRITTEN, StoreError("NOPERM")).result
    assert faults == {"store": None, "policy": "unknown: NOPERM", "scripts": None}


def test_the_checks_of_policy_and_scripts_are_unknown_if_the_store_does_not_reply(context):
    faults = drive(check(context), NOT_SENT).result
    unknown = "unknown: no reply from the store"
    assert faults == {"store": "connection refused", "policy": unknown, "scripts": unknown}


def test_a_limiter_prepares_its_outage_policy_before_it_connects():
    class Preparing(OutagePolicy):
        is_prepared = False

        def begin(self) -> None:
            self.is_prepared = True

    context = call_context(policy=Preparing)
    flow = begin(context, "cache:6379")
    next(flow)
    assert isinstance(context.policy, Preparing)
    assert context.policy.is_prepared
    flow.close()


def test_a_limiter_connects_at_its_start_and_logs_a_warning_if_the_store_may_evict_keys(context, caplog):
    requests, _ = drive(begin(context, "cache:6379"), found([]), LRU)
    assert [type(request) for request in requests] == [Read, Command]
    assert caplog.messages == [
        "store at cache:6379: maxmemory-policy is allkeys-lru; it must be noeviction, or budgets may vanish"
    ]
    assert context.state.policy_checked


@pytest.mark.parametrize("reply", [NOEVICTION, StoreError("NOPERM"), NOT_SENT])
def test_no_warning_is_logged_if_the_eviction_policy_is_noeviction_or_cannot_be_read(context, caplog, reply):
    drive(warn_of_eviction(context, "cache:6379"), reply)
    assert caplog.messages == []
