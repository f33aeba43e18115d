"""The circuit breaker: the first call of an outage opens it, later calls fail at once, and a probe closes it (P12)."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter, StoreUnavailable
from ktrdr_budget.engine.batching import breaker
from ktrdr_budget.errors import StoreError
from ktrdr_budget.money import to_units

from ...helpers.breakers import open_breaker
from ...helpers.keyspace import sums
from ...helpers.patience import away
from ...helpers.stopwatch import Stopwatch
from ...helpers.waiting import until, wait_until

BUDGETS = [Budget("agent", "5.00")]
TIMEOUT_S = 0.3
TOGETHER_S = 10 * TIMEOUT_S
"""The longest duration of hundreds of calls that fail at once; each would otherwise take its deadline."""


OUTAGES = pytest.mark.parametrize(
    ("begin", "end"),
    [
        (lambda server: server.kill(), lambda server: server.start()),
        (lambda server: server.pause(), lambda server: server.resume()),
    ],
    ids=["killed", "hangs"],
)


async def refused(call: Callable) -> StoreUnavailable:
    with pytest.raises(StoreUnavailable) as unavailable:
        await call()
    assert not isinstance(unavailable.value, StoreError)
    return unavailable.value


@OUTAGES
async def test_the_first_call_of_an_outage_takes_its_whole_deadline_and_later_calls_fail_at_once(
    own_server, begin, end, caplog
):
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        hold = await limiter.reserve("agent", "0.15")
        begin(own_server)
        assert limiter.store_state == "closed"
        started = time.monotonic()
        await open_breaker(limiter, hold.extend)
        assert time.monotonic() - started >= TIMEOUT_S * 0.9
        with Stopwatch() as took:
            for call in (lambda: limiter.reserve("agent", "0.01"), lambda: limiter.status("agent"), hold.commit) * 66:
                error = await refused(call)
                assert not error.ambiguous, "it was not sent"
        assert took.seconds < TOGETHER_S
        reason = r"cannot connect to unix://\S+ \(\w+( \w+)*\)|no reply from unix://\S+"  # killed, or hanging
        assert re.fullmatch(rf"({reason}) for \d+\.\d s; failing fast until it replies", str(error))
        end(own_server)
        await until(lambda: limiter.store_state == "closed")  # without a call
        assert (await hold.commit("0.07")).state == "committed"
        messages = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
        assert sum("failing fast until it replies" in message for message in messages) == 1
        assert sum("circuit breaker closed" in message for message in messages) == 1


@OUTAGES
async def test_concurrent_calls_do_not_wait_for_each_other_in_an_outage(own_server, begin, end):
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        await limiter.record("agent", "0.01")
        begin(own_server)
        with Stopwatch() as took:
            tries = [limiter.reserve("agent", "0.01") for _ in range(500)]
            outcomes = await asyncio.gather(*tries, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {StoreUnavailable}
        assert took.seconds < TOGETHER_S
        end(own_server)
        await until(lambda: limiter.store_state == "closed")


async def test_calls_send_nothing_and_one_probe_at_a_time_is_sent_while_the_breaker_is_open(proxy):
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        await limiter.record("agent", "0.01")
        proxy.hold_replies()
        await refused(lambda: limiter.record("agent", "0.01"))
        before, began = proxy.scripts_run, time.monotonic()
        while time.monotonic() < began + 1.0 or proxy.scripts_run == before:
            tries = [limiter.reserve("agent", "0.01") for _ in range(50)]
            await asyncio.gather(*tries, return_exceptions=True)
            await asyncio.sleep(0.01)
        probes_max = (time.monotonic() - began) / TIMEOUT_S + 1
        assert proxy.scripts_run - before <= probes_max, "each probe waits for its reply, then pauses"
        proxy.release_replies()
        await until(lambda: limiter.store_state == "closed")
        assert (await limiter.reserve("agent", "0.01")).cap_checked


async def test_the_breaker_closes_after_an_outage_even_if_calls_are_made_in_a_tight_loop(own_server):
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        await limiter.record("agent", "0.01")
        own_server.kill()
        await refused(lambda: limiter.status("agent"))
        own_server.start()
        tries = 0
        async with asyncio.timeout(30):
            while tries == 0 or limiter.store_state == "open":
                tries += 1
                with suppress(StoreUnavailable):
                    await limiter.status("agent")
        assert limiter.store_state == "closed"


async def test_the_first_call_succeeds_after_the_store_is_reachable_again(own_server, monkeypatch):
    monkeypatch.setattr(breaker, "PATIENCE_S", 10.0)  # the store may be slow to reply
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        for _ in range(3):
            await limiter.record("agent", "0.01")
            own_server.kill()
            await refused(lambda: limiter.reserve("agent", "0.15"))
            own_server.start()
            assert (await limiter.reserve("agent", "0.15")).cap_checked, "before the next planned probe"


async def test_probes_do_not_change_the_figures_of_a_budget(own_server):
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        await limiter.record("agent", "1.00")
        own_server.kill()
        await refused(lambda: limiter.status("agent"))
        own_server.start()
        await until(lambda: limiter.store_state == "closed")
        with own_server.client() as client:
            assert sums(client) == {"spent": to_units("1.00"), "held": 0, "unconfirmed": 0, "events": 1}
        assert limiter.losses == 0


async def test_policy_allow_admits_calls_at_once_and_defers_settlements_while_the_breaker_is_open(own_server):
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=TIMEOUT_S, on_store_error="allow") as limiter:
        await limiter.record("agent", "0.01")
        own_server.kill()
        assert not (await limiter.reserve("agent", "0.01")).cap_checked  # takes its deadline
        with Stopwatch() as took:
            for _ in range(100):
                hold = await limiter.reserve("agent", "0.01")
                assert not hold.cap_checked
                assert (await hold.commit()).deferred
        assert took.seconds < TOGETHER_S
        own_server.start()
        await until(lambda: limiter.deferred == 0)


async def test_one_lost_request_does_not_open_the_breaker_if_other_replies_arrive(proxy):
    """Other replies arrive meanwhile, so this is no outage."""
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        await limiter.record("agent", "0.01")
        proxy.lose_requests = 1
        await limiter.record("agent", "0.01")
        assert limiter.store_state == "closed"
        assert limiter.engine.dispatcher.breaker.openings == 0


async def test_a_blocked_event_loop_does_not_open_the_breaker(server):
    async with AsyncBudgetLimiter(server.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        await limiter.record("agent", "0.01")
        with away(server.url), server.client() as client:
            call = asyncio.create_task(limiter.record("agent", "0.01"))
            while not limiter.engine.dispatcher._lanes:
                await asyncio.sleep(0)
            await asyncio.sleep(0)  # the request is sent
            ends = time.monotonic() + TIMEOUT_S * 1.5
            wait_until(lambda: time.monotonic() > ends and sums(client)["events"] == 2)  # blocks the event loop
            await asyncio.gather(call, return_exceptions=True)
        assert limiter.store_state == "closed"
        assert (await limiter.reserve("agent", "0.01")).cap_checked


async def test_error_replies_of_the_store_do_not_open_the_breaker(own_server):
    """Each call raises the error of the store."""
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        await limiter.record("agent", "0.01")
        with own_server.client() as client:
            client.config_set("maxmemory", "1mb")
        for _ in range(3):
            with pytest.raises(StoreError):
                await limiter.record("agent", "0.01")
        assert limiter.store_state == "closed"


async def test_a_read_only_store_keeps_the_breaker_open(own_server):
    """A master that became a replica replies to requests, but refuses writes."""
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        await limiter.record("agent", "0.01")
        with own_server.client() as client, away(own_server.url):
            client.replicaof("127.0.0.1", 1)
            await open_breaker(limiter, lambda: limiter.record("agent", "0.01"))
            assert limiter.engine.dispatcher.breaker.openings == 1
            ends = time.monotonic() + 0.3
            await until(lambda: time.monotonic() > ends)
            assert limiter.store_state == "open"
            client.replicaof("NO", "ONE")
        await until(lambda: limiter.store_state == "closed")


async def test_each_readiness_check_queries_the_store_again(own_server):
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        assert (await limiter.check())["store"] is None

        async def check_fails() -> None:
            assert (await limiter.check())["store"] is not None

        own_server.kill()
        await open_breaker(limiter, check_fails)  # takes its deadline
        await check_fails()  # at once
        own_server.start()
        await until(lambda: limiter.store_state == "closed")
        assert (await limiter.check())["store"] is None


async def test_a_limiter_started_during_an_outage_connects_when_the_store_starts(own_server):
    own_server.kill()
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        await open_breaker(limiter, lambda: limiter.status("agent"))
        own_server.start()
        await until(lambda: limiter.store_state == "closed")
        assert (await limiter.reserve("agent", "0.01")).cap_checked


def test_the_breaker_of_the_sync_limiter_opens_in_an_outage_and_closes_afterwards(own_server):
    with BudgetLimiter(own_server.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        hold = limiter.reserve("agent", "0.15")
        own_server.kill()
        with pytest.raises(StoreUnavailable):
            hold.commit("0.07")
        with Stopwatch() as took:
            for _ in range(200):
                with pytest.raises(StoreUnavailable):
                    limiter.reserve("agent", "0.01")
        assert took.seconds < TOGETHER_S
        own_server.start()
        wait_until(lambda: limiter.store_state == "closed")
        assert hold.commit("0.07").state == "committed"


async def test_a_limiter_closes_without_waiting_for_a_deadline_while_its_breaker_is_open(own_server):
    limiter = AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=TIMEOUT_S)
    await limiter.record("agent", "0.01")
    own_server.pause()
    await refused(lambda: limiter.status("agent"))
    with Stopwatch() as took:
        await limiter.close()
    assert took.seconds < TOGETHER_S
