"""Reserving and settling over HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import Response

from ktrdr_budget.api.problems import Problem
from ktrdr_budget.api.requests import has_gone, read_body
from ktrdr_budget.api.responses import JsonResponse, granted, reservation, settlement
from ktrdr_budget.api.routing import Call, Operation
from ktrdr_budget.api.schemas import (
    CommitIn,
    ExtendIn,
    GrowIn,
    Nothing,
    ReservationIn,
    ReservationOut,
    SettlementOut,
    SpendIn,
)
from ktrdr_budget.models import HoldView, Settlement

if TYPE_CHECKING:
    from ktrdr_budget.api.service import Service

__all__ = ["Reservations"]


class Reservations:
    """The operations on holds."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def operations(self) -> list[Operation]:
        """The busiest first, for that is the order in which they are looked for."""
        body = (413, 422)
        made = {201: ReservationOut, 200: ReservationOut}
        hold = "/reservations/{id}"
        settled = {200: SettlementOut}
        return [
            Operation("POST", "/reservations", self.reserve, made, (404, 409, 429, *body), ReservationIn),
            Operation("POST", f"{hold}/commit", self.commit, settled, (404, 409, *body), CommitIn),
            Operation("POST", f"{hold}/release", self.release, settled, (404, 409, *body)),
            Operation("POST", f"{hold}/extend", self.extend, {200: ReservationOut}, (404, 409, 429, *body), ExtendIn),
            Operation("POST", f"{hold}/grow", self.grow, {200: ReservationOut}, (404, 409, 429, *body), GrowIn),
            Operation("GET", hold, self.get_reservation, {200: ReservationOut}, (404, 422)),
            Operation(
                "POST",
                "/spend",
                self.record_spend,
                {201: SettlementOut, 200: SettlementOut},
                (404, 409, *body),
                SpendIn,
            ),
        ]

    async def reserve(self, call: Call) -> Response:
        """Holds an estimate before the work, in every budget or in none.

        With an `id`, a retry is harmless: the same reservation again is answered with 200, as it is now.
        """
        body = await read_body(call.request, call.headers, ReservationIn)
        limiter = self._service.limiter
        hold = await limiter.reserve(
            body.amounts,
            id=body.id,
            ttl=body.ttl,
            on_expiry=body.on_expiry,
            operation=body.operation,
            owner=call.caller.owner,
        )
        location = _location(call.request.scope["path"], hold.id)
        if hold.replayed:
            return JsonResponse(reservation(await limiter.get(hold.id), replayed=True), 200, location)
        if body.id is None and await has_gone(call.request):
            # Nobody knows its id, so nobody could ever settle it.
            await hold.release()
        return JsonResponse(granted(hold, body.on_expiry, body.operation), 201, location)

    async def get_reservation(self, call: Call) -> Response:
        """A hold by its id."""
        return JsonResponse(reservation(await self._service.limiter.get(call.name)))

    async def commit(self, call: Call) -> Response:
        """Records what it really cost: never refused for lack of budget, for being late or for being more.

        An unconfirmed hold is settled by whoever reserved it, or with the admin key.
        """
        body = await read_body(call.request, call.headers, CommitIn)
        if not call.caller.admin:
            await self._seen(call)
        return _settled(await self._service.limiter.commit(call.name, body.amounts))

    async def release(self, call: Call) -> Response:
        """Gives everything back.

        Of an unconfirmed hold, or by an admin who did not reserve it, it stays open to the worker's later commit.
        """
        await read_body(call.request, call.headers, Nothing)
        hold = await self._seen(call)
        operator = call.caller.admin and hold.owner != call.caller.owner
        return _settled(await self._service.limiter.release(call.name, operator=operator))

    async def extend(self, call: Call) -> Response:
        """Heartbeat: a new deadline, and the total of what was used so far."""
        body = await read_body(call.request, call.headers, ExtendIn)
        if not call.caller.admin:
            await self._seen(call)
        return JsonResponse(reservation(await self._service.limiter.extend(call.name, body.ttl, accrued=body.accrued)))

    async def grow(self, call: Call) -> Response:
        """Raises the reservation to new totals, in every budget or in none.

        A total below the present one changes nothing.
        """
        body = await read_body(call.request, call.headers, GrowIn)
        if not call.caller.admin:
            await self._seen(call)
        return JsonResponse(reservation(await self._service.limiter.grow(call.name, body.amounts)))

    async def record_spend(self, call: Call) -> Response:
        """Spend without a reservation: a fact, so never refused for lack of budget.

        With an `id`, a retry is harmless: the same spend again is answered with 200.
        """
        body = await read_body(call.request, call.headers, SpendIn)
        done = await self._service.limiter.record(body.amounts, id=body.id, operation=body.operation)
        reservations = call.request.scope["path"].removesuffix("/spend") + "/reservations"
        return JsonResponse(settlement(done), 200 if done.replayed else 201, _location(reservations, done.id))

    async def _seen(self, call: Call) -> HoldView:
        """The hold, if this caller may settle it.

        Raises:
            Problem: it is unconfirmed or released by hand, and somebody else's.
        """
        hold = await self._service.limiter.get(call.name)
        unresolved = hold.state == "unconfirmed" or hold.released_by_operator
        if unresolved and hold.owner != call.caller.owner and not call.caller.admin:
            state = "released by hand" if hold.released_by_operator else hold.state
            raise Problem(403, "forbidden", f"hold {call.name!r} is {state}, and another's: it needs the admin key")
        return hold


def _location(reservations: str, hold_id: str) -> dict[str, str]:
    """Where a hold can be read. Of all that an id may hold, a path cannot hold but ``/``."""
    return {"Location": f"{reservations}/{hold_id.replace('/', '%2F')}"}


def _settled(done: Settlement) -> Response:
    return JsonResponse(settlement(done))
