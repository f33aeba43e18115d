"""``ktrdr agent trigger``, ``status``, ``cancel`` and ``cycles``: requests, output and exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

from .support import (
    COMPLETED,
    CYCLE,
    DESIGNED,
    GATED,
    NOT_STARTED,
    STARTED,
    TRAINED,
    FakeService,
    Terminal,
    agent_status,
    cycle,
    problem,
)

Run = Callable[..., Result]
TRIGGER = "POST /api/v1/agent/trigger"
STATUS = "GET /api/v1/agent/status"
CANCEL = "DELETE /api/v1/agent/cancel/op_1"
CYCLES = "GET /api/v1/agent/cycles"
RUNNING = {
    **problem(409, "Conflict", "a cycle is running")[1],
    "triggered": False,
    "reason": "active_cycle_exists",
    "message": "A research cycle is already running: op_7",
    "operation_ids": ["op_7"],
}
TAKEN = {
    **problem(409, "Conflict", "the id op_1 is in use with other contents")[1],
    "triggered": False,
    "reason": "id_conflict",
    "message": "the id op_1 is in use with other contents",
}
CROWDED = {
    **problem(429, "The tenant has too many holds", "the tenant has 3 holds")[1],
    "triggered": False,
    "reason": "too_many_holds",
    "message": "the tenant has 3 holds",
    "retry_after": 9,
}
OTHERWISE = {
    **problem(409, "The budget has another definition", "the budget 'agent' has another timezone in the store")[1],
    "triggered": False,
    "reason": "budget_mismatch",
    "message": "the budget 'agent' has another timezone in the store",
    "operation_ids": [],
}
INVALID = {
    **problem(422, "Invalid request", "operation_id: must match op_…")[1],
    "triggered": False,
    "reason": "invalid_request",
    "message": "operation_id: must match op_…",
}
DOWN = {
    **problem(503, "The store cannot be reached", "the store does not answer")[1],
    "triggered": False,
    "reason": "budget_unavailable",
    "message": "Budget unavailable",
}


# --- trigger --------------------------------------------------------------------------------------


def test_the_trigger_command_prints_the_reply_of_the_service_if_a_cycle_starts(
    ktrdr: Run, service: FakeService
) -> None:
    service.answer(TRIGGER, STARTED, 202)
    for words in ((), ("--json",)):
        result = ktrdr("agent", "trigger", *words)
        assert (result.exit_code, result.stderr) == (0, "")
        assert json.loads(result.stdout) == STARTED
        assert result.stdout.count("\n") == 1


def test_the_trigger_command_sends_a_new_id_each_time_if_no_id_is_given(ktrdr: Run, service: FakeService) -> None:
    service.answer(TRIGGER, STARTED, 202)
    ktrdr("agent", "trigger")
    ktrdr("agent", "trigger")
    ktrdr("agent", "trigger", "--id", "op_mine")
    ids = [request.body["operation_id"] for request in service.requests]
    assert ids[0] != ids[1]
    assert all(one.startswith("op_") for one in ids)
    assert ids[2] == "op_mine"
    assert all(list(request.body) == ["operation_id"] for request in service.requests)


def test_the_trigger_command_sends_its_options_unchanged(ktrdr: Run, service: FakeService) -> None:
    service.answer(TRIGGER, STARTED, 202)
    options = ("--brief", "Follow trends.", "--model", "haiku", "--bypass-gates")
    assert ktrdr("agent", "trigger", "--id", "op_1", *options).exit_code == 0
    assert ktrdr("agent", "trigger", "--id", "op_1", "--strategy", "momentum", "-m", "opus", "-b").exit_code == 0
    assert [request.body for request in service.requests] == [
        {"operation_id": "op_1", "brief": "Follow trends.", "model": "haiku", "bypass_gates": True},
        {"operation_id": "op_1", "strategy": "momentum", "model": "opus", "bypass_gates": True},
    ]


def test_an_unknown_option_of_the_trigger_command_is_a_usage_error(ktrdr: Run, service: FakeService) -> None:
    result = ktrdr("agent", "trigger", "--symbol", "AAPL")
    assert (result.exit_code, service.requests) == (2, [])
    assert "No such option" in result.stderr


@pytest.mark.parametrize(
    ("status", "document", "code", "line"),
    [
        (
            429,
            NOT_STARTED,
            3,
            "denied: Daily budget exhausted: budget_exhausted ($0.01 remaining, need $0.15); retry in 1 h",
        ),
        (
            429,
            {**NOT_STARTED, "retry_after": None},
            3,
            "denied: Daily budget exhausted: budget_exhausted ($0.01 remaining, need $0.15); a retry cannot succeed",
        ),
        (409, RUNNING, 3, "denied: A research cycle is already running: op_7"),
        (409, TAKEN, 1, "ktrdr: the id op_1 is in use with other contents"),
        (
            429,
            {**NOT_STARTED, "denial_reason": "exceeds_limit", "retry_after": 63_124},
            3,
            "denied: Daily budget exhausted: budget_exhausted ($0.01 remaining, need $0.15); a retry cannot succeed",
        ),
        (429, CROWDED, 3, "denied: the tenant has 3 holds; retry in 9 s"),
        (409, OTHERWISE, 1, "ktrdr: the budget 'agent' has another timezone in the store"),
        (422, INVALID, 2, "ktrdr: operation_id: must match op_…"),
        (
            503,
            DOWN,
            4,
            "ktrdr: the store does not answer; the request may have taken effect:"
            " repeating the request with --id op_1 is safe",
        ),
    ],
)
def test_the_trigger_command_prints_the_reply_of_the_service_if_no_cycle_starts(
    ktrdr: Run, service: FakeService, status: int, document: dict[str, Any], code: int, line: str
) -> None:
    service.answer(TRIGGER, document, status)
    for wait in ((), ("--wait",)):
        result = ktrdr("agent", "trigger", "--id", "op_1", *wait)
        assert (result.exit_code, result.stderr) == (code, line + "\n")
        assert json.loads(result.stdout) == document


@pytest.mark.parametrize(("status", "code"), [(401, 1), (404, 1), (409, 1), (422, 2), (500, 1), (503, 4)])
def test_the_trigger_command_reports_an_error_other_than_a_denial_in_one_line(
    ktrdr: Run, service: FakeService, status: int, code: int
) -> None:
    service.answer(TRIGGER, *reversed(problem(status, "Title", "what is wrong")))
    result = ktrdr("agent", "trigger")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("ktrdr: what is wrong")
    assert result.stderr.count("\n") == 1


def test_the_error_names_the_id_for_a_safe_retry_if_the_reply_to_the_trigger_command_is_lost(
    ktrdr: Run, service: FakeService
) -> None:
    service.answer(TRIGGER, b"HTTP/1.1 202 Accepted\r\nContent-Length: 99\r\n\r\n{")
    result = ktrdr("agent", "trigger")
    assert (result.exit_code, result.stdout) == (4, "")
    assert f"repeating the request with --id {service.requests[0].body['operation_id']} is safe" in result.stderr


@pytest.mark.parametrize("document", [{}, {"triggered": True}, {"operation_ids": ["op_1"]}])
def test_a_malformed_reply_to_a_trigger_is_an_error(ktrdr: Run, service: FakeService, document: dict[str, Any]) -> None:
    service.answer(TRIGGER, document, 202)
    result = ktrdr("agent", "trigger")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "not from a ktrdr-budget service" in result.stderr


@pytest.mark.parametrize("id", ["", "a b", "x" * 129, "ä"])
def test_an_invalid_id_is_a_usage_error(ktrdr: Run, service: FakeService, id: str) -> None:
    assert ktrdr("agent", "trigger", "--id", id).exit_code == 2
    assert ktrdr("agent", "cancel", id).exit_code == 2
    assert not service.requests


# --- status ---------------------------------------------------------------------------------------


def test_the_status_command_prints_idle_if_no_cycle_has_ever_run(ktrdr: Run, service: FakeService) -> None:
    service.answer(STATUS, agent_status())
    result = ktrdr("agent", "status")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "Agent Status\n"
        "==============================\n"
        "Status: idle\n"
        "Budget: $4.85 of $5.00 remaining\n"
        "Capacity: 3/3 cycles free\n"
        "Last Cycle: none\n"
    )


def test_the_status_command_shows_unlimited_if_budget_and_capacity_have_no_limit(
    ktrdr: Run, service: FakeService
) -> None:
    unlimited = {
        "budget": {"remaining": None, "daily_limit": None},
        "capacity": {"active": 1, "free": None, "limit": None},
    }
    service.answer(STATUS, {**agent_status(), **unlimited})
    assert ktrdr("agent", "status").stdout.splitlines()[3:5] == ["Budget: unlimited", "Capacity: unlimited, 1 running"]


def test_the_status_command_shows_unknown_if_budget_and_capacity_are_null(ktrdr: Run, service: FakeService) -> None:
    service.answer(STATUS, {**agent_status(), "budget": None, "capacity": None})
    assert ktrdr("agent", "status").stdout.splitlines()[3:5] == ["Budget: unknown", "Capacity: unknown"]


def test_the_status_command_omits_budget_and_capacity_if_an_older_service_sends_neither(
    ktrdr: Run, service: FakeService
) -> None:
    status = agent_status()
    del status["budget"], status["capacity"]
    service.answer(STATUS, status)
    assert ktrdr("agent", "status").stdout.splitlines()[2:] == ["Status: idle", "Last Cycle: none"]


def test_the_status_command_shows_the_details_of_a_running_cycle(ktrdr: Run, service: FakeService) -> None:
    service.answer(STATUS, agent_status(cycle(**TRAINED), last=cycle(**COMPLETED, operation_id="op_0")))
    assert ktrdr("agent", "status").stdout == (
        "Agent Status\n"
        "==============================\n"
        "Status: backtesting\n"
        "Budget: $4.85 of $5.00 remaining\n"
        "Capacity: 2/3 cycles free\n"
        "\n"
        "Cycle:          op_1\n"
        "Phase:          backtesting\n"
        "Strategy:       momentum_12_26\n"
        "Time:           1.5 s\n"
        "Spend:          $0.0312 of $0.15 estimated\n"
        "Tokens:         design 1234, assessment 0\n"
        "Training Gate:  passed: accuracy 0.531 >= 0.1\n"
        "Replica:        r1\n"
        "\n"
        "Last Cycle: op_0 completed after 5.0 s, $0.0715\n"
    )


def test_the_status_command_shows_a_separate_block_for_each_running_cycle(ktrdr: Run, service: FakeService) -> None:
    service.answer(STATUS, agent_status(cycle(status="cancelling"), cycle(operation_id="op_2", **DESIGNED)))
    blocks = ktrdr("agent", "status").stdout.split("\n\n")
    assert len(blocks) == 4
    assert "Phase:    designing, being cancelled\n" in blocks[1]
    assert blocks[2].startswith("Cycle:     op_2\nPhase:     training\n")
    assert blocks[3] == "Last Cycle: none\n"


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        (GATED, "failed after 2.0 s, $0.0312 (gate_failed: accuracy 0.05 < 0.1)"),
        (
            {**GATED, "error": "training gate: accuracy 0.05 < 0.1"},
            "failed after 2.0 s, $0.0312 (gate_failed: training gate: accuracy 0.05 < 0.1)",
        ),
        (
            {"status": "failed", "outcome": "failed", "reason": "worker_lost", "elapsed_seconds": 61},
            "failed after 1 min 01 s, $0.00 (worker_lost)",
        ),
        (
            {"status": "failed", "outcome": "failed", "reason": "error", "error": "KeyError: 'x'\n\x1b[2J"},
            "failed after 0.2 s, $0.00 (error: KeyError: 'x' ?[2J)",
        ),
        (
            {"status": "cancelled", "outcome": "cancelled", "reason": "cancelled", "elapsed_seconds": 3725.9},
            "cancelled after 1 h 02 min, $0.00",
        ),
    ],
)
def test_the_status_command_shows_how_the_last_cycle_ended(
    ktrdr: Run, service: FakeService, changes: dict[str, Any], shown: str
) -> None:
    service.answer(STATUS, agent_status(last=cycle(**changes)))
    assert ktrdr("agent", "status").stdout.splitlines()[-1] == f"Last Cycle: op_1 {shown}"


def test_the_status_command_with_json_prints_the_reply_of_the_service(ktrdr: Run, service: FakeService) -> None:
    reply = {**agent_status(cycle()), "something_new": 1}
    service.answer(STATUS, reply)
    assert json.loads(ktrdr("agent", "status", "--json").stdout) == reply


def test_the_status_command_with_watch_shows_each_change_of_a_cycle(
    terminal: Callable[..., Terminal], service: FakeService
) -> None:
    service.answer(STATUS, agent_status(cycle()))
    opened = terminal("agent", "status", "--watch", "--interval", "0.1")
    opened.read_until(lambda text: "Phase:    designing" in text)
    service.answer(STATUS, agent_status(cycle(**DESIGNED)))
    opened.read_until(lambda text: "momentum_12_26" in text)
    opened.type("\x03")
    assert opened.wait() == 0


# --- cancel ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "title"), [("cancelled", "Cancelled"), ("cancelling", "Cancelling")])
def test_the_cancel_command_shows_the_message_of_the_service(
    ktrdr: Run, service: FakeService, status: str, title: str
) -> None:
    reply = {"operation_id": "op_1", "status": status, "message": "it stops\nsoon"}
    service.answer(CANCEL, reply)
    result = ktrdr("agent", "cancel", "op_1")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{title} op_1: it stops soon\n", "")
    assert json.loads(ktrdr("agent", "cancel", "op_1", "--json").stdout) == reply


@pytest.mark.parametrize(
    ("status", "detail"), [(404, "there is no cycle op_1"), (409, "op_1 cannot be cancelled: it is completed")]
)
def test_a_refused_cancellation_is_reported_in_one_line_with_exit_code_1(
    ktrdr: Run, service: FakeService, status: int, detail: str
) -> None:
    service.answer(CANCEL, {**problem(status, "No", detail)[1], "operation_id": "op_1"}, status)
    for words in ((), ("--json",)):
        result = ktrdr("agent", "cancel", "op_1", *words)
        assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"ktrdr: {detail}\n")


def test_the_cancel_command_percent_encodes_the_id_as_one_path_segment(ktrdr: Run, service: FakeService) -> None:
    reply = {"operation_id": "a/b@c", "status": "cancelled", "message": "done"}
    service.answer("DELETE /api/v1/agent/cancel/a%2Fb%40c", reply)
    assert ktrdr("agent", "cancel", "a/b@c").exit_code == 0


# --- cycles ---------------------------------------------------------------------------------------


def test_the_cycles_command_prints_a_table(ktrdr: Run, service: FakeService) -> None:
    found = [
        cycle(operation_id="op_3", status="cancelling"),
        cycle(operation_id="op_2", **GATED),
        cycle(**COMPLETED),
    ]
    service.answer(CYCLES, {"cycles": found, "next_cursor": None})
    result = ktrdr("agent", "cycles")
    assert (result.exit_code, result.stderr) == (0, "")
    headings, *rows = ([cell.strip() for cell in line.split("  ") if cell] for line in result.stdout.splitlines())
    assert headings == ["OPERATION", "STARTED AT", "STATUS", "TIME", "SPEND", "TOKENS", "GATES", "STRATEGY"]
    at = "2026-11-23T12:00:00Z"
    assert rows == [
        ["op_3", at, "cancelling (designing)", "0.2 s", "$0.00", "0"],
        ["op_2", at, "failed (gate_failed)", "2.0 s", "$0.0312", "1234", "training fail", "momentum_12_26"],
        ["op_1", at, "completed", "5.0 s", "$0.0715", "2000", "training pass, backtest pass", "momentum_12_26"],
    ]


def test_the_cycles_command_prints_a_message_if_there_are_no_cycles(ktrdr: Run, service: FakeService) -> None:
    service.answer(CYCLES, {"cycles": [], "next_cursor": None})
    assert ktrdr("agent", "cycles").stdout == "No cycles.\n"


def test_the_cycles_command_prints_a_single_page_unless_all_pages_are_requested(
    ktrdr: Run, service: FakeService
) -> None:
    service.answer(f"{CYCLES}?limit=1", {"cycles": [cycle(operation_id="op_2")], "next_cursor": "c1"})
    service.answer(f"{CYCLES}?limit=1&cursor=c1", {"cycles": [cycle()], "next_cursor": None})
    assert ktrdr("agent", "cycles", "--limit", "1").stdout.endswith("More: --cursor c1, or --all\n")
    everything = json.loads(ktrdr("agent", "cycles", "--limit", "1", "--all", "--json").stdout)
    assert [item["operation_id"] for item in everything["cycles"]] == ["op_2", "op_1"]


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "x"])
def test_an_invalid_page_limit_is_a_usage_error(ktrdr: Run, limit: str) -> None:
    assert ktrdr("agent", "cycles", "--limit", limit).exit_code == 2


# --- Malformed replies ---------------------------------------------------------------------------

BROKEN: list[dict[str, Any]] = [
    *(
        {name: value for name, value in CYCLE.items() if name != missing}
        for missing in ("operation_id", "spend", "gates")
    ),
    cycle(spend="a lot"),
    cycle(elapsed_seconds="soon"),
    cycle(tokens=None),
    cycle(gates=[{}]),
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_malformed_cycle_is_an_error(ktrdr: Run, service: FakeService, broken: dict[str, Any]) -> None:
    service.answer(STATUS, {"status": "idle", "active_cycles": [broken], "last_cycle": None})
    service.answer(CYCLES, {"cycles": [broken], "next_cursor": None})
    for words in (("status",), ("cycles",)):
        result = ktrdr("agent", *words)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "not from a ktrdr-budget service" in result.stderr
        assert result.stderr.count("\n") == 1


def test_escape_sequences_in_replies_of_the_service_do_not_reach_the_terminal(ktrdr: Run, service: FakeService) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J"
    named = cycle(**{**COMPLETED, "operation_id": evil, "strategy_name": evil, "replica": evil, "phase": evil})
    running = {**named, "outcome": None, "status": "running"}
    service.answer(STATUS, {"status": evil, "active_cycles": [running], "last_cycle": named, "as_of": evil})
    service.answer(CYCLES, {"cycles": [named], "next_cursor": evil})
    service.answer(CANCEL, {"operation_id": evil, "status": "cancelled", "message": evil})
    service.answer(TRIGGER, {**NOT_STARTED, "message": evil}, 429)
    for words in (("status",), ("cycles",), ("cancel", "op_1"), ("trigger",)):
        result = ktrdr("agent", *words)
        assert "\x1b" not in result.output, words
        assert "\x07" not in result.output, words
        assert "owned" in result.output, words
