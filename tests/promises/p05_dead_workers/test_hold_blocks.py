"""`with limiter.hold(...)`, async and sync: how a block ends, and the heartbeats while a block runs (P5)."""

from __future__ import annotations

import asyncio
import time
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, BudgetLimiter, HoldConflict
from ktrdr_budget.engine.batching.heartbeat import Heartbeat
from ktrdr_budget.engine.replica.hold import current_hold
from ktrdr_budget.money import to_units

from ...conftest import ClockedServer
from ...helpers.keyspace import spent_and_held, sums
from ...helpers.waiting import until, wait_until

BUDGETS = [Budget("agent", "5.00"), Budget("cycles", 10, unit="cycles")]

WAYS_OUT = {
    # (accrued amount, whether the block raises, on_error): (spent, held) afterwards
    (None, False, "release"): ("0.15", "0"),
    (None, False, "charge"): ("0.15", "0"),
    ("0.05", False, "release"): ("0.05", "0"),
    ("0.05", False, "charge"): ("0.05", "0"),
    ("0.40", False, "release"): ("0.40", "0"),
    (None, True, "release"): ("0", "0"),
    (None, True, "charge"): ("0", "0.15"),
    ("0.05", True, "release"): ("0.05", "0"),
    ("0.05", True, "charge"): ("0", "0.15"),
    ("0.40", True, "charge"): ("0", "0.40"),
}


class WorkError(Exception):
    """An error inside a block."""


@pytest.mark.parametrize(("way", "expected"), WAYS_OUT.items(), ids=str)
async def test_the_accrued_spend_and_the_on_error_option_decide_what_an_async_hold_block_charges(
    client, limiter, way, expected
):
    accrued, raises, on_error = way
    try:
        async with limiter.hold("agent", "0.15", id="op_1", on_error=on_error) as hold:
            if accrued:
                hold.accrue(accrued)
            if raises:
                raise WorkError
    except WorkError:
        assert raises
    assert spent_and_held(client) == tuple(map(to_units, expected))


@pytest.mark.parametrize(("way", "expected"), WAYS_OUT.items(), ids=str)
def test_the_accrued_spend_and_the_on_error_option_decide_what_a_sync_hold_block_charges(
    client, sync_limiter, way, expected
):
    accrued, raises, on_error = way
    try:
        with sync_limiter.hold("agent", "0.15", id="op_1", on_error=on_error) as hold:
            if accrued:
                hold.accrue(accrued)
            if raises:
                raise WorkError
    except WorkError:
        assert raises
    assert spent_and_held(client) == tuple(map(to_units, expected))


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("on_error", ["release", "charge"])
async def test_a_block_does_not_settle_a_hold_that_its_body_has_settled(client, limiter, raises, on_error):
    for settle, spent in (("commit", "0.07"), ("release", "0.07")):
        try:
            async with limiter.hold("agent", "0.15", on_error=on_error) as hold:
                hold.accrue("0.05")
                await (hold.commit("0.07") if settle == "commit" else hold.release())
                if raises:
                    raise WorkError
        except WorkError:
            assert raises
        assert spent_and_held(client) == (to_units(spent), 0)


SETTLED_BY_ID = pytest.mark.parametrize(("settle", "spent"), [("commit", "0.07"), ("release", "0")])


@SETTLED_BY_ID
@pytest.mark.parametrize("raises", [False, True])
async def test_an_async_block_does_not_settle_a_hold_that_was_settled_by_id(
    client, limiter, caplog, settle, spent, raises
):
    try:
        async with limiter.hold("agent", "0.15", id="op_1") as hold:
            await (limiter.commit("op_1", spent) if settle == "commit" else limiter.release("op_1"))
            if raises:
                raise WorkError
    except WorkError:
        assert raises
    assert spent_and_held(client) == (to_units(spent), 0)
    assert (hold.settled, hold.state) == (True, "committed" if settle == "commit" else "released")
    assert caplog.records == []


@SETTLED_BY_ID
def test_a_sync_block_does_not_settle_a_hold_that_was_settled_by_id(client, sync_limiter, settle, spent):
    with sync_limiter.hold("agent", "0.15", id="op_1"):
        _ = sync_limiter.commit("op_1", spent) if settle == "commit" else sync_limiter.release("op_1")
    assert spent_and_held(client) == (to_units(spent), 0)


async def test_a_block_ends_without_an_error_if_its_accrued_amount_was_committed_by_id(client, limiter):
    async with limiter.hold("agent", "0.15", id="op_1") as hold:
        hold.accrue("0.07")
        await limiter.commit("op_1", "0.07")
    assert spent_and_held(client) == (to_units("0.07"), 0)


async def test_a_block_commits_its_accrued_spend_even_if_an_operator_has_released_the_hold(client, limiter):
    """P3: after a release by an operator, the cost of a hold can still be committed."""
    await limiter.reserve("agent", "0.15", id="op_1", ttl=1)
    await limiter.release("op_1", operator=True)
    async with limiter.hold("agent", "0.15", id="op_1", ttl=1) as hold:
        assert (hold.replayed, hold.state, hold.settled) == (True, "released", False)
        hold.accrue("0.05")
    assert hold.settled
    assert spent_and_held(client) == (to_units("0.05"), 0)
    assert (await limiter.get("op_1")).state == "committed"


async def test_a_block_without_an_error_commits_an_amount_for_each_of_its_budgets(limiter):
    async with limiter.hold({"agent": "0.15", "cycles": 1}):
        pass
    async with limiter.hold({"agent": "0.15", "cycles": 1}) as hold:
        hold.accrue("0.05")  # the count commits its reserved amount
    assert (await limiter.status("agent")).spent == Decimal("0.20")
    assert (await limiter.status("cycles")).spent == 2


async def test_if_an_error_leaves_a_hold_open_the_accrued_spend_is_charged_at_the_deadline(client, limiter):
    """docs.rs/eggrd: the charge equals the spend that the block reported before its error."""
    with pytest.raises(WorkError):
        async with limiter.hold("agent", "0.15", id="op_1", ttl=1, on_expiry="accrued", on_error="charge") as hold:
            hold.accrue("0.05")
            raise WorkError
    await until(lambda: _state_is(limiter, "op_1", "unconfirmed"))
    assert sums(client)["unconfirmed"] == to_units("0.05")


async def _state_is(limiter, hold_id: str, state: str) -> bool:
    return (await limiter.get(hold_id)).state == state


async def test_the_body_of_a_block_does_not_run_if_its_reservation_is_denied(client, limiter):
    with pytest.raises(BudgetExceeded):
        async with limiter.hold("agent", "5.01"):
            pytest.fail("the block ran")
    assert spent_and_held(client) == (0, 0)


async def test_a_failed_settlement_is_raised_unless_the_body_of_the_block_has_raised_an_error(limiter, caplog):
    with pytest.raises(HoldConflict):
        async with limiter.hold("agent", "0.15", id="op_1") as hold:
            hold.accrue("0.05")
            await limiter.release("op_1")
    assert caplog.records == []
    with pytest.raises(WorkError):
        async with limiter.hold("agent", "0.15", id="op_2") as hold:
            hold.accrue("0.05")
            await limiter.commit("op_2", "0.07")
            raise WorkError
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert (await limiter.status("agent")).spent == Decimal("0.07")


@pytest.fixture
def still_server(clocked_server: ClockedServer) -> ClockedServer:
    """A server whose clock moves only if the test advances it, so that no hold expires on a slow machine."""
    clocked_server.set(clocked_server.now(), frozen=True)
    return clocked_server


@pytest.mark.parametrize("ttl", [1, 2])
async def test_heartbeats_keep_an_async_hold_open(still_server, ttl):
    async with AsyncBudgetLimiter(still_server.url, BUDGETS) as limiter:
        async with limiter.hold("agent", "0.15", id="op_1", ttl=ttl, on_expiry="accrued") as hold:
            view = await limiter.get("op_1")
            for accrued in ("0.05", "0.25", "0.25"):  # past the first deadline
                hold.accrue(Decimal(accrued) - view.accrued.get("agent", 0))
                before = view.expires_at
                await asyncio.to_thread(still_server.advance, ttl / 2)
                await until(lambda before=before: _extended_since(limiter, before))
                await until(lambda before=before: hold.expires_at > before)
                view = await until(lambda accrued=accrued: _accrued_is(limiter, Decimal(accrued)))
                assert view.state == "open"
        with still_server.client() as client:
            assert spent_and_held(client) == (to_units("0.25"), 0)
        assert (await limiter.get("op_1")).state == "committed"


async def _extended_since(limiter, expires_at):
    view = await limiter.get("op_1")
    return view if view.expires_at > expires_at else None


async def _accrued_is(limiter, amount):
    view = await limiter.get("op_1")
    return view if view.accrued == {"agent": amount} else None


async def test_a_heartbeat_is_due_after_a_third_of_the_ttl(limiter):
    async with limiter.hold("agent", "0.15", ttl=60) as hold:
        before = asyncio.get_running_loop().time()
        heartbeat = Heartbeat(limiter.engine.dispatcher, hold)
        after = asyncio.get_running_loop().time()
        assert before + 20 <= heartbeat.timer.when() <= after + 20
        heartbeat.stop()


def test_heartbeats_keep_a_sync_hold_open(still_server):
    with BudgetLimiter(still_server.url, BUDGETS) as limiter, still_server.client() as client:
        with limiter.hold("agent", "0.15", id="op_1", ttl=1, on_expiry="accrued") as hold:
            hold.accrue("0.05")
            for _ in range(3):  # past the first deadline
                before = limiter.get("op_1").expires_at
                still_server.advance(0.5)
                wait_until(lambda before=before: limiter.get("op_1").expires_at > before)
            view = limiter.get("op_1")
            assert (view.state, view.accrued) == ("open", {"agent": Decimal("0.05")})
        assert spent_and_held(client) == (to_units("0.05"), 0)


async def test_heartbeats_stop_when_their_block_ends(still_server, caplog):
    async with AsyncBudgetLimiter(still_server.url, BUDGETS) as limiter:
        async with limiter.hold("agent", "0.15", id="op_2", ttl=1):
            pass
        async with limiter.hold("agent", "0.15", id="op_3", ttl=1) as hold:
            await hold.release()
        ended = [(await limiter.get(hold_id)).expires_at for hold_id in ("op_2", "op_3")]
        async with limiter.hold("agent", "0.15", id="op_1", ttl=1):
            for _ in range(2):  # heartbeats of a later block; those of the ended blocks would come before them
                before = (await limiter.get("op_1")).expires_at
                await asyncio.to_thread(still_server.advance, 0.5)
                await until(lambda before=before: _extended_since(limiter, before))
        assert [(await limiter.get(hold_id)).expires_at for hold_id in ("op_2", "op_3")] == ended
    assert caplog.records == []


async def test_if_the_store_refuses_a_heartbeat_after_the_end_of_its_block_nothing_is_logged(limiter, caplog):
    """The commit is in the same batch as the heartbeat, and a batch executes settlements first."""
    hold = await limiter.reserve("agent", "0.15")
    heartbeat = Heartbeat(limiter.engine.dispatcher, hold)
    heartbeat.stop()
    heartbeat.send()
    task = heartbeat.in_flight
    heartbeat.stop()
    await hold.commit("0.07")
    await asyncio.wait({task})
    assert isinstance(task.exception(), HoldConflict)
    assert caplog.records == []


async def test_heartbeats_stop_when_another_call_has_settled_the_hold(limiter, caplog):
    async with limiter.hold("agent", "0.15", id="op_1", ttl=1):
        await limiter.commit("op_1", "0.07")
        await until(lambda: "heartbeats of hold op_1 stopped" in caplog.text)
        ends = time.monotonic() + 0.4  # longer than the interval of heartbeats
        await until(lambda: time.monotonic() > ends)
    assert caplog.text.count("heartbeat of") + caplog.text.count("heartbeats of") == 1


async def test_the_spend_of_200_concurrent_blocks_adds_up(client, limiter):
    async def work(number: int) -> None:
        async with limiter.hold("agent", "0.01") as hold:
            await asyncio.sleep(0)
            hold.accrue("0.001")
            if number % 2:
                raise WorkError

    outcomes = await asyncio.gather(*(work(number) for number in range(200)), return_exceptions=True)
    assert sum(isinstance(outcome, WorkError) for outcome in outcomes) == 100
    assert spent_and_held(client) == (200 * to_units("0.001"), 0)


async def test_a_block_of_the_method_keep_commits_the_accrued_spend_of_an_existing_hold(client, limiter):
    hold = await limiter.reserve("agent", "0.15")
    async with limiter.keep(hold) as kept:
        assert kept is hold
        hold.accrue("0.05")
    assert spent_and_held(client) == (to_units("0.05"), 0)


async def test_current_hold_in_a_task_is_the_hold_of_the_innermost_block(limiter):
    assert current_hold.get() is None
    async with limiter.hold("agent", "0.15") as outer:
        assert current_hold.get() is outer
        async with limiter.hold("agent", "0.15") as inner:
            assert current_hold.get() is inner
            assert inner.belongs_to(limiter)
        assert current_hold.get() is outer
    assert current_hold.get() is None


def test_current_hold_in_a_thread_is_the_hold_of_the_open_block(sync_limiter):
    with sync_limiter.hold("agent", "0.15") as hold:
        assert current_hold.get() is hold
        assert hold.belongs_to(sync_limiter)
    assert current_hold.get() is None


async def test_the_hold_of_a_block_inside_a_generator_is_committed_if_another_task_closes_the_generator(
    limiter, client
):
    async def work():
        async with limiter.hold("agent", "0.15") as hold:
            hold.accrue("0.05")
            yield hold

    generator = work()
    hold = await anext(generator)
    await asyncio.create_task(generator.aclose())
    assert hold.state == "committed"
    assert spent_and_held(client) == (to_units("0.05"), 0)


@pytest.mark.parametrize("operation", ["", "a call"])
async def test_a_ledger_entry_shows_the_operation_and_the_notes_of_its_hold(server, operation):
    async with AsyncBudgetLimiter(server.url, BUDGETS, trace_id=lambda: next(traces)) as limiter:
        traces = iter(["of the reservation", "of the commit"])
        async with limiter.hold("agent", "0.15", operation=operation) as hold:
            for remark in ("prices/1.0", "estimated", "prices/1.0"):
                hold.note(remark)
        (entry,) = await limiter.ledger("agent")
        assert entry.operation == f"{operation} prices/1.0 estimated".strip()
        assert entry.trace_id == "of the commit"
        assert (await limiter.get(hold.id)).operation == entry.operation


async def test_after_a_data_loss_the_commit_of_a_lost_hold_is_recorded_with_the_notes_of_the_hold(server, client):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        hold = await limiter.reserve("agent", "0.15", id="op_1")
        hold.note("estimated")
        client.flushall()
        await hold.commit("0.07")
        (entry,) = await limiter.ledger("agent")
        assert (entry.kind, entry.operation) == ("commit", "estimated")


async def test_a_repeated_commit_with_notes_is_a_replay(limiter, client):
    hold = await limiter.reserve("agent", "0.15")
    hold.note("estimated")
    assert not (await hold.commit("0.07")).replayed
    assert (await hold.commit("0.07")).replayed
    assert spent_and_held(client) == (to_units("0.07"), 0)
