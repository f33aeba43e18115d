"""The agent over HTTP: triggering, watching and cancelling research cycles."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from ktrdr_budget.agent.cycle import OPERATION_TYPE
from ktrdr_budget.agent.cycle_store import CycleView
from ktrdr_budget.agent.options import UnusableOption
from ktrdr_budget.agent.service import AgentService, CycleActive, CycleEnded, MoneyDenied, UnknownCycle
from ktrdr_budget.api.agent_schemas import (
    ActiveProblem,
    AgentStatusOut,
    AgentUnavailableProblem,
    CancelledOut,
    CyclesOut,
    CyclesQuery,
    EndedProblem,
    InvalidTriggerProblem,
    LargeTriggerProblem,
    RefusedTriggerProblem,
    TriggerIn,
    TriggerOut,
)
from ktrdr_budget.api.auth import Keys
from ktrdr_budget.api.problems import Problem, denied, problem_of
from ktrdr_budget.api.requests import invalid, read_body, read_query
from ktrdr_budget.api.responses import JsonResponse, amount_json, instant_json
from ktrdr_budget.api.routing import BudgetRoute, Call, Operation, add_operations
from ktrdr_budget.errors import BudgetError, HoldConflict, StoreUnavailable

if TYPE_CHECKING:
    from ktrdr_budget.limiter import AsyncBudgetLimiter

__all__ = ["agent_router"]


def agent_router(
    agent: Callable[[], AgentService], limiter: Callable[[], AsyncBudgetLimiter], keys: Keys, prefix: str = "/api/v1"
) -> APIRouter:
    """The operations of an agent.

    Args:
        agent: tells the service of the app's present run.
        limiter: likewise.
        keys: who may do what.
        prefix: of all paths.
    """
    router = APIRouter(prefix=prefix, route_class=BudgetRoute, tags=["agent"])
    add_operations(router, _Agent(agent).operations(), keys, limiter)
    return router


class _Agent:
    def __init__(self, agent: Callable[[], AgentService]) -> None:
        self._agent = agent

    def operations(self) -> list[Operation]:
        refused: dict[int, type[BaseModel]] = {
            409: ActiveProblem,
            413: LargeTriggerProblem,
            422: InvalidTriggerProblem,
            429: RefusedTriggerProblem,
            503: AgentUnavailableProblem,
        }
        return [
            Operation(
                "POST",
                "/agent/trigger",
                self.trigger_cycle,
                {202: TriggerOut},
                (409, 413, 422, 429),
                TriggerIn,
                problem_models=refused,
            ),
            Operation("GET", "/agent/status", self.get_agent_status, {200: AgentStatusOut}),
            Operation("GET", "/agent/cycles", self.list_cycles, {200: CyclesOut}, (422,), query=CyclesQuery),
            Operation(
                "DELETE",
                "/agent/cancel/{operation_id}",
                self.cancel_cycle,
                {200: CancelledOut},
                (404, 409),
                problem_models={409: EndedProblem},
            ),
        ]

    async def trigger_cycle(self, call: Call) -> Response:
        """Begins a research cycle: reserves its estimate and a slot, all or none."""
        try:
            if call.request.scope["query_string"]:
                raise invalid("query", "this takes no query parameters; send the fields as a JSON body")
            body = await read_body(call.request, call.headers, TriggerIn)
            started = await self._agent().trigger(
                body.operation_id,
                strategy=body.strategy,
                brief=body.brief,
                model=body.model,
                bypass_gates=body.bypass_gates,
            )
        except Problem as problem:
            raise _not_triggered(problem) from None
        except UnusableOption as error:
            raise _not_triggered(invalid("body", error.message, error.field)) from None
        except BudgetError as error:
            raise _refused(error) from None
        message = f"Research cycle {started.operation_id} {'was started before' if started.replayed else 'started'}"
        answer = {
            "triggered": True,
            "operation_id": started.operation_id,
            "model": started.model,
            "message": message,
        }
        return JsonResponse(answer, 202)

    async def get_agent_status(self, call: Call) -> Response:
        """What the agent is doing, and how much money and how many cycles are left; every replica answers the same."""
        found = await self._agent().status()
        page, budget, slots = found.cycles, found.budget, found.capacity
        active = [_cycle(cycle) for cycle in page.active]
        status = {
            "status": active[0]["phase"] if active else "idle",
            "active_cycles": active,
            "last_cycle": None if page.last is None else _cycle(page.last),
            "budget": budget and {"remaining": amount_json(budget.remaining), "daily_limit": amount_json(budget.limit)},
            "capacity": slots and {"active": slots.held, "free": slots.remaining, "limit": slots.limit},
            "as_of": instant_json(page.as_of),
        }
        return JsonResponse(status)

    async def list_cycles(self, call: Call) -> Response:
        """Cycles: on the first page those that run, then those that have ended, newest first."""
        query = read_query(call.request, CyclesQuery)
        page = await self._agent().cycles(query.limit + 1, query.cursor or "")
        ended = page.ended[: query.limit]
        shown = [*reversed(page.active), *ended] if query.cursor is None else ended
        more = ended[-1].operation_id if len(page.ended) > query.limit else None
        return JsonResponse({"cycles": [_cycle(cycle) for cycle in shown], "next_cursor": more})

    async def cancel_cycle(self, call: Call) -> Response:
        """Stops a cycle, on whatever replica it runs; what it has used is committed."""
        operation_id = call.name
        try:
            status = await self._agent().cancel(operation_id)
        except UnknownCycle as error:
            raise Problem(404, "unknown-cycle", str(error), title="Unknown cycle") from None
        except CycleEnded as error:
            raise Problem(
                409,
                "cycle-ended",
                str(error),
                title="The cycle has ended",
                operation_id=error.operation_id,
                cycle_status=error.status,
            ) from None
        message = f"Research cycle {operation_id} {'is cancelled' if status == 'cancelled' else 'is being cancelled'}"
        return JsonResponse({"operation_id": operation_id, "status": status, "message": message})


def _refused(error: BudgetError) -> Problem:
    """Why a trigger has begun nothing."""
    if isinstance(error, MoneyDenied):
        return _exhausted(error)
    if isinstance(error, CycleActive):
        active = Problem(409, "active-cycle-exists", str(error), operation_ids=error.operation_ids)
        return _not_triggered(active, "active_cycle_exists")
    problem = problem_of(error, {})
    if problem.status == 409:
        problem.members["operation_ids"] = []
    told = {HoldConflict: "id_conflict", StoreUnavailable: "budget_unavailable"}
    return _not_triggered(problem, next((reason for kind, reason in told.items() if isinstance(error, kind)), ""))


def _not_triggered(problem: Problem, reason: str = "") -> Problem:
    """The same problem as the answer of a trigger; by default its reason is its code."""
    told = reason or problem.members.get("reason") or problem.code.replace("-", "_")
    problem.members |= {"triggered": False, "reason": told, "message": str(problem)}
    return problem


def _exhausted(error: MoneyDenied) -> Problem:
    """As any denial, with the one reason that triggers know; the finer one is ``denial_reason``."""
    problem = denied(error.denial, None)
    told = {"triggered": False, "reason": "budget_exhausted", "denial_reason": error.denial.reason}
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    members = {**problem.members, **told, "message": str(error), "retry_after": error.retry_after}
    return Problem(429, problem.code, str(error), title=problem.title, headers=headers, **members)


def _cycle(cycle: CycleView) -> dict[str, Any]:
    progress = cycle.progress
    request = progress.get("request") or {}
    return {
        "operation_id": cycle.operation_id,
        "operation_type": OPERATION_TYPE,
        "status": cycle.status,
        "phase": progress["phase"],
        "started_at": instant_json(cycle.started_at),
        "ended_at": None if cycle.ended_at is None else instant_json(cycle.ended_at),
        "elapsed_seconds": round(cycle.elapsed_s, 3),
        "spend": amount_json(Decimal(progress["spend"])),
        "estimate": amount_json(Decimal(progress["estimate"])),
        "tokens": progress["tokens"],
        "strategy_name": progress["strategy_name"],
        "model": progress.get("model"),  # the record may be of a replica of an earlier version
        "brief": request.get("brief"),
        "bypass_gates": bool(request.get("bypass_gates")),
        "gates": progress["gates"],
        "outcome": cycle.outcome,
        "reason": cycle.reason,
        "error": progress["error"],
        "results": progress["results"],
        "replica": progress["replica"],
        "trace_id": progress["trace_id"],
    }
