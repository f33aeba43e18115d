"""The parts of the OpenAPI document that FastAPI does not derive from the endpoints: problems and headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from ktrdr_budget.api.schemas import InvalidProblem, Problem, RefusedProblem, UnavailableProblem

__all__ = ["Responses", "created", "openapi_of", "problems"]

Responses = dict[int | str, dict[str, Any]]

_HEADERS: Mapping[str, dict[str, Any]] = {
    "Location": {"description": "The URL of the hold.", "required": True, "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds until a retry can succeed.", "schema": {"type": "integer"}},
    "WWW-Authenticate": {"description": "`Bearer`.", "required": True, "schema": {"type": "string"}},
    "RateLimit": {
        "description": "For budgets that count: the remainder (draft-ietf-httpapi-ratelimit-headers).",
        "schema": {"type": "string"},
    },
    "RateLimit-Policy": {
        "description": "For budgets that count: the limit and its window.",
        "schema": {"type": "string"},
    },
}
_PROBLEMS: Mapping[int, tuple[str, type[BaseModel], tuple[str, ...]]] = {
    401: ("The key is missing or unknown.", Problem, ("WWW-Authenticate",)),
    403: ("The key does not permit this operation.", Problem, ()),
    404: ("Unknown budget, hold or key.", Problem, ()),
    409: ("The id or name is in use, or another definition of the budget is registered.", Problem, ()),
    413: ("The body is too large.", Problem, ()),
    422: ("The request is invalid.", InvalidProblem, ()),
    429: (
        "A budget has no room, or the tenant has too many holds or budgets; nothing was written.",
        RefusedProblem,
        ("Retry-After", "RateLimit", "RateLimit-Policy"),
    ),
    503: ("The store is unreachable.", UnavailableProblem, ("Retry-After",)),
}


def problems(*statuses: int, models: Mapping[int, type[BaseModel]] | None = None) -> Responses:
    """Document error responses.

    Args:
        statuses: the HTTP statuses of the responses.
        models: a model for each further status. Its problem documents have additional members on this route.
    """
    responses: Responses = {}
    for status in sorted({*statuses, *(models or {})}):
        description, model, headers = _PROBLEMS[status]
        if models and status in models:
            model = models[status]
            description = (model.__doc__ or description).splitlines()[0]
        responses[status] = {"model": model, "description": description}
        if headers:
            responses[status]["headers"] = {name: _HEADERS[name] for name in headers}
    return responses


def created(model: type[BaseModel]) -> Responses:
    """Document the responses of an operation that creates a hold: 201, and 200 for a replay."""
    location = {"Location": _HEADERS["Location"]}
    replay = {
        "model": model,
        "description": "A replay: the same request succeeded before, and this request changed nothing.",
    }
    return {200: {**replay, "headers": location}, 201: {"headers": location}}


def openapi_of(app: FastAPI) -> dict[str, Any]:
    """Generate the document of an app. Set the media type of problems, because FastAPI declares each model as JSON."""
    if not app.openapi_schema:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                for status, response in operation["responses"].items():
                    if status >= "400" and "application/json" in response["content"]:
                        response["content"] = {"application/problem+json": response["content"]["application/json"]}
        app.openapi_schema = document
    return app.openapi_schema
