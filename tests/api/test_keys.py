"""Access keys over HTTP: created, used with their rights, revoked, expired."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from starlette.routing import BaseRoute

from ktrdr_budget.access_keys import AccessKeys
from ktrdr_budget.api.route import BudgetRoute

from .support import V1, Running, problem, reserved

ADMIN_ROUTES = {
    ("PUT", "/budgets/{name}/limit"),
    ("DELETE", "/budgets/{name}/limit"),
    ("POST", "/budgets/{name}/migrate"),
    ("GET", "/changes"),
    ("POST", "/keys"),
    ("GET", "/keys"),
    ("DELETE", "/keys/{name}"),
}
"""Every other route needs the right to read if its method is GET, else the right to use."""
PERMITTED = {"read": {"read"}, "use": {"read", "use"}, "admin": {"read", "use", "admin"}}
UNKNOWN_SECRET = "ktrdr_" + "A" * 43


@pytest.fixture
async def keyed(start) -> Running:
    """A service with a use key and an admin key in its environment."""
    return await start(api_key="use-1", admin_key="admin-1")


async def create(running: Running, name: str = "ci", **fields: Any) -> dict[str, Any]:
    """Create a key with the admin key; return the response's document."""
    response = await running.connect("admin-1").post(f"{V1}/keys", json={"name": name, **fields})
    assert response.status_code == 201, response.text
    document: dict[str, Any] = response.json()
    return document


async def secret_of(running: Running, name: str = "ci", **fields: Any) -> str:
    return str((await create(running, name, **fields))["secret"])


# -- rights ------------------------------------------------------------------------------------------------------------


def operations(routes: list[BaseRoute]) -> Iterator[tuple[str, str]]:
    """Each method and path of the API, with its parameters as in the OpenAPI document."""
    for route in routes:
        if isinstance(route, BudgetRoute) and route.path.startswith(V1):
            for method in sorted(route.methods):
                yield method, re.sub(r":\w+}", "}", route.path.removeprefix(V1))


async def refusals(running: Running, secret: str) -> dict[tuple[str, str], int]:
    """The status of each operation that refuses the key, by method and path.

    The bodies are invalid, so that an operation that accepts the key changes nothing.
    """
    found = {}
    client = running.connect(secret)
    for method, path in operations(running.app.router.routes):
        body = None if method == "GET" else {"nothing": "known"}
        response = await client.request(method, V1 + re.sub("{.*?}", "none", path), json=body)
        if response.status_code in (401, 403, 503):
            found[method, path] = response.status_code
        else:
            assert response.status_code in (200, 404, 422), (method, path, response.text)
    return found


def needed(method: str, path: str) -> str:
    return "admin" if (method, path) in ADMIN_ROUTES else "read" if method == "GET" else "use"


@pytest.mark.parametrize("rights", PERMITTED)
async def test_a_key_permits_exactly_the_operations_of_its_rights(keyed, rights):
    everything = list(operations(keyed.app.router.routes))
    assert set(everything) > ADMIN_ROUTES
    expected = {each: 403 for each in everything if needed(*each) not in PERMITTED[rights]}
    assert await refusals(keyed, await secret_of(keyed, rights=rights)) == expected


@pytest.mark.parametrize(("key", "rights"), [("use-1", "use"), ("admin-1", "admin")])
async def test_a_key_of_the_environment_permits_the_operations_of_its_rights(keyed, key, rights):
    everything = operations(keyed.app.router.routes)
    expected = {each: 403 for each in everything if needed(*each) not in PERMITTED[rights]}
    assert await refusals(keyed, key) == expected


@pytest.mark.parametrize("rights", PERMITTED)
async def test_a_key_with_a_scope_is_refused_by_every_operation(keyed, rights):
    secret = await secret_of(keyed, scope={"team": "quant"}, may_set=["user"], rights=rights)
    assert await refusals(keyed, secret) == dict.fromkeys(operations(keyed.app.router.routes), 403)


@pytest.mark.parametrize("secret", [UNKNOWN_SECRET, UNKNOWN_SECRET[:-1], "ktrdr_"])
async def test_an_unknown_secret_is_refused_by_every_operation(keyed, secret):
    assert await refusals(keyed, secret) == dict.fromkeys(operations(keyed.app.router.routes), 401)


async def test_the_refusal_names_the_missing_right(keyed):
    reader, user = [keyed.connect(await secret_of(keyed, rights, rights=rights)) for rights in ("read", "use")]
    refused = problem(await reader.post(f"{V1}/spend", json={"amounts": {"agent": "1"}}), 403, "forbidden")
    assert refused["detail"] == "this operation needs a key with the right to use"
    refused = problem(await user.get(f"{V1}/keys"), 403, "forbidden")
    assert refused["detail"] == "this operation needs the admin key"


async def test_the_key_is_checked_before_the_request_body(keyed):
    reader = keyed.connect(await secret_of(keyed, rights="read"))
    problem(await reader.post(f"{V1}/spend", content=b"{"), 403, "forbidden")
    problem(await keyed.connect(UNKNOWN_SECRET).post(f"{V1}/spend", content=b"{"), 401, "unauthorized")


async def test_a_key_without_keys_in_the_environment_serves_a_client_on_another_machine(start):
    running = await start()
    made = await AccessKeys(running.limiter).create("ci")
    client = running.connect(made.secret, address="192.0.2.1")
    assert (await client.get(f"{V1}/budgets")).status_code == 200
    problem(await client.get(f"{V1}/changes"), 403, "forbidden")
    wrong = running.connect(UNKNOWN_SECRET)
    problem(await wrong.get(f"{V1}/budgets"), 401, "unauthorized")


async def test_holds_and_changes_carry_the_name_of_the_key(keyed):
    user = keyed.connect(await secret_of(keyed))
    hold = await reserved(user)
    assert (await keyed.limiter.get(hold["id"])).owner == "key:ci"
    admin = keyed.connect(await secret_of(keyed, "ops", rights="admin"))
    await admin.put(f"{V1}/budgets/agent/limit", json={"limit": "9"})
    await admin.delete(f"{V1}/keys/ci?reason=leaked")
    revoked, limit, *_ = (await admin.get(f"{V1}/changes")).json()["changes"]
    assert (limit["kind"], limit["by"]) == ("limit", "ops")
    assert (revoked["kind"], revoked["name"], revoked["by"], revoked["reason"]) == ("key", "ci", "ops", "leaked")
    assert (revoked["before"], revoked["after"]) == ("use", "")


# -- revocation and expiry ---------------------------------------------------------------------------------------------


async def test_the_next_request_on_another_replica_obeys_a_revocation(start):
    one, other = [await start(admin_key="admin-1") for _ in range(2)]
    client = other.connect(await secret_of(one))
    hold = await reserved(client)
    revoked = await one.connect("admin-1").delete(f"{V1}/keys/ci")
    assert (revoked.status_code, revoked.json()) == (200, {"name": "ci", "revoked": True})
    refused = await client.post(f"{V1}/reservations/{hold['id']}/commit", json={"amounts": "0.07"})
    problem(refused, 401, "unauthorized")
    assert refused.headers["www-authenticate"] == "Bearer"
    assert (await other.limiter.get(hold["id"])).state == "open", "a revocation leaves holds open"
    problem(await one.connect("admin-1").delete(f"{V1}/keys/ci"), 404, "unknown-key")


async def test_a_rotated_key_of_the_same_name_settles_the_unconfirmed_holds_of_the_former(own_clock):
    running, clock = own_clock
    hold = await reserved(running.connect(await secret_of(running)), ttl=60)
    await running.connect("admin-1").delete(f"{V1}/keys/ci")
    clock.advance(120)
    path = f"{V1}/reservations/{hold['id']}/commit"
    stranger = running.connect(await secret_of(running, "another"))
    problem(await stranger.post(path, json={"amounts": "0.07"}), 403, "forbidden")
    client = running.connect(await secret_of(running))
    assert (await client.post(path, json={"amounts": "0.07"})).json()["late"] is True


@pytest.fixture
async def own_clock(start, clocked_server):
    """A service with a store whose clock the test sets, and that store."""
    return await start(redis_url=clocked_server.url, admin_key="admin-1"), clocked_server


async def test_a_key_expires_by_the_clock_of_the_store(own_clock):
    running, clock = own_clock
    made = await create(running, expires="1h")
    client = running.connect(made["secret"])
    clock.advance(3500)
    assert (await client.get(f"{V1}/budgets")).status_code == 200
    clock.advance(200)
    problem(await client.get(f"{V1}/budgets"), 401, "unauthorized")
    assert (await running.connect("admin-1").get(f"{V1}/keys")).json()["keys"] == []


async def test_without_the_store_an_access_key_cannot_be_checked(start, own_server):
    running = await start(redis_url=own_server.url, admin_key="admin-1", timeout=0.3, on_store_error="allow")
    client = running.connect(await secret_of(running))
    own_server.pause()
    refused = await client.post(f"{V1}/reservations", json={"amounts": {"agent": "0.15"}})
    problem(refused, 503, "store-unavailable")
    assert refused.headers["retry-after"] == "1"
    problem(await running.connect("wrong").get(f"{V1}/budgets"), 401, "unauthorized")
    own_server.resume()


# -- routes ------------------------------------------------------------------------------------------------------------


async def test_a_new_key_is_returned_with_its_secret_once(keyed):
    response = await keyed.connect("admin-1").post(
        f"{V1}/keys",
        json={"name": "team/ci", "scope": {"team": "quant"}, "may_set": ["user"], "rights": "read", "expires": "90d"},
    )
    made = response.json()
    assert response.headers["cache-control"] == "no-store"
    secret = made.pop("secret")
    assert re.fullmatch(r"ktrdr_[A-Za-z0-9_-]{43}", secret)
    assert list(made) == ["name", "scope", "may_set", "rights", "created_at", "expires_at"]
    created_at = datetime.fromisoformat(made["created_at"])
    assert datetime.fromisoformat(made["expires_at"]) - created_at == timedelta(days=90)
    assert abs(created_at - datetime.now(UTC)) < timedelta(minutes=5)
    listed = await keyed.connect("admin-1").get(f"{V1}/keys")
    assert listed.json() == {"keys": [made], "next_cursor": None}
    assert secret not in listed.text
    assert (await keyed.connect("admin-1").delete(f"{V1}/keys/team%2Fci")).json()["name"] == "team/ci"


async def test_a_second_key_of_the_same_name_is_a_conflict(keyed):
    made = await create(keyed)
    again = await keyed.connect("admin-1").post(f"{V1}/keys", json={"name": "ci"})
    problem(again, 409, "key-conflict")
    assert (await keyed.connect(made["secret"]).get(f"{V1}/budgets")).status_code == 200


async def test_keys_are_listed_in_pages(keyed):
    admin = keyed.connect("admin-1")
    for name in ("b", "c", "a"):
        await create(keyed, name)
    first = (await admin.get(f"{V1}/keys?limit=2")).json()
    assert ([key["name"] for key in first["keys"]], first["next_cursor"]) == (["a", "b"], "b")
    second = (await admin.get(f"{V1}/keys?limit=2&cursor=b")).json()
    assert ([key["name"] for key in second["keys"]], second["next_cursor"]) == (["c"], None)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": ""},
        {"name": 7},
        {"name": "ci", "owner": "me"},
        {"name": "ci", "scope": {"Team": "quant"}},
        {"name": "ci", "scope": {"team": 7}},
        {"name": "ci", "scope": [["team", "quant"]]},
        {"name": "ci", "scope": {f"field{number}": "x" for number in range(17)}},
        {"name": "ci", "may_set": "user"},
        {"name": "ci", "may_set": ["a b"]},
        {"name": "ci", "scope": {"team": "quant"}, "may_set": ["team"]},
        {"name": "ci", "rights": "root"},
        {"name": "ci", "expires": "soon"},
        {"name": "ci", "expires": 90},
        {"name": "ci", "reason": "x" * 257},
    ],
    ids=repr,
)
async def test_an_invalid_key_is_refused(keyed, body):
    admin = keyed.connect("admin-1")
    response = await admin.post(f"{V1}/keys", json=body)
    assert response.status_code == 422, response.text
    assert response.json()["code"] in ("invalid-request", "invalid-argument")
    assert (await admin.get(f"{V1}/keys")).json()["keys"] == []


async def test_responses_and_logs_contain_no_secret(keyed, caplog):
    caplog.set_level(logging.DEBUG)
    secret = await secret_of(keyed)
    client = keyed.connect(secret)
    responses: list[httpx.Response] = [
        await client.get(f"{V1}/budgets"),
        await client.get(f"{V1}/keys"),
        await client.get("/metrics"),
        await keyed.connect(secret[:-1] + "?").get(f"{V1}/budgets"),
        await keyed.connect("admin-1").get(f"{V1}/keys"),
        await keyed.connect("admin-1").get(f"{V1}/changes"),
        await keyed.connect("admin-1").delete(f"{V1}/keys/ci"),
        await client.get(f"{V1}/budgets"),
    ]
    assert [response.status_code for response in responses] == [200, 403, 200, 401, 200, 200, 200, 401]
    shown = [f"{response.headers} {response.text}" for response in responses]
    assert secret[6:-1] not in f"{shown} {caplog.text}"
