"""Reserving and settling over HTTP."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime

import httpx
import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.api.schemas import ReservationOut

from ..helpers.patience import away, hurried
from ..helpers.waiting import until
from .support import V1, figures, problem, reserved

JSON = {"Content-Type": "application/json"}


async def test_a_created_reservation_can_be_read_at_the_returned_location(client):
    response = await client.post(
        f"{V1}/reservations",
        json={"amounts": {"agent": "0.15", "cycles": 1}, "id": "op_1", "ttl": 60, "operation": "research"},
    )
    assert response.status_code == 201
    document = response.json()
    assert list(document) == [
        "id", "state", "amounts", "accrued", "charged", "windows", "on_expiry", "created_at", "expires_at",
        "operation", "scope", "replayed",
    ]  # fmt: skip
    assert document["id"] == "op_1"
    assert document["state"] == "open"
    assert document["amounts"] == {"agent": "0.15", "cycles": 1}
    assert document["accrued"] == document["charged"] == {"agent": "0.00", "cycles": 0}
    assert document["on_expiry"] == "charge"
    assert document["operation"] == "research"
    assert document["replayed"] is False
    created_at, expires_at = (datetime.fromisoformat(document[name]) for name in ("created_at", "expires_at"))
    assert (expires_at - created_at).total_seconds() == 60
    assert response.headers["location"] == f"{V1}/reservations/op_1"
    again = await client.get(response.headers["location"])
    assert again.status_code == 200
    assert again.json() == document


async def test_the_response_to_a_reservation_equals_the_hold_in_the_store(running):
    label = 'quoted "label"\n with é and \u2028'
    document = await reserved(
        running.client, {"agent": "0.000000001", "jobs": 1}, operation=label, on_expiry="accrued", ttl=1.5
    )
    view = await running.limiter.get(document["id"])
    assert document == ReservationOut.model_validate(view).model_dump(mode="json")
    assert document["amounts"] == {"agent": "0.000000001", "jobs": 1}
    assert document["operation"] == label


async def test_a_reservation_repeated_with_the_same_id_is_reported_as_a_replay(client):
    first = await reserved(client, id="op_1", operation="research")
    await client.post(f"{V1}/reservations/op_1/extend", json={"accrued": "0.03"})
    again = await client.post(
        f"{V1}/reservations", json={"amounts": {"agent": 0.15}, "id": "op_1", "operation": "research"}
    )
    assert again.status_code == 200
    assert again.headers["location"] == f"{V1}/reservations/op_1"
    document = again.json()
    assert document["replayed"] is True
    assert document["accrued"] == {"agent": "0.03"}
    assert document["created_at"] == first["created_at"]
    assert await figures(client) == ("0.00", "0.15", "0.00", "4.85")


async def test_a_different_reservation_with_a_used_id_is_a_conflict(client):
    await reserved(client, id="op_1")
    other = await client.post(f"{V1}/reservations", json={"amounts": {"agent": "0.16"}, "id": "op_1"})
    problem(other, 409, "hold-conflict")


async def test_no_budget_is_reserved_if_one_budget_denies_the_reservation(client):
    denied = await client.post(f"{V1}/reservations", json={"amounts": {"agent": "0.15", "cycles": 4}})
    document = problem(denied, 429, "budget-exceeded")
    assert (document["budget"], document["unit"], document["requested"]) == ("cycles", "cycles", 4)
    assert await figures(client) == ("0.00", "0.00", "0.00", "5.00")


async def test_a_commit_records_the_actual_cost(client):
    hold = await reserved(client)
    done = await client.post(f"{V1}/reservations/{hold['id']}/commit", json={"amounts": "0.07"})
    assert done.status_code == 200
    assert done.json() == {
        "id": hold["id"],
        "state": "committed",
        "amounts": {"agent": "0.07"},
        "replayed": False,
        "overrun": False,
        "late": False,
    }
    assert await figures(client) == ("0.07", "0.00", "0.00", "4.93")
    assert (await client.get(f"{V1}/reservations/{hold['id']}")).json()["charged"] == {"agent": "0.07"}


async def test_a_repeated_commit_is_a_replay_but_a_commit_of_a_different_amount_is_a_conflict(client):
    hold = await reserved(client)
    path = f"{V1}/reservations/{hold['id']}/commit"
    await client.post(path, json={"amounts": "0.07"})
    again = await client.post(path, json={"amounts": {"agent": 0.07}})
    assert again.json()["replayed"] is True
    problem(await client.post(path, json={"amounts": "0.08"}), 409, "hold-conflict")
    problem(await client.post(f"{V1}/reservations/{hold['id']}/release"), 409, "hold-conflict")
    assert await figures(client) == ("0.07", "0.00", "0.00", "4.93")


async def test_a_commit_without_amounts_commits_the_accrued_amount(client):
    hold = await reserved(client)
    await client.post(f"{V1}/reservations/{hold['id']}/extend", json={"accrued": "0.03"})
    done = await client.post(f"{V1}/reservations/{hold['id']}/commit")  # without a body
    assert done.json()["amounts"] == {"agent": "0.03"}
    other = await reserved(client)
    done = await client.post(f"{V1}/reservations/{other['id']}/commit", json={})
    assert done.json()["amounts"] == {"agent": "0.00"}


async def test_a_budget_that_the_commit_request_omits_is_charged_zero(client):
    hold = await reserved(client, {"agent": "0.15", "cycles": 2})
    done = await client.post(f"{V1}/reservations/{hold['id']}/commit", json={"amounts": {"cycles": 1}})
    assert done.json()["amounts"] == {"agent": "0.00", "cycles": 1}


async def test_a_commit_above_the_reservation_is_an_overrun(client):
    hold = await reserved(client)
    done = await client.post(f"{V1}/reservations/{hold['id']}/commit", json={"amounts": 7})
    assert done.json()["overrun"] is True
    assert await figures(client) == ("7.00", "0.00", "0.00", "0.00")


async def test_a_release_returns_the_whole_amount_to_the_budget(client):
    hold = await reserved(client)
    done = await client.post(f"{V1}/reservations/{hold['id']}/release")
    assert done.status_code == 200
    assert done.json()["state"] == "released"
    assert done.json()["amounts"] == {"agent": "0.00"}
    assert await figures(client) == ("0.00", "0.00", "0.00", "5.00")


async def test_a_release_with_amounts_in_the_body_is_refused(client):
    hold = await reserved(client)
    problem(await client.post(f"{V1}/reservations/{hold['id']}/release", json={"amounts": "1"}), 422, "invalid-request")
    assert (await client.post(f"{V1}/reservations/{hold['id']}/release", json={})).status_code == 200


async def test_an_extension_sets_the_accrued_total_and_never_shortens_the_deadline(client):
    hold = await reserved(client, ttl=60)
    path = f"{V1}/reservations/{hold['id']}/extend"
    for _ in range(2):  # a retry is harmless
        extended = await client.post(path, json={"ttl": 3600, "accrued": {"agent": "0.03"}})
        assert extended.status_code == 200
        assert extended.json()["accrued"] == {"agent": "0.03"}
    assert extended.json()["expires_at"] > hold["expires_at"]
    # Without a ttl or a body, a heartbeat does not shorten the deadline.
    for body in (None, {}, {"ttl": None}, {"accrued": "0.04"}):
        heartbeat = await client.post(path, json=body)
        assert (heartbeat.status_code, heartbeat.json()["expires_at"]) == (200, extended.json()["expires_at"])


async def test_the_amount_of_a_grow_request_is_the_new_total_of_the_hold(client):
    hold = await reserved(client)
    path = f"{V1}/reservations/{hold['id']}/grow"
    for _ in range(2):
        grown = await client.post(path, json={"amounts": {"agent": "0.25"}})
        assert grown.status_code == 200
        assert grown.json()["amounts"] == {"agent": "0.25"}
    assert await figures(client) == ("0.00", "0.25", "0.00", "4.75")
    problem(await client.post(path, json={"amounts": {"agent": "5.01"}}), 429, "budget-exceeded")
    assert await figures(client) == ("0.00", "0.25", "0.00", "4.75")


async def test_spend_sent_twice_with_the_same_id_is_recorded_once(client):
    spend = {"amounts": {"agent": "0.02", "cycles": 1}, "id": "op_9", "operation": "search"}
    first = await client.post(f"{V1}/spend", json=spend)
    assert first.status_code == 201
    assert first.json() == {
        "id": "op_9",
        "state": "recorded",
        "amounts": {"agent": "0.02", "cycles": 1},
        "replayed": False,
        "overrun": False,
        "late": False,
    }
    assert first.headers["location"] == f"{V1}/reservations/op_9"
    assert (await client.get(first.headers["location"])).json()["state"] == "recorded"
    again = await client.post(f"{V1}/spend", json=spend)
    assert again.status_code == 200
    assert again.json()["replayed"] is True
    problem(await client.post(f"{V1}/spend", json={**spend, "amounts": {"agent": "1"}}), 409, "hold-conflict")
    assert await figures(client) == ("0.02", "0.00", "0.00", "4.98")


async def test_spend_above_the_limit_is_recorded(client):
    done = await client.post(f"{V1}/spend", json={"amounts": {"agent": "6"}})
    assert done.status_code == 201
    assert await figures(client) == ("6.00", "0.00", "0.00", "0.00")


@pytest.mark.parametrize(
    "number", ["0.1", "0.10000000000000000001", "1e-9", "0.30000000000000004", "1E0", "4.999999999"]
)
async def test_an_amount_sent_as_a_json_number_is_read_as_an_exact_decimal(client, number):
    from ktrdr_budget.money import from_units, to_units

    response = await client.post(f"{V1}/reservations", content=f'{{"amounts": {{"agent": {number}}}}}', headers=JSON)
    assert response.status_code == 201
    assert response.json()["amounts"] == {"agent": f"{from_units(to_units(number)):f}"}


@pytest.mark.parametrize("hold_id", ["a/b", "a/b/commit", "x/release", "commit", "a:b@c", "%", "team/../x"])
async def test_a_hold_id_may_contain_a_slash(client, hold_id):
    from urllib.parse import quote

    if hold_id == "%":
        response = await client.get(f"{V1}/reservations/%25")
        problem(response, 422, "invalid-argument")
        return
    response = await client.post(f"{V1}/reservations", json={"amounts": {"agent": "0.15"}, "id": hold_id})
    assert response.status_code == 201
    location = response.headers["location"]
    assert location == f"{V1}/reservations/{quote(hold_id, safe=':@')}"
    assert (await client.get(location)).json()["id"] == hold_id
    extended = await client.post(f"{location}/extend", json={"accrued": "0.01"})
    assert extended.json()["id"] == hold_id
    done = await client.post(f"{location}/commit")
    assert done.json() == {**done.json(), "id": hold_id, "state": "committed", "amounts": {"agent": "0.01"}}


async def test_a_hold_id_in_a_path_may_contain_an_unencoded_slash(client):
    await reserved(client, id="team/op")
    assert (await client.get(f"{V1}/reservations/team/op")).json()["id"] == "team/op"
    assert (await client.post(f"{V1}/reservations/team/op/commit", json={"amounts": 0})).status_code == 200


async def test_a_hold_is_released_if_the_client_disconnects_before_receiving_the_generated_id(running):
    await running.limiter.status("agent")
    scope = {
        "type": "http", "method": "POST", "path": f"{V1}/reservations", "raw_path": f"{V1}/reservations".encode(),
        "query_string": b"", "root_path": "", "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "scheme": "http", "http_version": "1.1",
    }  # fmt: skip
    sent = []

    async def ask(body: dict, *, stays: bool) -> None:
        messages = [{"type": "http.request", "body": json.dumps(body).encode()}]
        if not stays:
            messages.append({"type": "http.disconnect"})

        async def receive():
            if messages:
                return messages.pop(0)
            return await asyncio.get_running_loop().create_future()

        async def send(message):
            sent.append(message)

        await running.app(dict(scope), receive, send)

    await ask({"amounts": {"agent": "0.15"}}, stays=False)
    assert (await running.limiter.status("agent")).held == 0
    await ask({"amounts": {"agent": "0.15"}, "id": "op_1"}, stays=False)  # with an id, a retry finds it
    await ask({"amounts": {"agent": "0.15"}}, stays=True)
    assert f"{(await running.limiter.status('agent')).held}" == "0.30"


async def test_a_late_commit_replaces_the_unconfirmed_amount_of_an_expired_hold(client):
    hold = await reserved(client, ttl=1)

    async def unconfirmed() -> bool:
        return (await client.get(f"{V1}/reservations/{hold['id']}")).json()["state"] == "unconfirmed"

    await until(unconfirmed)
    assert await figures(client) == ("0.00", "0.00", "0.15", "4.85")
    late = await client.post(f"{V1}/reservations/{hold['id']}/commit", json={"amounts": "0.07"})
    assert late.json()["late"] is True
    assert await figures(client) == ("0.07", "0.00", "0.00", "4.93")


async def test_sixty_four_concurrent_reservations_are_granted_exactly_up_to_the_limit(client):
    async def one(number: int) -> httpx.Response:
        return await client.post(f"{V1}/reservations", json={"amounts": {"agent": "0.15"}, "id": f"op_{number}"})

    answers = await asyncio.gather(*(one(number) for number in range(64)))
    assert sorted(answer.status_code for answer in answers) == [201] * 33 + [429] * 31
    assert await figures(client) == ("0.00", "4.95", "0.00", "0.05")


async def test_requests_for_a_hold_get_503_after_a_data_loss_until_a_worker_restores_the_hold(clocked_server, start):
    async with AsyncBudgetLimiter(clocked_server.url, [Budget("agent", "5.00")]) as worker:
        worker.engine.dispatcher.repair.stop()
        await worker.reserve("agent", "0.15", id="op_1")
        service = await start(redis_url=clocked_server.url)
        clocked_server.set(clocked_server.now(), frozen=True)  # the store waits for replays until its clock runs again
        with clocked_server.client() as store:
            store.flushall()
        path = f"{V1}/reservations/op_1"

        async def being_repaired(method: str) -> bool:
            response = await service.client.request(method, path + "/commit" * (method == "POST"), json={})
            assert response.status_code == 503
            return "being repaired" in response.json()["detail"]

        with away(clocked_server.url), hurried(service.limiter, 0.3):
            await until(lambda: being_repaired("POST"))
            await until(lambda: being_repaired("GET"))
        clocked_server.reset_clock()
        worker.engine.dispatcher.repair.suspect()
        await until(lambda: worker.losses == 1 and not worker.engine.dispatcher.repair.active)
        assert (await service.client.post(f"{path}/commit", json={"amounts": "0.07"})).status_code == 200
