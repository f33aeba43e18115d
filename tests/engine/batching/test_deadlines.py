"""Each call ends by its own deadline, whatever the deadline of the batch before it (P12)."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

import pytest
import uvloop

from ktrdr_budget import AsyncBudgetLimiter, Budget, StoreUnavailable
from ktrdr_budget.engine.batching.deadlines import Deadlines

from ...helpers.patience import away
from ...helpers.stopwatch import Stopwatch
from ...helpers.waiting import until

BUDGETS = [Budget("agent", "5.00")]


@pytest.fixture
async def hanging(server):
    """A limiter of a store that hangs, with a batch in flight whose deadline is in twenty seconds."""
    async with AsyncBudgetLimiter(server.url, BUDGETS, timeout=20.0) as limiter:
        await limiter.record("agent", "0.01")
        with server.client() as client, away(server.url):
            client.client_pause(60_000, all=False)
            patient = asyncio.create_task(limiter.record("agent", "0.01", id="op_patient"))
            await until(lambda: limiter.engine.dispatcher._lanes == 1 and not limiter.engine.dispatcher._queues)
            yield limiter
            client.client_unpause()
        assert (await patient).state == "recorded"


async def test_a_waiting_call_ends_by_its_own_deadline_even_if_a_batch_with_a_later_deadline_is_in_flight(hanging):
    """For example, the second request of a call, after a denial, has less time left than the request of a new call."""
    hanging.engine.dispatcher.timeout_s = 0.2
    began = time.monotonic()
    with pytest.raises(StoreUnavailable) as ended, Stopwatch() as took:
        await hanging.reserve("agent", "0.15")
    assert time.monotonic() - began > 0.15
    assert took.seconds < 1.0
    assert not ended.value.ambiguous, "it was never sent"


async def test_each_of_many_waiting_calls_ends_by_its_own_deadline(hanging):
    async def delay_s(seconds: float) -> float:
        hanging.engine.dispatcher.timeout_s = seconds
        with pytest.raises(StoreUnavailable), Stopwatch() as took:
            await hanging.record("agent", "0.01")
        return took.seconds - seconds

    late = await asyncio.gather(*(delay_s(0.5 - 0.02 * number) for number in range(10)))
    assert max(late) < 0.5, late


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_deadlines_that_have_passed_or_are_near_are_checked_on_both_event_loops(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
):
    async def check_at(delay_s: float) -> float:
        """The time between the deadline and the check, in seconds."""
        loop = asyncio.get_running_loop()
        checked = loop.create_future()

        def expire() -> float:
            checked.set_result(loop.time())
            return math.inf

        deadlines = Deadlines(expire)
        deadline = loop.time() + delay_s
        deadlines.watch(loop, deadline + 1)
        deadlines.watch(loop, deadline)
        return await asyncio.wait_for(checked, 20) - deadline

    with asyncio.Runner(loop_factory=new_loop) as runner:
        for delay_s in (-1, 0, 0.0004, 0.05):
            assert runner.run(check_at(delay_s)) >= 0
