"""The service as an app of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from ktrdr_budget.agent.factory import make_agent
from ktrdr_budget.agent.phases import Research
from ktrdr_budget.agent.service import slots
from ktrdr_budget.agent.settings import AgentSettings
from ktrdr_budget.api.agent import agent_router
from ktrdr_budget.api.auth import Keys
from ktrdr_budget.api.openapi import openapi_of
from ktrdr_budget.api.probes import probe_routes
from ktrdr_budget.api.problems import no_such_endpoint, problem_of
from ktrdr_budget.api.router import PREFIX, service_router
from ktrdr_budget.api.service import BudgetService
from ktrdr_budget.api.settings import Settings, load_settings
from ktrdr_budget.engine.batching.pending import Observer
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

_INDEX = {
    "docs": "/docs",
    "openapi": "/openapi.json",
    "api": "/api/v1",
    "agent_budget": "/api/v1/agent/budget",
    "budgets": "/api/v1/budgets",
    "liveness": "/livez",
    "health": "/readyz",
    "metrics": "/metrics",
}
"""The paths that ``/`` lists."""
DESCRIPTION = """One hard spend cap for every replica of a backend that runs LLM agents.

Money is a decimal string in dollars (a number in `/agent/budget`), a count an integer, an instant RFC 3339 in UTC.
Every error is `application/problem+json` with a stable `code`.
"""


def make_limiter(settings: Settings, agent: AgentSettings, observers: Sequence[Observer] = ()) -> AsyncBudgetLimiter:
    """Make a limiter from the settings, with the budgets of the agent.

    Raises:
        InvalidArgument: a setting is invalid.
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
    """Create the service. If the store is unreachable, the app starts anyway, and ``/readyz`` reports the fault.

    ``app.state`` has the ``settings``, the ``metrics`` and, while the app runs, the ``limiter`` and the ``agent``.

    Args:
        settings: the settings of the service. Default: read from the environment.
        agent: the settings of the agent. Default: read from the environment.
        research: the phases of the agent's cycles. Default: the bundled phases.

    Raises:
        SettingsError, InvalidArgument: a setting is invalid.
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
    service = BudgetService(make_limiter(settings, agent, observers), keys, settings.agent_cycle_estimate)
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
        exception_handlers=dict.fromkeys((HTTPException, RequestValidationError, BudgetError, Exception), _reply_error),
    )
    app.state.settings, app.state.metrics, app.state.limiter = settings, metrics, service.limiter
    app.add_api_route("/", _index, methods=["GET", "HEAD"], include_in_schema=False)
    # Not by include_router: FastAPI matches an included router twice, which takes a quarter of a reservation's time.
    app.router.routes[:0] = [
        *service_router(service).routes,
        *agent_router(service, lambda: app.state.agent, PREFIX).routes,
        *probe_routes(lambda: service.limiter, metrics).routes,
    ]
    instrument(app)
    app.openapi = lambda: openapi_of(app)  # type: ignore[method-assign]  # the way that FastAPI documents
    return app


def _version() -> str:
    try:
        return version("ktrdr-budget")
    except PackageNotFoundError:  # a checkout that is not installed
        return "0"


async def _index(request: Request) -> dict[str, str]:
    """List the paths of the service."""
    root = request.scope.get("root_path", "")
    paths = {name: root + path for name, path in _INDEX.items()}
    return {"service": "ktrdr-budget", "version": _version(), **paths}


async def _reply_error(request: Request, error: Exception) -> Response:
    """Reply to an error with a problem document, also on routes that other code adds to the app."""
    if isinstance(error, HTTPException) and error.status_code == 404:
        return no_such_endpoint(request.scope).response()
    return problem_of(error, request.app.state.limiter.budgets).response()
