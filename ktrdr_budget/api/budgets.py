"""Reading budgets over HTTP, and changing their limits."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from starlette.responses import Response

from ktrdr_budget.api.requests import read_body, read_query
from ktrdr_budget.api.responses import JsonResponse, agent_budget, budget, ledger_entry, reservation
from ktrdr_budget.api.routing import Call, Operation
from ktrdr_budget.api.schemas import (
    AgentBudgetOut,
    BudgetList,
    BudgetOut,
    HoldsPage,
    HoldsQuery,
    LedgerPage,
    LedgerQuery,
    LimitIn,
    MigrationOut,
    Nothing,
)
from ktrdr_budget.api.settings import AGENT

if TYPE_CHECKING:
    from ktrdr_budget.api.service import Service

__all__ = ["Budgets"]


class Budgets:
    """The operations on budgets."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def operations(self) -> list[Operation]:
        """Paths below a name before the name itself, which may hold ``/``."""
        one = "/budgets/{name}"
        found = {200: BudgetOut}
        read, changed = (404, 409, 422), (404, 409, 413, 422)
        return [
            Operation("GET", "/agent/budget", self.get_agent_budget, {200: AgentBudgetOut}, (404, 409)),
            Operation("GET", "/budgets", self.list_budgets, {200: BudgetList}),
            Operation("GET", f"{one}/holds", self.list_holds, {200: HoldsPage}, read, query=HoldsQuery),
            Operation("GET", f"{one}/ledger", self.list_ledger, {200: LedgerPage}, read, query=LedgerQuery),
            Operation("PUT", f"{one}/limit", self.set_limit, found, changed, LimitIn, admin=True),
            Operation("DELETE", f"{one}/limit", self.clear_limit, found, changed, admin=True),
            Operation("POST", f"{one}/migrate", self.migrate, {200: MigrationOut}, (404, 413, 422), admin=True),
            Operation("GET", one, self.get_budget, found, read),
        ]

    async def get_agent_budget(self, call: Call) -> Response:
        """The agent's daily budget, in unrounded JSON numbers."""
        status = await self._service.limiter.status(AGENT)
        return JsonResponse(agent_budget(status, self._service.cycle_estimate))

    async def list_budgets(self, call: Call) -> Response:
        """Every budget, at one instant. One whose figures are unknown is under `unavailable`, with the reason."""
        found = await self._service.limiter.statuses()
        unknown = [{"budget": name, "detail": str(error)} for name, error in found.unavailable.items()]
        return JsonResponse({"budgets": [budget(status) for status in found], "unavailable": unknown})

    async def get_budget(self, call: Call) -> Response:
        """A budget's window now."""
        return JsonResponse(budget(await self._service.limiter.status(call.name)))

    async def list_holds(self, call: Call) -> Response:
        """Open, then unconfirmed holds of a budget, newest deadline first."""
        query = read_query(call.request, HoldsQuery)
        page = await self._service.limiter.holds(call.name, limit=query.limit, cursor=query.cursor)
        return JsonResponse({"holds": [reservation(hold) for hold in page.items], "next_cursor": page.next_cursor})

    async def list_ledger(self, call: Call) -> Response:
        """The entries of a window, newest first; they add up to spent + unconfirmed."""
        query = read_query(call.request, LedgerQuery)
        page = await self._service.limiter.ledger(call.name, query.window, limit=query.limit, cursor=query.cursor)
        entries = [ledger_entry(entry) for entry in page.items]
        return JsonResponse({"entries": entries, "next_cursor": page.next_cursor, "trimmed": page.trimmed})

    async def set_limit(self, call: Call) -> Response:
        """Changes a limit for all replicas: for good, until an instant, or for the current window.

        It wins over configuration.
        """
        body = await read_body(call.request, call.headers, LimitIn)
        return JsonResponse(budget(await self._service.limiter.set_limit(call.name, body.limit, body.until)))

    async def clear_limit(self, call: Call) -> Response:
        """Returns to the configured limit."""
        await read_body(call.request, call.headers, Nothing)
        return JsonResponse(budget(await self._service.limiter.clear_limit(call.name)))

    async def migrate(self, call: Call) -> Response:
        """Replaces the registered unit, kind, period and timezone of a budget by those of this service.

        All replicas obey with their next call. Open holds are settled in the windows that admitted them.
        """
        await read_body(call.request, call.headers, Nothing)
        return JsonResponse(asdict(await self._service.limiter.migrate(call.name)))
