"""Requests and tasks that belong to no call, and the check that the reply to each read must pass (P13)."""

from __future__ import annotations

import asyncio
import gc
from contextvars import ContextVar, copy_context
from typing import Any

import pytest

from ktrdr_budget import Budget, StoreError, StoreUnavailable
from ktrdr_budget.engine.batching.background import Background, DataLossPending, refuses_everything
from ktrdr_budget.engine.protocol.operations import Retire
from ktrdr_budget.engine.protocol.replies import Retired
from ktrdr_budget.engine.protocol.requests import Read

from ...helpers.calls import NOW_MS, NOW_US, call_context

caller: ContextVar[str] = ContextVar("caller", default="nothing")
STATE_BUDGETS = [Budget("agent", "5.00")]


class Store:
    """A store with one reply to everything."""

    shown = "store:1"

    def __init__(self, reply: Any) -> None:
        self.reply = reply
        self.deadlines_s: list[float] = []

    async def open(self) -> None:
        """Do nothing: this store is always open."""

    async def apply(self, script, keys, args, deadline_s):
        self.deadlines_s.append(deadline_s)
        return self.reply

    async def run(self, read, deadline_s):
        return self.reply


def background(reply: Any = None) -> Background:
    return Background(call_context(*STATE_BUDGETS).state, Store(reply), timeout_s=5.0)


# -- requests ----------------------------------------------------------------------------------------------------------


async def test_a_batch_returns_parsed_replies_and_the_replica_saves_the_epoch_of_the_store():
    made = background(f"{NOW_US} - 3 epoch\nx")
    made.bind(asyncio.get_running_loop())
    head, replies = await made.send([Retire.nothing("key")])
    assert (head.acknowledged, replies) == (3, [Retired()])
    assert (made.state.epoch, made.state.acknowledged) == ("epoch", 3)


async def test_a_batch_has_the_timeout_of_the_limiter_unless_a_shorter_timeout_is_given():
    made = background(f"{NOW_US} - 3 epoch\nx")
    made.bind(asyncio.get_running_loop())
    before_s = made.time()
    await made.send([Retire.nothing("key")])
    await made.send([Retire.nothing("key")], 1.0)
    longer_s, shorter_s = made.store.deadlines_s
    assert longer_s - before_s >= 5.0
    assert shorter_s < longer_s


@pytest.mark.parametrize(
    ("message", "everything"),
    [
        ("OOM command not allowed", True),
        ("User x has no permissions to run SET", True),
        ("NOAUTH Authentication required", True),
        ("KTRDRSCHEMA 9", True),
        ("WRONGTYPE Operation against a key", False),
        ("ERR BOOM", False),
    ],
)
def test_an_error_concerns_the_whole_store_if_its_cause_is_memory_login_permissions_or_schema(message, everything):
    assert refuses_everything(StoreError(message)) is everything


# -- replies to reads --------------------------------------------------------------------------------------------------


def checked(made: Background, reply: list[Any], while_recovering: Any = "answers") -> Any:
    header = made.state.header
    return made.checked(Read("script", [], [], while_recovering), header, reply)[1]


def test_a_reply_is_used_if_the_store_still_has_the_same_epoch():
    made = background()
    assert checked(made, [f"{NOW_US} epoch 0 0", "figures"]) == ["figures"], "the first epoch that it sees"
    assert checked(made, [f"{NOW_US} epoch 0 0", "figures"]) == ["figures"]


@pytest.mark.parametrize("head", ["other 0 0", "- 0 0"], ids=["another epoch", "an empty store"])
def test_a_read_fails_and_a_probe_for_a_data_loss_is_sent_if_the_reply_has_a_different_epoch(head):
    made = background()
    suspicions: list[str] = []
    checked(made, [f"{NOW_US} epoch 0 0"])
    made.state.on_suspicion = lambda: suspicions.append("probe")
    with pytest.raises(DataLossPending, match="store at store:1: it lost writes") as pending:
        checked(made, [f"{NOW_US} {head}", "figures"])
    assert suspicions == ["probe"]
    assert pending.value.reached, "an outage policy grants nothing"


@pytest.mark.parametrize(
    ("while_recovering", "items", "used"),
    [
        ("answers", [None], True),
        ("answers if found", ["record"], True),
        ("answers if found", [["record", None]], True),
        ("answers if found", [None], False),
        ("answers if found", [[None, None]], False),
        ("waits", ["record"], False),
    ],
)
def test_only_complete_replies_are_used_while_replicas_replay_lost_data(while_recovering, items, used):
    made = background()
    reply = [f"{NOW_US} epoch 0 {NOW_MS + 1500}", *items]
    if used:
        assert checked(made, reply, while_recovering) == items
        return
    with pytest.raises(DataLossPending, match="try again in 1.5 s"):
        checked(made, reply, while_recovering)


async def test_a_read_without_a_usable_reply_raises_store_unavailable():
    made = background([f"{NOW_US} epoch 0 {NOW_MS + 1500}", None])
    made.bind(asyncio.get_running_loop())
    with pytest.raises(StoreUnavailable):
        await made.read(Read("script", [], [], "waits"))


# -- tasks and timers --------------------------------------------------------------------------------------------------


async def test_tasks_run_without_the_context_of_the_caller_unless_a_context_is_given():
    made, contexts = background(), list[str]()
    made.bind(asyncio.get_running_loop())

    async def note() -> None:
        contexts.append(caller.get())

    token = caller.set("caller")
    made.spawn(note())
    made.spawn(note(), copy_context())
    await asyncio.gather(*made.tasks)
    caller.reset(token)
    assert contexts == ["nothing", "caller"]


async def test_ending_a_limiter_cancels_its_tasks_and_waits_until_the_tasks_have_ended():
    made, begun, ended = background(), asyncio.Event(), list[str]()
    made.bind(asyncio.get_running_loop())

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("work")

    made.spawn(work())
    await begun.wait()
    assert not made.closed
    await made.end()
    assert (ended, made.closed, made.tasks) == (["work"], True, set())


def test_a_pending_timer_does_not_prevent_the_garbage_collection_of_its_limiter():
    class Limiter:
        calls = 0

        def refresh(self) -> None:
            type(self).calls += 1

    loop, made = asyncio.new_event_loop(), background()
    made.bind(loop)
    kept, collected = Limiter(), Limiter()
    for limiter in (kept, collected):
        made.later(0, limiter.refresh)
    del limiter, collected
    gc.collect()
    loop.call_later(0, loop.stop)
    loop.run_forever()
    loop.close()
    assert Limiter.calls == 1
