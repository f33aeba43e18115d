"""Paths of the service's routes: names may contain ``/``, plain or encoded."""

from __future__ import annotations

from urllib.parse import unquote

import pytest
from fastapi import APIRouter
from starlette.routing import Match

from ktrdr_budget.api.route import BudgetRoute

ROUTER = APIRouter(route_class=BudgetRoute)


@ROUTER.get("/budgets/{name:last_budget}")
@ROUTER.get("/budgets/{name:slashed}/holds")
@ROUTER.get("/reservations/{name:last_hold}")
@ROUTER.post("/reservations/{name:slashed}/commit")
def respond(name: str) -> None: ...


def route_of(method: str, path: str, raw_path: bytes | None) -> tuple[str, str] | None:
    """The route of a request, and the name in its path; ``None`` without a route."""
    scope = {"type": "http", "method": method, "path": path, "raw_path": raw_path, "root_path": ""}
    for route in ROUTER.routes:
        match, found = route.matches(scope)
        if match is Match.FULL:
            return route.path, found["path_params"]["name"]
    return None


@pytest.mark.parametrize(
    ("method", "sent", "route", "name"),
    [
        ("GET", "/budgets/team", "/budgets/{name:last_budget}", "team"),
        ("GET", "/budgets/team/a", "/budgets/{name:last_budget}", "team/a"),
        ("GET", "/budgets/team%2fa", "/budgets/{name:last_budget}", "team/a"),
        ("GET", "/budgets/team/holds", "/budgets/{name:slashed}/holds", "team"),
        ("GET", "/budgets/team%2Fholds", "/budgets/{name:last_budget}", "team/holds"),
        ("GET", "/budgets/team%2Fholds/holds", "/budgets/{name:slashed}/holds", "team/holds"),
        ("GET", "/reservations/a%20b%2Fcommit", "/reservations/{name:last_hold}", "a b/commit"),
        ("POST", "/reservations/a/b/commit", "/reservations/{name:slashed}/commit", "a/b"),
    ],
)
def test_an_encoded_slash_in_a_path_is_read_as_part_of_the_name(method: str, sent: str, route: str, name: str):
    assert route_of(method, unquote(sent), sent.encode()) == (route, name)


def test_a_get_request_to_the_commit_path_of_a_hold_matches_no_route():
    assert route_of("GET", "/reservations/a/commit", b"/reservations/a/commit") is None


@pytest.mark.parametrize("raw_path", [None, b"", b"/v2/team%2Fholds"])
def test_the_route_is_chosen_by_the_decoded_path_if_the_raw_path_is_missing_or_inconsistent(raw_path: bytes | None):
    assert route_of("GET", "/budgets/team/holds", raw_path) == ("/budgets/{name:slashed}/holds", "team")
