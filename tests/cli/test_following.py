"""``ktrdr agent trigger --wait``: progress, results and interruptions."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import Result

from ktrdr_budget.cli import following

from ..helpers.waiting import wait_until
from .support import (
    COMPLETED,
    DESIGNED,
    GATED,
    STARTED,
    TRAINED,
    FakeService,
    Request,
    Terminal,
    agent_status,
    command,
    cycle,
    problem,
)

Run = Callable[..., Result]
OpenTerminal = Callable[..., Terminal]
TRIGGER = "POST /api/v1/agent/trigger"
STATUS = "GET /api/v1/agent/status"
CYCLES = "GET /api/v1/agent/cycles"
WAIT = ("agent", "trigger", "--wait", "--interval", "0.1")
STEPS = [cycle(), cycle(), cycle(**DESIGNED), cycle(**TRAINED)]


def goes(service: FakeService, *steps: dict[str, Any] | tuple[int, dict[str, Any]]) -> None:
    """Start a cycle that advances one step per request and stays at the last one."""
    left = list(steps)

    def answer(request: Request) -> tuple[int, dict[str, Any]]:
        step = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(step, tuple):
            return step
        return 200, agent_status(step) if step["outcome"] is None else agent_status(last=step)

    service.answer(TRIGGER, STARTED, 202)
    service.answer(STATUS, answer)


# --- Without a terminal ---------------------------------------------------------------------------


def test_the_trigger_command_with_wait_prints_one_line_for_each_step_of_a_cycle(
    ktrdr: Run, service: FakeService
) -> None:
    goes(service, *STEPS, cycle(**COMPLETED))
    result = ktrdr(*WAIT)
    assert (result.exit_code, result.stderr) == (0, "")
    answer, *lines = result.stdout.splitlines()
    assert json.loads(answer) == STARTED
    assert lines == [
        "designing",
        "designing: momentum_12_26",
        "training",
        "training: accuracy 0.531, final loss 0.690",
        "training: gate passed: accuracy 0.531 >= 0.1",
        "backtesting",
        "backtesting: win rate 0.550, drawdown 0.120, Sharpe 1.250, trades 34",
        "backtesting: gate passed",
        "assessing",
        "assessing: verdict promising",
        "completed after 5.0 s, $0.0715",
    ]


def test_all_steps_are_printed_if_a_cycle_ends_before_the_first_poll(ktrdr: Run, service: FakeService) -> None:
    goes(service, cycle(**COMPLETED))
    assert len(ktrdr(*WAIT).stdout.splitlines()) == 12


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        (GATED, "failed after 2.0 s, $0.0312 (gate_failed: accuracy 0.05 < 0.1)"),
        (
            {"status": "cancelled", "outcome": "cancelled", "reason": "cancelled"},
            "cancelled after 0.2 s, $0.00",
        ),
        (
            {"status": "failed", "outcome": "failed", "reason": "worker_lost"},
            "failed after 0.2 s, $0.00 (worker_lost)",
        ),
    ],
)
def test_the_trigger_command_with_wait_has_exit_code_1_if_the_cycle_fails_or_is_cancelled(
    ktrdr: Run, service: FakeService, changes: dict[str, Any], end: str
) -> None:
    goes(service, cycle(), cycle(**changes))
    result = ktrdr(*WAIT)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == end
    assert result.stderr == f"ktrdr: op_1 {end}\n"


def test_the_trigger_command_with_wait_and_json_prints_the_reply_and_then_the_cycle_at_each_step(
    ktrdr: Run, service: FakeService
) -> None:
    goes(service, *STEPS, cycle(**COMPLETED))
    result = ktrdr(*WAIT, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    assert documents == [STARTED, cycle(), cycle(**DESIGNED), cycle(**TRAINED), cycle(**COMPLETED)]


def test_the_awaited_cycle_is_found_in_the_list_of_cycles_if_the_status_shows_a_different_cycle(
    ktrdr: Run, service: FakeService
) -> None:
    goes(service, cycle())
    service.answer(STATUS, agent_status(last=cycle(operation_id="op_9", **COMPLETED)))
    service.answer(CYCLES, {"cycles": [cycle(operation_id="op_9"), cycle(**COMPLETED)], "next_cursor": "c1"})
    assert ktrdr(*WAIT).stdout.endswith("completed after 5.0 s, $0.0715\n")


def test_waiting_for_a_cycle_without_a_record_is_an_error(ktrdr: Run, service: FakeService) -> None:
    goes(service, cycle())
    service.answer(STATUS, agent_status())
    service.answer(CYCLES, {"cycles": [], "next_cursor": None})
    result = ktrdr(*WAIT)
    assert (result.exit_code, result.stderr) == (1, "ktrdr: the service has no record of op_1\n")


def test_a_malformed_status_is_an_error(ktrdr: Run, service: FakeService) -> None:
    goes(service, {**cycle(), "phase": "resting"})
    result = ktrdr(*WAIT)
    assert result.exit_code == 1
    assert "not from a ktrdr-budget service" in result.stderr


# --- Outages of the service -----------------------------------------------------------------------


def test_a_short_outage_is_reported_once_and_the_wait_continues(ktrdr: Run, service: FakeService) -> None:
    away = problem(503, "Store unavailable", "the store is down")
    goes(service, cycle(), away, away, away, cycle(**COMPLETED))
    result = ktrdr(*WAIT)
    assert (result.exit_code, result.stderr) == (0, "ktrdr: the store is down\n")
    assert result.stdout.splitlines()[-1] == "completed after 5.0 s, $0.0715"


def test_a_long_outage_ends_the_wait_with_exit_code_4(
    ktrdr: Run, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "PATIENCE_S", 0.3)
    goes(service, cycle(), problem(503, "Store unavailable", "the store is down"))
    result = ktrdr(*WAIT)
    assert result.exit_code == 4
    assert result.stderr.splitlines()[-1] == "ktrdr: the store is down; op_1 may still be running"


def test_a_permanent_error_ends_the_wait_with_exit_code_1(ktrdr: Run, service: FakeService) -> None:
    goes(service, cycle(), problem(401, "Unauthorized", "a key is needed"))
    assert ktrdr(*WAIT).exit_code == 1


# --- On a terminal --------------------------------------------------------------------------------


def test_the_phases_are_redrawn_in_place_on_a_terminal(terminal: OpenTerminal, service: FakeService) -> None:
    goes(service, *STEPS, cycle(**COMPLETED))
    opened = terminal(*WAIT)
    assert opened.wait() == 0
    assert "Ctrl-C stops waiting; the cycle continues." in opened.text
    assert "\x1b[7A\r" in opened.text  # moves up over the six lines and the note
    assert "  \x1b[36m▸\x1b[0m training\x1b[K\n" in opened.text
    shown = opened.text.rpartition("A\r")[2].replace("\x1b[K", "").replace("\x1b[32m✓\x1b[0m", "✓")
    assert shown == (
        "Cycle op_1: completed, 5.0 s\n"
        "  ✓ designing    momentum_12_26\n"
        "  ✓ training     accuracy 0.531, final loss 0.690\n"
        "  ✓ backtesting  win rate 0.550, drawdown 0.120, Sharpe 1.250, trades 34\n"
        "  ✓ assessing    verdict promising\n"
        "Spend: $0.0715 of $0.15 estimated, 2000 tokens\x1b[J\n"
    )


def test_a_failed_phase_is_marked_on_a_terminal(terminal: OpenTerminal, service: FakeService) -> None:
    goes(service, cycle(**GATED))
    opened = terminal(*WAIT)
    assert opened.wait() == 1
    assert "  \x1b[31m✗\x1b[0m training     accuracy 0.050, final loss 0.690, gate failed" in opened.text
    assert "  · backtesting\x1b[K" in opened.text
    assert "ktrdr: op_1 failed after 2.0 s, $0.0312 (gate_failed: accuracy 0.05 < 0.1)\n" in opened.text


def test_the_phases_have_ascii_marks_on_a_terminal_without_unicode(
    terminal: OpenTerminal, service: FakeService, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("PYTHONIOENCODING", "ascii")
    environment.setenv("NO_COLOR", "1")
    goes(service, cycle(**TRAINED), cycle(**GATED))
    opened = terminal(*WAIT)
    assert opened.wait() == 1
    for mark in ("+ designing", "> backtesting", ". assessing", "x training"):
        assert f"  {mark}" in opened.text


def test_a_message_replaces_the_phases_on_a_terminal_during_an_outage(
    terminal: OpenTerminal, service: FakeService
) -> None:
    goes(service, cycle(), problem(503, "Store unavailable", "the store is down"), cycle(**COMPLETED))
    opened = terminal(*WAIT)
    assert opened.wait() == 0
    assert "Unknown since " in opened.text


# --- Ctrl-C ---------------------------------------------------------------------------------------

CONTINUES = "ktrdr: stopped waiting; the cycle continues (stop it with 'ktrdr agent cancel op_1')\n"


def test_ctrl_c_ends_the_wait_and_does_not_cancel_the_cycle(terminal: OpenTerminal, service: FakeService) -> None:
    goes(service, cycle(**DESIGNED))
    opened = terminal(*WAIT)
    opened.read_until(lambda text: "momentum_12_26" in text)
    opened.type("\x03")
    assert opened.wait() == 130
    assert opened.text.endswith(f"^C\n{CONTINUES}")
    assert not [request for request in service.requests if request.method == "DELETE"]


@pytest.fixture
def waiting(environment: pytest.MonkeyPatch, service: FakeService) -> Iterator[subprocess.Popen[str]]:
    """The command as a process, with a cycle that does not end."""
    goes(service, cycle())
    pipe = subprocess.PIPE
    with subprocess.Popen(command(*WAIT), stdout=pipe, stderr=pipe, text=True) as process:
        yield process
        process.kill()


def test_an_interrupt_ends_the_wait_with_a_one_line_message_if_there_is_no_terminal(
    waiting: subprocess.Popen[str], service: FakeService
) -> None:
    wait_until(lambda: len(service.requests) >= 3)
    waiting.send_signal(signal.SIGINT)
    out, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, err) == (130, CONTINUES)
    assert out.splitlines()[1:] == ["designing"]


def test_an_invalid_interval_is_a_usage_error(ktrdr: Run, service: FakeService) -> None:
    assert ktrdr("agent", "trigger", "--wait", "--interval", "0").exit_code == 2
    assert not service.requests
