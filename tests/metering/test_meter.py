"""A metered call outside a hold, async and sync: it reserves at the start, reports usage, and settles at the end."""

from __future__ import annotations

import asyncio
import logging
import threading
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, InvalidArgument, UnknownBudget
from ktrdr_budget.errors import UnknownPrice
from ktrdr_budget.metering.meter import Meter
from ktrdr_budget.metering.prices import ModelPrice, Prices
from ktrdr_budget.metering.usage import Usage
from ktrdr_budget.money import to_units

from ..helpers.keyspace import counted, dump, ledger_sum, spent_and_held, sums
from ..helpers.waiting import until, wait_until

BUDGETS = [
    Budget("agent", "1.00"),
    Budget("tokens", 100_000, unit="tokens"),
    Budget("calls", 1000, unit="requests"),
    Budget("parallel", 2, kind="slots"),
    Budget("pages", 10, unit="pages"),
]
PRICES = Prices([ModelPrice("acme", "road", "10", "50", cached_input="1", cache_write="12.5")])
CALL = {"provider": "acme", "model": "road", "input_tokens_max": 2000, "output_tokens_max": 1000}
WORST = 2000 * 12_500 + 1000 * 50_000
"""In nano-dollars. All input has the cache-write price, since input may be written to a cache."""


class BlockError(Exception):
    pass


@pytest.fixture
def meter(limiter):
    return Meter(limiter, pricer=PRICES)


@pytest.fixture
def sync_meter(sync_limiter):
    return Meter(sync_limiter, pricer=PRICES)


# -- outcomes of a call ------------------------------------------------------------------------------------------------

USED = Usage(1500, 300, 500)
COST = 1000 * 10_000 + 500 * 1000 + 300 * 50_000

OUTCOMES = {
    "finished": (lambda call: call.finish(USED), False, COST, 0, False),
    "finished, then an error": (lambda call: call.finish(USED), True, COST, 0, False),
    "finished below what was reported": (
        lambda call: (call.report(Usage(1900, 900)), call.finish(USED)),
        False,
        COST,
        0,
        False,
    ),
    "finished above the worst case": (lambda call: call.finish(Usage(3000, 2000)), False, 130_000_000, 0, False),
    "finished, then another report": (lambda call: (call.finish(USED), call.report(Usage(1))), False, COST, 0, False),
    "finished, then unknown": (lambda call: (call.finish(USED), call.unknown()), True, COST, 0, False),
    "reported, then an error": (
        lambda call: (call.report(Usage(1500, 0, 500)), call.report(USED)),
        True,
        COST,
        0,
        True,
    ),
    "reported only": (lambda call: call.report(USED), False, COST, 0, True),
    "only output reported, then an error": (
        lambda call: call.report(Usage(0, 20)),
        True,
        2000 * 12_500 + 20 * 50_000,  # input may have been written to a cache
        0,
        True,
    ),
    "rejected": (lambda call: call.rejected(), True, 0, 0, False),
    "rejected, no error": (lambda call: call.rejected(), False, 0, 0, False),
    "rejected, then finished": (lambda call: (call.rejected(), call.finish(USED)), False, COST, 0, False),
    "rejected, then another report": (lambda call: (call.rejected(), call.report(USED)), True, COST, 0, True),
    "unknown": (lambda call: call.unknown(), True, 0, WORST, False),
    "unknown, no error": (lambda call: call.unknown(), False, 0, WORST, False),
    "reported, then unknown": (lambda call: (call.report(USED), call.unknown()), True, 0, WORST, False),
    "finished without a usage": (lambda call: call.finish(Usage()), False, WORST, 0, True),
    "finished without input": (lambda call: call.finish(Usage(0, 20)), True, WORST, 0, True),
    "reported, finished without a usage": (
        lambda call: (call.report(USED), call.finish(Usage())),
        False,
        WORST,
        0,
        True,
    ),
    "reported above the worst case, finished without a usage": (
        lambda call: (call.report(Usage(3000, 2000)), call.finish(Usage())),
        False,
        130_000_000,
        0,
        True,
    ),
    "unreported": (lambda call: call.unreported(), False, WORST, 0, True),
    "unreported, then an error": (lambda call: call.unreported(), True, WORST, 0, True),
    "unreported, then finished": (lambda call: (call.unreported(), call.finish(USED)), False, COST, 0, False),
    "finished, then unreported": (lambda call: (call.finish(USED), call.unreported()), False, COST, 0, False),
    "no report, an error": (lambda call: None, True, 0, WORST, False),
    "no report": (lambda call: None, False, WORST, 0, True),
}


@pytest.mark.parametrize(("reports", "raises", "spent", "held", "estimated"), OUTCOMES.values(), ids=OUTCOMES)
async def test_an_async_call_commits_the_cost_of_the_reported_usage(
    client, limiter, meter, reports, raises, spent, held, estimated
):
    try:
        async with meter.call(**CALL) as call:
            assert spent_and_held(client) == (0, WORST)
            reports(call)
            if raises:
                raise BlockError
    except BlockError:
        assert raises
    assert spent_and_held(client) == (spent, held)
    page = await limiter.ledger("agent")
    if spent:
        assert [entry.operation for entry in page] == ["chat acme/road configured" + " estimated" * estimated]
    else:
        assert not page


@pytest.mark.parametrize(("reports", "raises", "spent", "held", "estimated"), OUTCOMES.values(), ids=OUTCOMES)
def test_a_sync_call_commits_the_cost_of_the_reported_usage(
    client, sync_limiter, sync_meter, reports, raises, spent, held, estimated
):
    try:
        with sync_meter.call(**CALL) as call:
            assert spent_and_held(client) == (0, WORST)
            reports(call)
            if raises:
                raise BlockError
    except BlockError:
        assert raises
    assert spent_and_held(client) == (spent, held)
    assert all(("estimated" in entry.operation) == estimated for entry in sync_limiter.ledger("agent"))


async def test_a_call_with_an_unknown_outcome_is_charged_when_the_reservation_expires(client, limiter):
    meter = Meter(limiter, pricer=PRICES, ttl=1)
    async with meter.call(**CALL) as call:
        call.unknown()
    status = await until(lambda: _expired(limiter))
    assert status.unconfirmed == Decimal("0.075")
    assert ledger_sum(client) == WORST == counted(client)


async def _expired(limiter):
    status = await limiter.status("agent")
    return status if status.unconfirmed else None


async def test_a_call_has_the_attributes_worst_case_and_cost_and_usage(meter):
    async with meter.call(**CALL) as call:
        assert (call.worst_case.amount, call.cost, call.usage) == (Decimal("0.075"), None, None)
        call.report(Usage(100))
        assert call.cost.amount == Decimal("0.001")
        call.finish(USED)
    assert (call.cost.nanos, call.usage, call.estimated) == (COST, USED, False)
    assert [line.name for line in call.cost.lines] == ["input", "cached input", "output"]


async def test_a_lower_usage_report_does_not_reduce_the_accrued_amount(meter):
    async with meter.call(**CALL) as call:
        for usage, accrued in [(Usage(100), "0.001"), (Usage(100, 10), "0.0015"), (Usage(100, 9), "0.0015")]:
            call.report(usage)
            assert call.hold.accrued == {"agent": Decimal(accrued)}
        call.finish(Usage(100, 11))


# -- denials and invalid arguments -------------------------------------------------------------------------------------


async def test_the_block_of_a_call_does_not_run_if_the_call_does_not_fit_the_budget(client, limiter, meter):
    await limiter.record("agent", "0.93")
    before = dump(client)
    sent = False
    with pytest.raises(BudgetExceeded) as caught:
        async with meter.call(**CALL):
            sent = True
    assert (sent, caught.value.requested, caught.value.fits) == (False, Decimal("0.075"), Decimal("0.07"))
    assert dump(client) == before


async def test_a_call_to_a_model_without_a_price_reserves_nothing(client, meter):
    before = dump(client)
    with pytest.raises(UnknownPrice):
        async with meter.call(**CALL | {"model": "path"}):
            pass
    assert dump(client) == before


async def test_a_meter_rejects_invalid_arguments(limiter):
    with pytest.raises(InvalidArgument, match="'pages' counts pages"):
        Meter(limiter, ["agent", "pages"], PRICES)
    with pytest.raises(UnknownBudget, match="'nowhere'"):
        Meter(limiter, ["nowhere"], PRICES)
    for budgets in ("agent", []):
        with pytest.raises(InvalidArgument, match="non-empty list"):
            Meter(limiter, budgets, PRICES)
    with pytest.raises(InvalidArgument, match="ttl"):
        Meter(limiter, pricer=PRICES, ttl=0)
    with pytest.raises(InvalidArgument, match="on_expiry"):
        Meter(limiter, pricer=PRICES, on_expiry="never")
    with pytest.raises(InvalidArgument, match="pricer"):
        Meter(limiter, pricer={"road": "0.15"})
    with pytest.raises(InvalidArgument, match="limiter"):
        Meter("redis://", pricer=PRICES)


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_tokens_max": -1},
        {"output_tokens_max": 1.5},
        {"input_tokens_max": True},
        {"provider": ""},
        {"model": None},
        {"operation": ""},
    ],
)
async def test_a_call_rejects_invalid_arguments(meter, wrong):
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        meter.call(**CALL | wrong)


async def test_entering_a_call_twice_or_reporting_usage_outside_the_with_block_is_rejected(meter):
    call = meter.call(**CALL)
    with pytest.raises(InvalidArgument, match="inside its block"):
        call.finish(USED)
    async with call:
        call.finish(USED)
    with pytest.raises(InvalidArgument, match="inside its block"):
        call.report(USED)
    with pytest.raises(InvalidArgument, match="once"):
        async with call:
            pass


async def test_entering_a_call_with_the_wrong_kind_of_with_statement_raises_type_error(meter, sync_meter):
    with pytest.raises(TypeError, match="use `async with`"), meter.call(**CALL):
        pass
    with pytest.raises(TypeError, match="use `with`"):
        async with sync_meter.call(**CALL):
            pass


# -- budgets of each unit ----------------------------------------------------------------------------------------------


async def test_each_budget_counts_its_own_unit(client, limiter):
    meter = Meter(limiter, ["agent", "tokens", "calls", "parallel"], PRICES)
    async with meter.call(**CALL) as call:
        held = {name: (await limiter.status(name)).held for name in meter.units}
        assert held == {"agent": Decimal("0.075"), "tokens": 3000, "calls": 1, "parallel": 1}
        call.finish(USED)
    assert spent_and_held(client) == (COST, 0)
    assert spent_and_held(client, "tokens") == (1800, 0)
    assert spent_and_held(client, "calls") == (1, 0)
    assert (await limiter.status("parallel")).held == 0


async def test_a_slots_budget_limits_the_number_of_concurrent_calls(limiter):
    meter = Meter(limiter, ["parallel"], PRICES)
    async with meter.call(**CALL) as first, meter.call(**CALL) as second:
        with pytest.raises(BudgetExceeded) as caught:
            await meter.call(**CALL).__aenter__()
        assert caught.value.reason == "budget_held"
        first.rejected()
        second.finish(USED)
    async with meter.call(**CALL) as third:
        third.finish(USED)


async def test_a_call_rejected_by_the_provider_is_not_counted_in_any_budget(client, limiter):
    meter = Meter(limiter, ["calls", "tokens"], PRICES)
    async with meter.call(**CALL) as call:
        call.rejected()
    assert spent_and_held(client, "calls") == spent_and_held(client, "tokens") == (0, 0)


async def test_a_call_to_a_free_model_costs_nothing(client, limiter):
    meter = Meter(limiter, pricer=Prices([ModelPrice("acme", "road", 0, 0)]))
    async with meter.call(**CALL) as call:
        assert spent_and_held(client) == (0, 1)
        call.finish(USED)
    assert spent_and_held(client) == (0, 0)
    await limiter.record("agent", "1.00")
    with pytest.raises(BudgetExceeded):
        await meter.call(**CALL).__aenter__()


@pytest.mark.parametrize("with_report", [False, True])
async def test_a_usage_without_input_tokens_is_accepted_if_the_call_has_no_input(client, limiter, with_report):
    """For example a model that is billed per image."""
    meter = Meter(limiter, pricer=Prices([ModelPrice("acme", "road", "10", "50", request="0.01")]))
    async with meter.call(**{**CALL, "input_tokens_max": 0}) as call:
        if with_report:
            call.report(Usage(0, 1))
        call.finish(Usage(0, 2))
    assert (call.estimated, spent_and_held(client)) == (False, (10_100_000, 0))


async def test_a_call_is_charged_the_worst_case_if_the_reported_usage_has_no_price(client, meter, caplog):
    async with meter.call(**CALL) as call:
        call.finish(Usage(10, 10, other={"web_searches": 1}))
    assert spent_and_held(client) == (WORST, 0)
    assert call.estimated
    assert "pricing failed for acme/road" in caplog.text


async def test_a_failed_call_is_charged_the_most_expensive_service_tier_unless_the_request_names_a_tier(
    client, limiter
):
    meter = Meter(limiter)
    request = {"provider": "openai", "model": "gpt-4.1-mini", "input_tokens_max": 1000, "output_tokens_max": 100}
    at = datetime.now(UTC)
    for tier, charged in ((None, "priority"), ("default", "")):
        options = {} if tier is None else {"service_tier": ""}
        with pytest.raises(BlockError):
            async with meter.call(**request, **options) as call:
                call.report(Usage(0, 40))
                raise BlockError
        expected = meter.pricer.price("openai", "gpt-4.1-mini", Usage(1000, 40, service_tier=charged), at)
        assert call.cost.nanos == expected.nanos
    assert spent_and_held(client)[1] == 0


async def test_a_call_is_charged_for_the_final_usage_if_an_earlier_report_had_no_price(client, meter):
    async with meter.call(**CALL) as call:
        call.report(Usage(10, 10, other={"web_searches": 1}))
        call.finish(USED)
    assert (call.estimated, spent_and_held(client)) == (False, (COST, 0))


async def test_a_call_is_priced_at_the_time_of_the_reservation(limiter):
    times = []

    class Clocked(Prices):
        def worst_case(self, *args, **options):
            times.append(args[4])
            return super().worst_case(*args, **options)

        def price(self, provider, model, usage, at):
            times.append(at)
            return super().price(provider, model, usage, at)

    async with Meter(limiter, pricer=Clocked([ModelPrice("acme", "road", 1, 1)])).call(**CALL) as call:
        call.report(USED)
        call.finish(USED)
    store = (await limiter.status("agent")).as_of
    assert len(times) == 3
    assert len(set(times)) == 1
    assert abs((store - times[0]).total_seconds()) < 1


# -- cancellation ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def proxied_limiter(proxy):
    """A limiter behind the proxy, already connected."""
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=20.0) as limiter:
        with pytest.raises(BudgetExceeded):
            await limiter.reserve("agent", "6.00")
        yield limiter


async def cancelled(task: asyncio.Task) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_no_amount_stays_held_if_a_call_is_cancelled_during_the_reservation(client, proxy, proxied_limiter):
    proxy.hold_replies()
    task = asyncio.create_task(Meter(proxied_limiter, pricer=PRICES).call(**CALL).__aenter__())
    await until(lambda: sums(client)["held"] == WORST)
    await cancelled(task)
    proxy.release_replies()
    await until(lambda: spent_and_held(client) == (0, 0))


async def test_a_settlement_completes_even_if_the_caller_is_cancelled(client, proxy, proxied_limiter):
    entered, leave = asyncio.Event(), asyncio.Event()

    async def work():
        async with Meter(proxied_limiter, pricer=PRICES).call(**CALL) as call:
            entered.set()
            await leave.wait()
            call.finish(USED)

    task = asyncio.create_task(work())
    await entered.wait()
    proxy.hold_replies()
    leave.set()
    await until(lambda: sums(client)["spent"] == COST)
    await cancelled(task)
    proxy.release_replies()
    assert spent_and_held(client) == (COST, 0)
    async with proxied_limiter.hold("agent", "0.01"):
        assert spent_and_held(client)[0] == COST


async def test_a_cancelled_stream_commits_the_cost_of_the_latest_usage_report(client, limiter, meter):
    reported = asyncio.Event()

    async def stream():
        async with meter.call(**CALL) as call:
            call.report(USED)
            reported.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(stream())
    await reported.wait()
    await cancelled(task)
    assert spent_and_held(client) == (COST, 0)
    assert (await limiter.ledger("agent"))[0].operation.endswith(" estimated")


async def test_if_a_call_ends_during_an_outage_the_call_is_settled_after_the_outage(start_server, caplog):
    own = start_server(None, "--appendonly", "yes", "--appendfsync", "always")
    async with AsyncBudgetLimiter(own.url, BUDGETS, timeout=0.3) as limiter:
        with caplog.at_level(logging.ERROR):
            async with Meter(limiter, pricer=PRICES).call(**CALL) as call:
                own.kill()
                call.finish(USED)
        assert "settlement failed for <MeteredCall chat acme/road finished>" in caplog.text
        own.start()
        await until(lambda: not limiter.unresolved)
        with own.client() as client:
            assert spent_and_held(client) == (COST, 0)


async def test_calls_admitted_during_an_outage_are_recorded_after_the_outage(start_server):
    own = start_server()
    async with AsyncBudgetLimiter(own.url, BUDGETS, timeout=0.2, on_store_error="allow") as limiter:
        meter = Meter(limiter, ["agent", "tokens"], PRICES)
        own.kill()
        async with meter.call(**CALL) as call:
            call.report(USED)
            call.finish(USED)
        async with limiter.hold("agent", "0.01") as hold, meter.call(**CALL) as call:
            call.finish(USED)
            assert not hold.cap_checked
        own.start()
        with own.client() as client:
            await until(lambda: not limiter.deferred)
            assert spent_and_held(client) == (2 * COST, 0)
            assert spent_and_held(client, "tokens") == (3600, 0)


# -- concurrency -------------------------------------------------------------------------------------------------------


async def test_concurrent_calls_never_exceed_the_cap_and_commit_exact_costs(client, meter):
    admitted = []

    async def make_call(number: int) -> None:
        try:
            async with meter.call(**CALL) as call:
                assert counted(client) <= to_units("1.00")
                usage = Usage(1000 + number, 10 * number)
                call.report(Usage(usage.input_tokens))
                await asyncio.sleep(0)
                call.finish(usage)
        except BudgetExceeded:
            return
        admitted.append(usage)

    await asyncio.gather(*(make_call(number) for number in range(40)))
    assert 13 <= len(admitted) < 40
    assert spent_and_held(client) == (sum(u.input_tokens * 10_000 + u.output_tokens * 50_000 for u in admitted), 0)


def test_calls_in_concurrent_threads_never_exceed_the_cap_and_commit_exact_costs(client, sync_meter):
    admitted, barrier = [], threading.Barrier(20)

    def make_call(number: int) -> None:
        barrier.wait()
        try:
            with sync_meter.call(**CALL) as call:
                usage = Usage(1000 + number, 10 * number)
                call.finish(usage)
        except BudgetExceeded:
            return
        admitted.append(usage)

    threads = [threading.Thread(target=make_call, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(admitted) >= 13
    assert spent_and_held(client) == (sum(u.input_tokens * 10_000 + u.output_tokens * 50_000 for u in admitted), 0)


async def test_heartbeats_extend_the_reservation_of_a_long_call(client, limiter):
    meter = Meter(limiter, pricer=PRICES, ttl=1)
    async with meter.call(**CALL) as call:
        first = call.hold.expires_at
        call.report(USED)
        await until(lambda: call.hold.expires_at > first)
        view = await limiter.get(call.hold.id)
        assert view.accrued == {"agent": Decimal("0.0255")}
        call.finish(USED)
    assert spent_and_held(client) == (COST, 0)


def test_heartbeats_extend_the_reservation_of_a_long_sync_call(sync_limiter):
    meter = Meter(sync_limiter, pricer=PRICES, ttl=1)
    with meter.call(**CALL) as call:
        first = call.hold.expires_at
        wait_until(lambda: call.hold.expires_at > first)
        call.finish(USED)
