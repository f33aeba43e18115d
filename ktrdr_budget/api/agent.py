"""Routes that trigger, list and cancel research cycles."""

from collections.abc import Callable
from decimal import Decimal
from typing import Annotated

from fastapi import APIRouter, Body, Query, Request

from ktrdr_budget.agent.cycle_store import CycleView
from ktrdr_budget.agent.options import UnusableOption
from ktrdr_budget.agent.service import AgentService, CycleActive, CycleEnded, MoneyDenied, UnknownCycle
from ktrdr_budget.api.agent_schemas import (
    ActiveProblem,
    AgentStatusOut,
    AgentUnavailableProblem,
    CancelledOut,
    CapacityOut,
    CycleOut,
    CyclesOut,
    EndedProblem,
    InvalidTriggerProblem,
    LargeTriggerProblem,
    RefusedTriggerProblem,
    RemainingOut,
    TriggerIn,
    TriggerOut,
)
from ktrdr_budget.api.openapi import problems
from ktrdr_budget.api.problems import HTTPProblem, denied, invalid
from ktrdr_budget.api.route import BudgetRoute, complete, operation_id
from ktrdr_budget.api.schemas import HoldId, PageQuery, instant_json
from ktrdr_budget.api.service import BudgetService
from ktrdr_budget.errors import HoldConflict, StoreUnavailable

__all__ = ["agent_router"]


class TriggerRoute(BudgetRoute):
    """The route that triggers a cycle. Except for 401 and 403, a problem also states why no cycle started."""

    def problem(self, problem: HTTPProblem, error: Exception) -> HTTPProblem:
        """Add the members that describe a refused trigger."""
        if problem.status_code in (401, 403):
            return problem
        reason = problem.members.get("reason") or problem.code.replace("-", "_")
        if isinstance(error, MoneyDenied):
            problem = _exhausted(error)
            reason = "budget_exhausted"
        elif isinstance(error, CycleActive):
            problem = HTTPProblem(409, "active-cycle-exists", str(error))
            reason = "active_cycle_exists"
        elif isinstance(error, HoldConflict):
            reason = "id_conflict"
        elif isinstance(error, StoreUnavailable):
            reason = "budget_unavailable"
        if problem.status_code == 409:
            problem.members["operation_ids"] = error.operation_ids if isinstance(error, CycleActive) else []
        problem.members |= {"triggered": False, "reason": reason, "message": problem.detail}
        return problem


def agent_router(service: BudgetService, agent: Callable[[], AgentService], prefix: str) -> APIRouter:
    """The routes of an agent.

    Args:
        service: the limiter and the keys.
        agent: a function that returns the agent of the app's current run.
        prefix: the prefix of all paths.
    """
    router = APIRouter(
        prefix=prefix,
        route_class=BudgetRoute,
        tags=["agent"],
        responses=problems(401, 403, 503),
        dependencies=[service.use],
        generate_unique_id_function=operation_id,
    )

    async def trigger_cycle(
        request: Request, body: Annotated[TriggerIn, Body(default_factory=TriggerIn)]
    ) -> TriggerOut:
        """Start a research cycle: reserve the estimate and a slot together, or start nothing."""
        if request.url.query:
            raise invalid("query", "a trigger takes no query parameters; send the fields as a JSON body")
        try:
            started = await agent().trigger(
                body.operation_id,
                strategy=body.strategy,
                brief=body.brief,
                model=body.model,
                bypass_gates=body.bypass_gates,
            )
        except UnusableOption as error:
            raise invalid("body", error.message, error.field) from None
        message = f"Research cycle {started.operation_id} {'was started before' if started.replayed else 'started'}"
        return TriggerOut(triggered=True, operation_id=started.operation_id, model=started.model, message=message)

    router.add_api_route(
        "/agent/trigger",
        trigger_cycle,
        methods=["POST"],
        status_code=202,
        responses=problems(
            models={
                409: ActiveProblem,
                413: LargeTriggerProblem,
                422: InvalidTriggerProblem,
                429: RefusedTriggerProblem,
                503: AgentUnavailableProblem,
            }
        ),
        route_class_override=TriggerRoute,
    )

    @router.get("/agent/status")
    async def get_agent_status() -> AgentStatusOut:
        """Read the agent's state, the remaining budget and the free slots. Every replica gives the same reply."""
        found = await agent().status()
        page, budget, slots = found.cycles, found.budget, found.capacity
        active = [_cycle(cycle) for cycle in page.active]
        return AgentStatusOut(
            status=active[0].phase if active else "idle",
            active_cycles=active,
            last_cycle=None if page.last is None else _cycle(page.last),
            budget=None if budget is None else RemainingOut.model_validate(budget),
            capacity=None if slots is None else CapacityOut.model_validate(slots),
            as_of=instant_json(page.as_of),
        )

    @router.get("/agent/cycles", responses=problems(422))
    async def list_cycles(query: Annotated[PageQuery, Query()]) -> CyclesOut:
        """List cycles, newest first. The first page starts with the running cycles; ended cycles follow."""
        page = await agent().cycles(query.limit + 1, query.cursor or "")
        ended = page.ended[: query.limit]
        shown = [*reversed(page.active), *ended] if query.cursor is None else ended
        more = ended[-1].operation_id if len(page.ended) > query.limit else None
        return CyclesOut(cycles=[_cycle(cycle) for cycle in shown], next_cursor=more)

    @router.delete(
        "/agent/cancel/{operation_id:slashed}",
        response_model=CancelledOut,
        responses=problems(404, 422, models={409: EndedProblem}),
    )
    async def cancel_cycle(operation_id: HoldId) -> dict[str, str]:
        """Cancel a cycle on any replica. The spend of the cycle so far is committed."""
        try:
            status = await agent().cancel(operation_id)
        except UnknownCycle as error:
            raise HTTPProblem(404, "unknown-cycle", str(error), title="Unknown cycle") from None
        except CycleEnded as error:
            raise HTTPProblem(
                409,
                "cycle-ended",
                str(error),
                title="The cycle has ended",
                operation_id=error.operation_id,
                cycle_status=error.status,
            ) from None
        message = f"Research cycle {operation_id} {'is cancelled' if status == 'cancelled' else 'is being cancelled'}"
        return {"operation_id": operation_id, "status": status, "message": message}

    return complete(router)


def _exhausted(error: MoneyDenied) -> HTTPProblem:
    """The problem for a denied trigger: ``reason`` is always the same; ``denial_reason`` is the precise reason."""
    problem = denied(error.denial, None)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    members = {**problem.members, "denial_reason": error.denial.reason, "retry_after": error.retry_after}
    return HTTPProblem(429, problem.code, str(error), title=problem.title, headers=headers, **members)


def _cycle(cycle: CycleView) -> CycleOut:
    progress = cycle.progress
    request = progress.get("request") or {}
    return CycleOut(
        operation_id=cycle.operation_id,
        status=cycle.status,
        phase=progress["phase"],
        started_at=instant_json(cycle.started_at),
        ended_at=None if cycle.ended_at is None else instant_json(cycle.ended_at),
        elapsed_seconds=round(cycle.elapsed_s, 3),
        spend=f"{Decimal(progress['spend']):f}",
        estimate=f"{Decimal(progress['estimate']):f}",
        tokens=progress["tokens"],
        strategy_name=progress["strategy_name"],
        model=progress.get("model"),  # replicas of earlier versions write no model
        brief=request.get("brief"),
        bypass_gates=bool(request.get("bypass_gates")),
        gates=progress["gates"],
        outcome=cycle.outcome,
        reason=cycle.reason,
        error=progress["error"],
        results=progress["results"],
        replica=progress["replica"],
        trace_id=progress["trace_id"],
    )
