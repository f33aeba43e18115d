"""The agent over HTTP: every response of a trigger, and the cycles that replicas list."""

from __future__ import annotations

import asyncio
from decimal import Decimal

import pytest
import redis

from ..helpers.waiting import until
from .support import V1

TRIGGER = f"{V1}/agent/trigger"


@pytest.fixture(autouse=True)
def pace(environment: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Run the phases without delays."""
    environment.setenv("AGENT_PHASE_SECONDS", "0")
    return environment


async def ended(client, operation_id: str) -> dict:
    """Wait for the end of a cycle, and return it."""

    async def look():
        cycles = (await client.get(f"{V1}/agent/cycles")).json()["cycles"]
        return next((cycle for cycle in cycles if cycle["operation_id"] == operation_id and cycle["ended_at"]), None)

    return await until(look)


async def test_a_triggered_cycle_costs_at_least_1_cent_and_at_most_the_estimate(start):
    client = (await start()).client
    response = await client.post(TRIGGER)
    assert response.status_code == 202
    answer = response.json()
    assert answer["triggered"] is True
    assert answer["operation_id"].startswith("op_")
    assert answer["operation_id"] in answer["message"]
    cycle = await ended(client, answer["operation_id"])
    assert (cycle["status"], cycle["outcome"], cycle["reason"]) == ("completed", "completed", None)
    assert 0.01 <= float(cycle["spend"]) <= 0.15
    assert cycle["elapsed_seconds"] < 20
    assert [gate["gate"] for gate in cycle["gates"]] == ["training", "backtest"]
    assert all(cycle["tokens"].values())
    budget = (await client.get(f"{V1}/agent/budget")).json()
    assert (budget["today_spend"], budget["held"]) == (float(cycle["spend"]), 0)
    status = (await client.get(f"{V1}/agent/status")).json()
    assert (status["status"], status["active_cycles"], status["last_cycle"]) == ("idle", [], cycle)
    assert (cycle["model"], cycle["brief"], cycle["bypass_gates"]) == ("ktrdr-scripted-1", None, False)


async def test_the_agent_status_shows_the_remaining_budget_and_the_number_of_free_slots(start, pace):
    pace.setenv("AGENT_PHASE_SECONDS", "3600")
    pace.setenv("AGENT_MAX_CONCURRENT_CYCLES", "2")
    here, there = (await start()).client, (await start()).client
    await here.post(f"{V1}/spend", json={"amounts": {"agent": "1.0000001"}})
    for free in (2, 1, 0):
        for client in (here, there):
            status = (await client.get(f"{V1}/agent/status")).json()
            assert status["capacity"] == {"active": 2 - free, "free": free, "limit": 2}
            remaining = Decimal("3.9999999") - (2 - free) * Decimal("0.15")
            assert status["budget"] == {"remaining": str(remaining), "daily_limit": "5.00"}
        await here.post(TRIGGER)


async def test_the_figures_in_the_agent_status_are_null_if_no_limits_are_set(start):
    client = (await start(agent_daily_budget="unlimited")).client
    assert (await client.put(f"{V1}/budgets/agent:cycles/limit", json={"limit": None})).status_code == 200
    status = (await client.get(f"{V1}/agent/status")).json()
    assert status["budget"] == {"remaining": None, "daily_limit": None}
    assert status["capacity"] == {"active": 0, "free": None, "limit": None}


async def test_a_cycle_uses_the_options_in_the_trigger_request(start, pace):
    pace.setenv("TRAINING_GATE_MIN_ACCURACY", "0.99")
    client = (await start()).client
    options = {"strategy": "trend_following", "model": "haiku", "bypass_gates": True}
    answer = (await client.post(TRIGGER, json=options)).json()
    assert answer["model"] == "ktrdr-scripted-1-haiku"
    cycle = await ended(client, answer["operation_id"])
    assert (cycle["outcome"], cycle["strategy_name"]) == ("completed", "trend_following")
    assert cycle["model"] == answer["model"]
    assert [(gate["gate"], gate["passed"], gate["bypassed"]) for gate in cycle["gates"]] == [
        ("training", False, True),
        ("backtest", True, True),
    ]
    brief = {"brief": "Short-term reversal, please."}
    cycle = await ended(client, (await client.post(TRIGGER, json=brief)).json()["operation_id"])
    assert (cycle["reason"], cycle["brief"], cycle["strategy_name"]) == (
        "gate_failed", "Short-term reversal, please.", "short_term_reversal",
    )  # fmt: skip


UNUSABLE = {
    '{"symbol": "AAPL"}': "symbol",
    '{"strategy": "no-such"}': "strategy",
    '{"strategy": ""}': "strategy",
    '{"brief": " "}': "brief",
    '{"brief": "x", "strategy": "momentum"}': "brief",
    '{"model": "gpt-4"}': "model",
    '{"model": 1}': "model",
    '{"bypass_gates": "yes"}': "bypass_gates",
}


@pytest.mark.parametrize("body", UNUSABLE)
async def test_the_refusal_of_a_trigger_names_the_unusable_option_and_no_cycle_starts(start, body: str):
    client = (await start()).client
    response = await client.post(TRIGGER, content=body, headers={"Content-Type": "application/json"})
    problem = is_a_refusal(response, 422, "invalid_request")
    assert [error["loc"] for error in problem["errors"]] == [["body", UNUSABLE[body]]]
    assert problem["detail"].startswith(UNUSABLE[body])
    assert (await client.get(f"{V1}/agent/budget")).json()["held"] == 0


async def test_a_trigger_with_query_parameters_is_refused(start):
    client = (await start()).client
    is_a_refusal(await client.post(f"{TRIGGER}?model=haiku"), 422, "invalid_request")
    assert (await client.get(f"{V1}/agent/status")).json()["status"] == "idle"


async def test_the_refusal_of_a_trigger_shows_the_remaining_and_requested_amounts_if_the_budget_is_exhausted(start):
    client = (await start(agent_daily_budget="0.01")).client
    response = await client.post(TRIGGER)
    assert response.status_code == 429
    assert response.headers["content-type"] == "application/problem+json"
    assert 0 < int(response.headers["retry-after"]) <= 86_400
    problem = response.json()
    assert (problem["triggered"], problem["reason"], problem["denial_reason"]) == (
        False, "budget_exhausted", "exceeds_limit",
    )  # fmt: skip
    assert problem["message"] == "Daily budget exhausted: budget_exhausted ($0.01 remaining, need $0.15)"
    assert (problem["remaining"], problem["requested"]) == ("0.01", "0.15")


async def test_a_second_trigger_is_refused_with_the_id_of_the_cycle_already_running(start, pace):
    pace.setenv("AGENT_PHASE_SECONDS", "3600")
    client = (await start()).client
    operation_id = (await client.post(TRIGGER, json={})).json()["operation_id"]
    response = await client.post(TRIGGER)
    assert response.status_code == 409
    problem = response.json()
    assert (problem["triggered"], problem["reason"]) == (False, "active_cycle_exists")
    assert problem["operation_ids"] == [operation_id]
    status = (await client.get(f"{V1}/agent/status")).json()
    assert status["status"] == "designing"
    assert [cycle["operation_id"] for cycle in status["active_cycles"]] == [operation_id]


@pytest.mark.parametrize("body", ["[]", "1", "{", '{"operation_id": "x"}', '{"operation_id": 1}', '{"estimate": 1}'])
async def test_a_trigger_with_an_invalid_body_starts_no_cycle(start, body):
    client = (await start()).client
    response = await client.post(TRIGGER, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert (await client.get(f"{V1}/agent/status")).json()["status"] == "idle"


def is_a_refusal(response, status: int, reason: str) -> dict:
    """Check that a response is a refused trigger, and return the document."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    problem = response.json()
    assert (problem["triggered"], problem["reason"]) == (False, reason)
    assert problem["message"] == problem["detail"] != ""
    return problem


@pytest.mark.parametrize("media_type", ["application/json", "text/plain", "application/x-www-form-urlencoded", None])
async def test_a_trigger_with_an_invalid_body_is_refused_for_every_media_type(start, media_type):
    client = (await start()).client
    headers = {} if media_type is None else {"Content-Type": media_type}
    is_a_refusal(await client.post(TRIGGER, content=b"nope", headers=headers), 422, "invalid_request")
    is_a_refusal(await client.post(TRIGGER, content=b"x" * 70_000, headers=headers), 413, "content_too_large")


async def test_a_trigger_is_refused_while_the_tenant_has_too_many_holds(start):
    client = (await start(max_holds=1)).client
    await client.post(f"{V1}/reservations", json={"amounts": {"agent": "0.10"}})
    problem = is_a_refusal(await client.post(TRIGGER), 429, "too_many_holds")
    assert problem["retry_after"] > 0


async def test_a_trigger_is_refused_if_the_store_has_a_different_definition_of_the_budget(start):
    here = (await start()).client
    await ended(here, (await here.post(TRIGGER)).json()["operation_id"])
    there = (await start(agent_budget_timezone="Asia/Tokyo")).client
    problem = is_a_refusal(await there.post(TRIGGER), 409, "budget_mismatch")
    assert problem["operation_ids"] == []
    status = (await there.get(f"{V1}/agent/status")).json()
    assert (status["status"], status["budget"], status["capacity"]["free"]) == ("idle", None, 1)


async def test_a_trigger_with_the_id_of_a_past_cycle_is_refused(start, client_of_store):
    client = (await start()).client
    await ended(client, (await client.post(TRIGGER, json={"operation_id": "op_old"})).json()["operation_id"])
    client_of_store.delete("ktrdr:{default}:h:op_old")  # as after 24 h
    is_a_refusal(await client.post(TRIGGER, json={"operation_id": "op_old"}), 409, "id_conflict")
    assert (await client.get(f"{V1}/agent/budget")).json()["held"] == 0


@pytest.fixture
def client_of_store(server):
    with redis.Redis.from_url(server.url) as store:
        yield store


async def test_a_trigger_during_a_store_outage_gets_status_503(start, start_server):
    own = start_server()
    client = (await start(redis_url=own.url, timeout=0.1)).client
    own.kill()
    response = await client.post(TRIGGER)
    assert response.status_code == 503
    problem = response.json()
    assert (problem["triggered"], problem["reason"]) == (False, "budget_unavailable")
    assert response.headers["retry-after"]
    for path in ("status", "cycles"):
        assert (await client.get(f"{V1}/agent/{path}")).status_code == 503


async def test_a_second_trigger_with_the_same_id_returns_the_first_cycle(start, pace):
    pace.setenv("AGENT_PHASE_SECONDS", "3600")
    here, there = (await start()).client, (await start()).client
    first = await here.post(TRIGGER, json={"operation_id": "op_mine"})
    again = await there.post(TRIGGER, json={"operation_id": "op_mine"})
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json()["operation_id"] == "op_mine"
    assert "before" in again.json()["message"]
    await here.post(f"{V1}/spend", json={"amounts": {"agent": "0.01"}, "id": "op_used"})
    response = await here.post(TRIGGER, json={"operation_id": "op_used"})
    assert (response.status_code, response.json()["code"]) == (409, "hold-conflict")


async def test_a_cycle_started_on_one_replica_can_be_cancelled_on_a_second_replica(start, pace):
    pace.setenv("AGENT_PHASE_SECONDS", "3600")
    here, there = (await start()).client, (await start()).client
    operation_id = (await here.post(TRIGGER)).json()["operation_id"]
    seen = [(await client.get(f"{V1}/agent/status")).json() for client in (here, there)]
    assert seen[0]["active_cycles"][0]["operation_id"] == seen[1]["active_cycles"][0]["operation_id"] == operation_id
    response = await there.delete(f"{V1}/agent/cancel/{operation_id}")
    assert (response.status_code, response.json()["status"]) == (200, "cancelled")
    assert response.json()["operation_id"] == operation_id
    again = await here.delete(f"{V1}/agent/cancel/{operation_id}")
    assert (again.status_code, again.json()["cycle_status"]) == (409, "cancelled")
    assert (await here.delete(f"{V1}/agent/cancel/op_nobody")).status_code == 404
    cycle = await ended(here, operation_id)
    budget = (await here.get(f"{V1}/agent/budget")).json()
    assert (cycle["outcome"], budget["today_spend"], budget["held"]) == ("cancelled", float(cycle["spend"]), 0)


async def test_cycles_are_listed_in_pages_with_the_newest_cycle_first(start):
    client = (await start()).client
    ids = []
    for _ in range(3):
        ids.append((await client.post(TRIGGER)).json()["operation_id"])
        await ended(client, ids[-1])
    first = (await client.get(f"{V1}/agent/cycles?limit=2")).json()
    assert [cycle["operation_id"] for cycle in first["cycles"]] == [ids[2], ids[1]]
    second = (await client.get(f"{V1}/agent/cycles?limit=2&cursor={first['next_cursor']}")).json()
    assert [cycle["operation_id"] for cycle in second["cycles"]] == [ids[0]]
    assert second["next_cursor"] is None
    assert (await client.get(f"{V1}/agent/cycles?limit=0")).status_code == 422


async def test_fifty_triggers_on_two_replicas_start_three_cycles_if_there_are_three_slots(start, pace):
    pace.setenv("AGENT_PHASE_SECONDS", "3600")
    pace.setenv("AGENT_MAX_CONCURRENT_CYCLES", "3")
    clients = [(await start()).client, (await start()).client]
    answers = await asyncio.gather(*[clients[i % 2].post(TRIGGER) for i in range(50)])
    assert sorted(answer.status_code for answer in answers) == [202] * 3 + [409] * 47


async def test_a_trigger_without_a_key_is_refused(start):
    running = await start(api_key="use-1", admin_key="admin-1")
    assert (await running.client.post(TRIGGER)).status_code == 401
    assert (await running.client.get(f"{V1}/agent/status")).status_code == 401
