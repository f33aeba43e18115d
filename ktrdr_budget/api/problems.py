"""Errors as ``application/problem+json`` (RFC 9457)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from ktrdr_budget.api.schemas import amount_json
from ktrdr_budget.errors import (
    BudgetError,
    BudgetExceeded,
    DefinitionConflict,
    HoldConflict,
    InvalidAmount,
    InvalidArgument,
    KeyConflict,
    StoreUnavailable,
    TooManyBudgets,
    TooManyHolds,
    UnknownBudget,
    UnknownHold,
    UnknownKey,
)
from ktrdr_budget.models import Budget, Denial
from ktrdr_budget.money import Amount
from ktrdr_budget.periods import window_at

__all__ = ["HTTPProblem", "denied", "invalid", "no_such_endpoint", "problem_of"]

TYPE_PREFIX = "urn:ktrdr-budget:problem:"
STORE_RETRY_S = 1
DETAIL_CHARACTERS_MAX = 300
PATH_CHARACTERS_MAX = 200
ERRORS_MAX = 20
SF_INTEGER_MAX = 999_999_999_999_999
"""The largest integer of a structured field (RFC 9651)."""

# Status, code and title of each class; the first matching class counts.
_MAPPED: tuple[tuple[type[BudgetError], int, str, str], ...] = (
    (UnknownHold, 404, "unknown-hold", "Unknown hold"),
    (UnknownBudget, 404, "unknown-budget", "Unknown budget"),
    (UnknownKey, 404, "unknown-key", "Unknown key"),
    (KeyConflict, 409, "key-conflict", "The key cannot be created"),
    (HoldConflict, 409, "hold-conflict", "The id is in use with other contents"),
    # A conflict: the request is valid, but two replicas are configured differently.
    (DefinitionConflict, 409, "budget-mismatch", "Another definition of the budget is registered"),
    (InvalidAmount, 422, "invalid-amount", "Invalid amount"),
    (InvalidArgument, 422, "invalid-argument", "Invalid request"),
    (StoreUnavailable, 503, "store-unavailable", "The store cannot be reached"),
)


class ProblemResponse(JSONResponse):
    """A problem document."""

    media_type = "application/problem+json"

    def render(self, content: Any) -> bytes:
        """Encode in ASCII, because a problem may quote a name with a lone surrogate from the request."""
        return json.dumps(content, separators=(",", ":")).encode()


class HTTPProblem(HTTPException):
    """An error response.

    Args:
        status: the HTTP status.
        code: a stable name for programs, the last part of the ``type``.
        detail: one line for a person.
        title: a short title, the same for every problem with this code. Default: the phrase of the status.
        headers: further header fields.
        members: further members of the document.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        title: str = "",
        headers: Mapping[str, str] | None = None,
        **members: Any,
    ) -> None:
        super().__init__(status, detail[:DETAIL_CHARACTERS_MAX], headers)
        self.code = code
        self.title = title or HTTPStatus(status).phrase
        self.members = members

    def response(self) -> ProblemResponse:
        """Build the response."""
        document = {
            "type": TYPE_PREFIX + self.code,
            "title": self.title,
            "status": self.status_code,
            "detail": self.detail,
            "code": self.code,
            **self.members,
        }
        return ProblemResponse(document, self.status_code, self.headers)


def problem_of(error: Exception, budgets: Mapping[str, Budget]) -> HTTPProblem:
    """The problem that reports an error over HTTP. The text of an unexpected error is only in the server's log."""
    if isinstance(error, HTTPProblem):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        code = "method-not-allowed" if error.status_code == 405 else "http-error"
        return HTTPProblem(error.status_code, code, str(error.detail), headers=error.headers)
    if isinstance(error, BudgetExceeded):
        return denied(error.denial, budgets.get(error.budget))
    if isinstance(error, (TooManyHolds, TooManyBudgets)):
        return _too_many(error)
    for kind, status, code, title in _MAPPED:
        if isinstance(error, kind):
            if isinstance(error, StoreUnavailable):
                retry = {"Retry-After": str(STORE_RETRY_S)}
                return HTTPProblem(status, code, str(error), title=title, headers=retry, ambiguous=error.ambiguous)
            return HTTPProblem(status, code, str(error), title=title)
    return HTTPProblem(500, "internal-error", "internal error; its cause is in the log of the service")


def no_such_endpoint(scope: Scope) -> HTTPProblem:
    """The problem with status 404 for a path without a route."""
    path = "".join(character if character.isprintable() else "?" for character in scope["path"])
    if len(path) > PATH_CHARACTERS_MAX:
        path = path[: PATH_CHARACTERS_MAX - 1] + "…"
    return HTTPProblem(404, "not-found", f"no such endpoint: {scope['method']} {path} (see /docs)")


# -- invalid requests --------------------------------------------------------------------------------------------------


def invalid(place: str, message: str, *path: str) -> RequestValidationError:
    """Make the error for an invalid value that only the limiter can detect. The error looks like Pydantic's."""
    return RequestValidationError([{"loc": (place, *path), "msg": message, "type": "value_error"}])


def _invalid(error: RequestValidationError) -> HTTPProblem:
    errors = [
        {"loc": list(item["loc"]), "msg": item["msg"].removeprefix("Value error, "), "type": item["type"]}
        for item in error.errors()[:ERRORS_MAX]
    ]
    first = errors[0]
    field = ".".join(map(str, first["loc"][1:]))
    detail = f"{field}: {first['msg']}" if field else first["msg"]
    return HTTPProblem(422, "invalid-request", detail, title="Invalid request", errors=errors)


# -- refusals ----------------------------------------------------------------------------------------------------------


def _too_many(error: TooManyHolds | TooManyBudgets) -> HTTPProblem:
    noun = "holds" if isinstance(error, TooManyHolds) else "budgets"
    retry_after_s = getattr(error, "retry_after", None)
    return HTTPProblem(
        429,
        f"too-many-{noun}",
        str(error),
        title=f"The tenant has too many {noun}",
        headers=_retry_after(retry_after_s),
        reason=f"too_many_{noun}",
        retry_after=retry_after_s,
    )


def denied(denial: Denial, budget: Budget | None) -> HTTPProblem:
    """The problem for a denial: the figures of the exhausted budget, and when to retry."""
    figures = ("limit", "spent", "held", "unconfirmed", "remaining", "requested", "fits")
    headers = _retry_after(denial.retry_after)
    if budget is not None and budget.unit != "usd":
        headers |= _rate_limit(denial, budget)
    return HTTPProblem(
        429,
        "budget-exceeded",
        denial.message,
        title="A budget has no room",
        headers=headers,
        budget=denial.budget,
        unit="usd" if budget is None else budget.unit,
        reason=denial.reason,
        **{name: amount_json(getattr(denial, name)) for name in figures},
        retry_after=denial.retry_after,
    )


def _retry_after(seconds: int | None) -> dict[str, str]:
    return {} if seconds is None else {"Retry-After": str(seconds)}


def _rate_limit(denial: Denial, budget: Budget) -> dict[str, str]:
    """The fields of draft-ietf-httpapi-ratelimit-headers-11, structured as RFC 9651 requires.

    ``requests`` is the draft's default unit. None of its other units fits money or tokens, so the budget's unit is an
    extension parameter, which the draft lets clients ignore. ``t`` is the time until the budget is
    available again; the draft forbids a ``t`` greater than ``Retry-After``, and here both are equal.
    """
    policy = f'"{budget.name}";q={_sf_integer(denial.limit)}'
    if budget.unit != "requests":
        policy += f';ktrdr-unit="{budget.unit}"'
    window = window_at(budget.period, budget.timezone, time.time_ns() // 1_000_000)
    if window.end_ms is not None:
        policy += f";w={(window.end_ms - window.start_ms) // 1000}"
    limit = f'"{budget.name}";r={_sf_integer(denial.remaining)}'
    if denial.retry_after is not None:
        limit += f";t={denial.retry_after}"
    return {"RateLimit-Policy": policy, "RateLimit": limit}


def _sf_integer(count: Amount) -> int:
    return min(int(count), SF_INTEGER_MAX)
