"""`Depends(hold_budget(...))` in another app."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Annotated

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse

from examples.local_provider import LocalProvider
from ktrdr_budget import (
    AsyncBudgetLimiter,
    AsyncHold,
    Budget,
    BudgetLimiter,
    Hold,
    InvalidAmount,
    InvalidArgument,
    UnknownBudget,
    guard,
)
from ktrdr_budget.api import BudgetProblem, hold_budget
from ktrdr_budget.metering.decorators import current_hold, set_default_limiter
from ktrdr_budget.metering.meter import Meter
from ktrdr_budget.metering.prices import ModelPrice, Prices
from ktrdr_budget.metering.usage import Usage
from ktrdr_budget.money import to_units

from ..helpers.guarded import CLAUDE, MESSAGES, bill_nanos, raw_client
from ..helpers.keyspace import ledger_sum, sums
from ..helpers.served_app import serving
from ..helpers.waiting import until

BUDGETS = [Budget("agent", "1.00"), Budget("calls", 1, unit="requests")]
MODEL = {"provider": "acme", "model": "road", "input_tokens_max": 10, "output_tokens_max": 1000}


@pytest.fixture
def client(server):
    """A client of the server. No service runs in these tests."""
    with server.client() as made:
        yield made


@pytest.fixture
def app(limiter):
    set_default_limiter(limiter)
    yield FastAPI()
    set_default_limiter(None)


@asynccontextmanager
async def visiting(app) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as made:
        yield made


async def ask(app, path: str = "/", method: str = "POST") -> httpx.Response:
    async with visiting(app) as visitor:
        return await visitor.request(method, path)


def figures(client, budget="agent") -> tuple[int, int]:
    found = sums(client, budget)
    assert found["unconfirmed"] == 0
    assert ledger_sum(client, budget) == found["spent"]
    return found["spent"], found["held"]


# -- what a route costs ------------------------------------------------------------------------------------------------


async def test_a_route_that_accrues_nothing_commits_the_whole_estimate(app, client, limiter):
    @app.post("/research/{topic}", dependencies=[Depends(hold_budget("agent", estimate="0.15"))])
    async def research(topic: str) -> str:
        assert figures(client) == (0, to_units("0.15"))
        return topic

    answer = await ask(app, "/research/rain")
    assert (answer.status_code, answer.json()) == (200, "rain")
    assert figures(client) == (to_units("0.15"), 0)
    assert [entry.operation for entry in await limiter.ledger("agent")] == ["POST /research/{topic}"]


async def test_a_route_commits_the_accrued_amount(app, client):
    @app.post("/")
    async def research(hold: Annotated[AsyncHold, Depends(hold_budget("agent", estimate="0.15"))]) -> str:
        assert current_hold() is hold
        hold.accrue("0.02")
        return "done"

    assert (await ask(app)).status_code == 200
    assert figures(client) == (to_units("0.02"), 0)


async def test_a_sync_route_commits_the_accrued_amount(app, client):
    @app.post("/", dependencies=[Depends(hold_budget("agent", estimate="0.15"))])
    def research() -> None:
        current_hold().accrue("0.02")

    assert (await ask(app)).status_code == 200
    assert figures(client) == (to_units("0.02"), 0)


async def test_metered_calls_in_a_route_are_charged_to_the_hold_of_the_route(app, client, limiter):
    meter = Meter(limiter, pricer=Prices([ModelPrice("acme", "road", 10, 50)]))

    @app.post("/", dependencies=[Depends(hold_budget("agent", estimate="0.15"))])
    async def research() -> None:
        async with meter.call(**MODEL) as call:
            assert call.hold is None
            call.finish(Usage(10, 2))

    assert (await ask(app)).status_code == 200
    assert figures(client) == (200_000, 0)


async def test_the_hold_of_a_streamed_response_is_committed_after_the_last_chunk(app, client):
    @app.post("/")
    async def research(hold: Annotated[AsyncHold, Depends(hold_budget("agent", estimate="0.15"))]) -> StreamingResponse:
        async def words() -> AsyncIterator[str]:
            for word in ("it ", "rains"):
                hold.accrue("0.01")
                assert figures(client) == (0, to_units("0.15"))
                yield word

        return StreamingResponse(words())

    assert (await ask(app)).text == "it rains"
    assert figures(client) == (to_units("0.02"), 0)


@pytest.mark.parametrize(("accrued", "spent"), [("0", "0.15"), ("0.01", "0.02")])
async def test_the_hold_of_a_stream_is_settled_once_if_the_client_disconnects(app, client, limiter, accrued, spent):
    """fastapi #11143: a `yield` dependency and a streamed response."""
    closed = asyncio.Event()

    @app.post("/")
    async def research(hold: Annotated[AsyncHold, Depends(hold_budget("agent", estimate="0.15"))]) -> StreamingResponse:
        async def words() -> AsyncIterator[str]:
            try:
                for word in ("it ", "rains "):
                    hold.accrue(accrued)
                    yield word
                await asyncio.Event().wait()
            finally:
                closed.set()

        return StreamingResponse(words())

    async with serving(app) as address, httpx.AsyncClient() as visitor:
        async with visitor.stream("POST", f"http://{address}/") as answer:
            text = answer.aiter_text()
            while "rains" not in await anext(text):
                pass
            assert figures(client) == (0, to_units("0.15"))
        await closed.wait()
        await until(lambda: sums(client)["held"] == 0)
    assert figures(client) == (to_units(spent), 0)
    assert [entry.operation for entry in await limiter.ledger("agent")] == ["POST /"]


@pytest.mark.parametrize(("accrued", "spent"), [("0", "0"), ("0.02", "0.02")])
@pytest.mark.parametrize("error", [HTTPException(404, "nothing"), ValueError("broken")])
async def test_a_route_that_raises_an_error_commits_the_accrued_amount(app, client, accrued, spent, error):
    @app.post("/")
    async def research(hold: Annotated[AsyncHold, Depends(hold_budget("agent", estimate="0.15"))]) -> None:
        hold.accrue(accrued)
        raise error

    if isinstance(error, HTTPException):
        assert (await ask(app)).status_code == 404
    else:
        with pytest.raises(ValueError, match="broken"):
            await ask(app)
    assert figures(client) == (to_units(spent), 0)


async def test_the_accrued_amount_is_committed_if_the_client_disconnects(app, client):
    begun = asyncio.Event()

    @app.post("/")
    async def research(hold: Annotated[AsyncHold, Depends(hold_budget("agent", estimate="0.15"))]) -> None:
        hold.accrue("0.02")
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(ask(app))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert figures(client) == (to_units("0.02"), 0)


# -- what is refused ---------------------------------------------------------------------------------------------------


async def test_a_route_denied_by_the_budget_responds_with_a_429_problem_document(app, client, limiter):
    ran = False

    @app.post("/", dependencies=[Depends(hold_budget("agent", estimate="0.15"))])
    async def research() -> None:
        nonlocal ran
        ran = True

    await limiter.record("agent", "0.90")
    answer = await ask(app)
    assert (answer.status_code, answer.headers["content-type"]) == (429, "application/problem+json")
    assert int(answer.headers["retry-after"]) > 0
    document = answer.json()
    assert document | {"retry_after": 1} == {
        "type": "urn:ktrdr-budget:problem:budget-exceeded",
        "title": "A budget has no room",
        "status": 429,
        "detail": "agent: budget_exhausted ($0.10 remaining, need $0.15)",
        "code": "budget-exceeded",
        "budget": "agent",
        "unit": "usd",
        "reason": "budget_exhausted",
        "limit": "1.00",
        "spent": "0.90",
        "held": "0.00",
        "unconfirmed": "0.00",
        "remaining": "0.10",
        "requested": "0.15",
        "fits": "0.10",
        "retry_after": 1,
    }
    assert not ran
    assert figures(client) == (to_units("0.90"), 0)


async def test_a_budget_in_requests_limits_the_request_rate_of_a_route(app):
    @app.get("/", dependencies=[Depends(hold_budget("calls", estimate=1))])
    async def look() -> None: ...

    assert (await ask(app, method="GET")).status_code == 200
    answer = await ask(app, method="GET")
    assert answer.status_code == 429
    assert answer.headers["ratelimit-policy"] == '"calls";q=1;w=86400'


async def test_the_response_is_429_if_the_budget_denies_a_model_call_inside_a_route(app, client, limiter):
    meter = Meter(limiter, pricer=Prices([ModelPrice("acme", "road", 10, 50)]))

    @app.post("/", dependencies=[Depends(hold_budget("agent", estimate="0.01"))])
    async def research() -> None:
        async with meter.call(**MODEL | {"output_tokens_max": 100_000}):
            raise AssertionError

    answer = await ask(app)
    assert (answer.status_code, answer.headers["content-type"]) == (429, "application/problem+json")
    assert answer.json()["requested"] == "4.9901"
    assert figures(client) == (0, 0)


async def test_a_route_replies_503_while_the_store_is_unreachable(start_server):
    own = start_server()
    app = FastAPI()
    async with AsyncBudgetLimiter(own.url, BUDGETS, timeout=0.1) as limiter:

        @app.post("/", dependencies=[Depends(hold_budget("agent", estimate="0.15", limiter=limiter))])
        async def research() -> None: ...

        own.kill()
        answer = await ask(app)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["code"] == "store-unavailable"


async def test_a_failed_settlement_does_not_change_the_response(start_server, caplog):
    own = start_server()
    app = FastAPI()
    async with AsyncBudgetLimiter(own.url, BUDGETS, timeout=1.0) as limiter:

        @app.post("/", dependencies=[Depends(hold_budget("agent", estimate="0.15", limiter=limiter))])
        async def research() -> str:
            own.kill()
            return "done"

        assert (await ask(app)).json() == "done"
    assert "could not be settled" in caplog.text


async def test_a_request_to_a_route_with_an_unknown_budget_raises_an_error_in_the_app(app):
    @app.post("/", dependencies=[Depends(hold_budget("nothing", estimate="0.15"))])
    async def research() -> None: ...

    with pytest.raises(UnknownBudget):  # a bug of the app
        await ask(app)


async def test_an_app_can_handle_budget_problems_with_its_own_exception_handler(app, limiter):
    @app.exception_handler(BudgetProblem)
    async def sorry(request: Request, error: BudgetProblem) -> JSONResponse:
        return JSONResponse({"sorry": error.problem.code}, error.status_code)

    @app.post("/", dependencies=[Depends(hold_budget("agent", estimate="2"))])
    async def research() -> None: ...

    answer = await ask(app)
    assert (answer.status_code, answer.json()) == (429, {"sorry": "budget-exceeded"})


# -- which limiter -----------------------------------------------------------------------------------------------------


async def test_the_limiter_may_be_given_as_a_function_of_the_request(client, limiter):
    app = FastAPI()
    app.state.limiter = limiter
    depends = hold_budget({"agent": "0.15", "calls": 1}, limiter=lambda request: request.app.state.limiter)

    @app.post("/", dependencies=[Depends(depends)])
    async def research() -> None: ...

    assert (await ask(app)).status_code == 200
    assert (figures(client), figures(client, "calls")) == ((to_units("0.15"), 0), (1, 0))


async def _awaited(request):
    return None


UNUSABLE = [
    ("agent", {}),
    ("agent", {"estimate": -1}),
    ("agent", {"estimate": "-0.15"}),
    ("agent", {"estimate": 0}),
    ("agent", {"estimate": "much"}),
    ("agent", {"estimate": float("nan")}),
    ("agent", {"estimate": True}),
    ("agent", {"estimate": "1e30"}),
    ("agent", {"estimate": ["0.15"]}),
    ("agent", {"estimate": lambda request: "0.15"}),
    ("a b", {"estimate": "0.15"}),
    ("", {"estimate": "0.15"}),
    (7, {"estimate": "0.15"}),
    (None, {"estimate": "0.15"}),
    (["agent"], {"estimate": "0.15"}),
    (lambda request: "agent", {"estimate": "0.15"}),
    ({}, {}),
    ({"agent": "0.15"}, {"estimate": "0.15"}),
    ({"agent": -1}, {}),
    ({"agent": None}, {}),
    ({"agent": lambda request: 1}, {}),
    ({"a b": 1}, {}),
    ({7: 1}, {}),
    ("agent", {"estimate": "0.15", "limiter": "agent"}),
    ("agent", {"estimate": "0.15", "limiter": AsyncBudgetLimiter}),
    ("agent", {"estimate": "0.15", "limiter": lambda: None}),
    ("agent", {"estimate": "0.15", "limiter": lambda request, more: None}),
    ("agent", {"estimate": "0.15", "limiter": _awaited}),
    ("agent", {"estimate": "0.15", "ttl": 0}),
    ("agent", {"estimate": "0.15", "ttl": "900"}),
    ("agent", {"estimate": "0.15", "on_error": "ignore"}),
    ("agent", {"estimate": "0.15", "on_expiry": "ignore"}),
    ("agent", {"estimate": "0.15", "on_expiry": ["charge"]}),
    ("agent", {"estimate": "0.15", "operation": 7}),
    ("agent", {"estimate": "0.15", "operation": lambda request: "look"}),
    ("agent", {"estimate": "0.15", "operation": "\ud800"}),
]


@pytest.mark.parametrize(("budget", "options"), UNUSABLE)
def test_invalid_arguments_are_refused_when_the_dependency_is_created(budget, options):
    with pytest.raises(InvalidArgument):
        hold_budget(budget, **options)


def test_a_dependency_created_with_a_limiter_checks_the_budgets_at_once(limiter):
    for budget, options in (("nothing", {"estimate": 1}), ({"agent": 1, "nothing": 1}, {})):
        with pytest.raises(UnknownBudget):
            hold_budget(budget, limiter=limiter, **options)
    with pytest.raises(InvalidAmount, match="whole number"):
        hold_budget("calls", estimate="0.15", limiter=limiter)
    assert hold_budget("calls", estimate=1, limiter=limiter)


@pytest.mark.parametrize("estimate", ["0.15", 1, 0.15, Decimal("0.15"), 10_000_000])
def test_an_estimate_in_any_unit_is_accepted_while_the_limiter_is_unknown(estimate):
    assert hold_budget("agent", estimate=estimate)
    assert hold_budget({"agent": estimate}, limiter=lambda connection: None)


async def test_a_limiter_function_that_returns_no_limiter_causes_an_error_that_shows_the_returned_value(server):
    app = FastAPI()

    @app.post("/", dependencies=[Depends(hold_budget("agent", estimate="0.15", limiter=lambda request: "redis://"))])
    async def research() -> None: ...

    with pytest.raises(InvalidArgument, match="must be an AsyncBudgetLimiter or a BudgetLimiter, not 'redis://'"):
        await ask(app)


# -- routes of `def` ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sync_app(server):
    with BudgetLimiter(server.url, BUDGETS) as limiter:
        app = FastAPI()
        app.state.limiter = limiter
        yield app


def of_app(request: Request) -> BudgetLimiter:
    return request.app.state.limiter


def holding(estimate: str = "0.15"):
    return Depends(hold_budget("agent", estimate=estimate, limiter=of_app))


async def test_metered_calls_in_a_sync_route_are_charged_to_the_hold_of_the_route(sync_app, client):
    meter = Meter(sync_app.state.limiter, pricer=Prices([ModelPrice("acme", "road", "10", "50")]))

    by_name = Depends(hold_budget("agent", estimate="0.15", limiter=sync_app.state.limiter))

    @sync_app.post("/", dependencies=[by_name])
    def research() -> str:
        with meter.call(**MODEL) as call:
            assert call.hold is None
            assert figures(client) == (0, to_units("0.15"))
            call.finish(Usage(10, 100))
        return "done"

    answer = await ask(sync_app)
    assert (answer.status_code, answer.json()) == (200, "done")
    assert figures(client) == (to_units("0.0051"), 0)


async def test_a_call_of_a_guarded_sync_client_in_a_sync_route_is_charged_once(sync_app, client):
    with LocalProvider() as provider:
        guarded = guard(raw_client("anthropic", False, provider), sync_app.state.limiter)

        @sync_app.post("/")
        def research(hold: Annotated[Hold, holding()]) -> str:
            assert current_hold() is hold
            guarded.messages.create(model=CLAUDE, max_tokens=50, messages=MESSAGES)
            return "done"

        assert (await ask(sync_app)).status_code == 200
        assert figures(client) == (bill_nanos(provider.ledger), 0)
        guarded.close()


@pytest.mark.parametrize(("accrued", "spent"), [("0", "0"), ("0.03", "0.03")])
async def test_a_sync_route_that_raises_an_error_commits_the_accrued_amount(sync_app, client, accrued, spent):
    @sync_app.post("/")
    def research(hold: Annotated[Hold, holding()]) -> None:
        hold.accrue(accrued)
        raise HTTPException(418)

    assert (await ask(sync_app)).status_code == 418
    assert figures(client) == (to_units(spent), 0)


async def test_a_sync_route_does_not_run_if_the_budget_denies_the_reservation(sync_app, client):
    @sync_app.post("/", dependencies=[holding("2.00")])
    def research() -> None:
        raise AssertionError

    answer = await ask(sync_app)
    assert (answer.status_code, answer.headers["content-type"]) == (429, "application/problem+json")
    assert figures(client) == (0, 0)


async def test_a_hold_is_released_if_the_client_disconnects_while_a_sync_route_reserves(sync_app, client, monkeypatch):
    limiter, goes_on = sync_app.state.limiter, threading.Event()
    reserve, reserving = limiter.reserve, threading.Event()

    def slowly(*args, **named):
        hold = reserve(*args, **named)
        reserving.set()
        assert goes_on.wait(30)
        return hold

    monkeypatch.setattr(limiter, "reserve", slowly)

    @sync_app.post("/", dependencies=[holding()])
    def research() -> None:
        raise AssertionError

    visit = asyncio.create_task(ask(sync_app))
    await until(reserving.is_set)
    visit.cancel()
    with pytest.raises(asyncio.CancelledError):
        await visit
    assert figures(client) == (0, to_units("0.15"))
    goes_on.set()
    await until(lambda: figures(client) == (0, 0))
