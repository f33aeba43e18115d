"""Every error as ``application/problem+json`` (RFC 9457)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from ktrdr_budget.api.responses import JsonResponse, amount_json
from ktrdr_budget.errors import (
    BudgetError,
    BudgetExceeded,
    DefinitionConflict,
    HoldConflict,
    InvalidAmount,
    InvalidArgument,
    StoreUnavailable,
    TooManyBudgets,
    TooManyHolds,
    UnknownBudget,
    UnknownHold,
)
from ktrdr_budget.models import Budget, Denial
from ktrdr_budget.periods import window_at

__all__ = ["PROBLEM_JSON", "Problem", "denied", "no_such_endpoint", "problem_of"]

PROBLEM_JSON = b"application/problem+json"
TYPE_PREFIX = "urn:ktrdr-budget:problem:"
STORE_RETRY_S = 1
DETAIL_CHARACTERS_MAX = 300
_PATH_CHARACTERS_MAX = 200
SF_INTEGER_MAX = 999_999_999_999_999
"""The largest integer of a structured field (RFC 9651)."""

# The first class that an error belongs to: status, code, title.
_MAPPED: tuple[tuple[type[BudgetError], int, str, str], ...] = (
    (UnknownHold, 404, "unknown-hold", "Unknown hold"),
    (UnknownBudget, 404, "unknown-budget", "Unknown budget"),
    (HoldConflict, 409, "hold-conflict", "The id is in use otherwise"),
    # Not the caller's words are at fault, but what two replicas of the service are configured to: a conflict.
    (DefinitionConflict, 409, "budget-mismatch", "Another definition of the budget is registered"),
    (InvalidAmount, 422, "invalid-amount", "Invalid amount"),
    (InvalidArgument, 422, "invalid-argument", "Invalid request"),
    (StoreUnavailable, 503, "store-unavailable", "The store cannot be reached"),
)


class Problem(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        code: a stable name for programs, the last part of the ``type``.
        detail: one line for a person.
        title: the same for every problem of this code; by default the status's own.
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
        super().__init__(detail[:DETAIL_CHARACTERS_MAX])
        self.status = status
        self.code = code
        self.title = title or HTTPStatus(status).phrase
        self.headers = headers or {}
        self.members = members

    def response(self) -> Response:
        """The answer."""
        document = {
            "type": TYPE_PREFIX + self.code,
            "title": self.title,
            "status": self.status,
            "detail": str(self),
            "code": self.code,
            **self.members,
        }
        return JsonResponse(document, self.status, self.headers, PROBLEM_JSON)


def problem_of(error: BudgetError, budgets: Mapping[str, Budget]) -> Problem:
    """How an error of the limiter is told over HTTP."""
    if isinstance(error, BudgetExceeded):
        return denied(error.denial, budgets.get(error.budget))
    if isinstance(error, (TooManyHolds, TooManyBudgets)):
        return _crowded(error)
    for kind, status, code, title in _MAPPED:
        if isinstance(error, kind):
            if isinstance(error, StoreUnavailable):
                retry = {"Retry-After": str(STORE_RETRY_S)}
                return Problem(status, code, str(error), title=title, headers=retry, ambiguous=error.ambiguous)
            return Problem(status, code, str(error), title=title)
    return Problem(500, "internal-error", "internal error; its cause is in the log of the service")


def no_such_endpoint(scope: Mapping[str, Any]) -> Problem:
    """404 for a path that no route answers."""
    path = "".join(character if character.isprintable() else "?" for character in scope["path"])
    if len(path) > _PATH_CHARACTERS_MAX:
        path = path[: _PATH_CHARACTERS_MAX - 1] + "…"
    return Problem(404, "not-found", f"no such endpoint: {scope['method']} {path} (see /docs)")


def _crowded(error: TooManyHolds | TooManyBudgets) -> Problem:
    """The tenant has as many holds or budgets as it may."""
    what = "holds" if isinstance(error, TooManyHolds) else "budgets"
    seconds = getattr(error, "retry_after", None)
    return Problem(
        429,
        f"too-many-{what}",
        str(error),
        title=f"The tenant has too many {what}",
        headers={} if seconds is None else {"Retry-After": str(seconds)},
        reason=f"too_many_{what}",
        retry_after=seconds,
    )


def denied(denial: Denial, budget: Budget | None) -> Problem:
    """Why a budget has no room, and when to come back."""
    figures = ("limit", "spent", "held", "unconfirmed", "remaining", "requested", "fits")
    headers = {} if denial.retry_after is None else {"Retry-After": str(denial.retry_after)}
    if budget is not None and budget.unit != "usd":
        headers |= _rate_limit(denial, budget)
    return Problem(
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


def _rate_limit(denial: Denial, budget: Budget) -> dict[str, str]:
    """The fields of draft-ietf-httpapi-ratelimit-headers-11, structured as RFC 9651 says.

    ``requests`` is the draft's default unit. Its other units have another meaning than ours, so ours goes into a
    parameter of our own, which the draft lets clients ignore. ``t`` must not end after ``Retry-After``: it is the same.
    """
    policy = f'"{budget.name}";q={_integer(denial.limit)}'
    if budget.unit != "requests":
        policy += f';ktrdr-unit="{budget.unit}"'
    window = window_at(budget.period, budget.timezone, time.time_ns() // 1_000_000)
    if window.end_ms is not None:
        policy += f";w={(window.end_ms - window.start_ms) // 1000}"
    limit = f'"{budget.name}";r={_integer(denial.remaining)}'
    if denial.retry_after is not None:
        limit += f";t={denial.retry_after}"
    return {"RateLimit-Policy": policy, "RateLimit": limit}


def _integer(count: object) -> int:
    return min(int(count), SF_INTEGER_MAX)  # type: ignore[call-overload, no-any-return]
