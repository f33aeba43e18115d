"""``ktrdr budget list | show | set-limit | clear-limit | holds | ledger | changes``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

from .support import BUDGET, HOLD, FakeService, Terminal, problem

Run = Callable[..., Result]
CYCLES = {
    **BUDGET,
    "name": "cycles",
    "unit": "cycles",
    "period": "ever",
    "kind": "slots",
    "window": "ever",
    "starts_at": None,
    "resets_at": None,
    "limit": None,
    "spent": 0,
    "held": 2,
    "unconfirmed": 0,
    "remaining": None,
    "configured_limit": None,
}
RUNTIME = {**BUDGET, "limit": "10.00", "remaining": "9.55", "limit_source": "runtime", "limit_until": None}
ENTRY = {
    "entry_id": "1763899200000-0",
    "at": "2026-11-23T12:00:00Z",
    "kind": "commit",
    "hold_id": "op_1",
    "amount": "0.07",
    "operation": "research",
    "trace_id": "",
    "scope": {},
}
HOLDS = "GET /api/v1/budgets/agent/holds"
LEDGER = "GET /api/v1/budgets/agent/ledger"


# --- list and show --------------------------------------------------------------------------------


def test_the_list_command_prints_an_aligned_table(ktrdr: Run, service: FakeService) -> None:
    service.answer("GET /api/v1/budgets", {"budgets": [BUDGET, CYCLES]})
    assert ktrdr("budget", "list").stdout == (
        "NAME    WINDOW      UNIT        LIMIT  SPENT   HELD  UNCONFIRMED  REMAINING  RESETS AT\n"
        "agent   2026-11-23  usd         $5.00  $0.15  $0.30        $0.00      $4.55  2026-11-24T00:00:00Z\n"
        "cycles  ever        cycles  unlimited      0      2            0  unlimited  never\n"
    )


def test_the_list_command_marks_a_limit_set_at_run_time(ktrdr: Run, service: FakeService) -> None:
    service.answer("GET /api/v1/budgets", {"budgets": [RUNTIME]})
    lines = ktrdr("budget", "list").stdout.splitlines()
    assert " $10.00* " in lines[1]
    assert lines[2] == "* set at run time"


def test_the_list_command_shows_unknown_if_the_figures_of_a_budget_cannot_be_read(
    ktrdr: Run, service: FakeService
) -> None:
    unavailable = [{"budget": "team", "detail": "budget 'team' has another definition"}]
    service.answer("GET /api/v1/budgets", {"budgets": [BUDGET], "unavailable": unavailable})
    result = ktrdr("budget", "list")
    assert (result.exit_code, result.stderr) == (1, "ktrdr: budget 'team' has another definition\n")
    _, agent, team = result.stdout.splitlines()
    assert agent.split()[0] == "agent"
    assert team.split() == ["team", *["unknown"] * 8]
    result = ktrdr("budget", "list", "--json")
    assert (result.exit_code, json.loads(result.stdout)["unavailable"]) == (1, unavailable)


def test_the_list_command_prints_a_message_if_there_are_no_budgets(ktrdr: Run, service: FakeService) -> None:
    service.answer("GET /api/v1/budgets", {"budgets": []})
    assert ktrdr("budget", "list").stdout == "No budgets.\n"


def test_table_headings_are_bold_only_on_a_terminal(
    ktrdr: Run, terminal: Callable[..., Terminal], service: FakeService, environment: pytest.MonkeyPatch
) -> None:
    service.answer("GET /api/v1/budgets", {"budgets": [BUDGET]})
    opened = terminal("budget", "list", columns=120)
    assert opened.wait() == 0
    assert opened.text.startswith("\x1b[1mNAME")
    plain = ktrdr("budget", "list").stdout
    assert opened.text.replace("\x1b[1m", "").replace("\x1b[0m", "") == plain
    environment.setenv("NO_COLOR", "1")
    opened = terminal("budget", "list", columns=120)
    assert opened.wait() == 0
    assert opened.text == plain


TRACED = {**ENTRY, "trace_id": "0af7651916cd43dd8448eb211c80319c"}
TEAM = {**BUDGET, "name": "team:quant", "spent": "0.066255", "limit_source": "runtime"}


@pytest.mark.parametrize(
    ("words", "call", "document", "headings"),
    [
        (("list",), "GET /api/v1/budgets", {"budgets": [BUDGET, TEAM]}, ["NAME", "WINDOW", "LIMIT", "RESETS AT"]),
        (("ledger", "agent"), LEDGER, {"entries": [TRACED] * 2, "next_cursor": None}, ["AT", "AMOUNT", "ENTRY"]),
    ],
)
def test_a_table_wider_than_the_terminal_is_printed_as_one_block_per_row(
    terminal: Callable[..., Terminal],
    service: FakeService,
    words: tuple[str, ...],
    call: str,
    document: dict[str, Any],
    headings: list[str],
) -> None:
    service.answer(call, document)
    for columns in (80, 50):
        opened = terminal("budget", *words, columns=columns)
        assert opened.wait() == 0
        lines = opened.text.splitlines()
        assert max(map(len, lines)) <= columns, opened.text
        for heading in headings:
            assert len([line for line in lines if line.startswith(f"{heading}: ")]) == 2, opened.text
        assert lines.count("") == 1  # between the blocks


def test_the_show_command_prints_all_figures_of_a_budget(ktrdr: Run, service: FakeService) -> None:
    service.answer("GET /api/v1/budgets/agent", BUDGET)
    assert ktrdr("budget", "show", "agent").stdout == (
        "Budget:        agent\n"
        "Window:        2026-11-23 (day, UTC)\n"
        "Unit:          usd\n"
        "Limit:         $5.00\n"
        "Spent:         $0.15\n"
        "Held:          $0.30\n"
        "Unconfirmed:   $0.00\n"
        "Remaining:     $4.55\n"
        "Spend events:  1\n"
        "Overruns:      0\n"
        "Resets at:     2026-11-24T00:00:00Z\n"
        "As of:         2026-11-23T12:00:00Z\n"
    )


def test_the_show_command_prints_the_end_of_the_recovery_after_a_data_loss(ktrdr: Run, service: FakeService) -> None:
    service.answer("GET /api/v1/budgets/agent", {**BUDGET, "recovering_until": "2026-11-23T12:00:03Z"})
    last = ktrdr("budget", "show", "agent").stdout.splitlines()[-1]
    assert last == "Recovering:    the store lost writes; nothing is admitted until 2026-11-23T12:00:03Z"


def test_the_show_command_prints_unlimited_and_never_for_an_unlimited_slots_budget(
    ktrdr: Run, service: FakeService
) -> None:
    service.answer("GET /api/v1/budgets/cycles", CYCLES)
    text = ktrdr("budget", "show", "cycles").stdout
    assert "Window:        ever (ever, UTC, slots)\n" in text
    assert "Limit:         unlimited\n" in text
    assert "Resets at:     never\n" in text


@pytest.mark.parametrize(
    ("words", "document"), [(("list",), {"budgets": [BUDGET, CYCLES]}), (("show", "agent"), BUDGET)]
)
def test_the_option_json_prints_the_reply_of_the_service(
    ktrdr: Run, service: FakeService, words: tuple[str, ...], document: Any
) -> None:
    service.answer("GET /api/v1/budgets", document)
    service.answer("GET /api/v1/budgets/agent", document)
    assert json.loads(ktrdr("budget", *words, "--json").stdout) == document


def test_an_unknown_budget_is_an_error(ktrdr: Run, service: FakeService) -> None:
    service.answer("GET /api/v1/budgets/unknown", *reversed(problem(404, "Unknown", "no budget is named 'unknown'")))
    result = ktrdr("budget", "show", "unknown")
    assert (result.exit_code, result.stderr) == (1, "ktrdr: no budget is named 'unknown'\n")


# --- Definitions ----------------------------------------------------------------------------------


def test_the_migrate_command_prints_the_old_and_the_new_definition(ktrdr: Run, service: FakeService) -> None:
    before, after = (f"unit usd, period {period}, timezone UTC, kind spend" for period in ("week", "day"))
    answer = {"budget": "agent", "before": before, "after": after, "limit_cleared": False}
    service.answer("POST /api/v1/budgets/agent/migrate", answer)
    result = ktrdr("budget", "migrate", "agent")
    assert (result.exit_code, result.stdout) == (0, f"Budget:  agent\nBefore:  {before}\nNow:     {after}\n")
    assert json.loads(ktrdr("budget", "migrate", "agent", "--json").stdout) == answer
    service.answer("POST /api/v1/budgets/agent/migrate", {**answer, "before": None, "limit_cleared": True})
    lines = ktrdr("budget", "migrate", "agent").stdout.splitlines()
    assert lines[1] == "Before:  not registered"
    assert lines[3] == "Limit:   the run-time limit was cleared because its unit has changed"


# --- Limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "body"),
    [
        (("10.00",), {"limit": "10.00"}),
        (("0",), {"limit": "0"}),
        (("unlimited",), {"limit": None}),
        (("10", "--until", "never"), {"limit": "10"}),
        (("10", "--until", "window"), {"limit": "10", "until": "window"}),
        (("10", "--reason", "a long backtest"), {"limit": "10", "reason": "a long backtest"}),
        (("10", "--until", "2026-11-24T00:00:00Z"), {"limit": "10", "until": "2026-11-24T00:00:00Z"}),
        (("10", "--until", "2026-11-24T00:00:00+01:00"), {"limit": "10", "until": "2026-11-24T00:00:00+01:00"}),
    ],
)
def test_the_set_limit_command_sends_the_limit_and_the_end_of_the_limit(
    ktrdr: Run, service: FakeService, words: tuple[str, ...], body: dict[str, Any]
) -> None:
    service.answer("PUT /api/v1/budgets/agent/limit", RUNTIME)
    result = ktrdr("budget", "set-limit", "agent", *words)
    assert result.exit_code == 0, result.stderr
    assert service.requests[0].body == body
    assert "Limit:         $10.00 (set at run time; configured: $5.00)\n" in result.stdout


def test_the_set_limit_command_prints_the_end_of_the_limit(ktrdr: Run, service: FakeService) -> None:
    service.answer("PUT /api/v1/budgets/agent/limit", {**RUNTIME, "limit_until": "2026-11-24T00:00:00Z"})
    text = ktrdr("budget", "set-limit", "agent", "10", "--until", "window").stdout
    assert "Limit:         $10.00 (set at run time until 2026-11-24T00:00:00Z; configured: $5.00)\n" in text


@pytest.mark.parametrize("until", ["tomorrow", "2026-11-24", "2026-11-24T00:00:00", ""])
def test_the_set_limit_command_rejects_a_time_without_a_timezone(ktrdr: Run, service: FakeService, until: str) -> None:
    result = ktrdr("budget", "set-limit", "agent", "10", "--until", until)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert service.requests == []


def test_the_set_limit_command_reports_a_usage_error_if_the_service_rejects_the_limit(
    ktrdr: Run, service: FakeService
) -> None:
    service.answer("PUT /api/v1/budgets/agent/limit", *reversed(problem(422, "Invalid", "amount is not a number: 'x'")))
    result = ktrdr("budget", "set-limit", "agent", "x")
    assert (result.exit_code, result.stderr) == (2, "ktrdr: amount is not a number: 'x'\n")


def test_the_clear_limit_command_restores_the_configured_limit(ktrdr: Run, service: FakeService) -> None:
    service.answer("DELETE /api/v1/budgets/agent/limit", BUDGET)
    result = ktrdr("budget", "clear-limit", "agent")
    assert result.exit_code == 0
    assert "Limit:         $5.00\n" in result.stdout
    assert service.requests[0].body is None
    service.answer("DELETE /api/v1/budgets/agent/limit?reason=all+done", BUDGET)
    assert ktrdr("budget", "clear-limit", "agent", "--reason", "all done").exit_code == 0


# --- Changes --------------------------------------------------------------------------------------


def test_the_changes_command_prints_a_table(ktrdr: Run, service: FakeService) -> None:
    first = {
        "number": 1,
        "at": "2026-11-23T12:00:00Z",
        "kind": "limit",
        "name": "agent",
        "by": "http-4f51124d",
        "before": "",
        "after": "$10.00",
        "reason": "a long backtest",
    }
    second = {**first, "number": 2, "before": "$10.00", "after": "", "by": "", "reason": ""}
    service.answer("GET /api/v1/changes", {"changes": [second, first], "next_cursor": None, "trimmed": False})
    assert ktrdr("budget", "changes").stdout == (
        "NUMBER  AT                    KIND   NAME   BEFORE  AFTER   BY             REASON\n"
        "     2  2026-11-23T12:00:00Z  limit  agent  $10.00\n"
        "     1  2026-11-23T12:00:00Z  limit  agent          $10.00  http-4f51124d  a long backtest\n"
    )


def test_the_changes_command_prints_a_message_if_nothing_was_changed(ktrdr: Run, service: FakeService) -> None:
    service.answer("GET /api/v1/changes", {"changes": [], "next_cursor": None, "trimmed": False})
    assert ktrdr("budget", "changes").stdout == "No changes.\n"


# --- Pages ----------------------------------------------------------------------------------------


def test_the_holds_command_prints_an_aligned_table(ktrdr: Run, service: FakeService) -> None:
    expired = {**HOLD, "id": "op_22", "state": "unconfirmed", "charged": {"agent": "0.15"}, "operation": ""}
    many = {**HOLD, "amounts": {"cycles": 1, "agent": "0.15"}}
    service.answer(HOLDS, {"holds": [many, expired], "next_cursor": None})
    assert ktrdr("budget", "holds", "agent").stdout == (
        "ID     STATE        AMOUNT  ACCRUED  CHARGED  EXPIRES AT            OPERATION\n"
        "op_1   open          $0.15    $0.00           2026-11-23T12:15:00Z  research\n"
        "op_22  unconfirmed   $0.15    $0.00    $0.15  2026-11-23T12:15:00Z\n"
    )


def test_the_ledger_command_prints_an_aligned_table(ktrdr: Run, service: FakeService) -> None:
    correction = {**ENTRY, "kind": "correction", "amount": "-0.08", "operation": "", "trace_id": "abc"}
    service.answer(LEDGER, {"entries": [correction, ENTRY], "next_cursor": None})
    assert ktrdr("budget", "ledger", "agent").stdout == (
        "AT                    KIND        AMOUNT  HOLD  OPERATION  TRACE  ENTRY\n"
        "2026-11-23T12:00:00Z  correction  -$0.08  op_1             abc    1763899200000-0\n"
        "2026-11-23T12:00:00Z  commit       $0.07  op_1  research          1763899200000-0\n"
    )


def test_the_lists_of_holds_and_of_ledger_entries_show_the_scope_after_the_operation(
    ktrdr: Run, service: FakeService
) -> None:
    scope = {"team": "quant", "user": "alice"}
    service.answer(HOLDS, {"holds": [{**HOLD, "scope": scope}], "next_cursor": None})
    service.answer(LEDGER, {"entries": [{**ENTRY, "operation": "", "scope": scope}], "next_cursor": None})
    assert ktrdr("budget", "holds", "agent").stdout.endswith("  research (team=quant, user=alice)\n")
    assert "  op_1  (team=quant, user=alice)  " in ktrdr("budget", "ledger", "agent").stdout
    entries = json.loads(ktrdr("budget", "ledger", "agent", "--json").stdout)["entries"]
    assert [entry["scope"] for entry in entries] == [scope]


def test_escape_sequences_in_the_name_of_an_operation_do_not_reach_the_terminal(
    ktrdr: Run, service: FakeService
) -> None:
    service.answer(LEDGER, {"entries": [{**ENTRY, "operation": "a\x1b[2Jb\nc"}], "next_cursor": None})
    text = ktrdr("budget", "ledger", "agent").stdout
    assert "a?[2Jb c" in text
    assert text.count("\n") == 2


@pytest.mark.parametrize(
    ("command", "call", "field", "none"),
    [
        ("holds", HOLDS, "holds", "No holds of agent.\n"),
        ("ledger", LEDGER, "entries", "No entries in the ledger of agent.\n"),
    ],
)
def test_a_message_is_printed_if_there_are_no_holds_or_no_ledger_entries(
    ktrdr: Run, service: FakeService, command: str, call: str, field: str, none: str
) -> None:
    service.answer(call, {field: [], "next_cursor": None})
    assert ktrdr("budget", command, "agent").stdout == none


def test_the_ledger_command_sends_the_given_window_and_page_size_and_cursor(ktrdr: Run, service: FakeService) -> None:
    service.answer(f"{LEDGER}?window=2026-11-23T10Z&limit=5&cursor=1-0", {"entries": [], "next_cursor": None})
    result = ktrdr("budget", "ledger", "agent", "--window", "2026-11-23T10Z", "--limit", "5", "--cursor", "1-0")
    assert result.exit_code == 0, result.stderr


def three_pages(service: FakeService) -> list[dict[str, Any]]:
    entries = [{**ENTRY, "entry_id": f"{number}-0"} for number in range(5)]
    query = f"{LEDGER}?limit=1000"
    service.answer(query, {"entries": entries[:2], "next_cursor": "2-0"})
    service.answer(f"{query}&cursor=2-0", {"entries": entries[2:4], "next_cursor": "4-0"})
    service.answer(f"{query}&cursor=4-0", {"entries": entries[4:], "next_cursor": None})
    return entries


def test_a_page_shows_the_cursor_of_the_next_page(ktrdr: Run, service: FakeService) -> None:
    service.answer(LEDGER, {"entries": [ENTRY], "next_cursor": "2-0"})
    assert ktrdr("budget", "ledger", "agent").stdout.splitlines()[-1] == "More: --cursor 2-0, or --all"


def test_the_option_all_prints_all_pages_as_one_table(ktrdr: Run, service: FakeService) -> None:
    entries = three_pages(service)
    lines = ktrdr("budget", "ledger", "agent", "--all").stdout.splitlines()
    assert [line.split()[-1] for line in lines] == ["ENTRY", *(entry["entry_id"] for entry in entries)]


def test_the_option_all_prints_all_pages_as_one_json_document(ktrdr: Run, service: FakeService) -> None:
    entries = three_pages(service)
    result = ktrdr("budget", "ledger", "agent", "--all", "--json")
    assert json.loads(result.stdout) == {"entries": entries, "next_cursor": None}


def trimmed_meanwhile(service: FakeService) -> list[dict[str, Any]]:
    """Reply with two pages: the ledger is trimmed after the first, so the second starts again at the newest entry."""
    entries = [{**ENTRY, "entry_id": entry_id} for entry_id in ("9", "10", "")]
    query = f"{LEDGER}?limit=1000"
    service.answer(query, {"entries": entries[:1], "next_cursor": "9", "trimmed": False})
    service.answer(f"{query}&cursor=9", {"entries": entries[1:], "next_cursor": None, "trimmed": True})
    return entries


def test_a_line_says_that_the_list_starts_again_if_the_ledger_is_trimmed_between_pages(
    ktrdr: Run, service: FakeService
) -> None:
    trimmed_meanwhile(service)
    lines = ktrdr("budget", "ledger", "agent", "--all").stdout.splitlines()
    assert lines[2] == "Entries were trimmed meanwhile; the list starts again at the newest entry"


def test_the_json_document_is_marked_as_trimmed_if_the_ledger_is_trimmed_between_pages(
    ktrdr: Run, service: FakeService
) -> None:
    entries = trimmed_meanwhile(service)
    result = ktrdr("budget", "ledger", "agent", "--all", "--json")
    assert json.loads(result.stdout) == {"entries": entries, "next_cursor": None, "trimmed": True}


def test_json_output_of_a_single_page_is_the_reply_of_the_service(ktrdr: Run, service: FakeService) -> None:
    service.answer(f"{HOLDS}?limit=1000", {"holds": [HOLD], "next_cursor": None})
    assert json.loads(ktrdr("budget", "holds", "agent", "--all", "--json").stdout) == {
        "holds": [HOLD],
        "next_cursor": None,
    }


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_the_command_fails_if_the_service_sends_the_same_page_twice(
    ktrdr: Run, service: FakeService, options: tuple[str, ...]
) -> None:
    for cursor in ("", "&cursor=1-0"):
        service.answer(f"{LEDGER}?limit=1000{cursor}", {"entries": [ENTRY], "next_cursor": "1-0"})
    result = ktrdr("budget", "ledger", "agent", "--all", *options)
    assert result.exit_code == 1
    assert "the same page twice" in result.stderr


@pytest.mark.parametrize("page", [{}, {"entries": [{}], "next_cursor": None}, {"entries": {}, "next_cursor": None},
                                  {"entries": [], "next_cursor": 5}, {"holds": [], "next_cursor": None}])  # fmt: skip
def test_a_malformed_page_is_an_error(ktrdr: Run, service: FakeService, page: dict[str, Any]) -> None:
    service.answer(LEDGER, page)
    result = ktrdr("budget", "ledger", "agent")
    assert result.exit_code == 1
    assert "is not from a ktrdr-budget service" in result.stderr


@pytest.mark.parametrize("limit", ["0", "1001", "x"])
def test_a_page_limit_below_1_or_above_1000_is_a_usage_error(ktrdr: Run, service: FakeService, limit: str) -> None:
    assert ktrdr("budget", "holds", "agent", "--limit", limit).exit_code == 2
    assert service.requests == []
