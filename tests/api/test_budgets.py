"""Reading budgets over HTTP, and changing their limits."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import pytest

from ..helpers.patience import away
from ..helpers.waiting import until
from .support import V1, figures, problem, reserved


async def test_amounts_of_the_agent_budget_are_json_numbers(client):
    await client.post(f"{V1}/spend", json={"amounts": {"agent": "0.15"}})
    response = await client.get(f"{V1}/agent/budget")
    assert response.status_code == 200
    document = response.json()
    assert list(document) == [
        "date", "daily_limit", "today_spend", "remaining", "cycles_affordable", "spend_events", "held",
        "unconfirmed", "resets_at",
    ]  # fmt: skip
    tomorrow = datetime.now(UTC).date() + timedelta(days=1)
    assert document["resets_at"] == f"{tomorrow}T00:00:00Z"
    assert document["date"] == f"{tomorrow - timedelta(days=1)}"
    assert document["daily_limit"] == 5.0
    assert document["today_spend"] == 0.15
    assert document["remaining"] == 4.85
    assert document["cycles_affordable"] == 32
    assert document["spend_events"] == 1
    assert document["held"] == document["unconfirmed"] == 0.0
    assert '"remaining":4.85,' in response.text  # not 4.8499999999999996


async def test_a_nano_dollar_is_written_as_a_plain_decimal_in_every_response(client):
    """No amount is in scientific notation, because some JSON parsers cannot read it."""
    answers = [
        await client.post(f"{V1}/reservations", json={"amounts": {"agent": "0.000000001"}, "id": "op_1"}),
        await client.get(f"{V1}/reservations/op_1"),
        await client.get(f"{V1}/agent/budget"),
        await client.post(f"{V1}/reservations/op_1/commit", json={"amounts": "0.000000001"}),
        await client.post(f"{V1}/reservations/op_1/release", json={}),
        await client.post(f"{V1}/spend", json={"amounts": {"agent": 1e-9}}),
        *[await client.get(f"{V1}/{path}") for path in ("agent/budget", "budgets", "budgets/agent/ledger")],
    ]
    for answer in answers:
        assert "0.00000000" in answer.text
        # Only whole JSON values: an id may contain 6e5.
        assert not re.search(r"[:\[,\"][0-9.]+[eE][-+]?\d+[\",\]}]", answer.text), answer.text
    assert '"today_spend":0.000000002,' in answers[-3].text


async def test_the_limit_and_the_remaining_amount_of_an_unlimited_budget_are_null(start):
    client = (await start(agent_daily_budget="unlimited")).client
    document = (await client.get(f"{V1}/agent/budget")).json()
    assert document["daily_limit"] is document["remaining"] is document["cycles_affordable"] is None
    document = (await client.get(f"{V1}/budgets/agent")).json()
    assert document["limit"] is document["remaining"] is document["configured_limit"] is None


async def test_a_limit_of_zero_denies_every_reservation(start):
    client = (await start(agent_daily_budget="0")).client
    denied = await client.post(f"{V1}/reservations", json={"amounts": {"agent": "0.000000001"}})
    document = problem(denied, 429, "budget-exceeded")
    assert (document["limit"], document["reason"]) == ("0.00", "exceeds_limit")
    assert (await client.get(f"{V1}/agent/budget")).json()["cycles_affordable"] == 0


async def test_the_estimate_of_a_cycle_can_be_configured(start):
    client = (await start(agent_cycle_estimate="0.30")).client
    assert (await client.get(f"{V1}/agent/budget")).json()["cycles_affordable"] == 16


async def test_every_budget_is_listed(client):
    response = await client.get(f"{V1}/budgets")
    assert response.status_code == 200
    budgets = {budget["name"]: budget for budget in response.json()["budgets"]}
    assert list(budgets) == ["agent", "team/a:b@c", "team/holds", "cycles", "calls", "jobs", "free", "agent:cycles"]
    agent = budgets["agent"]
    assert list(agent) == [
        "name", "unit", "kind", "period", "timezone", "window", "starts_at", "resets_at", "limit", "spent", "held",
        "unconfirmed", "remaining", "spend_events", "overruns", "limit_source", "limit_until", "configured_limit",
        "as_of", "recovering_until",
    ]  # fmt: skip
    assert (agent["unit"], agent["kind"], agent["period"], agent["timezone"]) == ("usd", "spend", "day", "UTC")
    assert (agent["limit"], agent["configured_limit"], agent["limit_source"]) == ("5.00", "5.00", "configured")
    assert agent["limit_until"] is None
    assert agent["as_of"].endswith("Z")
    assert (budgets["cycles"]["limit"], budgets["cycles"]["spent"]) == (3, 0)
    assert (budgets["jobs"]["kind"], budgets["jobs"]["unit"], budgets["jobs"]["period"]) == ("slots", "slots", "ever")
    assert budgets["free"]["resets_at"] is budgets["free"]["starts_at"] is None
    assert budgets["team/a:b@c"]["timezone"] == "Europe/Rome"


@pytest.mark.parametrize("name", ["team/a:b@c", "team/holds"])
async def test_a_budget_name_may_contain_a_slash(client, name):
    path = f"{V1}/budgets/{quote(name, safe='')}"
    hold = await reserved(client, {name: "0.10"})
    await client.post(f"{V1}/spend", json={"amounts": {name: "0.20"}, "id": "op_2"})
    found = await client.get(path)
    assert (found.json()["name"], found.json()["spent"], found.json()["held"]) == (name, "0.20", "0.10")
    assert [item["id"] for item in (await client.get(f"{path}/holds")).json()["holds"]] == [hold["id"]]
    assert [item["hold_id"] for item in (await client.get(f"{path}/ledger")).json()["entries"]] == ["op_2"]
    changed = await client.put(f"{path}/limit", json={"limit": "0.50"})
    assert (changed.json()["name"], changed.json()["limit"]) == (name, "0.50")
    assert (await client.delete(f"{path}/limit")).json()["limit_source"] == "configured"


async def test_a_budget_name_may_end_with_the_segment_holds_only_if_the_slash_is_encoded(client):
    assert (await client.get(f"{V1}/budgets/team/a:b@c")).json()["name"] == "team/a:b@c"
    assert (await client.get(f"{V1}/budgets/team/a:b@c/holds")).json() == {"holds": [], "next_cursor": None}
    problem(await client.get(f"{V1}/budgets/team/holds"), 404, "unknown-budget")  # the holds of `team`
    assert (await client.get(f"{V1}/budgets/team%2fholds/holds")).json() == {"holds": [], "next_cursor": None}


async def test_holds_are_listed_in_pages(client):
    ids = [(await reserved(client, id=f"op_{number}", ttl=60 + number))["id"] for number in range(5)]
    found, cursor = [], None
    for _ in range(3):
        parameters = {"limit": 2} if cursor is None else {"limit": 2, "cursor": cursor}
        page = (await client.get(f"{V1}/budgets/agent/holds", params=parameters)).json()
        found += [hold["id"] for hold in page["holds"]]
        cursor = page["next_cursor"]
    assert found == ids[::-1]
    assert cursor is None
    assert page["holds"][0]["amounts"] == {"agent": "0.15"}


async def test_the_ledger_is_listed_in_pages_with_the_newest_entry_first(client):
    for number in range(3):
        await client.post(
            f"{V1}/spend", json={"amounts": {"agent": "0.02"}, "id": f"op_{number}", "operation": "search"}
        )
    hold = await reserved(client)
    await client.post(f"{V1}/reservations/{hold['id']}/commit", json={"amounts": "0.07"})
    first = (await client.get(f"{V1}/budgets/agent/ledger?limit=3")).json()
    second = (await client.get(f"{V1}/budgets/agent/ledger?limit=3&cursor={first['next_cursor']}")).json()
    entries = first["entries"] + second["entries"]
    assert second["next_cursor"] is None and second["trimmed"] is False
    assert [entry["entry_id"] for entry in entries] == ["4", "3", "2", "1"]
    assert [entry["kind"] for entry in entries] == ["commit", "record", "record", "record"]
    assert [entry["amount"] for entry in entries] == ["0.07", "0.02", "0.02", "0.02"]
    assert list(entries[1]) == ["entry_id", "at", "kind", "hold_id", "amount", "operation", "trace_id", "scope"]
    assert (entries[1]["hold_id"], entries[1]["operation"]) == ("op_2", "search")
    window = (await client.get(f"{V1}/budgets/agent")).json()["window"]
    assert (await client.get(f"{V1}/budgets/agent/ledger?window={window}")).json()["entries"] == entries
    assert (await client.get(f"{V1}/budgets/agent/ledger?window=2020-01-01")).json()["entries"] == []
    again = (await client.get(f"{V1}/budgets/agent/ledger?cursor=99")).json()
    assert (again["entries"], again["trimmed"]) == (entries, True), "the entries of that number are gone"


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=1001", "limit=ten", "limit=", "limit=1_0", "limit=-1", "cursor=x", "cursor=2-0", "cursor="],
)
async def test_an_invalid_page_limit_or_cursor_is_refused(client, query):
    response = await client.get(f"{V1}/budgets/agent/holds?{query}")
    assert response.status_code == 422
    assert response.json()["code"] in ("invalid-request", "invalid-argument")


@pytest.mark.parametrize(
    "query", ["cursor=0-0", "cursor=99999999999999999999", "cursor=1-0", "window=yesterday", "window=2026-13-01"]
)
async def test_an_invalid_cursor_or_window_of_a_ledger_is_refused(client, query):
    problem(await client.get(f"{V1}/budgets/agent/ledger?{query}"), 422, "invalid-argument")


async def test_a_limit_set_over_http_applies_to_all_replicas(start):
    one, other = (await start()).client, (await start()).client
    changed = await one.put(f"{V1}/budgets/agent/limit", json={"limit": "10.00"})
    assert changed.status_code == 200
    assert (changed.json()["limit"], changed.json()["limit_source"]) == ("10.00", "runtime")
    assert (await other.get(f"{V1}/agent/budget")).json()["daily_limit"] == 10.0
    assert (await reserved(other, {"agent": "7"}))["state"] == "open"
    cleared = await other.delete(f"{V1}/budgets/agent/limit")
    assert (cleared.json()["limit"], cleared.json()["limit_source"]) == ("5.00", "configured")
    assert await figures(one) == ("0.00", "7.00", "0.00", "0.00")


async def test_the_key_is_checked_before_an_unexpected_body(start):
    client = (await start(admin_key="admin-1")).client
    problem(await client.request("DELETE", f"{V1}/budgets/agent/limit", json={"x": 1}), 401, "unauthorized")


async def test_the_log_of_changes_names_the_key_and_the_reason_of_each_change(start):
    client = (await start(admin_key="admin-1")).connect("admin-1")
    await client.put(f"{V1}/budgets/agent/limit", json={"limit": "10.00", "reason": "a long backtest"})
    await client.delete(f"{V1}/budgets/agent/limit?reason=all+done")
    page = (await client.get(f"{V1}/changes?limit=1")).json()
    [cleared] = page["changes"]
    owner = f"http-{hashlib.sha256(b'admin-1').hexdigest()[:8]}"
    assert (cleared["kind"], cleared["name"], cleared["by"]) == ("limit", "agent", owner)
    assert (cleared["before"], cleared["after"], cleared["reason"]) == ("$10.00", "", "all done")
    page = (await client.get(f"{V1}/changes?cursor={page['next_cursor']}")).json()
    [made] = page["changes"]
    assert (made["number"], made["reason"], page["next_cursor"]) == (1, "a long backtest", None)
    problem(await client.get(f"{V1}/changes?cursor=x"), 422, "invalid-argument")
    problem(await client.delete(f"{V1}/budgets/agent/limit?reason={'x' * 257}"), 422, "invalid-request")


async def test_a_limit_can_be_set_until_a_given_time(client):
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    changed = await client.put(
        f"{V1}/budgets/agent/limit", json={"limit": 1, "until": f"{until:%Y-%m-%dT%H:%M:%S}+00:00"}
    )
    assert changed.json()["limit_until"] == f"{until:%Y-%m-%dT%H:%M:%S}Z"
    changed = await client.put(f"{V1}/budgets/agent/limit", json={"limit": None, "until": "window"})
    assert changed.json()["limit"] is None
    assert changed.json()["limit_until"] == changed.json()["resets_at"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"until": "window"},
        {"limit": "-1"},
        {"limit": True},
        {"limit": [1]},
        {"limit": "1", "until": "tomorrow"},
        {"limit": "1", "until": "2026-11-23T18:00:00"},
        {"limit": "1", "until": "2001-01-01T00:00:00Z"},
        {"limit": "1", "until": "9999-12-31T23:59:59-23:59"},
        {"limit": "1", "until": "2026-02-30T00:00:00Z"},
        {"limit": "1", "until": 1700000000},
        {"limit": "1", "for": "all"},
        {"limit": "1", "reason": "x" * 257},
        {"limit": "1", "reason": None},
        {"limit": "9007199.254740992"},
    ],
)
async def test_an_invalid_limit_is_refused(client, body):
    response = await client.put(f"{V1}/budgets/agent/limit", json=body)
    assert response.status_code == 422, response.text
    assert response.json()["code"] in ("invalid-request", "invalid-argument", "invalid-amount")
    assert (await client.get(f"{V1}/budgets/agent")).json()["limit_source"] == "configured"


async def test_the_agent_budget_resets_at_midnight_in_the_configured_timezone(start):
    client = (await start(agent_budget_timezone="Pacific/Kiritimati")).client
    document = (await client.get(f"{V1}/budgets/agent")).json()
    assert document["timezone"] == "Pacific/Kiritimati"
    assert document["resets_at"].endswith("T10:00:00Z")


async def test_after_a_data_loss_a_budget_shows_when_the_recovery_of_the_store_ends(start, clocked_server):
    client = (await start(redis_url=clocked_server.url, timeout=0.3)).client
    assert (await client.get(f"{V1}/budgets/agent")).json()["recovering_until"] is None
    assert (await client.post(f"{V1}/spend", json={"amounts": {"agent": "0.15"}})).status_code == 201
    clocked_server.set(clocked_server.now(), frozen=True)  # the store waits for replays until its clock runs again
    with clocked_server.client() as store:
        store.flushall()

    async def being_repaired() -> bool:
        refused = await client.post(f"{V1}/reservations", json={"amounts": {"agent": "0.15"}})
        return "being repaired" in problem(refused, 503, "store-unavailable")["detail"]

    with away(clocked_server.url):
        await until(being_repaired)
    ends = (await client.get(f"{V1}/budgets/agent")).json()["recovering_until"]
    assert ends.endswith("Z")
    assert (await client.get(f"{V1}/agent/budget")).json()["recovering_until"] == ends
