"""``@budgeted(...)``, for async and sync functions."""

from __future__ import annotations

import asyncio
import functools
import gc
from contextlib import nullcontext
from decimal import Decimal

import pytest

from ktrdr_budget import Budget, BudgetExceeded, BudgetLimiter, InvalidArgument, UnknownBudget, tracker
from ktrdr_budget.errors import InvalidAmount
from ktrdr_budget.metering import defaults
from ktrdr_budget.metering.decorators import budgeted, current_hold, set_default_limiter
from ktrdr_budget.metering.meter import Meter
from ktrdr_budget.metering.prices import ModelPrice, Prices
from ktrdr_budget.metering.usage import Usage
from ktrdr_budget.money import to_units

from ..helpers.keyspace import spent_and_held

BUDGETS = [Budget("agent", "1.00"), Budget("calls", 100, unit="requests")]


class FunctionError(Exception):
    """Raised by a budgeted function."""


@pytest.fixture(autouse=True)
def no_default():
    yield
    set_default_limiter(None)


def accrue(amount: str) -> str:
    current_hold().accrue(amount)
    return "answer"


def fail(*amounts: str) -> None:
    for amount in amounts:
        accrue(amount)
    raise FunctionError


OUTCOMES = {
    # the function, options of `budgeted`, whether it raises, the amount spent
    "no cost, nothing accrued": (lambda: "answer", {}, False, "0.15"),
    "accrued": (lambda: accrue("0.03"), {}, False, "0.03"),
    "cost from the result": (lambda: "answer", {"cost": lambda result: Decimal(len(result)) / 100}, False, "0.06"),
    "cost above the estimate": (lambda: "answer", {"cost": lambda _: "0.40"}, False, "0.40"),
    "cost below the accrued amount": (lambda: accrue("0.03"), {"cost": lambda _: "0.02"}, False, "0.02"),
    "cost per budget": (lambda: "answer", {"cost": lambda _: {"agent": "0.01"}}, False, "0.01"),
    "error": (fail, {}, True, "0"),
    "error after accruing": (lambda: fail("0.03"), {}, True, "0.03"),
    "error, with a cost function": (fail, {"cost": lambda _: "0.02"}, True, "0"),
}


@pytest.mark.parametrize(("work", "options", "raises", "spent"), OUTCOMES.values(), ids=OUTCOMES)
async def test_an_async_budgeted_function_commits_its_cost(client, limiter, work, options, raises, spent):
    @budgeted("agent", estimate="0.15", limiter=limiter, **options)
    async def research():
        assert spent_and_held(client) == (0, to_units("0.15"))
        return work()

    with pytest.raises(FunctionError) if raises else nullcontext():
        assert await research() == "answer"
    assert spent_and_held(client) == (to_units(spent), 0)


@pytest.mark.parametrize(("work", "options", "raises", "spent"), OUTCOMES.values(), ids=OUTCOMES)
def test_a_sync_budgeted_function_commits_its_cost(client, sync_limiter, work, options, raises, spent):
    @budgeted("agent", estimate="0.15", limiter=sync_limiter, **options)
    def research():
        assert spent_and_held(client) == (0, to_units("0.15"))
        return work()

    with pytest.raises(FunctionError) if raises else nullcontext():
        assert research() == "answer"
    assert spent_and_held(client) == (to_units(spent), 0)


async def test_a_budgeted_function_does_not_run_if_the_estimate_does_not_fit_the_budget(client, limiter):
    ran = False

    @budgeted("agent", estimate="1.01", limiter=limiter)
    async def research():
        nonlocal ran
        ran = True

    with pytest.raises(BudgetExceeded):
        await research()
    assert not ran
    assert spent_and_held(client) == (0, 0)


async def test_the_estimate_can_be_computed_from_the_arguments_of_the_function(client, limiter):
    @budgeted("agent", estimate=lambda pages, *, price: pages * Decimal(price), limiter=limiter)
    async def read(pages, *, price):
        return pages

    assert await read(3, price="0.02") == 3
    assert spent_and_held(client) == (to_units("0.06"), 0)


async def test_a_mapping_of_estimates_reserves_amounts_of_several_budgets(client, limiter):
    @budgeted({"agent": "0.15", "calls": 2}, limiter=limiter, cost=lambda result: result)
    async def research():
        return "0.05"

    await research()
    assert spent_and_held(client) == (to_units("0.05"), 0)
    assert spent_and_held(client, "calls") == (2, 0)


async def test_a_metered_call_inside_a_budgeted_function_claims_from_the_hold_of_the_function(client, limiter):
    meter = Meter(limiter, pricer=Prices([ModelPrice("acme", "road", 10, 50)]))

    @budgeted("agent", estimate="0.15", limiter=limiter)
    async def research():
        async with meter.call(provider="acme", model="road", input_tokens_max=10, output_tokens_max=10) as call:
            call.finish(Usage(10, 2))

    await research()
    assert spent_and_held(client) == (200_000, 0)


@pytest.mark.parametrize("wrong", [lambda _: "much", lambda _: -1, lambda _: 1 / 0])
async def test_if_the_cost_of_a_function_is_invalid_the_estimate_is_committed(client, limiter, wrong):
    @budgeted("agent", estimate="0.15", limiter=limiter, cost=wrong)
    async def research():
        accrue("0.03")

    with pytest.raises((InvalidAmount, ZeroDivisionError)):
        await research()
    assert spent_and_held(client) == (to_units("0.15"), 0)


async def test_a_cancelled_function_commits_the_accrued_amount(client, limiter):
    @budgeted("agent", estimate="0.15", limiter=limiter)
    async def research(started):
        accrue("0.03")
        started.set()
        await asyncio.Event().wait()

    started = asyncio.Event()
    task = asyncio.create_task(research(started))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert spent_and_held(client) == (to_units("0.03"), 0)


async def test_the_ledger_label_is_the_function_name_or_the_operation(limiter):
    @budgeted("agent", estimate="0.01", limiter=limiter)
    async def research():
        """Researches a topic."""

    @budgeted("agent", estimate="0.01", limiter=limiter, operation="digging")
    async def dig(): ...

    await research()
    await dig()
    labels = [entry.operation for entry in await limiter.ledger("agent")]
    assert labels == ["digging", "test_the_ledger_label_is_the_function_name_or_the_operation.<locals>.research"]
    assert (research.__name__, research.__doc__) == ("research", "Researches a topic.")
    assert asyncio.iscoroutinefunction(research)


# -- which limiter -----------------------------------------------------------------------------------------------------


async def test_a_function_without_a_limiter_uses_the_sync_or_async_default_limiter(client, limiter, sync_limiter):
    @budgeted("agent", estimate="0.15")
    async def research(): ...

    @budgeted("agent", estimate="0.05")
    def dig(): ...

    set_default_limiter(limiter)
    set_default_limiter(sync_limiter)
    await research()
    dig()
    assert spent_and_held(client) == (to_units("0.20"), 0)
    with pytest.raises(InvalidArgument, match="limiter must be"):
        set_default_limiter("redis://")


async def test_the_limiter_argument_can_be_a_function_that_returns_the_limiter(client, limiter):
    app = {}

    @budgeted("agent", estimate="0.15", limiter=lambda: app["limiter"])
    async def research(): ...

    app["limiter"] = limiter
    await research()
    assert spent_and_held(client) == (to_units("0.15"), 0)


def test_an_async_function_without_a_limiter_uses_a_limiter_created_from_the_environment(client, server, monkeypatch):
    monkeypatch.setenv("KTRDR_REDIS_URL", server.url)
    monkeypatch.setenv("AGENT_DAILY_BUDGET", "0.20")

    @budgeted("agent", estimate="0.15")
    async def research():
        return defaults.default_async_limiter()

    async def main():
        first = await research()
        with pytest.raises(BudgetExceeded):
            await research()
        return first, defaults.default_async_limiter()

    first, second = asyncio.run(main())
    assert first is second
    assert spent_and_held(client) == (to_units("0.15"), 0)
    assert not defaults.loop_limiters
    gc.collect()  # an unclosed connection would warn, and warnings are errors


def test_a_sync_function_without_a_limiter_uses_the_budget_tracker_of_the_process(client, server, monkeypatch):
    monkeypatch.setenv("KTRDR_REDIS_URL", server.url)
    monkeypatch.setattr(tracker, "_tracker", None)

    @budgeted("agent", estimate="0.15")
    def research(): ...

    research()
    tracker.get_budget_tracker().close()
    assert spent_and_held(client) == (to_units("0.15"), 0)


async def test_a_limiter_must_be_sync_for_a_sync_function_and_async_for_an_async_function(limiter, sync_limiter):
    with pytest.raises(InvalidArgument, match="must be a BudgetLimiter"):

        @budgeted("agent", estimate="0.15", limiter=limiter)
        def dig(): ...

    @budgeted("agent", estimate="0.15", limiter=lambda: sync_limiter)
    async def research(): ...

    with pytest.raises(InvalidArgument, match="must be an AsyncBudgetLimiter"):
        await research()


def test_current_hold_returns_the_innermost_hold_and_raises_an_error_outside_of_holds(sync_limiter):
    with sync_limiter.hold("agent", "0.01") as outer:
        with sync_limiter.hold("agent", "0.02") as inner:
            assert current_hold() is inner
        assert current_hold() is outer
    with pytest.raises(InvalidArgument, match="no hold"):
        current_hold()


def test_budgeted_rejects_generator_functions():
    def numbers():
        yield 1

    async def letters():
        yield "a"

    for function in (numbers, letters):
        with pytest.raises(InvalidArgument, match="is a generator"):
            budgeted("agent", estimate="0.15")(function)


@pytest.mark.parametrize(
    ("budget", "options"),
    [
        ("agent", {}),
        ("a b", {"estimate": 1}),
        ("agent", {"estimate": "much"}),
        ("agent", {"estimate": 1, "ttl": 0}),
        ("agent", {"estimate": 1, "on_error": "ignore"}),
        ("agent", {"estimate": 1, "on_expiry": "ignore"}),
        ("agent", {"estimate": 1, "operation": 7}),
        ("agent", {"estimate": 1, "cost": "0.15"}),
        ("agent", {"estimate": 1, "cost": lambda: "0.15"}),
        ("agent", {"estimate": 1, "limiter": "redis://"}),
        ("agent", {"estimate": 1, "limiter": BudgetLimiter}),
        ("agent", {"estimate": 1, "limiter": lambda request: None}),
        ("agent", {"estimate": 0}),
        ({"a b": 1}, {}),
        ({"agent": None}, {}),
        ({"agent": lambda pages: pages}, {}),
        ({"agent": 1}, {"estimate": lambda pages: pages}),
        ({}, {}),
        ({"agent": 1}, {"estimate": 1}),
        ({"agent": -1}, {}),
        (7, {"estimate": 1}),
    ],
)
def test_invalid_arguments_are_rejected_when_the_decorator_is_created(budget, options):
    with pytest.raises(InvalidArgument):
        budgeted(budget, **options)


def test_an_unknown_budget_is_rejected_when_the_decorator_is_created(sync_limiter):
    with pytest.raises(UnknownBudget):
        budgeted("nothing", estimate=lambda: 1, limiter=sync_limiter)


async def test_a_function_is_also_charged_for_a_metered_call_if_the_call_ends_after_the_function(client, limiter):
    meter = Meter(limiter, pricer=Prices([ModelPrice("acme", "road", "10", "50")]))

    @budgeted("agent", estimate="0.15", limiter=limiter, cost=lambda _: "0.02")
    async def stream():
        call = meter.call(provider="acme", model="road", input_tokens_max=1000, output_tokens_max=1000)
        return await call.__aenter__()

    call = await stream()
    assert spent_and_held(client) == (0, to_units("0.15"))
    call.finish(Usage(1000, 100))
    await call.__aexit__(None, None, None)
    assert spent_and_held(client) == (to_units("0.02") + to_units("0.015"), 0)


class Scan:
    """A callable without a ``__qualname__``."""

    def __call__(self, pages: int) -> int:
        return pages


async def test_the_ledger_label_of_a_partial_is_the_name_of_the_wrapped_function_or_class(limiter, sync_limiter):
    async def research(topic: str) -> str:
        return topic

    assert await budgeted("agent", "0.1", limiter=limiter)(functools.partial(research, "rain"))() == "rain"
    assert budgeted("agent", "0.1", limiter=sync_limiter)(functools.partial(functools.partial(Scan()), 2))() == 2
    labels = [entry.operation.rpartition(".")[2] for entry in await limiter.ledger("agent")]
    assert labels == ["Scan", "research"]
