"""Calls inside a hold claim from it, grow it when needed, and never claim more than it reserves."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, HoldConflict, StoreUnavailable
from ktrdr_budget.metering.meter import Meter
from ktrdr_budget.metering.prices import ModelPrice, Prices
from ktrdr_budget.metering.usage import Usage
from ktrdr_budget.money import from_units, to_units

from ..helpers.keyspace import dump, spent_and_held
from ..helpers.stopwatch import Stopwatch
from ..helpers.timers import pending_heartbeats
from ..helpers.waiting import until

BUDGETS = [
    Budget("agent", "1.00"),
    Budget("tokens", 100_000, unit="tokens"),
    Budget("calls", 1000, unit="requests"),
    Budget("parallel", 2, kind="slots"),
]
PRICES = Prices([ModelPrice("acme", "road", "10", "50")])
CALL = {"provider": "acme", "model": "road", "input_tokens_max": 1000, "output_tokens_max": 1000}
WORST = to_units("0.06")
USED = Usage(1000, 100)
COST = to_units("0.015")


class BlockError(Exception):
    pass


@pytest.fixture
def meter(limiter):
    return Meter(limiter, pricer=PRICES)


async def test_a_call_sends_nothing_to_the_store_if_the_call_fits_the_hold(client, limiter, meter):
    async with limiter.hold("agent", "0.15", operation="cycle") as hold:
        before = dump(client)
        async with meter.call(**CALL) as call:
            assert hold.drawn == {"agent": WORST}
            call.report(Usage(1000))
            assert (hold.accrued, hold.drawn) == ({"agent": Decimal("0.01")}, {"agent": WORST - to_units("0.01")})
            call.finish(USED)
        assert (hold.accrued, hold.drawn, call.hold) == ({"agent": Decimal("0.015")}, {"agent": 0}, None)
        assert dump(client) == before
    assert spent_and_held(client) == (COST, 0)
    assert [entry.operation for entry in await limiter.ledger("agent")] == ["cycle configured chat acme/road"]


def test_a_sync_call_inside_a_hold_claims_from_the_hold(client, sync_limiter):
    meter = Meter(sync_limiter, pricer=PRICES)
    with sync_limiter.hold("agent", "0.15"):
        for _ in range(2):
            with meter.call(**CALL) as call:
                call.finish(USED)
        assert spent_and_held(client) == (0, to_units("0.15"))
    assert spent_and_held(client) == (2 * COST, 0)


async def test_if_a_call_does_not_fit_the_hold_the_hold_grows_by_the_missing_amount(client, limiter, meter):
    async with limiter.hold("agent", "0.05") as hold:
        async with meter.call(**CALL) as call:
            assert hold.amounts == {"agent": Decimal("0.06")}
            assert spent_and_held(client) == (0, WORST)
            call.finish(USED)
        async with meter.call(**CALL) as call:
            assert hold.amounts == {"agent": Decimal("0.075")}
            call.finish(USED)
    assert spent_and_held(client) == (2 * COST, 0)


async def test_if_a_hold_cannot_grow_for_a_large_call_a_smaller_call_still_runs(client, limiter, meter):
    await limiter.record("agent", "0.92")
    async with limiter.hold("agent", "0.06") as hold:
        async with meter.call(**CALL) as call:
            call.finish(USED)
        sent = False
        with pytest.raises(BudgetExceeded) as caught:
            async with meter.call(**CALL | {"output_tokens_max": 1200}):
                sent = True
        assert (sent, caught.value.budget) == (False, "agent")
        assert (hold.drawn, hold.amounts) == ({"agent": 0}, {"agent": Decimal("0.06")})
        async with meter.call(**CALL | {"output_tokens_max": 700}) as call:
            call.finish(USED)
    assert spent_and_held(client) == (to_units("0.92") + 2 * COST, 0)


OUTCOMES = {
    # reports, whether the block raises, accrued units, whether they are an estimate
    "rejected": (lambda call: call.rejected(), True, 0, False),
    "unknown": (lambda call: call.unknown(), True, WORST, True),
    "reported, then unknown": (lambda call: (call.report(USED), call.unknown()), True, WORST, True),
    "no report, an error": (lambda call: None, True, WORST, True),
    "finished without a usage": (lambda call: call.finish(Usage()), False, WORST, True),
    "reported, then an error": (lambda call: call.report(USED), True, COST, True),
    "only output reported, then an error": (lambda call: call.report(Usage(0, 100)), True, COST, True),
    "finished below the latest report": (
        lambda call: (call.report(Usage(1000, 900)), call.finish(USED)),
        False,
        COST,
        False,
    ),
    "finished above the worst case": (lambda call: call.finish(Usage(2000, 2000)), False, to_units("0.12"), False),
}


@pytest.mark.parametrize(("reports", "raises", "accrued", "estimated"), OUTCOMES.values(), ids=OUTCOMES)
async def test_a_call_inside_a_hold_adds_the_cost_of_the_call_to_the_accrued_amount(
    client, limiter, meter, reports, raises, accrued, estimated
):
    async with limiter.hold("agent", "0.15") as hold:
        hold.accrue("0.000000001")
        try:
            async with meter.call(**CALL) as call:
                reports(call)
                if raises:
                    raise BlockError
        except BlockError:
            assert raises
        assert (hold.accrued, hold.drawn) == ({"agent": from_units(accrued + 1)}, {"agent": 0})
    assert spent_and_held(client) == (accrued + 1, 0)
    assert (await limiter.ledger("agent"))[0].operation.startswith("estimated ") == estimated


async def test_a_shortened_ledger_label_still_contains_the_word_estimated_and_the_price_source(limiter):
    models = [f"road-{'x' * 30}-{number}" for number in range(9)]
    meter = Meter(limiter, pricer=Prices([ModelPrice("acme", model, "1", "5") for model in models]))
    async with limiter.hold("agent", "0.15", operation="cycle"):
        for model in models:
            async with meter.call(**CALL | {"model": model}) as call:
                call.finish(USED) if model != models[-1] else call.report(USED)
    (entry,) = await limiter.ledger("agent")
    assert entry.operation.startswith(f"cycle estimated configured chat acme/{models[0]} chat acme/{models[1]}")


async def test_the_ledger_label_of_a_long_model_name_still_contains_the_price_source(limiter):
    model = "road-" + "x" * 300
    meter = Meter(limiter, pricer=Prices([ModelPrice("acme", model, "1", "5")]))
    async with meter.call(**CALL | {"model": model}) as call:
        call.report(USED)
    (entry,) = await limiter.ledger("agent")
    assert entry.operation.endswith("xxx configured estimated")


async def test_a_hold_costs_nothing_if_all_calls_inside_the_hold_were_rejected_or_denied(client, limiter, meter):
    async with limiter.hold("agent", "0.15"), meter.call(**CALL) as call:
        call.rejected()
    assert spent_and_held(client) == (0, 0)
    async with limiter.hold("agent", "0.15"):
        with pytest.raises(BudgetExceeded):
            await meter.call(**CALL | {"output_tokens_max": 10**6}).__aenter__()
    assert spent_and_held(client) == (0, 0)  # a denied call costs nothing, either
    async with limiter.hold("agent", "0.15"):
        pass
    assert spent_and_held(client) == (to_units("0.15"), 0)  # without calls the estimate is committed


async def test_if_a_hold_lacks_a_budget_of_the_meter_the_call_reserves_the_missing_budget_separately(client, limiter):
    meter = Meter(limiter, ["agent", "tokens", "calls", "parallel"], PRICES)
    async with limiter.hold({"agent": "0.15", "calls": 5}) as hold:
        async with meter.call(**CALL) as call:
            assert hold.drawn == {"agent": WORST, "calls": 1}
            assert call.hold.amounts == {"tokens": 2000, "parallel": 1}
            call.finish(USED)
        assert hold.accrued == {"agent": Decimal("0.015"), "calls": 1}
        assert spent_and_held(client, "tokens") == (1100, 0)
        assert (await limiter.status("parallel")).held == 0
    assert spent_and_held(client) == (COST, 0)
    assert spent_and_held(client, "calls") == (1, 0)


async def test_if_the_separate_reservation_of_a_call_is_denied_the_claimed_amount_returns_to_the_hold(limiter):
    meter = Meter(limiter, ["agent", "tokens"], PRICES)
    await limiter.record("tokens", 99_000)
    async with limiter.hold("agent", "0.15") as hold:
        with pytest.raises(BudgetExceeded) as caught:
            await meter.call(**CALL).__aenter__()
        assert (caught.value.budget, hold.drawn) == ("tokens", {"agent": 0})
        hold.accrue(0)


async def test_a_call_returns_the_claimed_slots_to_the_hold(limiter):
    meter = Meter(limiter, ["agent", "parallel"], PRICES)
    async with limiter.hold({"agent": "0.15", "parallel": 1}) as hold:
        async with meter.call(**CALL) as first:
            async with meter.call(**CALL) as second:
                assert hold.amounts["parallel"] == 2
                with pytest.raises(BudgetExceeded) as caught:
                    await meter.call(**CALL).__aenter__()
                assert caught.value.budget == "parallel"
                second.finish(USED)
            first.unknown()
        assert hold.drawn == {"agent": 0, "parallel": 0}
        assert hold.accrued["parallel"] == 0
    assert (await limiter.status("parallel")).held == 0


async def test_a_call_does_not_claim_from_a_hold_of_a_different_limiter(client, server, limiter, meter):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as other, other.hold("agent", "0.15") as hold:
        async with meter.call(**CALL) as call:
            assert (hold.drawn, call.hold.amounts) == ({}, {"agent": Decimal("0.06")})
            call.finish(USED)
        assert spent_and_held(client) == (COST, to_units("0.15"))


async def test_a_call_claims_from_the_innermost_hold(limiter, meter):
    async with limiter.hold("agent", "0.15") as outer:
        async with limiter.hold("agent", "0.10") as inner, meter.call(**CALL) as call:
            assert (outer.drawn, inner.drawn) == ({}, {"agent": WORST})
            call.finish(USED)
        async with meter.call(**CALL) as call:
            assert outer.drawn == {"agent": WORST}
            call.finish(USED)


async def test_a_call_does_not_claim_from_a_settled_hold(client, limiter, meter):
    async with limiter.hold("agent", "0.15") as hold:
        await hold.commit("0.02")
        async with meter.call(**CALL) as call:
            assert call.hold is not None
            call.finish(USED)
    assert spent_and_held(client) == (to_units("0.02") + COST, 0)


async def test_a_hold_stays_open_after_the_block_until_the_last_call_ends(client, limiter, meter):
    async with limiter.hold("agent", "0.06") as hold:
        call = await meter.call(**CALL).__aenter__()
        call.report(Usage(1000))
    assert (hold.state, spent_and_held(client)) == ("open", (0, WORST))
    with pytest.raises(BudgetExceeded):  # the worst case of the call counts
        await limiter.reserve("agent", "0.95")
    call.finish(USED)
    await call.__aexit__(None, None, None)
    assert (hold.state, spent_and_held(client)) == ("committed", (COST, 0))
    assert [entry.kind for entry in await limiter.ledger("agent")] == ["commit"]


def test_a_sync_hold_stays_open_after_the_block_until_the_last_call_ends(client, sync_limiter):
    meter = Meter(sync_limiter, pricer=PRICES)
    with sync_limiter.hold("agent", "0.06"):
        call = meter.call(**CALL).__enter__()
    assert spent_and_held(client) == (0, WORST)
    call.finish(USED)
    call.__exit__(None, None, None)
    assert spent_and_held(client) == (COST, 0)


async def test_if_two_calls_are_open_after_the_block_the_hold_is_settled_when_both_calls_have_ended(
    client, limiter, meter
):
    async with limiter.hold("agent", "0.15"):
        async with meter.call(**CALL) as done:
            done.finish(USED)
        first, second = [await meter.call(**CALL).__aenter__() for _ in range(2)]
    first.finish(USED)
    await first.__aexit__(None, None, None)
    assert spent_and_held(client) == (0, to_units("0.15"))
    second.rejected()
    await second.__aexit__(None, None, None)
    assert spent_and_held(client) == (2 * COST, 0)


async def test_after_a_failed_block_the_on_error_option_is_applied_when_the_last_call_ends(client, limiter, meter):
    calls = []
    for on_error in ("release", "charge"):
        with pytest.raises(BlockError):
            async with limiter.hold("agent", "0.06", on_error=on_error):
                calls.append(await meter.call(**CALL).__aenter__())
                raise BlockError
    assert spent_and_held(client) == (0, 2 * WORST)
    for call in calls:
        call.rejected()
        await call.__aexit__(None, None, None)
    assert spent_and_held(client) == (0, WORST)  # on_error="charge": kept until it expires


async def test_if_a_call_starts_after_the_block_of_the_hold_the_call_reserves_separately(client, limiter, meter):
    async with limiter.hold("agent", "0.06"):
        call = await meter.call(**CALL).__aenter__()
        context = copy_context()
    late = meter.call(**CALL)
    await asyncio.create_task(late.__aenter__(), context=context)
    assert late.hold is not None
    for each in (late, call):
        each.finish(USED)
        await each.__aexit__(None, None, None)
    assert spent_and_held(client) == (2 * COST, 0)


async def test_heartbeats_of_a_hold_continue_after_the_block_until_the_last_call_ends(client, limiter, meter):
    async with limiter.hold("agent", "0.06", ttl=1) as hold:
        call = await meter.call(**CALL).__aenter__()
        before = hold.expires_at
    await until(lambda: hold.expires_at > before)
    assert hold.state == "open"
    call.finish(USED)
    await call.__aexit__(None, None, None)
    assert not pending_heartbeats(asyncio.get_running_loop())
    assert spent_and_held(client) == (COST, 0)


async def test_a_hold_cannot_be_settled_while_a_call_is_in_progress(client, limiter, meter):
    async with limiter.hold("agent", "0.15") as hold:
        async with meter.call(**CALL) as call:
            for settle in (lambda: hold.commit("0.02"), hold.release):
                with pytest.raises(HoldConflict, match="in progress"):
                    await settle()
            assert spent_and_held(client) == (0, to_units("0.15"))
            call.finish(USED)
        await hold.commit("0.02")
    assert spent_and_held(client) == (to_units("0.02"), 0)


async def test_if_a_hold_is_settled_by_id_during_a_call_the_cost_of_the_call_is_recorded_separately(
    client, limiter, meter
):
    async with limiter.hold("agent", "0.15") as hold:
        async with meter.call(**CALL) as call:
            await limiter.release(hold.id)
            hold.state = "released"  # as a heartbeat would report
            call.finish(USED)
        assert [entry.kind for entry in await limiter.ledger("agent")] == ["record"]
    assert spent_and_held(client) == (COST, 0)


async def test_a_hold_is_settled_if_the_last_call_is_denied_after_the_block_has_ended(client, limiter):
    meter = Meter(limiter, ["agent", "tokens"], PRICES)
    reserve, waits = limiter.reserve, asyncio.Event()

    async def slowly(*args, **named):
        await waits.wait()
        return await reserve(*args, **named)

    await limiter.record("tokens", 99_000)
    async with limiter.hold("agent", "0.06") as hold:
        limiter.reserve = slowly
        denied = asyncio.create_task(meter.call(**CALL).__aenter__())
        await until(lambda: hold.busy)
    assert spent_and_held(client) == (0, WORST)
    waits.set()
    with pytest.raises(BudgetExceeded):
        await denied
    assert spent_and_held(client) == (0, 0)


async def test_a_call_inside_an_expired_hold_is_denied_if_the_hold_no_longer_fits_the_budget(client, limiter, meter):
    hold = await limiter.reserve("agent", "0.15", ttl=1, on_expiry="release")
    await until(lambda: _is_unheld(limiter))
    await limiter.record("agent", "0.90")
    async with limiter.keep(hold):
        with pytest.raises(BudgetExceeded):
            await hold.extend()
        hold.state = "unconfirmed"  # as a heartbeat would report
        with pytest.raises(BudgetExceeded):
            await meter.call(**CALL).__aenter__()
        assert hold.drawn == {"agent": 0}


async def _is_unheld(limiter):
    return (await limiter.status("agent")).held == 0


# -- concurrency -------------------------------------------------------------------------------------------------------


def covered(hold) -> bool:
    """Whether accrued and claimed amounts are within the reservation."""
    with hold.lock:
        accrued = dict(zip((window.budget for window, _ in hold.parts), hold.accrued_units, strict=True))
        return all(accrued[w.budget] + hold.drawn.get(w.budget, 0) <= units for w, units in hold.parts)


async def test_concurrent_calls_in_one_hold_claim_the_sum_of_their_worst_cases(client, limiter, meter):
    async with limiter.hold("agent", "0.10") as hold:
        async with meter.call(**CALL) as first, meter.call(**CALL) as second, meter.call(**CALL) as third:
            assert (hold.drawn, hold.amounts) == ({"agent": 3 * WORST}, {"agent": Decimal("0.18")})
            first.finish(USED)
            second.finish(USED)
            third.rejected()
        assert hold.drawn == {"agent": 0}
    assert spent_and_held(client) == (2 * COST, 0)


async def test_the_denial_of_a_large_call_does_not_affect_smaller_calls_in_the_same_hold(client, limiter, meter):
    await limiter.record("agent", "0.80")
    async with limiter.hold("agent", "0.01"):

        async def make_call(tokens: int) -> bool:
            try:
                async with meter.call(**CALL | {"output_tokens_max": tokens}) as call:
                    await asyncio.sleep(0)
                    call.finish(USED)
            except BudgetExceeded:
                return False
            return True

        granted = await asyncio.gather(
            make_call(1000), make_call(9000), make_call(1000), make_call(9000), make_call(500)
        )
    assert granted == [True, False, True, False, True]
    assert spent_and_held(client) == (to_units("0.80") + 3 * COST, 0)


async def test_calls_of_concurrent_tasks_never_claim_more_than_the_hold_reserves(client, limiter, meter):
    chance = random.Random(4)
    billed = []
    async with limiter.hold("agent", "0.02") as hold:

        async def make_call(delays: list[int], output: int) -> None:
            for _ in range(delays[0]):
                await asyncio.sleep(0)
            try:
                async with meter.call(**CALL) as call:
                    assert covered(hold)
                    for part in range(3):
                        call.report(Usage(1000, output * part // 3))
                        assert covered(hold)
                        for _ in range(delays[1]):
                            await asyncio.sleep(0)
                    if output % 10 == 0:
                        raise BlockError
                    call.finish(Usage(1000, output))
                    billed.append(output)
            except (BudgetExceeded, BlockError) as error:
                if isinstance(error, BlockError):
                    billed.append(output * 2 // 3)

        work = [([chance.randrange(9), chance.randrange(9)], chance.randrange(1000)) for _ in range(60)]
        await asyncio.gather(*(make_call(*each) for each in work))
        assert covered(hold)
        assert hold.drawn == {"agent": 0}
        assert len(billed) < 60  # some were denied
    assert spent_and_held(client) == (sum(10_000_000 + output * 50_000 for output in billed), 0)


def test_calls_of_concurrent_threads_never_claim_more_than_the_hold_reserves(client, sync_limiter):
    meter = Meter(sync_limiter, pricer=PRICES)
    billed = []
    with sync_limiter.hold("agent", "0.02") as hold:

        def make_calls(output: int) -> None:
            for _ in range(10):
                try:
                    with meter.call(**CALL) as call:
                        assert covered(hold)
                        call.report(Usage(1000))
                        call.finish(Usage(1000, output))
                except BudgetExceeded:
                    continue
                billed.append(output)

        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(copy_context().run, make_calls, number) for number in range(8)]:
                future.result()
        assert hold.drawn == {"agent": 0}
    assert len(billed) >= 60
    assert spent_and_held(client) == (sum(10_000_000 + output * 50_000 for output in billed), 0)


def test_amounts_accrued_by_concurrent_threads_are_all_counted(client, sync_limiter):
    with sync_limiter.hold("agent", "0.5") as hold:
        barrier = threading.Barrier(8)

        def accrue() -> None:
            barrier.wait()
            for _ in range(500):
                hold.accrue("0.00001")
                hold.adjust({"agent": 1})

        threads = [threading.Thread(target=accrue) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert spent_and_held(client) == (8 * 500 * 10_001, 0)


# -- cancellation and outages ------------------------------------------------------------------------------------------


async def test_a_cancelled_call_claims_nothing_if_the_hold_was_still_growing(client, proxy):
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=20.0) as limiter, limiter.hold("agent", "0.01") as hold:
        meter = Meter(limiter, pricer=PRICES)
        async with meter.call(**CALL) as call:
            call.finish(USED)
        proxy.hold_replies()
        growing = asyncio.create_task(meter.call(**CALL | {"output_tokens_max": 2000}).__aenter__())
        await until(lambda: hold.growth.wanted)
        waiting = asyncio.create_task(meter.call(**CALL | {"output_tokens_max": 2000}).__aenter__())
        await asyncio.sleep(0)
        for task in (waiting, growing):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (hold.drawn, hold.growth.wanted) == ({"agent": 0}, {})
        proxy.release_replies()
        async with meter.call(**CALL) as call:
            call.finish(USED)
    assert spent_and_held(client) == (2 * COST, 0)


async def test_if_the_store_does_not_reply_all_calls_that_need_a_larger_hold_fail_after_one_timeout(client, proxy):
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=0.3) as limiter:
        meter = Meter(limiter, pricer=PRICES)
        async with limiter.hold("agent", "0.01") as hold:
            proxy.hold_replies()
            with Stopwatch() as took:
                calls = (meter.call(**CALL).__aenter__() for _ in range(10))
                results = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(result, StoreUnavailable) for result in results)
            assert took.seconds < 2.0
            assert (hold.drawn, hold.growth.wanted) == ({"agent": 0}, {})
            proxy.release_replies()
            async with meter.call(**CALL) as call:
                call.finish(USED)
    assert spent_and_held(client) == (COST, 0)
