"""`Depends(hold_budget(...))` on WebSocket routes, with a real server and a real client (fastapi-limiter PR #23)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosedError, InvalidStatus

from ktrdr_budget import AsyncBudgetLimiter, AsyncHold, Budget, BudgetLimiter, Hold
from ktrdr_budget.api import BudgetProblem, hold_budget
from ktrdr_budget.metering.decorators import current_hold, set_default_limiter
from ktrdr_budget.metering.meter import Meter
from ktrdr_budget.metering.prices import ModelPrice, Prices
from ktrdr_budget.metering.usage import Usage
from ktrdr_budget.money import to_units

from ..helpers.keyspace import spent_and_held, sums
from ..helpers.served_app import serving
from ..helpers.waiting import until

BUDGETS = [Budget("agent", "1.00"), Budget("calls", 5, unit="requests")]
MODEL = {"provider": "acme", "model": "road", "input_tokens_max": 10, "output_tokens_max": 1000}
PRICES = Prices([ModelPrice("acme", "road", 10, 50)])
ESTIMATE = to_units("0.15")
SyncHeld = Annotated[
    Hold,
    Depends(hold_budget("agent", estimate="0.15", limiter=lambda connection: connection.app.state.limiter)),
]
Held = Annotated[AsyncHold, Depends(hold_budget("agent", estimate="0.15"))]


@pytest.fixture
def client(server):
    """A client of the store."""
    with server.client() as made:
        yield made


@pytest.fixture
def app(limiter):
    set_default_limiter(limiter)
    yield FastAPI()
    set_default_limiter(None)


@asynccontextmanager
async def visiting(app: FastAPI, path: str = "/live") -> AsyncIterator[ClientConnection]:
    async with serving(app) as address, connect(f"ws://{address}{path}", proxy=None) as socket:
        yield socket


def echo(app: FastAPI, *, ends: str, accrued: str | None = None) -> None:
    """Add a route that echoes every message. ``ends`` selects how the route ends."""

    @app.websocket("/live")
    async def live(socket: WebSocket, hold: Held) -> None:
        await socket.accept()
        assert current_hold() is hold
        with suppress(WebSocketDisconnect) if ends == "caught" else nullcontext():
            while (word := await socket.receive_text()) != "end":
                if accrued is not None:
                    hold.accrue(accrued)
                await socket.send_text(word)
        if ends == "raises":
            raise ZeroDivisionError


async def settled(client: Any, limiter: AsyncBudgetLimiter) -> tuple[int, list[str]]:
    """Wait until nothing is held; return the spent amount and the operations in the ledger."""
    await until(lambda: sums(client)["held"] == 0)
    return spent_and_held(client)[0], [entry.operation for entry in await limiter.ledger("agent")]


# -- what a session costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accrued", "spent"), [(None, "0.15"), ("0.02", "0.02")], ids=["without accruals", "accrued"])
@pytest.mark.parametrize("ends", ["returned", "caught", "uncaught", "cut"])
async def test_the_hold_of_a_websocket_session_is_settled_once_however_the_session_ends(
    app, client, limiter, ends, accrued, spent
):
    """A disconnected client is charged like any other."""
    echo(app, ends=ends, accrued=accrued)
    async with serving(app) as address:
        async with connect(f"ws://{address}/live", proxy=None) as socket:
            await socket.send("it rains")
            assert await socket.recv() == "it rains"
            assert spent_and_held(client) == (0, ESTIMATE)
            if ends == "returned":
                await socket.send("end")
                await socket.wait_closed()
            elif ends == "cut":
                socket.transport.abort()
        assert await settled(client, limiter) == (to_units(spent), ["WEBSOCKET /live"])
    assert await settled(client, limiter) == (to_units(spent), ["WEBSOCKET /live"])


@pytest.mark.parametrize(("accrued", "entries"), [(None, 0), ("0.02", 1)])
async def test_a_websocket_session_that_raises_an_error_commits_the_accrued_amount(
    app, client, limiter, accrued, entries
):
    echo(app, ends="raises", accrued=accrued)
    async with visiting(app) as socket:
        await socket.send("it rains")
        await socket.recv()
        await socket.send("end")
        await socket.wait_closed()
        assert await settled(client, limiter) == (to_units(accrued or "0"), ["WEBSOCKET /live"] * entries)


async def test_a_websocket_session_refused_by_the_route_costs_nothing(app, client, limiter):
    @app.websocket("/live")
    async def live(socket: WebSocket, hold: Held) -> None:
        hold.accrue(0)
        await hold.release()
        await socket.close()

    with pytest.raises(InvalidStatus):
        async with visiting(app):
            raise AssertionError
    assert await settled(client, limiter) == (0, [])


async def test_metered_calls_in_a_session_are_charged_to_the_hold_of_the_session(app, client, limiter):
    meter = Meter(limiter, pricer=PRICES)

    @app.websocket("/live/{topic}", dependencies=[Depends(hold_budget("agent", estimate="0.15"))])
    async def live(socket: WebSocket, topic: str) -> None:
        await socket.accept()
        async with meter.call(**MODEL) as call:
            assert call.hold is None
            call.finish(Usage(10, 2))
        await socket.send_text(topic)

    async with visiting(app, "/live/rain") as socket:
        assert await socket.recv() == "rain"
        await socket.wait_closed()
        spent, (label,) = await settled(client, limiter)
        assert spent == 200_000
        assert label.startswith("WEBSOCKET /live/{topic} ")


async def test_a_budget_dependency_of_the_app_applies_to_http_requests_and_websockets(client, limiter):
    app = FastAPI(dependencies=[Depends(hold_budget({"agent": "0.15", "calls": 1}, limiter=limiter))])

    @app.get("/")
    async def look() -> str:
        return "it rains"

    @app.websocket("/live")
    async def live(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("it rains")

    async with serving(app) as address:
        async with httpx.AsyncClient() as visitor:
            assert (await visitor.get(f"http://{address}/")).json() == "it rains"
        async with connect(f"ws://{address}/live", proxy=None) as socket:
            assert await socket.recv() == "it rains"
            await socket.wait_closed()
        await until(lambda: sums(client, "calls")["spent"] == 2)
        assert await settled(client, limiter) == (2 * ESTIMATE, ["WEBSOCKET /live", "GET /"])


async def test_a_limiter_function_of_a_websocket_may_return_a_sync_limiter(server, client):
    app = FastAPI()
    with BudgetLimiter(server.url, BUDGETS) as sync_limiter:
        app.state.limiter = sync_limiter

        @app.websocket("/live")
        async def live(socket: WebSocket, hold: SyncHeld) -> None:
            await socket.accept()
            hold.accrue("0.03")
            await socket.receive_text()

        async with visiting(app) as socket:
            assert sums(client)["held"] == ESTIMATE
            await socket.close()
            await until(lambda: sums(client)["held"] == 0)
            assert spent_and_held(client) == (to_units("0.03"), 0)


# -- what is refused ---------------------------------------------------------------------------------------------------


async def test_a_websocket_handshake_gets_429_if_the_budget_denies_the_session(app, client, limiter):
    echo(app, ends="returned")
    await limiter.record("agent", "0.90")
    with pytest.raises(InvalidStatus) as caught:
        async with visiting(app):
            raise AssertionError
    answer = caught.value.response
    assert (answer.status_code, answer.headers["content-type"]) == (429, "application/problem+json")
    assert int(answer.headers["retry-after"]) > 0
    document = json.loads(answer.body)
    assert (document["code"], document["requested"], document["fits"]) == ("budget-exceeded", "0.15", "0.10")
    assert spent_and_held(client) == (to_units("0.90"), 0)


async def test_an_open_websocket_is_closed_with_the_reason_if_the_budget_denies_a_model_call(app, client, limiter):
    meter = Meter(limiter, pricer=PRICES)

    @app.websocket("/live")
    async def live(socket: WebSocket, hold: Held) -> None:
        await socket.accept()
        hold.accrue("0.02")
        async with meter.call(**MODEL | {"output_tokens_max": 100_000}):
            raise AssertionError

    async with visiting(app) as socket:
        with pytest.raises(ConnectionClosedError) as caught:
            await socket.recv()
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1008
        assert caught.value.rcvd.reason.startswith("agent: ")
        spent, _ = await settled(client, limiter)
        assert spent == to_units("0.02")


async def test_the_websocket_handshake_gets_503_while_the_store_is_unreachable(start_server):
    own = start_server()
    app = FastAPI()
    async with AsyncBudgetLimiter(own.url, BUDGETS, timeout=0.1) as limiter:

        @app.websocket("/live", dependencies=[Depends(hold_budget("agent", estimate="0.15", limiter=limiter))])
        async def live(socket: WebSocket) -> None: ...

        own.kill()
        with pytest.raises(InvalidStatus) as caught:
            async with visiting(app):
                raise AssertionError
    assert caught.value.response.status_code == 503
    assert json.loads(caught.value.response.body)["code"] == "store-unavailable"


async def test_a_denied_websocket_is_closed_with_the_reason_if_the_server_cannot_send_handshake_responses(app, limiter):
    echo(app, ends="returned")
    await limiter.record("agent", "0.90")
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/live", "headers": [], "query_string": b"", "subprotocols": []}
    await app(scope, receive, send)
    (closed,) = sent
    assert (closed["type"], closed["code"]) == ("websocket.close", 1008)
    assert closed["reason"] == "agent: budget_exhausted ($0.10 remaining, need $0.15)"


async def test_an_app_can_handle_budget_problems_of_websockets_with_its_own_exception_handler(app, limiter):
    @app.exception_handler(BudgetProblem)
    async def sorry(socket: WebSocket, error: BudgetProblem) -> JSONResponse:
        return JSONResponse({"sorry": error.problem.code}, 402)

    echo(app, ends="returned")
    await limiter.record("agent", "0.90")
    with pytest.raises(InvalidStatus) as caught:
        async with visiting(app):
            raise AssertionError
    assert (caught.value.response.status_code, json.loads(caught.value.response.body)) == (
        402,
        {"sorry": "budget-exceeded"},
    )
