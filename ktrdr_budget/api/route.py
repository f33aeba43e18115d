"""The route class of the service: exact JSON in, problem documents out, names that contain ``/``.

FastAPI has exception handlers only for an app. With a route class, the routers give the same replies in any app.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from decimal import Decimal
from typing import Any, NoReturn
from urllib.parse import unquote

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from ktrdr_budget.api.problems import HTTPProblem, invalid, problem_of
from ktrdr_budget.api.schemas import InvalidJSON
from ktrdr_budget.errors import BudgetError

__all__ = ["BODY_BYTES_MAX", "BUDGETS", "BudgetRequest", "BudgetRoute", "complete", "operation_id", "refuse_body"]

BODY_BYTES_MAX = 65_536
BUDGETS = "ktrdr_budget.budgets"
"""The key of the limiter's budgets in the scope of a request. A denial shows the units of these budgets."""


# -- requests ----------------------------------------------------------------------------------------------------------


class BudgetRequest(Request):
    """A request with a bounded body and exact JSON: 0.1 is read as a ``Decimal``, and a repeated name is an error."""

    async def body(self) -> bytes:
        """Read the body.

        Raises:
            HTTPProblem: 413 if the body is too large.
        """
        if not hasattr(self, "_body"):
            body, more = b"", True
            while more:
                message = await self.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > BODY_BYTES_MAX:
                    raise HTTPProblem(413, "content-too-large", f"the body must be at most {BODY_BYTES_MAX} bytes")
            self._body = body
        return self._body

    async def json(self) -> Any:
        """Parse the body. If that fails, return :class:`InvalidJSON`, so that the key is checked before the body."""
        body = await self.body()
        try:
            return _decode(body.decode())
        except json.JSONDecodeError as error:
            return InvalidJSON(f"{error.msg} (character {error.pos})")
        except UnicodeDecodeError:
            return InvalidJSON("the body is not in UTF-8")
        except _StrictJSONError as error:
            return InvalidJSON(str(error))
        except RecursionError:
            return InvalidJSON("the body is nested too deep")
        except (ValueError, ArithmeticError):
            return InvalidJSON("a number is too long")

    async def is_disconnected(self) -> bool:
        """Whether the client closed the connection. Call this method only after the body was read."""
        # Read uvicorn's flag if there is one: Starlette's check takes a third of the time of a reservation.
        flag = getattr(getattr(self.receive, "__self__", None), "disconnected", None)
        return flag if isinstance(flag, bool) else await super().is_disconnected()


class _StrictJSONError(ValueError):
    """Python's parser accepts the document, but the document is not JSON."""


def _refuse_constant(constant: str) -> NoReturn:
    raise _StrictJSONError(f"{constant} is not a number")


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise _StrictJSONError("an object has the same name twice")
    return document


_decode = json.JSONDecoder(parse_float=Decimal, parse_constant=_refuse_constant, object_pairs_hook=_unique_names).decode


async def refuse_body(request: Request) -> None:
    """Refuse a body other than ``{}``.

    Raises:
        RequestValidationError: the request has another body.
    """
    if await request.body() and await request.json() != {}:
        raise invalid("body", "this operation takes no body")


# -- paths -------------------------------------------------------------------------------------------------------------


class _Slashed(Convertor[str]):
    """A budget's name or a hold's id, which may contain ``/``, plain or as ``%2F``."""

    regex = ".+"

    def convert(self, value: str) -> str:
        return value.replace("%2F", "/")

    def to_string(self, value: str) -> str:
        return value.replace("/", "%2F")


class _LastBudgetName(_Slashed):
    """A budget's name at the end of a path. A final ``/holds`` is not part of the name; a final ``%2Fholds`` is."""

    regex = "(?!.*/(?:holds|ledger|limit|migrate)$).+"


class _LastHoldId(_Slashed):
    """A hold's id at the end of a path."""

    regex = "(?!.*/(?:commit|release|extend|grow)$).+"


register_url_convertor("slashed", _Slashed())
register_url_convertor("last_budget", _LastBudgetName())
register_url_convertor("last_hold", _LastHoldId())


def _keep_encoded_slashes(scope: Scope) -> Scope:
    """Restore each ``%2F`` of the path in the ASGI scope, because the server has decoded ``%2F`` to ``/``."""
    raw_path = scope.get("raw_path") or b""
    if b"%2" not in raw_path:
        return scope
    sent = raw_path.decode("latin-1")
    if unquote(sent) != scope["path"]:  # a middleware has rewritten the path
        return scope
    return {**scope, "path": unquote(re.sub("%2f", "%252F", sent, flags=re.IGNORECASE))}


# -- routes ------------------------------------------------------------------------------------------------------------


class BudgetRoute(APIRoute):
    """A route of the service."""

    methods: set[str]
    allowed_methods: set[str]
    """The methods of all routes with this path."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match the undecoded path. ``team%2Fholds`` is a budget; ``team/holds`` is the list of holds of ``team``."""
        return super().matches(_keep_encoded_slashes(scope))

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reply 405 with the allowed methods if the method is wrong; else reply as FastAPI does."""
        if scope["method"] in self.methods:
            await super().handle(scope, receive, send)
            return
        allowed = ", ".join(sorted(self.allowed_methods))
        detail = f"this path takes {allowed}"
        response = HTTPProblem(405, "method-not-allowed", detail, headers={"Allow": allowed}).response()
        await response(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Pass :class:`BudgetRequest` to FastAPI's handler, and reply to errors with problems."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(BudgetRequest(request.scope, request.receive))
            except (HTTPProblem, BudgetError, RequestValidationError) as error:
                problem = problem_of(error, request.scope.get(BUDGETS, {}))
                return self.problem(problem, error).response()

        return handle

    def problem(self, problem: HTTPProblem, error: Exception) -> HTTPProblem:
        """Adapt a problem to the route."""
        return problem


def operation_id(route: APIRoute) -> str:
    """The id of the operation in OpenAPI: the name of the endpoint."""
    return route.name


def complete(router: APIRouter) -> APIRouter:
    """Complete the routes of a router.

    Set the allowed methods of each path, and document that the admin key serves in place of the use key.
    """
    routes = [route for route in router.routes if isinstance(route, BudgetRoute)]
    for route in routes:
        route.allowed_methods = set().union(*(other.methods for other in routes if other.path == route.path))
        if any(getattr(each.call, "scheme_name", "") == "useKey" for each in route.dependant.dependencies):
            route.openapi_extra = {"security": [{"adminKey": []}]}
    return router
