"""Authentication, admin operations and the owners of holds."""

from __future__ import annotations

import hashlib
from typing import Any

import httpx
import pytest
from starlette.requests import HTTPConnection

from ktrdr_budget.access_keys import AccessKeys
from ktrdr_budget.api import Keys
from ktrdr_budget.api.auth import Caller, is_loopback
from ktrdr_budget.testing import AsyncMemoryLimiter

from ..helpers.waiting import until
from .support import V1, Running, figures, problem, reserved

OPEN_TO_ALL = ("/livez", "/readyz", "/metrics", "/openapi.json")
USE = (
    ("GET", "/agent/budget", None),
    ("GET", "/budgets", None),
    ("GET", "/budgets/agent", None),
    ("GET", "/budgets/agent/holds", None),
    ("GET", "/budgets/agent/ledger", None),
    ("POST", "/reservations", {"amounts": {"agent": "0.01"}}),
    ("GET", "/reservations/none", None),
    ("POST", "/reservations/none/commit", {}),
    ("POST", "/reservations/none/release", {}),
    ("POST", "/reservations/none/extend", {}),
    ("POST", "/reservations/none/grow", {"amounts": {"agent": 1}}),
    ("POST", "/spend", {"amounts": {"agent": "0.01"}}),
)
ADMIN = (
    ("PUT", "/budgets/agent/limit", {"limit": "9"}),
    ("DELETE", "/budgets/agent/limit", None),
    ("POST", "/budgets/agent/migrate", None),
    ("GET", "/changes", None),
    ("GET", "/keys", None),
    ("DELETE", "/keys/none", None),
)


@pytest.fixture
async def keyed(start) -> Running:
    """A service with two use keys and an admin key."""
    return await start(api_key="use-1, use-2", admin_key="admin-1")


async def authenticate(keys: Keys, key: str = "", client: Any = None) -> Caller:
    """Return the authenticated caller of a request that has this key and comes from this client."""
    access_keys = AccessKeys(AsyncMemoryLimiter([]))  # a request to its store would fail
    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    return await keys.authenticate(HTTPConnection({"type": "http", "client": client, "headers": headers}), access_keys)


async def statuses(client: httpx.AsyncClient, operations) -> set[int]:
    return {(await client.request(method, V1 + path, json=body)).status_code for method, path, body in operations}


async def test_without_a_key_only_the_probes_and_the_openapi_document_can_be_read(keyed):
    client = keyed.connect()
    for method, path, body in (*USE, *ADMIN):
        response = await client.request(method, V1 + path, json=body)
        problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
    for path in OPEN_TO_ALL:
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize(
    "header",
    ["Bearer wrong", "Bearer", "Bearer ", "use-1", "Basic use-1", "Bearer use-1x", "Bearer use-", "Bearer use-1,use-2"],
)
async def test_a_wrong_key_is_refused(keyed, header):
    response = await keyed.client.get(f"{V1}/budgets", headers={"Authorization": header})
    problem(response, 401, "unauthorized")
    assert "use-1" not in response.text


async def test_a_non_ascii_key_is_refused(keyed):
    response = await keyed.client.get(f"{V1}/budgets", headers={b"Authorization": "Bearer k\u00e9y".encode()})
    problem(response, 401, "unauthorized")


async def test_the_key_is_checked_before_the_request_body(keyed):
    response = await keyed.client.put(f"{V1}/budgets/a%20b/limit", content=b"{", headers={"Content-Type": "text/x"})
    problem(response, 401, "unauthorized")
    response = await keyed.connect("use-1").put(f"{V1}/budgets/agent/limit", content=b"{")
    problem(response, 403, "forbidden")


@pytest.mark.parametrize("key", ["use-1", "use-2"])
async def test_a_use_key_permits_all_operations_except_admin_operations(keyed, key):
    client = keyed.connect(key)
    assert await statuses(client, USE) == {200, 201, 404}
    for method, path, body in ADMIN:
        problem(await client.request(method, V1 + path, json=body), 403, "forbidden")
    assert (await client.get(f"{V1}/budgets/agent")).json()["limit_source"] == "configured"


async def test_an_admin_key_permits_all_operations(keyed):
    client = keyed.connect("admin-1")
    assert await statuses(client, (*USE, *ADMIN)) == {200, 201, 404}


async def test_the_bearer_scheme_is_case_insensitive(keyed):
    response = await keyed.client.get(f"{V1}/budgets", headers={"Authorization": "bearer  use-1"})
    assert response.status_code == 200


async def test_admin_operations_are_refused_if_no_admin_key_is_configured(start):
    client = (await start(api_key="use-1")).connect("use-1")
    assert await statuses(client, USE) == {200, 201, 404}
    assert await statuses(client, ADMIN) == {403}


async def test_all_operations_need_the_admin_key_if_no_use_key_is_configured(start):
    running = await start(admin_key="admin-1")
    assert await statuses(running.connect(), (*USE, *ADMIN)) == {401}
    assert await statuses(running.connect("admin-1"), (*USE, *ADMIN)) == {200, 201, 404}


async def test_a_service_without_keys_refuses_clients_on_other_machines(start):
    running = await start()
    for address in ("127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"):
        assert await statuses(running.connect(address=address), (*USE, *ADMIN)) == {200, 201, 404}
    for address in ("10.0.0.7", "192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"):
        for method, path, body in (*USE, *ADMIN):
            problem(await running.connect(address=address).request(method, V1 + path, json=body), 403, "keys-required")
        assert (await running.connect(address=address).get("/livez")).status_code == 200


async def test_a_service_without_keys_accepts_clients_on_other_machines_if_auth_is_none(start):
    running = await start(auth="none")
    assert await statuses(running.connect(address="192.0.2.1"), (*USE, *ADMIN)) == {200, 201, 404}


async def test_a_client_without_an_address_counts_as_local(start):
    running = await start()
    assert (await running.connect(address="testclient").get(f"{V1}/budgets")).status_code == 200
    assert is_loopback("unix")
    assert (await authenticate(Keys(), client=None)).admin  # a unix socket


# -- whose hold it is --------------------------------------------------------------------------------------------------


async def unconfirmed(running: Running, key: str) -> str:
    """Reserve with this key, wait until the hold has expired, and return the path of the hold."""
    client = running.connect(key)
    path = f"{V1}/reservations/{(await reserved(client, ttl=1))['id']}"

    async def expired() -> bool:
        return (await client.get(path)).json()["state"] == "unconfirmed"

    await until(expired)
    return path


async def test_the_owner_of_a_hold_is_stored_as_a_hash_of_the_key(keyed, server):
    for key in ("use-1", "use-2", "admin-1"):
        hold = await reserved(keyed.connect(key))
        owner = (await keyed.limiter.get(hold["id"])).owner
        assert owner == f"http-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    with server.client() as redis:
        stored = "".join(redis.get(key) for key in redis.scan_iter("*:h:*"))
    assert "use-1" not in stored


async def test_the_owner_of_a_hold_is_named_http_if_no_key_is_configured(start):
    running = await start()
    hold = await reserved(running.client)
    assert (await running.limiter.get(hold["id"])).owner == "http"


async def test_an_unconfirmed_hold_can_be_settled_with_the_use_key_that_reserved_the_hold(keyed):
    path = await unconfirmed(keyed, "use-1")
    done = await keyed.connect("use-1").post(f"{path}/commit", json={"amounts": "0.07"})
    assert (done.status_code, done.json()["late"]) == (200, True)
    path = await unconfirmed(keyed, "use-1")
    assert (await keyed.connect("use-1").post(f"{path}/release")).json()["state"] == "released"
    assert await figures(keyed.connect("use-1")) == ("0.07", "0.00", "0.00", "4.93")


async def test_an_unconfirmed_hold_of_a_use_key_can_be_settled_with_the_admin_key_but_with_no_other_use_key(keyed):
    path, other = await unconfirmed(keyed, "use-1"), keyed.connect("use-2")
    for action, body in (
        ("commit", {"amounts": "0"}),
        ("release", None),
        ("extend", {}),  # an extended hold is open again, so any key could settle it
        ("grow", {"amounts": {"agent": "0.15"}}),
    ):
        problem(await other.post(f"{path}/{action}", json=body), 403, "forbidden")
    assert await figures(other) == ("0.00", "0.00", "0.15", "4.85")
    done = await keyed.connect("admin-1").post(f"{path}/commit", json={"amounts": "0.07"})
    assert (done.status_code, done.json()["late"]) == (200, True)


async def test_any_use_key_can_settle_an_open_hold(keyed):
    one, other = keyed.connect("use-1"), keyed.connect("use-2")
    hold = await reserved(one)
    assert (await other.post(f"{V1}/reservations/{hold['id']}/commit", json={"amounts": "0.07"})).status_code == 200
    hold = await reserved(one)
    assert (await other.post(f"{V1}/reservations/{hold['id']}/release")).status_code == 200


async def test_the_worker_can_still_commit_the_real_cost_after_an_admin_released_the_unconfirmed_hold(keyed):
    path = await unconfirmed(keyed, "use-1")
    released = await keyed.connect("admin-1").post(f"{path}/release")
    assert released.json()["state"] == "released"
    assert await figures(keyed.connect("use-1")) == ("0.00", "0.00", "0.00", "5.00")
    back = await keyed.connect("use-1").post(f"{path}/commit", json={"amounts": "0.07"})
    assert (back.status_code, back.json()["late"]) == (200, True)
    assert await figures(keyed.connect("use-1")) == ("0.07", "0.00", "0.00", "4.93")


async def test_a_second_use_key_cannot_settle_an_unconfirmed_hold_released_by_an_admin(keyed):
    path, other = await unconfirmed(keyed, "use-1"), keyed.connect("use-2")
    await keyed.connect("admin-1").post(f"{path}/release")
    for action, body in (
        ("commit", {"amounts": "5"}),
        ("release", None),
        ("extend", {}),
        ("grow", {"amounts": {"agent": "0.15"}}),
    ):
        problem(await other.post(f"{path}/{action}", json=body), 403, "forbidden")
    assert await figures(other) == ("0.00", "0.00", "0.00", "5.00")
    done = await keyed.connect("admin-1").post(f"{path}/commit", json={"amounts": "0.07"})
    assert (done.status_code, done.json()["late"]) == (200, True)


@pytest.mark.parametrize("keys", [{}, {"api_key": "use-1", "admin_key": "admin-1"}])
async def test_the_worker_can_still_commit_the_real_cost_after_releasing_the_unconfirmed_hold(start, keys):
    running = await start(**keys)
    client = running.connect("use-1" if keys else "")
    path = await unconfirmed(running, "use-1" if keys else "")
    for _ in range(2):
        assert (await client.post(f"{path}/release")).status_code == 200
    done = await client.post(f"{path}/commit", json={"amounts": "0.07"})
    assert (done.status_code, done.json()["late"]) == (200, True)
    problem(await client.post(f"{path}/commit", json={"amounts": "0.08"}), 409, "hold-conflict")
    assert await figures(client) == ("0.07", "0.00", "0.00", "4.93")


async def test_a_late_commit_is_a_conflict_after_the_owner_released_the_open_hold(keyed):
    admin = keyed.connect("admin-1")
    hold = await reserved(admin)
    await admin.post(f"{V1}/reservations/{hold['id']}/release")
    late = await admin.post(f"{V1}/reservations/{hold['id']}/commit", json={"amounts": "0.07"})
    problem(late, 409, "hold-conflict")


async def test_a_hold_released_over_http_can_still_be_committed_by_the_library(start):
    running = await start()
    async with running.limiter.hold("agent", "0.15") as hold:
        assert (await running.client.post(f"{V1}/reservations/{hold.id}/release")).status_code == 200
        hold.accrue("0.07")
    assert await figures(running.client) == ("0.07", "0.00", "0.00", "4.93")


# -- keys --------------------------------------------------------------------------------------------------------------


def test_the_repr_of_keys_has_no_secret():
    assert "secret" not in repr(Keys(["secret"], ["secret-too"]))


async def test_keys_are_read_from_environment_variables():
    assert not Keys.from_environment({})
    keys = Keys.from_environment({"KTRDR_API_KEY": "a, b,", "KTRDR_ADMIN_KEY": "c"})
    for key, admin in (("a", False), ("b", False), ("c", True)):
        assert (await authenticate(keys, key)).admin is admin
    assert (await authenticate(Keys.from_environment({"KTRDR_AUTH": "none"}), client=("192.0.2.1", 1))).admin


async def test_a_sent_key_is_compared_with_all_configured_keys(monkeypatch):
    import hmac

    compared = []
    honest = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda one, other: compared.append(one) or honest(one, other))
    keys = Keys(["a", "b"], ["c"])
    for key in ("a", "c"):
        compared.clear()
        await authenticate(keys, key)
        assert compared == [b"a", b"b", b"c"]
