"""Routes that read budgets, and change their limits."""

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from ktrdr_budget.api.auth import Caller
from ktrdr_budget.api.openapi import problems
from ktrdr_budget.api.route import refuse_body
from ktrdr_budget.api.schemas import (
    AgentBudgetOut,
    BudgetList,
    BudgetName,
    BudgetOut,
    ChangesPage,
    HoldsPage,
    LedgerPage,
    LedgerQuery,
    LimitIn,
    MigrationOut,
    PageQuery,
    ReasonQuery,
    UnavailableBudget,
)
from ktrdr_budget.api.service import BudgetService
from ktrdr_budget.environment import AGENT
from ktrdr_budget.models import Change, HoldView, LedgerEntry, Migration, Page, Status

__all__ = ["add_budget_routes"]

BUDGET = "/budgets/{name:slashed}"


def add_budget_routes(router: APIRouter, service: BudgetService) -> None:
    """Add the routes on budgets."""
    use, admin = [service.use], [service.admin]

    @router.get("/agent/budget", dependencies=use, response_model=AgentBudgetOut, responses=problems(404, 409))
    async def get_agent_budget() -> Response:
        """Read the agent's daily budget, in unrounded JSON numbers."""
        status = await service.limiter.status(AGENT)
        document = AgentBudgetOut.model_validate(status)
        if status.remaining is not None:
            document.cycles_affordable = int(status.remaining // service.cycle_estimate)
        # Pydantic writes small numbers in scientific notation, so the model has strings of digits.
        return Response(re.sub(r'"([0-9]+\.[0-9]+)"', r"\1", document.model_dump_json()), media_type="application/json")

    @router.get("/budgets", dependencies=use)
    async def list_budgets() -> BudgetList:
        """Read every budget at one instant. Budgets with unknown figures are under `unavailable`, with the reason."""
        statuses = await service.limiter.statuses()
        unavailable = statuses.unavailable.items()
        return BudgetList(
            budgets=[BudgetOut.model_validate(status) for status in statuses],
            unavailable=[UnavailableBudget(budget=name, detail=str(error)) for name, error in unavailable],
        )

    @router.get(f"{BUDGET}/holds", dependencies=use, response_model=HoldsPage, responses=problems(404, 409, 422))
    async def list_holds(name: BudgetName, query: Annotated[PageQuery, Query()]) -> Page[HoldView]:
        """List the open holds of a budget, then its unconfirmed holds. Both lists start with the latest deadline."""
        return await service.limiter.holds(name, limit=query.limit, cursor=query.cursor)

    @router.get(f"{BUDGET}/ledger", dependencies=use, response_model=LedgerPage, responses=problems(404, 409, 422))
    async def list_ledger(name: BudgetName, query: Annotated[LedgerQuery, Query()]) -> Page[LedgerEntry]:
        """List the ledger entries of a window, newest first. The sum of all entries is spent + unconfirmed."""
        return await service.limiter.ledger(name, query.window, limit=query.limit, cursor=query.cursor)

    @router.put(f"{BUDGET}/limit", response_model=BudgetOut, responses=problems(404, 409, 413, 422))
    async def set_limit(name: BudgetName, body: LimitIn, caller: Annotated[Caller, service.admin]) -> Status:
        """Set a limit for all replicas: permanently, until an instant, or for the current window.

        The limit overrides the configured limit.
        """
        return await service.limiter.set_limit(name, body.limit, body.until, by=caller.name, reason=body.reason)

    @router.delete(
        f"{BUDGET}/limit",
        dependencies=[*admin, Depends(refuse_body)],
        response_model=BudgetOut,
        responses=problems(404, 409, 413, 422),
    )
    async def clear_limit(
        name: BudgetName, caller: Annotated[Caller, service.admin], query: Annotated[ReasonQuery, Query()]
    ) -> Status:
        """Remove the run-time limit, so that the configured limit applies again."""
        return await service.limiter.clear_limit(name, by=caller.name, reason=query.reason)

    @router.get("/changes", dependencies=admin, response_model=ChangesPage, responses=problems(422))
    async def list_changes(query: Annotated[PageQuery, Query()]) -> Page[Change]:
        """List the changes that were made at run time, newest first: what, by which key, and why."""
        return await service.limiter.changes(query.limit, query.cursor)

    @router.post(
        f"{BUDGET}/migrate",
        dependencies=[*admin, Depends(refuse_body)],
        response_model=MigrationOut,
        responses=problems(404, 413, 422),
    )
    async def migrate(name: BudgetName) -> Migration:
        """Replace the registered definition of a budget by the definition of this service.

        A definition is the unit, kind, period and timezone of a budget. All replicas apply the new definition with
        their next call. An open hold is settled in the window in which it was reserved.
        """
        return await service.limiter.migrate(name)

    @router.get(
        "/budgets/{name:last_budget}", dependencies=use, response_model=BudgetOut, responses=problems(404, 409, 422)
    )
    async def get_budget(name: BudgetName) -> Status:
        """Read a budget's current window."""
        return await service.limiter.status(name)
