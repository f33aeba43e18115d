"""How an operation becomes a route: who may call it, where it is, and what OpenAPI says of it.

An endpoint takes the request alone and answers with a response, errors included: FastAPI neither parses nor validates
nor serialises for it, and it works in any app. A name or id may hold ``/``, also unencoded, unless it ends like one of
the paths below it (``/holds``, ``/commit``, …); then its ``/`` is sent as ``%2F``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastapi import APIRouter, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ktrdr_budget.api.auth import Caller, Keys
from ktrdr_budget.api.problems import Problem, no_such_endpoint, problem_of
from ktrdr_budget.api.requests import last_segment
from ktrdr_budget.api.schemas import NAME, InvalidProblem, RefusedProblem, UnavailableProblem
from ktrdr_budget.api.schemas import Problem as ProblemOut
from ktrdr_budget.errors import BudgetError
from ktrdr_budget.limiter import AsyncBudgetLimiter

__all__ = ["BudgetRoute", "Call", "Operation", "add_operations", "inline_schema", "method_not_allowed"]


class Call(NamedTuple):
    """A request, by a caller who may make it."""

    request: Request
    headers: Mapping[bytes, bytes]
    caller: Caller
    name: str
    """The budget's name or the hold's id in the path; empty if there is none."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    handler: Callable[[Call], Awaitable[Response]]
    """Its docstring is the operation's description, its name the operation's id."""
    answers: Mapping[int, type[BaseModel]]
    """The model of each status that is no error; the first is the usual one."""
    problems: Iterable[int] = ()
    """Statuses of errors, besides those that all operations have."""
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    admin: bool = False
    problem_models: Mapping[int, type[BaseModel]] = field(default_factory=dict)
    """What the problems of a status look like, where they tell more than elsewhere."""

    @property
    def collection(self) -> str:
        """The path's first segment."""
        return self.path.split("/")[1]

    @property
    def action(self) -> str:
        """What follows the name in the path, such as ``holds``; empty if nothing does."""
        return self.path.partition("}/")[2]


class BudgetRoute(APIRoute):
    """A route whose wrong methods are problems, too."""

    direct = False
    """Whether nothing of FastAPI has a part in this route: then it is skipped. Only the app's maker can know that."""
    methods: set[str]
    methods_of_path: Mapping[str, Iterable[str]] = {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["method"] not in self.methods:
            response = method_not_allowed(self.methods_of_path.get(self.path, self.methods)).response()
        elif self.direct:
            response = await self.endpoint(Request(scope, receive, send))
        else:
            await super().handle(scope, receive, send)
            return
        await response(scope, receive, send)


def method_not_allowed(methods: Iterable[str]) -> Problem:
    """405, with what is allowed instead."""
    allowed = ", ".join(sorted(methods))
    return Problem(405, "method-not-allowed", f"this path takes {allowed}", headers={"Allow": allowed})


# -- endpoints ---------------------------------------------------------------------------------------------------------


class _Endpoints:
    """Turns handlers into endpoints, and tells which of them a path really means."""

    def __init__(self, operations: Iterable[Operation], keys: Keys, limiter: Callable[[], AsyncBudgetLimiter]) -> None:
        self._keys = keys
        self._limiter = limiter
        self._by_place: dict[tuple[str, str], dict[str, Operation]] = {}
        for operation in operations:
            if "{" in operation.path:
                place = self._by_place.setdefault((operation.collection, operation.action), {})
                place[operation.method] = operation

    def endpoint(self, operation: Operation) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint of an operation."""
        named = "{" in operation.path

        async def endpoint(request: Request) -> Response:
            try:
                scope = request.scope
                headers = dict(scope["headers"])
                caller = self._keys.caller(scope, headers)
                meant, name = self._resolve(operation, scope) if named else (operation, "")
                if meant.admin and not caller.admin:
                    raise Problem(403, "forbidden", "this needs the admin key")
                return await meant.handler(Call(request, headers, caller, name))
            except Problem as problem:
                return problem.response()
            except BudgetError as error:
                return problem_of(error, self._limiter().budgets).response()
            except ClientDisconnect:
                return Problem(400, "disconnected", "the client has gone").response()

        endpoint.__name__ = operation.handler.__name__
        endpoint.__doc__ = operation.handler.__doc__
        return endpoint

    def _resolve(self, operation: Operation, scope: Scope) -> tuple[Operation, str]:
        """What the path means as it was sent: ``team%2Fholds`` is a name, ``team/holds`` are the holds of a team."""
        (name,) = scope["path_params"].values()
        action, last = operation.action, last_segment(scope)
        whole = f"{name}/{action}" if action else name
        meant = last if last != whole and (operation.collection, last) in self._by_place else ""
        if meant != action:
            name = whole.removesuffix(f"/{meant}") if meant else whole
            by_method = self._by_place[operation.collection, meant]
            if operation.method not in by_method:
                raise method_not_allowed(by_method)
            operation = by_method[operation.method]
        if not name:
            raise no_such_endpoint(scope)
        return operation, name


# -- routes ------------------------------------------------------------------------------------------------------------

_USE = HTTPBearer(scheme_name="useKey", description="A key of KTRDR_API_KEY.", auto_error=False)
_ADMIN = HTTPBearer(scheme_name="adminKey", description="A key of KTRDR_ADMIN_KEY.", auto_error=False)
_PROBLEMS: Mapping[int, tuple[str, type[BaseModel], tuple[str, ...]]] = {
    401: ("No key, or an unknown one.", ProblemOut, ("WWW-Authenticate",)),
    403: ("The key does not suffice.", ProblemOut, ()),
    404: ("Unknown budget or hold.", ProblemOut, ()),
    409: ("The id is in use otherwise, or a budget is defined otherwise elsewhere.", ProblemOut, ()),
    413: ("The body is too large.", ProblemOut, ()),
    422: ("The request is not valid.", InvalidProblem, ()),
    429: (
        "A budget has no room, or the tenant has too many holds or budgets; nothing was written.",
        RefusedProblem,
        ("Retry-After", "RateLimit", "RateLimit-Policy"),
    ),
    503: ("The store cannot be reached.", UnavailableProblem, ("Retry-After",)),
}
_HEADERS: Mapping[str, dict[str, Any]] = {
    "Location": {"description": "Where the hold can be read.", "required": True, "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds until trying again can help.", "schema": {"type": "integer"}},
    "WWW-Authenticate": {"description": "`Bearer`.", "required": True, "schema": {"type": "string"}},
    "RateLimit": {
        "description": "For budgets that count: what is left (draft-ietf-httpapi-ratelimit-headers).",
        "schema": {"type": "string"},
    },
    "RateLimit-Policy": {
        "description": "For budgets that count: the limit and its window.",
        "schema": {"type": "string"},
    },
}


def add_operations(
    router: APIRouter, operations: Iterable[Operation], keys: Keys, limiter: Callable[[], AsyncBudgetLimiter]
) -> None:
    """Adds a route for each operation; the router's ``route_class`` is :class:`BudgetRoute`."""
    operations = list(operations)
    endpoints = _Endpoints(operations, keys, limiter)
    methods_of_path: dict[str, list[str]] = {}
    for operation in operations:
        path = operation.path.replace("}", ":path}")
        methods_of_path.setdefault(router.prefix + path, []).append(operation.method)
        status, *_ = operation.answers
        router.add_api_route(
            path,
            endpoints.endpoint(operation),
            methods=[operation.method],
            status_code=status,
            response_model=None,
            operation_id=operation.handler.__name__,
            summary=operation.handler.__name__.replace("_", " ").capitalize(),
            dependencies=_security(operation, keys),
            responses=_responses(operation),
            openapi_extra=_extra(operation),
        )
    for route in router.routes:
        if isinstance(route, BudgetRoute):
            route.methods_of_path = methods_of_path


def _security(operation: Operation, keys: Keys) -> list[Any]:
    """For OpenAPI: the endpoint looks at the key itself, before anything else."""
    if not keys:
        return []
    return [Security(_ADMIN)] if operation.admin else [Security(_USE), Security(_ADMIN)]


def _responses(operation: Operation) -> dict[int | str, dict[str, Any]]:
    responses: dict[int | str, dict[str, Any]] = {}
    for status, model in operation.answers.items():
        again = status == 200 and 201 in operation.answers
        text = "The same was done before; nothing changed." if again else _first_line(model)
        responses[status] = {"model": model, "description": text}
        if operation.method == "POST" and 201 in operation.answers:
            responses[status]["headers"] = {"Location": _HEADERS["Location"]}
    for status in sorted({401, 403, 503, *operation.problems}):
        text, model, headers = _PROBLEMS[status]
        if status in operation.problem_models:
            model = operation.problem_models[status]
            text = _first_line(model)
        responses[status] = {
            "description": text,
            "content": {"application/problem+json": {"schema": inline_schema(model)}},
        }
        if headers:
            responses[status]["headers"] = {name: _HEADERS[name] for name in headers}
    return responses


def _extra(operation: Operation) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if parameters := _parameters(operation):
        extra["parameters"] = parameters
    if operation.body is not None:
        schema = inline_schema(operation.body)
        required = bool(schema.get("required"))
        extra["requestBody"] = {"required": required, "content": {"application/json": {"schema": schema}}}
    return extra


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    parameters = []
    if "{" in operation.path:
        name = operation.path.partition("{")[2].partition("}")[0]
        schema = {"type": "string", "pattern": f"^{NAME}$"}
        text = "It may hold `/`, sent as `%2F`."
        parameters.append({"name": name, "in": "path", "required": True, "description": text, "schema": schema})
    if operation.query is not None:
        for name, schema in inline_schema(operation.query)["properties"].items():
            text = schema.pop("description", "")
            parameters.append({"name": name, "in": "query", "required": False, "description": text, "schema": schema})
    return parameters


def inline_schema(model: type[BaseModel]) -> dict[str, Any]:
    """A model's schema without references, so that it needs no place in the app's components."""
    schema = model.model_json_schema(mode="validation")
    definitions = schema.pop("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolved(definitions[node["$ref"].rpartition("/")[2]])
            return {name: resolved(value) for name, value in node.items()}
        return [resolved(item) for item in node] if isinstance(node, list) else node

    found: dict[str, Any] = resolved(schema)
    return found


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]
