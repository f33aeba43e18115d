"""What orchestrators and Prometheus ask: open to all, and outside of ``/api/v1``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ktrdr_budget.api.problems import Problem
from ktrdr_budget.api.responses import JsonResponse
from ktrdr_budget.api.routing import BudgetRoute, inline_schema
from ktrdr_budget.api.schemas import Liveness, Readiness, UnreadyProblem

if TYPE_CHECKING:
    from ktrdr_budget.api.service import Service
    from ktrdr_budget.telemetry.metrics import LimiterMetrics

__all__ = ["probes"]

_TEXT: dict[str, Any] = {"schema": {"type": "string"}}


def probes(service: Service, metrics: LimiterMetrics) -> APIRouter:
    """``/livez``, ``/readyz`` and ``/metrics``."""

    async def livez(request: Request) -> Response:
        """Whether the process answers. Depends on nothing else."""
        return JsonResponse({"status": "alive"})

    async def readyz(request: Request) -> Response:
        """Whether the store can be relied on: it takes writes, evicts nothing, runs what a reservation needs."""
        faults = await service.limiter.check()
        checks = {name: fault or "ok" for name, fault in faults.items()}
        if not any(faults.values()):
            return JsonResponse({"status": "ready", "checks": checks})
        detail = "; ".join(f"{name}: {fault}" for name, fault in faults.items() if fault)
        return Problem(503, "not-ready", detail, title="Not ready", checks=checks).response()

    async def scrape(request: Request) -> Response:
        """Metrics for Prometheus, as its text or as OpenMetrics; figures are read from the store now."""
        text, media_type = await metrics.render(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": media_type})

    router = APIRouter(route_class=BudgetRoute, tags=["probes"])
    unready = {"application/problem+json": {"schema": inline_schema(UnreadyProblem)}}
    texts = {"content": {"text/plain": _TEXT, "application/openmetrics-text": _TEXT}}
    _add(router, "/livez", livez, {200: {"model": Liveness}})
    _add(router, "/readyz", readyz, {200: {"model": Readiness}, 503: {"description": "Not ready.", "content": unready}})
    _add(router, "/metrics", scrape, {200: texts}, response_class=Response)
    return router


def _add(
    router: APIRouter, path: str, endpoint: Any, responses: dict[int | str, dict[str, Any]], **options: Any
) -> None:
    router.add_api_route(
        path,
        endpoint,
        methods=["GET"],
        response_model=None,
        operation_id=endpoint.__name__,
        summary=endpoint.__name__.capitalize(),
        responses=responses,
        **options,
    )
    # What balancers ask with, too; the server sends no body then.
    router.add_api_route(path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False)
