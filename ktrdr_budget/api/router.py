"""The service as routers for any FastAPI app."""

from __future__ import annotations

from fastapi import APIRouter

from ktrdr_budget.api.auth import Keys
from ktrdr_budget.api.budgets import Budgets
from ktrdr_budget.api.probes import probes
from ktrdr_budget.api.reservations import Reservations
from ktrdr_budget.api.routing import BudgetRoute, add_operations
from ktrdr_budget.api.service import Service
from ktrdr_budget.environment import cycle_estimate as cycle_estimate_of_environment
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.money import AmountIn
from ktrdr_budget.telemetry.metrics import LimiterMetrics

__all__ = ["budget_router", "probe_router", "service_router"]

PREFIX = "/api/v1"


def service_router(service: Service, prefix: str = PREFIX) -> APIRouter:
    """The operations of a service."""
    router = APIRouter(prefix=prefix, route_class=BudgetRoute, tags=["budgets"])
    operations = [*Reservations(service).operations(), *Budgets(service).operations()]
    add_operations(router, operations, service.keys, lambda: service.limiter)
    return router


def budget_router(
    limiter: AsyncBudgetLimiter,
    *,
    keys: Keys | None = None,
    cycle_estimate: AmountIn | None = None,
    prefix: str = PREFIX,
) -> APIRouter:
    """The HTTP interface of a limiter, for ``app.include_router(...)``. Errors are ``application/problem+json``.

    Args:
        limiter: the app starts and closes it.
        keys: who may do what; by default as ``KTRDR_API_KEY``, ``KTRDR_ADMIN_KEY`` and ``KTRDR_AUTH`` say. An app that
            asks for its own credentials gives ``Keys(open_to_all=True)``.
        cycle_estimate: dollars that one research cycle is expected to cost; by default ``AGENT_CYCLE_ESTIMATE`` (0.15).
        prefix: of all paths.
    """
    estimate = cycle_estimate_of_environment() if cycle_estimate is None else cycle_estimate
    return service_router(Service(limiter, Keys.from_environment() if keys is None else keys, estimate), prefix)


def probe_router(limiter: AsyncBudgetLimiter, metrics: LimiterMetrics | None = None) -> APIRouter:
    """``/livez``, ``/readyz`` and ``/metrics`` of a limiter, for an app that has none of its own.

    Args:
        limiter: the app starts and closes it.
        metrics: whose ``observe`` is the limiter's ``observer``; without them, only the store's figures are told.
    """
    if metrics is None:
        metrics = LimiterMetrics()
    if metrics.limiter is not limiter:
        metrics.watch(limiter)
    return probes(Service(limiter, Keys(), "1"), metrics)
