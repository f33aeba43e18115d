"""The routers in another app."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.api import Keys, budget_router, probe_router
from ktrdr_budget.telemetry.metrics import LimiterMetrics

from .support import V1, connect, problem, reserved


def foreign(limiter: AsyncBudgetLimiter) -> FastAPI:
    """An app that starts and closes a limiter."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with limiter:
            yield

    return FastAPI(lifespan=lifespan)


@pytest.fixture
def limiter(server) -> AsyncBudgetLimiter:
    return AsyncBudgetLimiter(server.url, [Budget("agent", "5.00"), Budget("team/a", 2, unit="calls")])


async def test_the_budget_router_works_in_any_fastapi_app(limiter):
    app = foreign(limiter)
    app.include_router(budget_router(limiter))
    async with app.router.lifespan_context(app), connect(app) as client:
        hold = await reserved(client)
        path = f"{V1}/reservations/{hold['id']}"
        assert (await client.post(f"{path}/commit", json={"amounts": "0.07"})).json()["amounts"] == {"agent": "0.07"}
        assert (await client.get(f"{V1}/agent/budget")).json()["today_spend"] == 0.07
        assert (await client.get(f"{V1}/budgets/team%2Fa")).json()["name"] == "team/a"
        problem(await client.get(f"{V1}/budgets/unknown"), 404, "unknown-budget")
        problem(await client.post(f"{V1}/reservations", json={}), 422, "invalid-request")
        problem(await client.post(f"{V1}/reservations", json={"amounts": {"agent": 9}}), 429, "budget-exceeded")
        wrong = await client.get(f"{V1}/budgets/agent/limit")
        problem(wrong, 405, "method-not-allowed")
        assert wrong.headers["allow"] == "DELETE, PUT"
        assert (await client.get("/nothing")).json() == {"detail": "Not Found"}  # the response of the app itself


async def test_the_dependencies_of_the_app_run_before_the_routes_of_the_router(limiter):
    received = []

    async def login(request: Request) -> None:
        received.append(await request.body())  # the route must still be able to read it
        if request.headers.get("x-user") != "me":
            raise HTTPException(418)

    app = foreign(limiter)
    outer = APIRouter(prefix="/outer")
    outer.include_router(budget_router(limiter, keys=Keys(open_to_all=True), prefix="/inner"))
    app.include_router(outer, dependencies=[Depends(login)])
    async with app.router.lifespan_context(app), connect(app, address="192.0.2.1") as client:
        body = {"amounts": {"agent": "0.15"}, "id": "op_1"}
        assert (await client.post("/outer/inner/reservations", json=body)).status_code == 418
        granted = await client.post("/outer/inner/reservations", json=body, headers={"X-User": "me"})
        assert granted.status_code == 201
        assert granted.headers["location"] == "/outer/inner/reservations/op_1"
        assert len(received) == 2
        assert (await client.get("/outer/inner/budgets")).status_code == 418


async def test_a_mounted_router_reads_its_keys_from_environment_variables(limiter, environment):
    environment.setenv("KTRDR_API_KEY", "use-1")
    environment.setenv("AGENT_CYCLE_ESTIMATE", "0.50")
    app = foreign(limiter)
    app.include_router(budget_router(limiter))
    async with app.router.lifespan_context(app):
        problem(await connect(app).get(f"{V1}/budgets"), 401, "unauthorized")
        answer = await connect(app, key="use-1").get(f"{V1}/agent/budget")
        assert answer.json()["cycles_affordable"] == 10


async def test_a_mounted_router_requires_a_key_from_callers_on_other_machines(limiter):
    app = foreign(limiter)
    app.include_router(budget_router(limiter))
    async with app.router.lifespan_context(app), connect(app, address="192.0.2.1") as client:
        problem(await client.get(f"{V1}/budgets"), 403, "keys-required")


async def test_the_budget_router_works_in_an_app_mounted_under_a_path(limiter):
    inner, app = FastAPI(), foreign(limiter)
    inner.include_router(budget_router(limiter))
    app.mount("/sub", inner)
    async with app.router.lifespan_context(app), connect(app) as client:
        granted = await client.post(f"/sub{V1}/reservations", json={"amounts": {"agent": 1}, "id": "a/commit"})
        assert granted.headers["location"] == f"/sub{V1}/reservations/a%2Fcommit"
        assert (await client.get(granted.headers["location"])).json()["id"] == "a/commit"


async def test_the_budget_router_works_behind_http_middleware(limiter):
    app = foreign(limiter)
    app.include_router(budget_router(limiter))

    @app.middleware("http")
    async def passes_on(request: Request, call_next):
        return await call_next(request)

    async with app.router.lifespan_context(app), connect(app) as client:
        hold = await reserved(client)
        assert (await client.get(f"{V1}/reservations/{hold['id']}")).json() == hold
        problem(await client.post(f"{V1}/reservations", json={"amounts": {"agent": 9}}), 429, "budget-exceeded")


async def test_an_app_can_include_the_probe_router(server):
    metrics = LimiterMetrics()
    limiter = AsyncBudgetLimiter(server.url, [Budget("agent", "5.00")], observer=metrics.observe)
    app = foreign(limiter)
    app.include_router(budget_router(limiter))
    app.include_router(probe_router(limiter, metrics), prefix="/internal")
    async with app.router.lifespan_context(app), connect(app) as client:
        await reserved(client)
        assert (await client.get("/internal/readyz")).json()["status"] == "ready"
        text = (await client.get("/internal/metrics")).text
        assert "agent_budget_remaining_dollars 4.85\n" in text
        assert 'ktrdr_budget_reservations_total{outcome="granted",reason=""} 1.0\n' in text


async def test_the_metrics_route_works_if_the_limiter_has_no_observer(limiter):
    app = foreign(limiter)
    app.include_router(probe_router(limiter))
    async with app.router.lifespan_context(app), connect(app) as client:
        assert "agent_budget_remaining_dollars 5.0\n" in (await client.get("/metrics")).text


async def test_a_request_for_the_agent_budget_gets_404_if_the_limiter_has_no_such_budget(server):
    limiter = AsyncBudgetLimiter(server.url, [Budget("other", 1)])
    app = foreign(limiter)
    app.include_router(budget_router(limiter))
    async with app.router.lifespan_context(app), connect(app) as client:
        problem(await client.get(f"{V1}/agent/budget"), 404, "unknown-budget")


async def test_every_reference_in_the_openapi_document_of_the_app_has_a_target(limiter):
    """Every reference has a target."""
    app = foreign(limiter)
    app.include_router(budget_router(limiter, keys=Keys(["use"], ["admin"])))
    document = app.openapi()

    def references(node) -> set[str]:
        if isinstance(node, list):
            return set().union(*map(references, node))
        if isinstance(node, dict):
            own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
            return own.union(*map(references, node.values()))
        return set()

    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references(document["paths"]) <= known
    assert f"{V1}/budgets/{{name}}/limit" in document["paths"]
    assert document["components"]["securitySchemes"].keys() == {"useKey", "adminKey"}
