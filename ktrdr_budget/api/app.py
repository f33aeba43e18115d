"""The service as an app of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ktrdr_budget.agent.factory import make_agent
from ktrdr_budget.agent.phases import Research
from ktrdr_budget.agent.service import slots
from ktrdr_budget.agent.settings import AgentSettings
from ktrdr_budget.api.agent import agent_router
from ktrdr_budget.api.auth import Keys
from ktrdr_budget.api.probes import probes
from ktrdr_budget.api.problems import Problem, no_such_endpoint, problem_of
from ktrdr_budget.api.responses import JsonResponse
from ktrdr_budget.api.router import service_router
from ktrdr_budget.api.routing import BudgetRoute
from ktrdr_budget.api.service import Service
from ktrdr_budget.api.settings import Settings, load_settings
from ktrdr_budget.engine.batching.dispatcher import Observer
from ktrdr_budget.errors import BudgetError, StoreUnavailable
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.telemetry.agent_metrics import AgentMetrics
from ktrdr_budget.telemetry.audit import Audit
from ktrdr_budget.telemetry.budget_log import BudgetLog
from ktrdr_budget.telemetry.metrics import LimiterMetrics
from ktrdr_budget.telemetry.outcomes import combined
from ktrdr_budget.telemetry.tracing import configure_tracing, current_trace_id, flush_tracing, instrument, trace_call

__all__ = ["create_app", "make_limiter"]

logger = logging.getLogger("ktrdr_budget")

_CODES = {405: "method-not-allowed"}
_PLACES = {
    "docs": "/docs",
    "openapi": "/openapi.json",
    "api": "/api/v1",
    "agent_budget": "/api/v1/agent/budget",
    "budgets": "/api/v1/budgets",
    "liveness": "/livez",
    "health": "/readyz",
    "metrics": "/metrics",
}
"""What ``/`` answers with."""
DESCRIPTION = """One hard spend cap for every replica of a backend that runs LLM agents.

Money is a decimal string in dollars, a count an integer, an instant RFC 3339 in UTC. Every error is
`application/problem+json` with a stable `code`.
"""


def make_limiter(settings: Settings, agent: AgentSettings, observers: Sequence[Observer] = ()) -> AsyncBudgetLimiter:
    """A limiter as the settings say, with the budgets of the agent; the observers, if any, watch it.

    Raises:
        InvalidArgument: a setting is not usable.
    """
    return AsyncBudgetLimiter(
        settings.store_url,
        (*settings.budgets, slots(agent.max_concurrent_cycles)),
        tenant=settings.tenant,
        timeout=settings.timeout,
        on_store_error=settings.on_store_error,
        lease_slab=settings.lease_slabs,
        data_dir=settings.agent_budget_dir,
        durability=settings.durability,
        max_holds=settings.max_holds,
        max_budgets=settings.max_budgets,
        retention_days=settings.retention_days,
        observer=combined(*observers) if observers else None,
        trace_id=current_trace_id,
    )


def create_app(
    settings: Settings | None = None, agent: AgentSettings | None = None, research: Research | None = None
) -> FastAPI:
    """The service. A store that is down does not hinder its start: ``/readyz`` tells, and it recovers by itself.

    ``app.state`` has its ``settings``, ``metrics`` and, once it runs, its ``limiter`` and its ``agent``.

    Args:
        settings: by default those of the environment.
        agent: likewise.
        research: the phases of the agent's cycles; the bundled ones by default.

    Raises:
        SettingsError, InvalidArgument: one of them is not usable.
    """
    settings = load_settings() if settings is None else settings
    agent = AgentSettings.from_environment() if agent is None else agent
    configure_tracing()
    metrics = LimiterMetrics()
    measures = AgentMetrics(metrics.registry)
    budget_log = BudgetLog()
    observers = [metrics.observe, measures.observe, trace_call, budget_log.observe]
    keys = Keys(settings.use_keys, settings.admin_keys, open_to_all=settings.auth == "none")
    audit = Audit()
    metrics.add(audit)
    service = Service(make_limiter(settings, agent, observers), keys, settings.agent_cycle_estimate)
    metrics.watch(service.limiter)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        limiter = app.state.limiter = service.limiter = make_limiter(settings, agent, observers)
        metrics.watch(limiter)
        budget_log.watch(limiter)
        app.state.agent = make_agent(limiter, agent, settings.agent_cycle_estimate, measures, research)
        try:
            await limiter.start()
        except StoreUnavailable as error:
            logger.warning("starting without the store: %s", error)
        auditing = asyncio.create_task(audit.run(limiter))
        try:
            yield
        finally:
            auditing.cancel()
            await app.state.agent.close()
            await budget_log.drain()
            await limiter.close()
            await asyncio.to_thread(flush_tracing)

    app = FastAPI(
        title="ktrdr-budget",
        version=_version(),
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        exception_handlers={HTTPException: _refused, BudgetError: _failed, Exception: _failed},
    )
    app.state.settings, app.state.metrics, app.state.limiter = settings, metrics, service.limiter
    app.add_api_route("/", _index, methods=["GET", "HEAD"], include_in_schema=False)
    _add_routes(app, probes(service, metrics))
    _add_routes(app, agent_router(lambda: app.state.agent, lambda: service.limiter, keys))
    _add_routes(app, service_router(service))
    instrument(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI, router: APIRouter) -> None:
    """Puts the routes into the app itself, before those of its documentation: they are found faster so."""
    for route in router.routes:
        if isinstance(route, BudgetRoute):
            route.direct = True
    app.router.routes[:0] = router.routes


def _version() -> str:
    try:
        return version("ktrdr-budget")
    except PackageNotFoundError:  # a checkout that is not installed
        return "0"


async def _index(request: Request) -> Response:
    """Where things are, for a person who opens the service's address."""
    root = request.scope.get("root_path", "")
    paths = {name: root + path for name, path in _PLACES.items()}
    return JsonResponse({"service": "ktrdr-budget", "version": _version(), **paths})


# -- errors ------------------------------------------------------------------------------------------------------------


async def _refused(request: Request, error: Exception) -> Response:
    """What no route of ours has answered."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return no_such_endpoint(request.scope).response()
    code = _CODES.get(error.status_code, "http-error")
    return Problem(error.status_code, code, str(error.detail), headers=error.headers).response()


async def _failed(request: Request, error: Exception) -> Response:
    """Also for the routes of others in this app. What is unexpected is logged by the server, not told."""
    if isinstance(error, BudgetError):
        return problem_of(error, request.app.state.limiter.budgets).response()
    return Problem(500, "internal-error", "internal error; its cause is in the log of the service").response()


# -- OpenAPI -----------------------------------------------------------------------------------------------------------


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The app's OpenAPI document, each schema written once: routers that go into any app must write theirs inline."""
    if not app.openapi_schema:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas: dict[str, Any] = document.setdefault("components", {}).setdefault("schemas", {})
        document["paths"] = _hoisted(document["paths"], schemas)
        app.openapi_schema = document
    return app.openapi_schema


def _hoisted(node: Any, schemas: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_hoisted(item, schemas) for item in node]
    if not isinstance(node, dict):
        return node
    found = {name: _hoisted(value, schemas) for name, value in node.items()}
    title = found.get("title", "")
    if found.get("type") != "object" or "properties" not in found or not title:
        return found
    schemas[title] = found
    return {"$ref": f"#/components/schemas/{title}"}
