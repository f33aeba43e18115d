"""Limiters in forks, event loops and threads."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetError, BudgetExceeded, BudgetLimiter, StoreUnavailable
from ktrdr_budget.money import to_units

from ...helpers.keyspace import ledger_sum, sums
from ...helpers.proxy import ThreadedProxy
from ...helpers.stopwatch import Stopwatch
from ...helpers.waiting import wait_until

BUDGETS = [Budget("agent", "5.00")]


class Child:
    """A fork of this process that calls a function and writes the result as JSON."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # about a fork beside threads, the subject of these tests
            self._pid = os.fork()
        if self._pid == 0:
            try:
                reply = {"result": work()}
                gc.collect()
            except BaseException:
                reply = {"error": traceback.format_exc()}
            os.write(writer, json.dumps(reply).encode())
            os._exit(0)
        os.close(writer)

    def result(self) -> Any:
        with open(self._reader, "rb") as pipe:
            reply = json.loads(pipe.read() or b'{"error": "it died"}')
        os.waitpid(self._pid, 0)
        assert "error" not in reply, reply["error"]
        return reply["result"]


@pytest.fixture
def limiter(server):
    with BudgetLimiter(server.url, BUDGETS, timeout=20.0) as made:
        yield made


def spend(limiter: BudgetLimiter, times: int = 50) -> str:
    """Reserve and commit; return the replica's id."""
    hold = None
    for _ in range(times):
        hold = limiter.reserve("agent", "0.01")
        hold.commit("0.001")
    assert hold is not None
    return hold.id.rpartition("-")[0]


# -- fork --------------------------------------------------------------------------------------------------------------


def test_after_a_fork_parent_and_child_have_separate_connections_and_replica_ids(client, limiter):
    replica = spend(limiter)
    child = Child(lambda: spend(limiter))
    with Stopwatch() as took:
        assert spend(limiter) == replica
    assert took.seconds < 10, "the parent's connection was disturbed"
    assert child.result() != replica
    assert spend(limiter) == replica
    assert sums(client) == {"spent": 200 * to_units("0.001"), "held": 0, "unconfirmed": 0, "events": 200}
    assert limiter.losses == 0


FORKING = """
import os, sys
from ktrdr_budget import Budget, BudgetLimiter

limiter = BudgetLimiter(sys.argv[1], [Budget("agent", "5.00")], timeout=20.0)
limiter.record("agent", "0.01")
if os.fork() == 0:
    limiter.record("agent", "0.01")
    sys.exit(0)
os.wait()
limiter.record("agent", "0.01")
limiter.close()
"""


def test_after_a_forked_child_exits_the_parent_can_still_record_spend(server, client):
    """The two share one epoll instance: garbage collection in the child must not remove the parent's socket."""
    words = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING, server.url]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert sums(client)["events"] == 3


def test_a_child_of_a_forked_child_has_its_own_replica_id(client, limiter):
    def grandparent() -> list[str]:
        own = spend(limiter, 5)
        return [own, Child(lambda: spend(limiter, 5)).result(), spend(limiter, 5)]

    first, second, again = Child(grandparent).result()
    assert len({spend(limiter, 5), first, second}) == 3
    assert first == again
    assert sums(client)["events"] == 20


def test_calls_in_flight_at_a_fork_are_completed_by_the_parent_only(server, client, tmp_path_factory):
    path = Path(tmp_path_factory.mktemp("p")) / "s"
    with ThreadedProxy(server.socket_path, path) as proxy, BudgetLimiter(proxy.url, BUDGETS, timeout=20.0) as limiter:
        spend(limiter, 1)
        proxy.hold_replies()
        holds: list = []
        threads = [threading.Thread(target=lambda: holds.append(limiter.reserve("agent", "0.10"))) for _ in range(5)]
        for thread in threads:
            thread.start()
        wait_until(lambda: sums(client)["held"])
        child = Child(lambda: None)
        child.result()
        proxy.release_replies()
        for thread in threads:
            thread.join()
        assert len({hold.id for hold in holds}) == 5
        assert sums(client)["held"] == 5 * to_units("0.10")


def test_a_hold_of_the_parent_can_be_settled_by_the_child(client, limiter):
    hold = limiter.reserve("agent", "0.15")
    assert Child(lambda: str(hold.commit("0.07").amounts["agent"])).result() == "0.07"
    assert hold.commit("0.07").replayed
    assert sums(client)["spent"] == to_units("0.07")


def test_after_a_fork_only_the_parent_has_the_deferred_spend(tmp_path, caplog):
    with BudgetLimiter(f"unix://{tmp_path}/none", BUDGETS, timeout=0.1, on_store_error="allow") as limiter:
        assert limiter.record("agent", "0.02").deferred
        assert Child(lambda: limiter.deferred).result() == 0
        assert limiter.deferred == 1


def test_an_async_limiter_works_in_the_parent_and_the_child_of_a_fork(server, client):
    limiter = AsyncBudgetLimiter(server.url, BUDGETS, timeout=20.0)

    async def spend_async() -> str:
        hold = await limiter.reserve("agent", "0.01")
        await hold.commit("0.001")
        return hold.id.rpartition("-")[0]

    async def in_new_loop() -> str:
        replica = await spend_async()
        await limiter.close()
        return replica

    async def parent() -> None:
        replica = await spend_async()
        child = Child(lambda: asyncio.run(in_new_loop()))
        assert await spend_async() == replica
        assert await asyncio.to_thread(child.result) != replica
        assert await spend_async() == replica
        await limiter.close()

    asyncio.run(parent())
    assert sums(client)["events"] == 4


# -- event loops -------------------------------------------------------------------------------------------------------


def test_an_async_limiter_refuses_calls_from_a_second_event_loop(server):
    limiter = AsyncBudgetLimiter(server.url, BUDGETS)

    async def first() -> None:
        await limiter.record("agent", "0.01")
        assert await asyncio.to_thread(lambda: asyncio.run(second())) == 4
        await limiter.record("agent", "0.01")
        await limiter.close()

    async def second() -> int:
        refused = 0
        for call in (
            lambda: limiter.reserve("agent", "0.15"),
            lambda: limiter.record("agent", "0.15"),
            lambda: limiter.status("agent"),
            limiter.start,
        ):
            with pytest.raises(RuntimeError, match="another event loop"):
                await call()
            refused += 1
        return refused

    asyncio.run(first())


def test_an_async_limiter_can_be_created_outside_of_an_event_loop(server):
    async_limiter = AsyncBudgetLimiter(server.url, BUDGETS)

    async def use() -> Decimal:
        async with async_limiter:
            await async_limiter.record("agent", "0.01")
            return (await async_limiter.status("agent")).spent

    assert asyncio.run(use()) == Decimal("0.01")


def test_a_sync_limiter_works_inside_an_event_loop(server):
    """A call blocks that event loop, like any synchronous call; the limiter works in a separate event loop."""
    with BudgetLimiter(server.url, BUDGETS) as limiter:

        async def use() -> Decimal:
            limiter.record("agent", "0.01")
            return limiter.status("agent").spent

        assert asyncio.run(use()) == asyncio.run(use()) - Decimal("0.01")


def test_a_closed_limiter_refuses_calls(server):
    limiter = BudgetLimiter(server.url, BUDGETS)
    limiter.record("agent", "0.01")
    limiter.close()
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="closed"):
        limiter.record("agent", "0.01")
    limiter.close()
    assert threading.active_count() == before


def test_a_call_is_refused_if_another_thread_closes_the_limiter_at_the_same_time(server):
    """The call is queued after the event loop of the limiter has ended, so the loop would never execute the call."""
    limiter = BudgetLimiter(server.url, BUDGETS)
    limiter.record("agent", "0.01")
    portal = limiter.engine.runner.portal
    loop, thread, refusals = portal.loop(), portal.thread, []

    def call() -> None:
        with pytest.raises(RuntimeError, match="this limiter is closed") as closed:
            limiter.record("agent", "0.01")
        refusals.append(closed)

    late = threading.Thread(target=call, daemon=True)

    class Ending:
        def join(self) -> None:
            thread.join()
            portal.loop = lambda: loop  # the caller has found the loop before its end
            late.start()
            late.join(1)

    portal.thread = Ending()
    limiter.close()
    late.join(10)
    assert len(refusals) == 1


@pytest.mark.parametrize("call", ["record", "acquire", "keep"])
def test_every_thread_gets_an_error_when_its_limiter_is_closed(server, call):
    for _ in range(5):
        limiter = BudgetLimiter(server.url, [Budget("agent", None)], timeout=1.0)
        limiter.record("agent", 0)
        lease = limiter.lease("agent", "0.01")
        lease.__enter__()

        def use(limiter=limiter, lease=lease) -> None:
            if call == "record":
                limiter.record("agent", "0.001")
            elif call == "acquire":
                lease.acquire("0.005").commit("0.005")
            else:
                with limiter.hold("agent", "0.001"):
                    pass

        errors: list[BaseException] = []

        def work(use=use, errors=errors) -> None:
            try:
                while True:
                    use()
            except (RuntimeError, BudgetError) as closed:
                errors.append(closed)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        limiter.close()
        for thread in threads:
            thread.join(15)
        assert len(errors) == 6, errors


# -- threads -----------------------------------------------------------------------------------------------------------


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Call a function in several threads at once; return the results, or raise the first error."""
    barrier, results, errors = threading.Barrier(count), [], []

    def run(number: int) -> None:
        barrier.wait()
        try:
            results.append(work(number))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    return results


def test_32_threads_of_one_limiter_fill_a_cap_exactly(server, client):
    with BudgetLimiter(server.url, [Budget("agent", "0.7")], timeout=10.0) as limiter:

        def reserve(number: int) -> Counter[str]:
            outcomes: Counter[str] = Counter()
            while True:
                try:
                    limiter.reserve("agent", "0.0007", owner=f"thread-{number}")
                    outcomes["granted"] += 1
                except BudgetExceeded:
                    return outcomes

        outcomes = in_threads(32, reserve)
        assert sum(counter["granted"] for counter in outcomes) == 1000
        assert sums(client)["held"] == to_units("0.7")


def test_settlements_of_32_threads_add_up(client, limiter):
    def work(number: int) -> None:
        for turn in range(10):
            with limiter.hold("agent", "0.01") as hold:
                hold.accrue("0.0001")
                if (number + turn) % 3 == 0:
                    hold.release()

    in_threads(32, work)
    committed = sum((number + turn) % 3 != 0 for number in range(32) for turn in range(10))
    assert sums(client)["spent"] == ledger_sum(client) == committed * to_units("0.0001")
    assert sums(client)["held"] == 0


def test_every_thread_gets_an_error_while_the_store_is_unreachable(tmp_path):
    with BudgetLimiter(f"unix://{tmp_path}/none", BUDGETS, timeout=0.2) as limiter:

        def refused(number: int) -> bool:
            with pytest.raises(StoreUnavailable):
                limiter.reserve("agent", "0.15", id=f"op_{number}")
            return True

        assert len(in_threads(16, refused)) == 16
