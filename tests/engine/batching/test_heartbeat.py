"""The heartbeats of a hold in a ``with`` block: when they are sent, and what ends them."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import uvloop

from ktrdr_budget import Budget, HoldConflict, StoreUnavailable, UnknownHold
from ktrdr_budget.engine.batching.heartbeat import Heartbeat
from ktrdr_budget.engine.replica.hold import HoldBase

from ...helpers.calls import call_context, granted_hold

caller: contextvars.ContextVar[str] = contextvars.ContextVar("caller")


class Dispatcher:
    """Records calls, and timers of an event loop that never runs."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.context = call_context(Budget("tokens", 1000, unit="tokens"))
        self.loop = loop
        self.sent: list[Future[Any]] = []
        self.timers: list[tuple[float, contextvars.Context]] = []

    def bind(self) -> Dispatcher:
        return self

    def call_later(self, delay_s, callback, context):
        self.timers.append((delay_s, context))
        return self.loop.call_later(delay_s, callback, context=context)

    def submit(self, flow, operation):
        assert operation == "heartbeat"
        flow.close()
        self.sent.append(Future())
        return self.sent[-1]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def dispatcher(request: pytest.FixtureRequest) -> Iterator[Dispatcher]:
    made = Dispatcher(request.param())
    yield made
    made.loop.close()


@pytest.fixture
def hold(dispatcher) -> HoldBase:
    return granted_hold(dispatcher.context, tokens=40)


def begun(dispatcher, hold) -> Heartbeat:
    return Heartbeat(dispatcher, hold)


def test_heartbeats_are_sent_every_third_of_the_ttl_and_at_least_every_eight_hours(dispatcher, hold):
    heartbeat = begun(dispatcher, hold)
    heartbeat.send()
    hold.ttl_ms = 10**12
    dispatcher.sent[0].set_result(None)
    assert [delay_s for delay_s, _ in dispatcher.timers] == [20, 86_400 / 3]


def test_heartbeats_do_not_inherit_the_context_variables_of_the_caller(dispatcher, hold):
    """An instrumentation would put their spans into the block's trace."""
    token = caller.set("block")
    begun(dispatcher, hold)
    caller.reset(token)
    [(_, context)] = dispatcher.timers
    assert caller not in context


def test_the_next_heartbeat_is_scheduled_after_the_reply_to_the_previous_heartbeat(dispatcher, hold, caplog):
    heartbeat = begun(dispatcher, hold)
    heartbeat.send()
    assert len(dispatcher.timers) == 1
    dispatcher.sent[0].set_result(None)
    assert len(dispatcher.timers) == 2
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("error", "event", "continues"),
    [
        (HoldConflict("settled"), "heartbeats of hold a stopped: settled", False),
        (UnknownHold("dropped"), "heartbeats of hold a stopped: dropped", False),
        (StoreUnavailable("no reply"), "heartbeat of hold a failed: no reply", True),
    ],
)
def test_heartbeats_stop_if_the_hold_is_settled_or_unknown_but_not_if_the_store_is_unavailable(
    dispatcher, hold, caplog, error, event, continues
):
    heartbeat = begun(dispatcher, hold)
    heartbeat.send()
    dispatcher.sent[0].set_exception(error)
    assert caplog.messages == [event]
    assert (heartbeat.timer is not None) is continues


def test_a_settled_hold_has_no_heartbeats(dispatcher, hold):
    heartbeat = begun(dispatcher, hold)
    hold.state = "committed"
    heartbeat.send()
    begun(dispatcher, hold)
    assert (dispatcher.sent, len(dispatcher.timers)) == ([], 1)


def test_stopping_the_heartbeats_cancels_the_next_heartbeat(dispatcher, hold):
    heartbeat = begun(dispatcher, hold)
    timer = heartbeat.timer
    heartbeat.stop()
    assert timer is not None and timer.cancelled()


@pytest.mark.parametrize("error", [HoldConflict("settled"), StoreUnavailable("no reply")])
def test_nothing_is_logged_if_a_heartbeat_fails_after_the_heartbeats_were_stopped(dispatcher, hold, caplog, error):
    """The hold may have been settled before the heartbeat arrived."""
    heartbeat = begun(dispatcher, hold)
    heartbeat.send()
    heartbeat.stop()
    dispatcher.sent[0].set_exception(error)
    assert caplog.messages == []
    assert heartbeat.timer is None
