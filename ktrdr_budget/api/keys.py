"""Routes that create, list and revoke access keys."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from ktrdr_budget.api.auth import Caller
from ktrdr_budget.api.openapi import problems
from ktrdr_budget.api.route import refuse_body
from ktrdr_budget.api.schemas import (
    AccessKeyOut,
    KeyIn,
    KeyName,
    KeysPage,
    NewKeyOut,
    PageQuery,
    ReasonQuery,
    RevokedKeyOut,
)
from ktrdr_budget.api.service import BudgetService
from ktrdr_budget.models import AccessKey, Page

__all__ = ["add_key_routes"]


def add_key_routes(router: APIRouter, service: BudgetService) -> None:
    """Add the routes on access keys."""

    @router.post("/keys", status_code=201, responses=problems(409, 413, 422))
    async def create_key(response: Response, body: KeyIn, caller: Annotated[Caller, service.admin]) -> NewKeyOut:
        """Create an access key. The response has its secret, which cannot be read again."""
        made = await service.access_keys.create(
            body.name,
            scope=body.scope,
            may_set=body.may_set,
            rights=body.rights,
            expires=body.expires,
            by=caller.name,
            reason=body.reason,
        )
        response.headers["Cache-Control"] = "no-store"
        return NewKeyOut(**AccessKeyOut.model_validate(made.key).model_dump(), secret=made.secret)

    @router.get("/keys", dependencies=[service.admin], response_model=KeysPage, responses=problems(422))
    async def list_keys(query: Annotated[PageQuery, Query()]) -> Page[AccessKey]:
        """List the access keys by name, without their secrets."""
        return await service.access_keys.list(query.limit, query.cursor)

    @router.delete(
        "/keys/{name:slashed}",
        dependencies=[service.admin, Depends(refuse_body)],  # the key is checked first
        responses=problems(404, 413, 422),
    )
    async def revoke_key(
        name: KeyName, caller: Annotated[Caller, service.admin], query: Annotated[ReasonQuery, Query()]
    ) -> RevokedKeyOut:
        """Revoke an access key. The next request with it is refused, on every replica. Its holds stay open."""
        await service.access_keys.revoke(name, by=caller.name, reason=query.reason)
        return RevokedKeyOut(name=name, revoked=True)
