"""Routes that reserve and settle."""

from functools import lru_cache
from typing import Annotated

from fastapi import APIRouter, Body, Request, Response

from ktrdr_budget.api.auth import Caller
from ktrdr_budget.api.openapi import created, problems
from ktrdr_budget.api.problems import HTTPProblem
from ktrdr_budget.api.route import refuse_body
from ktrdr_budget.api.schemas import (
    CommitIn,
    ExtendIn,
    GrowIn,
    HoldId,
    ReservationIn,
    ReservationOut,
    SettlementOut,
    SpendIn,
    amount_json,
    instant_json,
)
from ktrdr_budget.api.service import BudgetService
from ktrdr_budget.limiter import AsyncHold
from ktrdr_budget.models import HoldView, Settlement
from ktrdr_budget.money import from_units
from ktrdr_budget.periods import from_ms

__all__ = ["add_reservation_routes"]

HOLD = "/reservations/{id:slashed}"


def add_reservation_routes(router: APIRouter, service: BudgetService) -> None:
    """Add the routes on holds, the most frequent first, because routes are matched in this order."""

    @router.post(
        "/reservations", status_code=201, responses=created(ReservationOut) | problems(404, 409, 413, 422, 429)
    )
    async def reserve(
        request: Request, response: Response, body: ReservationIn, caller: Annotated[Caller, service.use]
    ) -> ReservationOut:
        """Reserve an estimate before the work, in every named budget or in none.

        If the request has an `id`, a retry is harmless. If the hold was already granted, the response has status 200
        and the present state of the hold.
        """
        hold = await service.limiter.reserve(
            body.amounts,
            id=body.id,
            ttl=body.ttl,
            on_expiry=body.on_expiry,
            operation=body.operation,
            owner=caller.owner,
        )
        response.headers["Location"] = _location(request.scope["path"], hold.id)
        if hold.replayed:
            response.status_code = 200
            view = await service.limiter.get(hold.id)
            return ReservationOut.model_validate(view).model_copy(update={"replayed": True})
        if body.id is None and await request.is_disconnected():
            await hold.release()  # the client never received the id, so it could never settle the hold
        return _granted(hold, body)

    @router.post(f"{HOLD}/commit", response_model=SettlementOut, responses=problems(404, 409, 413, 422))
    async def commit(
        id: HoldId, body: Annotated[CommitIn, Body(default_factory=CommitIn)], caller: Annotated[Caller, service.use]
    ) -> Settlement:
        """Record the actual cost of a hold. A commit is never denied, even if it is late or above the reserved amount.

        An unconfirmed hold can be settled only with the key that reserved the hold, or with the admin key.
        """
        if not caller.admin:
            await _hold_of(caller, id)
        return await service.limiter.commit(id, body.amounts)

    @router.post(f"{HOLD}/release", response_model=SettlementOut, responses=problems(404, 409, 413, 422))
    async def release(id: HoldId, request: Request, caller: Annotated[Caller, service.use]) -> Settlement:
        """Release the whole amount of a hold.

        If the hold was unconfirmed, or if an admin releases the hold of another key, a later commit of the worker still
        counts.
        """
        await refuse_body(request)
        hold = await _hold_of(caller, id)
        operator = caller.admin and hold.owner != caller.owner
        return await service.limiter.release(id, operator=operator)

    @router.post(f"{HOLD}/extend", response_model=ReservationOut, responses=problems(404, 409, 413, 422, 429))
    async def extend(
        id: HoldId, body: Annotated[ExtendIn, Body(default_factory=ExtendIn)], caller: Annotated[Caller, service.use]
    ) -> HoldView:
        """Send a heartbeat: set a new deadline, and report the total cost so far."""
        if not caller.admin:
            await _hold_of(caller, id)
        return await service.limiter.extend(id, body.ttl, accrued=body.accrued)

    @router.post(f"{HOLD}/grow", response_model=ReservationOut, responses=problems(404, 409, 413, 422, 429))
    async def grow(id: HoldId, body: GrowIn, caller: Annotated[Caller, service.use]) -> HoldView:
        """Raise the reserved amounts to new totals, in every named budget or in none.

        A total below the present amount changes nothing.
        """
        if not caller.admin:
            await _hold_of(caller, id)
        return await service.limiter.grow(id, body.amounts)

    @router.get(
        "/reservations/{id:last_hold}",
        dependencies=[service.use],
        response_model=ReservationOut,
        responses=problems(404, 422),
    )
    async def get_reservation(id: HoldId) -> HoldView:
        """Read a hold."""
        return await service.limiter.get(id)

    @router.post(
        "/spend",
        status_code=201,
        dependencies=[service.use],
        response_model=SettlementOut,
        responses=created(SettlementOut) | problems(404, 409, 413, 422),
    )
    async def record_spend(request: Request, response: Response, body: SpendIn) -> Settlement:
        """Record spend without a reservation. Recorded spend is never denied.

        If the request has an `id`, a retry is harmless. If the spend was already recorded, the response has status 200.
        """
        settlement = await service.limiter.record(body.amounts, id=body.id, operation=body.operation)
        reservations = request.scope["path"].removesuffix("/spend") + "/reservations"
        response.headers["Location"] = _location(reservations, settlement.id)
        if settlement.replayed:
            response.status_code = 200
        return settlement

    async def _hold_of(caller: Caller, hold_id: str) -> HoldView:
        """Read a hold that the caller may settle.

        Raises:
            HTTPProblem: the hold is unconfirmed, or released by an operator, and another key reserved it.
        """
        hold = await service.limiter.get(hold_id)
        unresolved = hold.state == "unconfirmed" or hold.released_by_operator
        if unresolved and hold.owner != caller.owner and not caller.admin:
            state = "released by an operator" if hold.released_by_operator else hold.state
            detail = (
                f"hold {hold_id!r} is {state} and was reserved with another key; to settle the hold, use the admin key"
            )
            raise HTTPProblem(403, "forbidden", detail)
        return hold


def _granted(hold: AsyncHold, body: ReservationIn) -> ReservationOut:
    """The response for a new hold. Texts of frequent values are cached."""
    zero = {window.budget: _units_json(0, window.unit) for window, _ in hold.parts}
    return ReservationOut(
        id=hold.id,
        state="open",
        amounts={window.budget: _units_json(units, window.unit) for window, units in hold.parts},
        accrued=zero,
        charged=zero,
        windows={window.budget: window.span.name for window, _ in hold.parts},
        on_expiry=body.on_expiry,
        created_at=_ms_json(hold.deadline_ms - round(hold.ttl * 1000)),
        expires_at=_ms_json(hold.deadline_ms),
        operation=body.operation,
        scope=dict(hold.scope),
    )


@lru_cache(maxsize=4096)
def _units_json(units: int, unit: str) -> str | int:
    return amount_json(from_units(units, unit))


@lru_cache(maxsize=256)
def _second_json(second: int) -> str:
    return instant_json(from_ms(second * 1000))[:-1]


def _ms_json(instant_ms: int) -> str:
    second, milliseconds = divmod(instant_ms, 1000)
    return f"{_second_json(second)}.{milliseconds:03d}Z" if milliseconds else f"{_second_json(second)}Z"


def _location(reservations: str, hold_id: str) -> str:
    """The path of a hold. ``/`` is the only character of an id that a path segment cannot contain."""
    return f"{reservations}/{hold_id.replace('/', '%2F')}"
