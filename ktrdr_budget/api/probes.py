"""Routes for orchestrators and Prometheus: without authentication, outside of ``/api/v1``."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from ktrdr_budget.api.problems import HTTPProblem
from ktrdr_budget.api.route import BudgetRoute, complete, operation_id
from ktrdr_budget.api.schemas import Liveness, Readiness, UnreadyProblem
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.telemetry.metrics import LimiterMetrics

__all__ = ["probe_routes"]

_TEXT: dict[str, Any] = {"schema": {"type": "string"}}


def probe_routes(limiter: Callable[[], AsyncBudgetLimiter], metrics: LimiterMetrics) -> APIRouter:
    """The routes ``/livez``, ``/readyz`` and ``/metrics``, also for ``HEAD``, which load balancers use."""
    router = APIRouter(route_class=BudgetRoute, tags=["probes"], generate_unique_id_function=operation_id)

    @router.head("/livez", include_in_schema=False)
    @router.get("/livez")
    async def livez() -> Liveness:
        """Report that the process replies. The reply does not depend on the store."""
        return Liveness(status="alive")

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", responses={503: {"model": UnreadyProblem, "description": "Not ready."}})
    async def readyz() -> Readiness:
        """Check that the store accepts writes, evicts nothing and runs the commands of a reservation."""
        faults = await limiter().check()
        checks = {name: fault or "ok" for name, fault in faults.items()}
        if any(faults.values()):
            detail = "; ".join(f"{name}: {fault}" for name, fault in faults.items() if fault)
            raise HTTPProblem(503, "not-ready", detail, title="Not ready", checks=checks)
        return Readiness.model_validate({"status": "ready", "checks": checks})

    @router.head("/metrics", include_in_schema=False)
    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": _TEXT, "application/openmetrics-text": _TEXT}}},
    )
    async def scrape(request: Request) -> Response:
        """Return metrics for Prometheus, as its text format or OpenMetrics. The figures are read from the store now."""
        text, media_type = await metrics.render(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": media_type})

    return complete(router)
