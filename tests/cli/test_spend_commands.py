"""``ktrdr budget reserve | commit | release | record``: requests, output and exit codes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

from .support import DENIAL, HOLD, SETTLED, FakeService, problem

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def answers(service: FakeService) -> None:
    service.answer("POST /api/v1/reservations", HOLD, 201)
    service.answer("POST /api/v1/spend", {**SETTLED, "state": "recorded"}, 201)
    service.answer("POST /api/v1/reservations/op_1/commit", SETTLED)
    service.answer(
        "POST /api/v1/reservations/op_1/release", {**SETTLED, "state": "released", "amounts": {"agent": "0.00"}}
    )


def sent(ktrdr: Run, service: FakeService, *words: str) -> dict[str, Any]:
    """Return the body of the only request."""
    result = ktrdr("budget", *words)
    assert result.exit_code == 0, result.stderr
    assert len(service.requests) == 1
    return dict(service.requests[0].body)


# --- Requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["reserve", "record"])
@pytest.mark.parametrize(
    ("words", "amounts"),
    [
        (("agent", "0.15"), {"agent": "0.15"}),
        (("agent=0.15",), {"agent": "0.15"}),
        (("agent=0.15", "team:quant=0.15", "cycles=1"), {"agent": "0.15", "team:quant": "0.15", "cycles": "1"}),
    ],
)
def test_amounts_are_sent_unchanged(
    ktrdr: Run, service: FakeService, command: str, words: tuple[str, ...], amounts: dict[str, str]
) -> None:
    body = sent(ktrdr, service, command, *words, "--id", "op_1")
    assert body == {"amounts": amounts, "id": "op_1"}
    assert list(body["amounts"]) == list(amounts)  # the order decides which denial is reported


def test_all_options_of_a_reservation_are_sent(ktrdr: Run, service: FakeService) -> None:
    options = ("--id", "op/1", "--ttl", "60", "--on-expiry", "accrued", "--operation", "research")
    assert sent(ktrdr, service, "reserve", "agent", "0.15", *options) == {
        "amounts": {"agent": "0.15"},
        "id": "op/1",
        "ttl": 60,
        "on_expiry": "accrued",
        "operation": "research",
    }


def test_a_ttl_with_a_fraction_of_a_second_is_sent_unchanged(ktrdr: Run, service: FakeService) -> None:
    assert sent(ktrdr, service, "reserve", "agent", "0.15", "--ttl", "1.5")["ttl"] == 1.5


@pytest.mark.parametrize(("command", "prefix"), [("reserve", "hold"), ("record", "spend")])
def test_each_call_without_an_id_sends_a_new_generated_id(
    ktrdr: Run, service: FakeService, command: str, prefix: str
) -> None:
    for _ in range(2):
        ktrdr("budget", command, "agent", "0.15")
    first, second = (request.body["id"] for request in service.requests)
    assert first != second
    assert re.fullmatch(rf"{prefix}_[0-9a-f]{{16}}", first)


@pytest.mark.parametrize(
    ("words", "body"),
    [
        ((), {}),
        (("0.07",), {"amounts": "0.07"}),
        (("agent=0.07",), {"amounts": {"agent": "0.07"}}),
        (("agent=0.07", "cycles=1"), {"amounts": {"agent": "0.07", "cycles": "1"}}),
    ],
)
def test_the_commit_command_accepts_no_amount_and_one_amount_and_an_amount_for_each_budget(
    ktrdr: Run, service: FakeService, words: tuple[str, ...], body: dict[str, Any]
) -> None:
    assert sent(ktrdr, service, "commit", "op_1", *words) == body


def test_the_record_command_sends_the_name_of_the_operation(ktrdr: Run, service: FakeService) -> None:
    assert sent(ktrdr, service, "record", "agent", "0.02", "--operation", "import")["operation"] == "import"


# --- Output ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("reserve", "agent", "0.15"), "Reserved op_1: agent $0.15; expires 2026-11-23T12:15:00Z"),
        (("commit", "op_1", "0.07"), "Committed op_1: agent $0.07"),
        (("release", "op_1"), "Released op_1: agent $0.00"),
        (("record", "agent", "0.07"), "Recorded op_1: agent $0.07"),
    ],
)
def test_each_command_prints_its_result_in_one_line(ktrdr: Run, words: tuple[str, ...], line: str) -> None:
    result = ktrdr("budget", *words)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{line}\n", "")


def test_a_reservation_over_several_budgets_shows_each_amount_in_its_unit(ktrdr: Run, service: FakeService) -> None:
    service.answer("POST /api/v1/reservations", {**HOLD, "amounts": {"agent": "0.15", "cycles": 1}}, 201)
    assert "op_1: agent $0.15, cycles 1; expires" in ktrdr("budget", "reserve", "agent=0.15", "cycles=1").stdout


def test_the_reserve_command_prints_the_state_of_a_replayed_reservation(ktrdr: Run, service: FakeService) -> None:
    service.answer("POST /api/v1/reservations", {**HOLD, "state": "committed", "replayed": True}, 200)
    assert ktrdr("budget", "reserve", "agent", "0.15").stdout == "Replayed op_1: agent $0.15; committed\n"


def test_the_commit_command_prints_one_note_each_for_a_replay_an_overrun_and_a_late_settlement(
    ktrdr: Run, service: FakeService
) -> None:
    special = {**SETTLED, "replayed": True, "overrun": True, "late": True}
    service.answer("POST /api/v1/reservations/op_1/commit", special)
    notes = "replayed; above the reservation; after expiry or release"
    assert ktrdr("budget", "commit", "op_1").stdout == f"Committed op_1: agent $0.07 ({notes})\n"


@pytest.mark.parametrize(
    ("words", "document"),
    [
        (("reserve", "agent", "0.15"), HOLD),
        (("commit", "op_1"), SETTLED),
        (("record", "agent", "0.07"), {**SETTLED, "state": "recorded"}),
    ],
)
def test_the_option_json_prints_the_reply_of_the_service(
    ktrdr: Run, words: tuple[str, ...], document: dict[str, Any]
) -> None:
    assert json.loads(ktrdr("budget", *words, "--json").stdout) == document


# --- Errors ---------------------------------------------------------------------------------------


def test_a_denial_is_reported_in_one_line_with_exit_code_3(ktrdr: Run, service: FakeService) -> None:
    service.answer("POST /api/v1/reservations", DENIAL, 429)
    result = ktrdr("budget", "reserve", "agent", "0.15")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr == "denied: agent: budget_exhausted ($0.10 remaining, need $0.15); retry in 1 h\n"


def test_the_figures_of_a_denial_are_printed_on_stdout_with_the_option_json(ktrdr: Run, service: FakeService) -> None:
    service.answer("POST /api/v1/reservations", DENIAL, 429)
    result = ktrdr("budget", "reserve", "agent", "0.15", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout) == DENIAL
    assert result.stderr.startswith("denied: ")


@pytest.mark.parametrize(("status", "exit_code"), [(404, 1), (409, 1), (422, 2), (503, 4)])
@pytest.mark.parametrize(
    "words", [("reserve", "agent", "1"), ("commit", "op_1"), ("release", "op_1"), ("record", "a", "1")]
)
def test_the_exit_code_depends_on_the_http_status_of_the_error_reply(
    ktrdr: Run, service: FakeService, words: tuple[str, ...], status: int, exit_code: int
) -> None:
    for call in list(service.answers):
        service.answer(call, *reversed(problem(status, "Title", "what is wrong")))
    result = ktrdr("budget", *words)
    assert result.exit_code == exit_code
    assert result.stderr.startswith("ktrdr: what is wrong")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("reserve",),
        ("reserve", "agent"),
        ("reserve", "agent", "0.15", "more"),
        ("reserve", "agent=0.15", "cycles"),
        ("reserve", "agent=0.15", "agent=0.20"),
        ("reserve", "=0.15"),
        ("reserve", "a b", "0.15"),
        ("reserve", "agent", "-1"),
        ("reserve", "agent", "1", "--id", "an id"),
        ("reserve", "agent", "1", "--id", ""),
        ("reserve", "agent", "1", "--ttl", "0"),
        ("reserve", "agent", "1", "--ttl", "86401"),
        ("reserve", "agent", "1", "--ttl", "nan"),
        ("reserve", "agent", "1", "--on-expiry", "forget"),
        ("commit",),
        ("commit", "op_1", "0.07", "0.08"),
        ("commit", "op_1", "agent=0.07", "0.08"),
        ("commit", "an id"),
        ("release",),
        ("release", "op_1", "0.07"),
        ("record", "agent"),
    ],
)
def test_wrong_usage_is_an_error_and_no_request_is_sent(
    ktrdr: Run, service: FakeService, words: tuple[str, ...]
) -> None:
    result = ktrdr("budget", *words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert f"(see 'ktrdr budget {words[0]} --help')" in result.stderr
    assert service.requests == []


# --- Negative amounts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "negative"),
    [
        (("record", "agent", "-0.5"), "-0.5"),
        (("record", "--operation", "x", "agent", "-.5"), "-.5"),
        (("reserve", "agent", "-1", "--id", "op_1"), "-1"),
        (("commit", "op_1", "-0.07"), "-0.07"),
        (("set-limit", "agent", "-5.00", "--until", "window"), "-5.00"),
    ],
)
def test_a_negative_amount_is_reported_as_an_invalid_amount_not_as_an_unknown_option(
    ktrdr: Run, service: FakeService, words: tuple[str, ...], negative: str
) -> None:
    result = ktrdr("budget", *words)
    assert (result.exit_code, result.stdout, service.requests) == (2, "", [])
    assert result.stderr == (
        f"ktrdr: {negative!r} is not an amount; use a non-negative decimal such as 0.15"
        f" (see 'ktrdr budget {words[0]} --help')\n"
    )


def test_an_unknown_option_of_the_record_command_is_a_usage_error(ktrdr: Run) -> None:
    result = ktrdr("budget", "record", "agent", "0.15", "-x", "--operation", "-5")
    assert (result.exit_code, result.stderr) == (
        2,
        "ktrdr: No such option '-x' (see 'ktrdr budget record --help')\n",
    )
