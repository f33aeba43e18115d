"""``ktrdr agent budget``: the text form, the bar on a terminal, and --watch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from ktrdr_budget.cli.agent_commands import _BAR_CELLS, _cells

from ..helpers.waiting import wait_until
from .support import STATUS, FakeService, Request, Terminal, command, problem

Run = Callable[..., Result]
OpenTerminal = Callable[..., Terminal]
CALL = "GET /api/v1/agent/budget"
FORM = """\
Agent Budget Status
==============================
Date: 2026-11-23
Daily Limit: $5.00
Today's Spend: $0.15
Remaining: $4.85
Cycles Affordable: ~32
"""


def lines_of(ktrdr: Run, service: FakeService, *options: str, **changes: Any) -> list[str]:
    service.answer(CALL, {**STATUS, **changes})
    result = ktrdr("agent", "budget", *options)
    assert result.exit_code == 0, result.stderr
    return result.stdout.splitlines()


# --- The form -------------------------------------------------------------------------------------


def test_the_agent_budget_command_prints_the_documented_form(ktrdr: Run) -> None:
    result = ktrdr("agent", "budget")
    assert (result.exit_code, result.stdout, result.stderr) == (0, FORM, "")


def test_the_agent_budget_command_shows_held_and_unconfirmed_amounts_on_separate_lines(
    ktrdr: Run, service: FakeService
) -> None:
    lines = lines_of(ktrdr, service, held=0.15, unconfirmed=0.3, remaining=4.4, cycles_affordable=29)
    assert lines[4:] == [
        "Today's Spend: $0.15",
        "Held: $0.15",
        "Unconfirmed: $0.30",
        "Remaining: $4.40",
        "Cycles Affordable: ~29",
    ]


def test_the_agent_budget_command_shows_when_cycles_can_start_again_after_a_data_loss(
    ktrdr: Run, service: FakeService
) -> None:
    last = lines_of(ktrdr, service, recovering_until="2026-11-23T12:00:03Z")[-1]
    assert last == "Recovering: the store lost writes; no cycle starts until 2026-11-23T12:00:03Z"


def test_the_agent_budget_command_has_exit_code_0_for_an_exhausted_budget(ktrdr: Run, service: FakeService) -> None:
    lines = lines_of(ktrdr, service, today_spend=5.0, remaining=0.0, cycles_affordable=0)
    assert lines[4:] == ["Today's Spend: $5.00", "Remaining: $0.00", "Cycles Affordable: ~0"]


def test_the_agent_budget_command_shows_unlimited_for_a_budget_without_a_limit(
    ktrdr: Run, service: FakeService
) -> None:
    lines = lines_of(ktrdr, service, daily_limit=None, remaining=None, cycles_affordable=None)
    assert lines[3:] == [
        "Daily Limit: unlimited",
        "Today's Spend: $0.15",
        "Remaining: unlimited",
        "Cycles Affordable: unlimited",
    ]


@pytest.mark.parametrize(
    ("spend", "remaining", "shown"),
    [
        (0.069585, 4.930415, ["Today's Spend: $0.07", "Remaining: $4.93"]),
        (0.065, 4.935, ["Today's Spend: $0.07", "Remaining: $4.93"]),  # as f"{0.065:.2f}"
        (0.0000016, 4.9999984, ["Today's Spend: $0.00", "Remaining: $5.00"]),
        (1, 4, ["Today's Spend: $1.00", "Remaining: $4.00"]),
    ],
)
def test_the_agent_budget_command_rounds_amounts_to_two_decimals(
    ktrdr: Run, service: FakeService, spend: float, remaining: float, shown: list[str]
) -> None:
    assert shown == [f"Today's Spend: ${spend:.2f}", f"Remaining: ${remaining:.2f}"]
    assert lines_of(ktrdr, service, today_spend=spend, remaining=remaining)[4:6] == shown


@pytest.mark.parametrize(
    ("spend", "remaining", "shown"),
    [
        (0.1499, 4.8501, ["Today's Spend: $0.1499", "Remaining: $4.8501"]),
        (0.0000016, 4.9999984, ["Today's Spend: $0.0000016", "Remaining: $4.9999984"]),
        (4.996, 0.004, ["Today's Spend: $4.996", "Remaining: $0.004"]),
        (1, 4, ["Today's Spend: $1.00", "Remaining: $4.00"]),
    ],
)
def test_the_option_exact_shows_all_digits(
    ktrdr: Run, service: FakeService, spend: float, remaining: float, shown: list[str]
) -> None:
    assert lines_of(ktrdr, service, "--exact", today_spend=spend, remaining=remaining)[4:6] == shown


def test_the_option_json_prints_the_reply_of_the_service(ktrdr: Run, service: FakeService) -> None:
    reply = {**STATUS, "today_spend": 0.1234567, "remaining": 4.8765433, "something_new": [1, None]}
    service.answer(CALL, reply)
    result = ktrdr("agent", "budget", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == reply
    assert result.stdout.count("\n") == 1


# --- The bar --------------------------------------------------------------------------------------


def shown_on(terminal: OpenTerminal, *words: str, **size: int) -> str:
    opened = terminal("agent", "budget", *words, **size)
    assert opened.wait() == 0, opened.text
    return opened.text


def test_the_agent_budget_command_adds_a_bar_on_a_terminal(terminal: OpenTerminal, service: FakeService) -> None:
    service.answer(CALL, {**STATUS, "today_spend": 2.5, "unconfirmed": 0.5, "held": 0.5, "remaining": 1.5})
    text = shown_on(terminal)
    assert text.startswith(FORM[:70])
    assert text.endswith("\n[\x1b[32m███████████████▓▓▓▒▒▒\x1b[0m·········] 70% used\n")


def test_the_bar_is_yellow_at_90_percent_and_red_above_100_percent(
    terminal: OpenTerminal, service: FakeService
) -> None:
    service.answer(CALL, {**STATUS, "today_spend": 4.5, "remaining": 0.5})
    assert "[\x1b[33m" in shown_on(terminal)
    service.answer(CALL, {**STATUS, "today_spend": 6.0, "remaining": 0.0})
    assert shown_on(terminal).endswith(f"[\x1b[31m{'█' * 30}\x1b[0m] 120% used\n")


def test_the_bar_has_no_colour_if_the_variable_no_color_is_set(
    terminal: OpenTerminal, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("NO_COLOR", "1")
    text = shown_on(terminal)
    assert text.endswith("[█·····························] 3% used\n")
    assert "\x1b" not in text


def test_an_empty_variable_no_color_has_no_effect(terminal: OpenTerminal, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("NO_COLOR", "")
    assert "\x1b[32m" in shown_on(terminal)


def test_the_bar_has_ascii_characters_on_a_terminal_without_unicode(
    terminal: OpenTerminal, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("PYTHONIOENCODING", "ascii")
    assert shown_on(terminal).endswith("[\x1b[32m#\x1b[0m.............................] 3% used\n")


def test_the_agent_budget_command_prints_no_bar_on_a_dumb_terminal(
    terminal: OpenTerminal, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("TERM", "dumb")
    assert shown_on(terminal) == FORM


@pytest.mark.parametrize("limit", [None, 0.0])
def test_there_is_no_bar_if_the_limit_is_zero_or_absent(
    terminal: OpenTerminal, service: FakeService, limit: float | None
) -> None:
    remaining, cycles = (None, None) if limit is None else (0.0, 0)
    service.answer(CALL, {**STATUS, "daily_limit": limit, "remaining": remaining, "cycles_affordable": cycles})
    assert "used" not in shown_on(terminal)


def test_json_output_shows_one_nano_dollar_as_a_plain_decimal_number(ktrdr: Run, service: FakeService) -> None:
    service.answer("GET /api/v1/agent/budget", json.dumps(STATUS).replace(": 0.15,", ": 0.000000001,"))
    assert '"today_spend": 0.000000001,' in ktrdr("agent", "budget", "--json").stdout


def test_json_on_a_terminal_is_indented(terminal: OpenTerminal) -> None:
    text = shown_on(terminal, "--json")
    assert json.loads(text) == STATUS
    assert text.startswith('{\n  "date"')


PART = st.decimals(min_value=0, max_value=100, places=9)


@given(st.decimals(min_value=Decimal("1e-9"), max_value=100, places=9), st.tuples(PART, PART, PART))
def test_the_bar_shows_each_non_zero_part_but_is_full_only_if_nothing_remains(
    limit: Decimal, parts: tuple[Decimal, ...]
) -> None:
    cells = _cells(parts, limit)
    assert [bool(cell) for cell in cells] == [bool(part) for part in parts]
    assert all(cell >= 0 for cell in cells)
    assert (sum(cells) == _BAR_CELLS) == (sum(parts) >= limit)
    assert sum(cells) <= _BAR_CELLS


# --- --watch --------------------------------------------------------------------------------------


def spending(service: FakeService) -> None:
    """A service whose spend rises by one cent per request."""
    cents = iter(range(16, 10_000))

    def answer(request: Request) -> tuple[int, dict[str, Any]]:
        return 200, {**STATUS, "today_spend": next(cents) / 100}

    service.answer(CALL, answer)


def test_a_watch_redraws_the_figures_in_place_until_ctrl_c(terminal: OpenTerminal, service: FakeService) -> None:
    spending(service)
    opened = terminal("agent", "budget", "--watch", "--interval", "0.1")
    text = opened.read_until(lambda text: "$0.18" in text)
    assert "\x1b[9A\r" in text  # moves up over the nine lines of the previous text
    assert "Ctrl-C to exit." in text
    opened.type("\x03")
    assert opened.wait() == 0
    assert "Traceback" not in opened.text
    assert "Aborted" not in opened.text
    assert opened.text.endswith("\n")


def test_a_watch_clears_the_screen_of_a_narrow_terminal(terminal: OpenTerminal, service: FakeService) -> None:
    opened = terminal("agent", "budget", "--watch", "--interval", "0.1", columns=20)
    opened.read_until(lambda text: "\x1b[2J\x1b[H" in text)
    opened.type("\x03")
    assert opened.wait() == 0


def test_a_watch_shows_unknown_instead_of_old_figures_during_an_outage(
    terminal: OpenTerminal, service: FakeService
) -> None:
    opened = terminal("agent", "budget", "--watch", "--interval", "0.1")
    opened.read_until(lambda text: "Remaining: $4.85" in text)
    service.answer(CALL, *reversed(problem(503, "Store unavailable", "the store is down")))
    opened.read_until(lambda text: "the store is down" in text)
    last = opened.text.rpartition("A\r")[2]
    assert last.startswith("Unknown since ")
    assert "$" not in last
    assert "\x1b[J" in last  # clears the lines below
    service.answer(CALL, {**STATUS, "today_spend": 0.5})
    opened.read_until(lambda text: "$0.50" in text)
    opened.type("\x03")
    assert opened.wait() == 0


def test_a_watch_ends_after_a_permanent_error(terminal: OpenTerminal, service: FakeService) -> None:
    opened = terminal("agent", "budget", "--watch", "--interval", "0.1")
    opened.read_until(lambda text: "Remaining: $4.85" in text)
    service.answer(CALL, *reversed(problem(401, "Unauthorized", "a key is needed")))
    assert opened.wait() == 1
    assert "ktrdr: a key is needed" in opened.text


def test_a_watch_fails_at_once_if_the_service_is_unreachable(ktrdr: Run) -> None:
    result = ktrdr("--api-url", "http://127.0.0.1:1", "agent", "budget", "--watch")
    assert result.exit_code == 4
    assert result.stderr.count("\n") == 1


def watching(*words: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command("agent", "budget", "--watch", "--interval", "0.1", *words), stdout=pipe, stderr=pipe, text=True
    )


def end(process: subprocess.Popen[str]) -> tuple[str, str, int]:
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return out, err, process.returncode


@pytest.mark.usefixtures("environment")
def test_a_watch_with_json_writes_one_line_per_refresh_into_a_pipe(service: FakeService) -> None:
    spending(service)
    process = watching("--json")
    assert process.stdout is not None
    spends = [json.loads(process.stdout.readline())["today_spend"] for _ in range(3)]
    assert spends == [0.16, 0.17, 0.18]
    _, err, code = end(process)
    assert (err, code) == ("", 0)


@pytest.mark.usefixtures("environment")
def test_a_watch_writes_the_text_form_into_a_pipe_at_each_refresh(service: FakeService) -> None:
    process = watching()
    wait_until(lambda: len(service.requests) >= 4)
    out, err, code = end(process)
    assert (err, code) == ("", 0)
    assert out.startswith(f"{FORM}\n{FORM}\n{FORM}")
    assert "\x1b" not in out


@pytest.mark.usefixtures("environment")
def test_a_watch_reports_an_outage_on_stderr_if_stdout_is_a_pipe(service: FakeService) -> None:
    process = watching("--json")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    service.answer(CALL, *reversed(problem(503, "Store unavailable", "the store is down")))
    assert process.stderr.readline() == "ktrdr: the store is down\n"
    service.answer(CALL, {**STATUS, "today_spend": 0.5})
    while json.loads(process.stdout.readline())["today_spend"] != 0.5:
        pass
    assert end(process)[2] == 0


@pytest.mark.usefixtures("environment")
def test_a_watch_ends_if_the_reader_closes_the_pipe(service: FakeService) -> None:
    reader, writer = os.pipe()
    process = subprocess.Popen(
        command("agent", "budget", "--watch", "--interval", "0.1"), stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    _, err = process.communicate(timeout=60)
    assert (err, process.returncode) == ("", 1)


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "soon", "100000"])
def test_an_invalid_interval_is_a_usage_error(ktrdr: Run, interval: str) -> None:
    result = ktrdr("agent", "budget", "--watch", "--interval", interval)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
