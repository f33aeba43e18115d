"""The service as routers for any FastAPI app."""

from __future__ import annotations

from fastapi import APIRouter

from ktrdr_budget.api.auth import Keys
from ktrdr_budget.api.budgets import add_budget_routes
from ktrdr_budget.api.keys import add_key_routes
from ktrdr_budget.api.openapi import problems
from ktrdr_budget.api.probes import probe_routes
from ktrdr_budget.api.reservations import add_reservation_routes
from ktrdr_budget.api.route import BudgetRoute, complete, operation_id
from ktrdr_budget.api.service import BudgetService
from ktrdr_budget.environment import cycle_estimate as cycle_estimate_of_environment
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.money import AmountIn
from ktrdr_budget.telemetry.metrics import LimiterMetrics

__all__ = ["budget_router", "probe_router", "service_router"]

PREFIX = "/api/v1"


def service_router(service: BudgetService, prefix: str = PREFIX) -> APIRouter:
    """The routes of a service."""
    router = APIRouter(
        prefix=prefix,
        route_class=BudgetRoute,
        tags=["budgets"],
        responses=problems(401, 403, 503),
        generate_unique_id_function=operation_id,
    )
    add_reservation_routes(router, service)
    add_budget_routes(router, service)
    add_key_routes(router, service)
    return complete(router)


def budget_router(
    limiter: AsyncBudgetLimiter,
    *,
    keys: Keys | None = None,
    cycle_estimate: AmountIn | None = None,
    prefix: str = PREFIX,
) -> APIRouter:
    """The HTTP interface of a limiter, for ``app.include_router(...)``. Errors are ``application/problem+json``.

    Args:
        limiter: the limiter, which the app starts and closes.
        keys: the keys of the interface. Default: ``KTRDR_API_KEY``, ``KTRDR_ADMIN_KEY`` and ``KTRDR_AUTH``. An app with
            its own authentication passes ``Keys(open_to_all=True)``.
        cycle_estimate: the expected cost of a research cycle, in dollars. Default: ``AGENT_CYCLE_ESTIMATE`` (0.15).
        prefix: the prefix of all paths.
    """
    estimate = cycle_estimate_of_environment() if cycle_estimate is None else cycle_estimate
    return service_router(BudgetService(limiter, Keys.from_environment() if keys is None else keys, estimate), prefix)


def probe_router(limiter: AsyncBudgetLimiter, metrics: LimiterMetrics | None = None) -> APIRouter:
    """The routes ``/livez``, ``/readyz`` and ``/metrics`` of a limiter, for an app without such routes.

    Args:
        limiter: the limiter, which the app starts and closes.
        metrics: the metrics of the limiter. The ``observer`` of the limiter must be ``metrics.observe``. Default: new
            metrics, which have the figures of the store, but no counters.
    """
    if metrics is None:
        metrics = LimiterMetrics()
    if metrics.limiter is not limiter:
        metrics.watch(limiter)
    return probe_routes(lambda: limiter, metrics)
