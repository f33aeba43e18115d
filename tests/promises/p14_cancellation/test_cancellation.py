"""A cancellation leaves no hold and loses no spend, at each step of a call (P14)."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, BudgetLimiter, HoldConflict, StoreUnavailable
from ktrdr_budget.money import to_units

from ...helpers.keyspace import dump, ledger_sum, sums
from ...helpers.proxy import Proxy, ThreadedProxy
from ...helpers.waiting import until, wait_until

BUDGET = Budget("agent", "5.00")


@pytest.fixture
async def limiter(proxy: Proxy) -> AsyncIterator[AsyncBudgetLimiter]:
    async with AsyncBudgetLimiter(proxy.url, [BUDGET], timeout=20.0) as made:
        with pytest.raises(BudgetExceeded):  # the server has the script, and no key
            await made.reserve("agent", "6.00")
        yield made


async def cancelled(task: asyncio.Task) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def in_flight(client, call, held: str) -> asyncio.Task:
    """Start a call; return when the store has executed the call, before the reply arrives."""
    task = asyncio.create_task(call)
    await until(lambda: sums(client)["held"] == to_units(held))
    return task


async def figures_become(client, **expected: str) -> None:
    """Wait until the figures in the store have these values."""
    wanted = {name: to_units(amount) for name, amount in expected.items()}
    await until(lambda: sums(client).items() >= wanted.items())


# -- before the request is sent ----------------------------------------------------------------------------------------


async def test_a_reservation_cancelled_in_the_queue_leaves_no_hold(client, proxy, limiter):
    proxy.hold_replies()
    first = await in_flight(client, limiter.reserve("agent", "0.10"), "0.10")
    queued = asyncio.create_task(limiter.reserve("agent", "0.15", id="queued"))
    after = asyncio.create_task(limiter.reserve("agent", "0.20"))
    await asyncio.sleep(0)
    await cancelled(queued)
    proxy.release_replies()
    await (await first).release()
    assert (await after).amounts == {"agent": Decimal("0.20")}
    assert sums(client)["held"] == to_units("0.20")
    assert not client.exists("ktrdr:{default}:h:queued")
    assert not (await limiter.reserve("agent", "0.15", id="queued")).replayed


async def test_a_task_cancelled_before_its_first_step_writes_nothing(client, limiter):
    before = dump(client)
    await cancelled(asyncio.create_task(limiter.reserve("agent", "0.15")))
    assert dump(client) == before == {}


# -- while the request is in flight ------------------------------------------------------------------------------------


async def test_a_grant_is_released_if_its_caller_is_cancelled_while_the_request_is_in_flight(client, proxy, limiter):
    proxy.hold_replies()
    await cancelled(await in_flight(client, limiter.reserve("agent", "0.15", id="op_1"), "0.15"))
    proxy.release_replies()
    await figures_become(client, held="0", spent="0")
    assert (await limiter.get("op_1")).state == "released"


async def test_a_grant_is_released_if_its_caller_is_cancelled_as_the_reply_arrives(server, client):
    """The reply has been read, and the caller has not run yet."""
    tasks: list[asyncio.Task] = []

    def cancel_now(observation) -> None:
        if observation.operation == "reserve" and observation.error is None:
            tasks[0].cancel()

    async with AsyncBudgetLimiter(server.url, [BUDGET], observer=cancel_now) as limiter:
        tasks.append(asyncio.create_task(limiter.reserve("agent", "0.15", id="op_1")))
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        await figures_become(client, held="0", spent="0")
        assert (await limiter.get("op_1")).state == "released"


async def test_a_grant_with_a_lost_reply_is_released_if_its_caller_is_cancelled(client, proxy, limiter):
    """The limiter sends the request again; the second reply is a replay of the grant."""
    run = proxy.scripts_run
    proxy.lose_replies = 1
    proxy.hold_replies()
    task = await in_flight(client, limiter.reserve("agent", "0.15"), "0.15")
    await until(lambda: proxy.scripts_run == run + 2)
    await cancelled(task)
    proxy.release_replies()
    await figures_become(client, held="0", spent="0")


async def test_a_grant_that_arrives_after_the_deadline_is_released_only_if_the_limiter_generated_the_id(client, proxy):
    """#27639: a caller never receives the generated id, so no caller could settle the hold."""
    async with AsyncBudgetLimiter(proxy.url, [BUDGET], timeout=0.2) as limiter:
        proxy.hold_replies()
        calls = limiter.reserve("agent", "0.15"), limiter.reserve("agent", "0.10", id="named")
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * 2
        await figures_become(client, held="0.25")
        proxy.release_replies()
        await figures_become(client, held="0.10", spent="0")
        assert (await limiter.reserve("agent", "0.10", id="named")).replayed


async def test_a_cancelled_replay_does_not_release_the_hold(client, proxy, limiter):
    hold = await limiter.reserve("agent", "0.15", id="op_1")
    proxy.hold_replies()
    seen = proxy.scripts_run
    retry = asyncio.create_task(limiter.reserve("agent", "0.15", id="op_1"))
    await until(lambda: proxy.scripts_run > seen)
    await cancelled(retry)
    proxy.release_replies()
    await limiter.record("agent", 0)
    assert sums(client)["held"] == to_units("0.15")
    assert not (await hold.commit("0.07")).late


async def test_a_cancelled_call_does_not_affect_other_calls_of_its_batch(client, proxy, limiter):
    proxy.hold_replies()
    first = await in_flight(client, limiter.reserve("agent", "0.01"), "0.01")
    batch = [asyncio.create_task(limiter.reserve("agent", "0.10")) for _ in range(12)]
    proxy.release_replies()
    await first
    proxy.hold_replies()
    await figures_become(client, held="1.21")
    for task in batch[::2]:
        task.cancel()
    proxy.release_replies()
    outcomes = await asyncio.gather(*batch, return_exceptions=True)
    assert [isinstance(outcome, asyncio.CancelledError) for outcome in outcomes] == [True, False] * 6
    await figures_become(client, held="0.61")
    for hold in outcomes[1::2]:
        await hold.commit("0.10")
    await figures_become(client, held="0.01", spent="0.60")


async def test_after_many_cancellations_only_holds_received_by_a_caller_stay_open(server, client):
    async with AsyncBudgetLimiter(server.url, [Budget("agent", "50.00")]) as limiter:
        tasks = []
        for number in range(600):
            tasks.append(asyncio.create_task(limiter.reserve("agent", "0.01")))
            if number % 7 == 0:
                await asyncio.sleep(0)
            if number % 3 == 0:
                tasks[number // 2].cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        granted = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        assert 0 < len(granted) < 600
        await until(lambda: sums(client)["held"] == len(granted) * to_units("0.01"))


async def test_a_failed_task_group_releases_the_reservations_of_its_tasks(client, proxy, limiter):
    proxy.hold_replies()

    async def fail() -> None:
        await until(lambda: sums(client)["held"])
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as failed:
        async with asyncio.TaskGroup() as group:
            group.create_task(limiter.reserve("agent", "0.15"))
            group.create_task(limiter.reserve("agent", "0.15"))
            group.create_task(fail())
    assert failed.group_contains(ZeroDivisionError)
    proxy.release_replies()
    await limiter.record("agent", 0)
    await figures_become(client, held="0")


async def test_a_reservation_is_released_if_asyncio_timeout_cancels_the_call(client, proxy, limiter):
    proxy.hold_replies()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await limiter.reserve("agent", "0.15")
    proxy.release_replies()
    await limiter.record("agent", 0)
    await figures_become(client, held="0")


# -- settlements -------------------------------------------------------------------------------------------------------


async def test_a_commit_cancelled_in_flight_is_recorded(client, proxy, limiter):
    hold = await limiter.reserve("agent", "0.15")
    proxy.hold_replies()
    seen = proxy.scripts_run
    commit = asyncio.create_task(hold.commit("0.07"))
    await until(lambda: proxy.scripts_run > seen)
    await cancelled(commit)
    proxy.release_replies()
    await figures_become(client, held="0", spent="0.07")
    assert (await hold.commit("0.07")).replayed


async def test_a_commit_cancelled_in_the_queue_is_recorded(client, proxy, limiter):
    hold = await limiter.reserve("agent", "0.15")
    proxy.hold_replies()
    blocking = await in_flight(client, limiter.reserve("agent", "0.10"), "0.25")
    commit = asyncio.create_task(hold.commit("0.07"))
    await asyncio.sleep(0)
    await cancelled(commit)
    proxy.release_replies()
    await blocking
    await figures_become(client, held="0.10", spent="0.07")


async def test_a_commit_by_id_is_recorded_if_its_caller_is_cancelled_while_the_hold_is_read(client, proxy, limiter):
    await limiter.reserve("agent", "0.15", id="op_1")
    client.config_resetstat()
    proxy.hold_replies()
    commit = asyncio.create_task(limiter.commit("op_1", "0.07"))
    await until(lambda: "cmdstat_get" in client.info("commandstats"))
    await cancelled(commit)
    assert sums(client)["spent"] == 0, "the hold has been read, but not settled"
    proxy.release_replies()
    await figures_become(client, held="0", spent="0.07")


async def test_pr_37558_spend_is_recorded_even_if_the_caller_of_record_is_cancelled(client, proxy, limiter):
    """#13245: spend is a fact, even if no caller waits for the reply."""
    proxy.hold_replies()
    blocking = await in_flight(client, limiter.reserve("agent", "0.10"), "0.10")
    record = asyncio.create_task(limiter.record("agent", "0.02", id="op_1"))
    await asyncio.sleep(0)
    await cancelled(record)
    proxy.release_replies()
    await blocking
    await figures_become(client, spent="0.02")
    assert (await limiter.record("agent", "0.02", id="op_1")).replayed


async def test_a_block_does_not_release_its_hold_after_a_cancelled_commit(client, proxy, limiter, caplog):
    proxy.release_replies()

    async def work() -> None:
        async with limiter.hold("agent", "0.15", id="op_1") as hold:
            proxy.hold_replies()
            await hold.commit("0.07")

    seen = proxy.scripts_run
    task = asyncio.create_task(work())
    await until(lambda: proxy.scripts_run == seen + 2)
    task.cancel()
    await asyncio.sleep(0.01)
    proxy.release_replies()
    with pytest.raises(asyncio.CancelledError):
        await task
    await figures_become(client, held="0", spent="0.07")
    assert caplog.records == []
    with pytest.raises(HoldConflict):
        await limiter.release("op_1")


@pytest.mark.parametrize("call", ["commit", "release", "record"])
async def test_a_settlement_cancelled_during_an_outage_is_completed_after_the_outage(start_server, call):
    """The settlement was never sent, so it is not ambiguous; but its cancelled caller cannot retry it."""
    own_server = start_server(None, "--appendonly", "yes", "--appendfsync", "always")
    async with AsyncBudgetLimiter(own_server.url, [BUDGET], timeout=0.3) as limiter:
        inside, killed = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            async with limiter.hold("agent", "0.15", on_expiry="charge") as hold:
                inside.set()
                await killed.wait()
                await {
                    "commit": lambda: hold.commit("0.07"),
                    "release": hold.release,
                    "record": lambda: limiter.record("agent", "0.07"),
                }[call]()

        task = asyncio.create_task(work())
        await inside.wait()
        own_server.kill()
        killed.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await cancelled(task)
        await until(lambda: limiter.unresolved > 0)
        own_server.start()
        await until(lambda: not limiter.unresolved)
        with own_server.client() as client:
            await until(lambda: sums(client)["spent"] == to_units("0" if call == "release" else "0.07"))
            # The end of the block releases the hold, without a retry by the caller.
            await until(lambda: sums(client)["held"] == 0)
    own_server.kill()


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accrued", "spent"), [(None, "0"), ("0.05", "0.05"), ("0.30", "0.30")])
async def test_pr_37558_a_cancelled_block_commits_its_accrued_spend(client, limiter, accrued, spent):
    """#13245, docs.rs/eggrd: a cancelled caller pays its accrued spend, not $0."""
    inside = asyncio.Event()

    async def work() -> None:
        async with limiter.hold("agent", "0.15") as hold:
            if accrued:
                hold.accrue(accrued)
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await inside.wait()
    assert sums(client)["held"] == to_units("0.15")
    await cancelled(task)
    await figures_become(client, held="0", spent=spent)
    assert ledger_sum(client) == to_units(spent)


async def test_a_block_cancelled_during_its_settlement_still_settles_its_hold(client, proxy, limiter):
    async def work() -> None:
        async with limiter.hold("agent", "0.15") as hold:
            hold.accrue("0.05")
            proxy.hold_replies()

    task = asyncio.create_task(work())
    await figures_become(client, spent="0.05")
    await cancelled(task)
    proxy.release_replies()
    await figures_become(client, held="0", spent="0.05")


async def test_a_block_cancelled_during_its_reservation_releases_its_hold(client, proxy, limiter):
    async def work() -> None:
        async with limiter.hold("agent", "0.15"):
            pytest.fail("the block ran")

    proxy.hold_replies()
    await cancelled(await in_flight(client, work(), "0.15"))
    proxy.release_replies()
    await figures_become(client, held="0", spent="0")


async def test_closing_the_limiter_completes_calls_in_flight(server, client):
    limiter = AsyncBudgetLimiter(server.url, [BUDGET])
    hold = await limiter.reserve("agent", "0.15")
    commit = asyncio.create_task(hold.commit("0.07"))
    await asyncio.sleep(0)
    await limiter.close()
    assert sums(client)["spent"] == to_units("0.07")
    await commit
    with pytest.raises(RuntimeError, match="closed"):
        await limiter.reserve("agent", "0.15")


# -- the synchronous limiter -------------------------------------------------------------------------------------------


@pytest.fixture
def threaded_proxy(server, tmp_path_factory: pytest.TempPathFactory):
    with ThreadedProxy(server.socket_path, Path(tmp_path_factory.mktemp("p")) / "s") as made:
        yield made


def interrupt_when(condition) -> threading.Thread:
    """Send SIGINT to the main thread once the condition is true."""

    def wait() -> None:
        wait_until(condition)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_ctrl_c_during_a_reservation_releases_the_hold(server, client, threaded_proxy):
    with BudgetLimiter(threaded_proxy.url, [BUDGET], timeout=20.0) as limiter, server.client() as other:
        threaded_proxy.hold_replies()
        interrupting = interrupt_when(lambda: sums(other)["held"])
        with pytest.raises(KeyboardInterrupt):
            limiter.reserve("agent", "0.15", id="op_1")
        interrupting.join()
        threaded_proxy.release_replies()
        wait_until(lambda: sums(client)["held"] == 0)
        assert limiter.get("op_1").state == "released"
        assert limiter.reserve("agent", "0.15").state == "open"


def test_ctrl_c_during_a_commit_does_not_stop_the_commit(server, client, threaded_proxy):
    with BudgetLimiter(threaded_proxy.url, [BUDGET], timeout=20.0) as limiter, server.client() as other:
        hold = limiter.reserve("agent", "0.15")
        threaded_proxy.hold_replies()
        interrupting = interrupt_when(lambda: sums(other)["spent"])
        with pytest.raises(KeyboardInterrupt):
            hold.commit("0.07")
        interrupting.join()
        threaded_proxy.release_replies()
        assert hold.commit("0.07").replayed
        assert sums(client) == {"spent": to_units("0.07"), "held": 0, "unconfirmed": 0, "events": 1}


def test_ctrl_c_inside_a_block_commits_its_accrued_spend(server, client):
    with BudgetLimiter(server.url, [BUDGET]) as limiter:
        entered = threading.Event()
        interrupting = interrupt_when(entered.is_set)
        with pytest.raises(KeyboardInterrupt), limiter.hold("agent", "0.15") as hold:
            hold.accrue("0.05")
            entered.set()
            threading.Event().wait(10)
        interrupting.join()
        assert sums(client) == {"spent": to_units("0.05"), "held": 0, "unconfirmed": 0, "events": 1}
