"""Every error is application/problem+json with its reason."""

from __future__ import annotations

import json
import re

import httpx
import pytest

from ktrdr_budget import Budget, BudgetError, Denial
from ktrdr_budget.api.problems import denied as denied_problem
from ktrdr_budget.api.problems import problem_of
from ktrdr_budget.api.route import BODY_BYTES_MAX

from ..helpers.stopwatch import Stopwatch
from ..helpers.waiting import until
from .support import V1, connect, problem, reserved

JSON = {"Content-Type": "application/json"}


# -- unknown paths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/nothing", V1, f"{V1}/", f"{V1}/budget", f"{V1}/agent", "/docs/x", "/livez/x"])
async def test_an_unknown_path_is_not_found(client, path):
    document = problem(await client.get(path), 404, "not-found")
    assert document["detail"] == f"no such endpoint: GET {path} (see /docs)"


async def test_a_404_response_shortens_a_long_path_and_replaces_control_characters(client):
    document = problem(await client.post("/%1b[2J" + "x" * 5_000), 404, "not-found")
    assert document["detail"].startswith("no such endpoint: POST /?[2Jxxx")
    assert document["detail"].endswith("x… (see /docs)")


@pytest.mark.parametrize("path", ["budgets/", "budgets//holds", "reservations/"])
async def test_a_path_with_an_empty_name_is_not_found(client, path):
    document = problem(await client.get(f"{V1}/{path}"), 404, "not-found")
    assert document["detail"] == f"no such endpoint: GET {V1}/{path} (see /docs)"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/agent/budget", "GET"),
        ("POST", "/budgets", "GET"),
        ("POST", "/budgets/agent", "GET"),
        ("PUT", "/budgets/agent/holds", "GET"),
        ("GET", "/budgets/agent/limit", "DELETE, PUT"),
        ("POST", "/budgets/agent/limit", "DELETE, PUT"),
        ("PUT", "/budgets/team%2Flimit", "GET"),
        ("GET", "/reservations", "POST"),
        ("PATCH", "/reservations/op_1", "GET"),
        ("GET", "/reservations/op_1/commit", "POST"),
        ("POST", "/reservations/op_1%2Fcommit", "GET"),
        ("OPTIONS", "/spend", "POST"),
        ("QUERY", "/budgets", "GET"),
    ],
)
async def test_the_refusal_of_a_wrong_method_lists_the_allowed_methods(client, method, path, allowed):
    response = await client.request(method, V1 + path)
    problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == allowed


async def test_the_probes_refuse_post_requests(client):
    for path in ("/livez", "/readyz", "/metrics"):
        problem(await client.post(path), 405, "method-not-allowed")


# -- unknown names ----------------------------------------------------------------------------------------------------


async def test_an_unknown_budget_is_not_found(client):
    for path in ("", "/holds", "/ledger"):
        problem(await client.get(f"{V1}/budgets/unknown{path}"), 404, "unknown-budget")
    problem(await client.put(f"{V1}/budgets/unknown/limit", json={"limit": 1}), 404, "unknown-budget")
    problem(await client.delete(f"{V1}/budgets/unknown/limit"), 404, "unknown-budget")
    for path in ("reservations", "spend"):
        problem(await client.post(f"{V1}/{path}", json={"amounts": {"unknown": 1}}), 404, "unknown-budget")


async def test_an_unknown_hold_is_not_found(client):
    problem(await client.get(f"{V1}/reservations/op_1"), 404, "unknown-hold")
    for path, body in (("commit", {}), ("release", {}), ("extend", {}), ("grow", {"amounts": {"agent": 1}})):
        problem(await client.post(f"{V1}/reservations/op_1/{path}", json=body), 404, "unknown-hold")


async def test_a_commit_for_a_budget_missing_from_the_hold_gets_404(client):
    hold = await reserved(client)
    done = await client.post(f"{V1}/reservations/{hold['id']}/commit", json={"amounts": {"cycles": 1}})
    problem(done, 404, "unknown-budget")


# -- what is not valid -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, ["body", "amounts"]),
        ([], ["body"]),
        (None, ["body"]),
        ("0.15", ["body"]),
        ({"amounts": {}}, ["body", "amounts"]),
        ({"amounts": "0.15"}, ["body", "amounts"]),
        ({"amounts": {"agent": True}}, ["body", "amounts"]),
        ({"amounts": {"agent": None}}, ["body", "amounts"]),
        ({"amounts": {"agent": {}}}, ["body", "amounts"]),
        ({"amounts": {"agent": "NaN"}}, ["body", "amounts"]),
        ({"amounts": {"agent": "Infinity"}}, ["body", "amounts"]),
        ({"amounts": {"agent": " 1"}}, ["body", "amounts"]),
        ({"amounts": {"agent": "1_0"}}, ["body", "amounts"]),
        ({"amounts": {"agent": "-1"}}, ["body", "amounts"]),
        ({"amounts": {"agent": "\u0661"}}, ["body", "amounts"]),
        ({"amounts": {"a b": 1}}, ["body", "amounts"]),
        ({"amounts": {"": 1}}, ["body", "amounts"]),
        ({"amounts": {f"b{number}": 1 for number in range(65)}}, ["body", "amounts"]),
        ({"amounts": {"agent": 1}, "id": "a b"}, ["body", "id"]),
        ({"amounts": {"agent": 1}, "id": ""}, ["body", "id"]),
        ({"amounts": {"agent": 1}, "id": "x" * 129}, ["body", "id"]),
        ({"amounts": {"agent": 1}, "id": 7}, ["body", "id"]),
        ({"amounts": {"agent": 1}, "ttl": 0}, ["body", "ttl"]),
        ({"amounts": {"agent": 1}, "ttl": 86401}, ["body", "ttl"]),
        ({"amounts": {"agent": 1}, "ttl": "60"}, ["body", "ttl"]),
        ({"amounts": {"agent": 1}, "ttl": True}, ["body", "ttl"]),
        ({"amounts": {"agent": 1}, "on_expiry": "forget"}, ["body", "on_expiry"]),
        ({"amounts": {"agent": 1}, "operation": "x" * 257}, ["body", "operation"]),
        ({"amounts": {"agent": 1}, "operation": 7}, ["body", "operation"]),
        ({"amounts": {"agent": 1}, "operation": "\ud800"}, ["body", "operation"]),
        ({"amounts": {"agent": 1}, "owner": "me"}, ["body", "owner"]),
    ],
)
async def test_the_refusal_of_an_invalid_body_shows_the_location_of_the_error(client, body, where):
    response = await client.post(f"{V1}/reservations", content=json.dumps(body), headers=JSON)
    document = problem(response, 422, "invalid-request")
    assert document["errors"][0]["loc"] == where
    assert document["errors"][0]["msg"]
    assert document["errors"][0]["type"]
    assert "Value error" not in document["detail"]


@pytest.mark.parametrize(
    ("amounts", "code"),
    [
        ({"agent": 0}, "invalid-amount"),
        ({"agent": -1}, "invalid-amount"),
        ({"agent": "9007199.254740992"}, "invalid-amount"),
        ({"agent": "1e99"}, "invalid-amount"),
        ({"cycles": 1.5}, "invalid-amount"),
        ({"cycles": "0.5"}, "invalid-amount"),
        ({"agent": int("9" * 4000)}, "invalid-amount"),
    ],
)
async def test_an_amount_outside_the_range_or_precision_of_the_budget_is_refused(client, amounts, code):
    response = await client.post(f"{V1}/reservations", json={"amounts": amounts})
    assert len(problem(response, 422, code)["detail"]) <= 300


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not JSON"),
        (b"nonsense", "not JSON"),
        (b'{"amounts": {"agent": NaN}}', "NaN is not a number"),
        (b'{"amounts": {"agent": -Infinity}}', "-Infinity is not a number"),
        (b'{"amounts": {"agent": 1, "agent": 2}}', "the same name twice"),
        (b'{"amounts": {"agent": 1}} x', "not JSON"),
        (b"\xff\xfe", "not in UTF-8"),
        (b'\xef\xbb\xbf{"amounts": {"agent": 1}}', "not JSON"),
        (b"[" * 20_000 + b"]" * 20_000, "nested too deep"),
        (b'{"amounts": {"agent": ' + b"9" * 5000 + b"}}", "a number is too long"),
        (b'{"amounts": {"agent": 1e99999999999999999999}}', "a number is too long"),
    ],
)
async def test_an_invalid_json_body_is_refused(client, content, words):
    document = problem(await client.post(f"{V1}/reservations", content=content, headers=JSON), 422, "invalid-request")
    assert words in document["detail"]
    assert "sys." not in document["detail"]


@pytest.mark.parametrize(
    "media_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", "", "json"]
)
async def test_a_body_without_a_json_media_type_is_refused(client, media_type):
    response = await client.post(
        f"{V1}/reservations", content=b'{"amounts": {"agent": 1}}', headers={"Content-Type": media_type}
    )
    problem(response, 422, "invalid-request")


@pytest.mark.parametrize("media_type", ["application/json;charset=utf-8", "Application/JSON", "application/a+json"])
async def test_a_body_may_have_any_json_media_type(client, media_type):
    response = await client.post(
        f"{V1}/reservations", content=b'{"amounts": {"agent": 1}}', headers={"Content-Type": media_type}
    )
    assert response.status_code == 201


async def test_a_body_above_the_size_limit_is_refused(client):
    body = b'{"amounts": {"agent": 1}, "operation": "' + b"x" * BODY_BYTES_MAX + b'"}'
    problem(await client.post(f"{V1}/reservations", content=body, headers=JSON), 413, "content-too-large")

    async def in_pieces():
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    response = await client.post(f"{V1}/reservations", content=in_pieces(), headers=JSON)
    problem(response, 413, "content-too-large")
    just_fits = b'{"amounts": {"agent": 1}}'.ljust(BODY_BYTES_MAX)
    assert (await client.post(f"{V1}/reservations", content=just_fits, headers=JSON)).status_code == 201


@pytest.mark.parametrize("name", ["a%20b", "%ff", "x" * 129, "%E2%82%AC"])
async def test_an_invalid_name_in_a_path_is_refused(client, name):
    problem(await client.get(f"{V1}/budgets/{name}"), 422, "invalid-argument")
    problem(await client.get(f"{V1}/reservations/{name}"), 422, "invalid-argument")


# -- denials -----------------------------------------------------------------------------------------------------------


async def test_a_denial_shows_the_reason_and_the_seconds_until_a_retry(client):
    await client.post(f"{V1}/spend", json={"amounts": {"agent": "4.90"}})
    denied = await client.post(f"{V1}/reservations", json={"amounts": {"agent": "0.15"}})
    document = problem(denied, 429, "budget-exceeded")
    assert document["detail"] == "agent: budget_exhausted ($0.10 remaining, need $0.15)"
    assert document["budget"] == "agent"
    assert document["unit"] == "usd"
    assert document["reason"] == "budget_exhausted"
    assert (document["limit"], document["spent"], document["held"]) == ("5.00", "4.90", "0.00")
    assert (document["unconfirmed"], document["remaining"]) == ("0.00", "0.10")
    assert (document["requested"], document["fits"]) == ("0.15", "0.10")
    assert 0 < document["retry_after"] <= 86_400
    assert denied.headers["retry-after"] == str(document["retry_after"])
    assert "ratelimit" not in denied.headers  # money has no unit there


async def test_the_denial_of_a_request_above_the_whole_limit_suggests_no_retry(client):
    denied = await client.post(f"{V1}/reservations", json={"amounts": {"agent": "6"}})
    assert problem(denied, 429, "budget-exceeded")["retry_after"] is None
    assert "retry-after" not in denied.headers


async def test_the_denial_suggests_a_retry_at_the_first_deadline_if_open_holds_fill_the_budget(client):
    await reserved(client, {"agent": "5"}, ttl=30)
    denied = await client.post(f"{V1}/reservations", json={"amounts": {"agent": "0.15"}})
    document = problem(denied, 429, "budget-exceeded")
    assert document["reason"] == "budget_held"
    assert 25 <= document["retry_after"] <= 30


async def test_a_denial_by_a_budget_in_requests_or_cycles_has_rate_limit_headers(client):
    await client.post(f"{V1}/spend", json={"amounts": {"calls": 1, "cycles": 3}})
    denied = await client.post(f"{V1}/reservations", json={"amounts": {"calls": 2}})
    seconds = problem(denied, 429, "budget-exceeded")["retry_after"]
    assert denied.headers["ratelimit-policy"] == '"calls";q=2;w=3600'
    assert denied.headers["ratelimit"] == f'"calls";r=1;t={seconds}'
    denied = await client.post(f"{V1}/reservations", json={"amounts": {"cycles": 1}})
    seconds = problem(denied, 429, "budget-exceeded")["retry_after"]
    assert denied.headers["ratelimit-policy"] == '"cycles";q=3;ktrdr-unit="cycles";w=86400'
    assert denied.headers["ratelimit"] == f'"cycles";r=0;t={seconds}'


async def test_the_rate_limit_headers_of_a_slots_budget_show_no_window(client):
    denied = await client.post(f"{V1}/reservations", json={"amounts": {"jobs": 2}})
    problem(denied, 429, "budget-exceeded")
    assert denied.headers["ratelimit-policy"] == '"jobs";q=1;ktrdr-unit="slots"'
    assert denied.headers["ratelimit"] == '"jobs";r=1'


def test_a_large_count_is_reduced_to_the_largest_integer_allowed_in_a_rate_limit_header():
    huge = 2**53 - 1
    denial = Denial("tokens", "budget_exhausted", huge, 0, 0, 0, huge, 1, huge, 60, "count")
    headers = denied_problem(denial, Budget("tokens", huge, unit="tokens")).headers
    assert re.findall(r"[qr]=(\d+)", str(headers)) == ["999999999999999"] * 2


# -- the store ---------------------------------------------------------------------------------------------------------


async def test_requests_get_409_if_a_budget_is_registered_with_a_different_definition(start, tmp_path):
    paths = [tmp_path / "one.toml", tmp_path / "other.toml"]
    for path, unit in zip(paths, ("tokens", "calls"), strict=True):
        path.write_text(f'[[budgets]]\nname = "count"\nlimit = 5\nunit = "{unit}"\n')
    one, other = [(await start(budgets_file=path)).client for path in paths]
    await reserved(one, {"count": 1})
    problem(await other.post(f"{V1}/reservations", json={"amounts": {"count": 1}}), 409, "budget-mismatch")
    problem(await other.get(f"{V1}/budgets/count"), 409, "budget-mismatch")
    found = (await other.get(f"{V1}/budgets")).json()
    assert [budget["name"] for budget in found["budgets"]] == ["agent", "agent:cycles"], "it hides no other"
    [unknown] = found["unavailable"]
    assert unknown["budget"] == "count"
    for words in ("unit tokens, period day", "unit calls, period day", "ktrdr budget migrate count"):
        assert words in unknown["detail"]
    migration = (await other.post(f"{V1}/budgets/count/migrate")).json()
    assert (migration["before"], migration["after"]) == (
        "unit tokens, period day, timezone UTC, kind spend",
        "unit calls, period day, timezone UTC, kind spend",
    )
    await reserved(other, {"count": 1})
    problem(await one.post(f"{V1}/reservations", json={"amounts": {"count": 1}}), 409, "budget-mismatch")


async def test_every_request_gets_503_while_the_store_is_down(start, start_server):
    own = start_server(None, "--appendonly", "yes")
    client = (await start(redis_url=own.url, timeout=0.2)).client
    hold = await reserved(client)
    own.kill()
    for method, path, body in (
        ("GET", "/agent/budget", None),
        ("GET", "/budgets", None),
        ("GET", "/budgets/agent/holds", None),
        ("GET", "/budgets/agent/ledger", None),
        ("PUT", "/budgets/agent/limit", {"limit": 1}),
        ("POST", "/reservations", {"amounts": {"agent": "0.15"}, "id": "op_1"}),
        ("GET", f"/reservations/{hold['id']}", None),
        ("POST", f"/reservations/{hold['id']}/commit", {}),
        ("POST", f"/reservations/{hold['id']}/release", {}),
        ("POST", f"/reservations/{hold['id']}/extend", {}),
        ("POST", f"/reservations/{hold['id']}/grow", {"amounts": {"agent": "1"}}),
        ("POST", "/spend", {"amounts": {"agent": "0.15"}, "id": "op_2"}),
    ):
        response = await client.request(method, V1 + path, json=body)
        document = problem(response, 503, "store-unavailable")
        assert isinstance(document["ambiguous"], bool)
        assert response.headers["retry-after"] == "1"
    own.start()

    async def back() -> bool:
        return (await client.get(f"{V1}/budgets")).status_code == 200

    await until(back)
    assert (await reserved(client, id="op_1"))["replayed"] is False


async def test_a_reservation_gets_503_within_two_seconds_if_the_store_hangs(start, start_server):
    own = start_server()
    client = (await start(redis_url=own.url, timeout=0.2)).client
    await reserved(client)
    own.pause()
    try:
        with Stopwatch() as took:
            response = await client.post(f"{V1}/reservations", json={"amounts": {"agent": "0.15"}})
        assert took.seconds < 2
        assert problem(response, 503, "store-unavailable")["ambiguous"] is True
    finally:
        own.resume()


async def test_holds_can_be_reserved_and_settled_during_an_outage_if_the_outage_policy_is_allow(start, start_server):
    own = start_server()
    client = (await start(redis_url=own.url, timeout=0.2, on_store_error="allow", agent_daily_budget="1")).client
    own.kill()
    hold = await reserved(client, {"agent": "0.15"}, id="op_1", operation="research")
    await reserved(client, {"agent": "7"}, id="op_2")
    path = f"{V1}/reservations/op_1"
    assert (await client.get(path)).json() == hold
    extended = await client.post(f"{path}/extend", json={"accrued": "0.03"})
    assert extended.json()["accrued"] == {"agent": "0.03"}
    grown = await client.post(f"{path}/grow", json={"amounts": {"agent": "0.25"}})
    assert grown.json()["amounts"] == {"agent": "0.25"}
    done = await client.post(f"{path}/commit")
    assert done.json()["amounts"] == {"agent": "0.03"}
    assert (await client.post(f"{V1}/reservations/op_2/release")).json()["state"] == "released"
    problem(await client.get(f"{V1}/agent/budget"), 503, "store-unavailable")  # unknown is not "all remaining"
    own.start()

    async def recorded() -> bool:
        response = await client.get(f"{V1}/agent/budget")
        return response.status_code == 200 and response.json()["today_spend"] == 0.03

    await until(recorded)
    assert (await client.post(f"{path}/commit", json={"amounts": "0.03"})).json()["replayed"] is True
    assert (await client.get(f"{V1}/agent/budget")).json()["spend_events"] == 1


# -- unexpected errors -------------------------------------------------------------------------------------------------


async def test_the_response_to_an_unexpected_error_does_not_show_the_error_text(running):
    async def broken() -> None:
        raise RuntimeError("secret")

    running.app.get("/broken")(broken)
    async with connect(running.app) as client:
        response = await client.get("/broken")
    assert "secret" not in response.text
    problem(response, 500, "internal-error")


async def test_an_error_raised_by_the_limiter_in_a_route_of_the_app_becomes_a_problem_document(running):
    async def other() -> None:
        await running.limiter.status("unknown")

    running.app.get("/other")(other)
    problem(await running.client.get("/other"), 404, "unknown-budget")


def test_an_unexpected_error_becomes_a_500_problem():
    assert problem_of(BudgetError("?"), {}).status_code == 500


async def test_every_error_response_is_a_problem_document(client: httpx.AsyncClient):
    """Every combination of method and path."""
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"):
        for path in ("/", "/livez", "/openapi.json", f"{V1}/budgets/x", f"{V1}/reservations", f"{V1}/spend/x"):
            response = await client.request(method, path)
            if response.status_code >= 400:
                assert response.headers["content-type"] == "application/problem+json", (method, path)
