"""``ktrdr agent trigger``, ``status``, ``cancel`` and ``cycles`` against the real service on a real server."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from ..api.processes import serving
from ..conftest import Server
from ..helpers.waiting import wait_until
from .support import Terminal, command

Process = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.slow
def test_the_commands_show_a_cycle_from_start_to_end(
    server: Server, process: Process, environment: pytest.MonkeyPatch
) -> None:
    with serving(KTRDR_REDIS_URL=server.url, AGENT_PHASE_SECONDS="0.2") as replica:
        environment.setenv("KTRDR_API_URL", replica.url)
        assert process("agent", "status").stdout.splitlines()[2:] == [
            "Status: idle",
            "Budget: $5.00 of $5.00 remaining",
            "Capacity: 1/1 cycles free",
            "Last Cycle: none",
        ]
        assert process("agent", "cycles").stdout == "No cycles.\n"

        ended = process("agent", "trigger", "--wait", "--interval", "0.1", "--id", "op_1")
        assert (ended.returncode, ended.stderr) == (0, "")
        answer, *lines = ended.stdout.splitlines()
        assert json.loads(answer)["triggered"] is True
        phases = [line for line in lines if line in ("designing", "training", "backtesting", "assessing")]
        assert phases == ["designing", "training", "backtesting", "assessing"]
        assert len([line for line in lines if ": gate passed: " in line]) == 2
        assert lines[-1].startswith("completed after ")

        [cycle] = json.loads(process("agent", "cycles", "--json").stdout)["cycles"]
        spend = Decimal(cycle["spend"])
        assert Decimal("0.01") <= spend <= Decimal("0.15")
        assert lines[-1].endswith(f", ${spend}")
        assert f"Today's Spend: ${spend}\n" in process("agent", "budget", "--exact").stdout
        assert f"Today's Spend: ${spend:.2f}\n" in process("agent", "budget").stdout
        assert process("agent", "status").stdout.splitlines()[-1] == f"Last Cycle: op_1 {lines[-1]}"
        row = process("agent", "cycles").stdout.splitlines()[1]
        assert row.startswith("op_1  ")
        assert "training pass, backtest pass" in row
        invalid = process("agent", "cycles", "--cursor", "x")
        assert (invalid.returncode, invalid.stdout) == (2, "")
        assert invalid.stderr == "ktrdr: invalid cursor: use the one that the previous page returned\n"

        # A repeated trigger starts no second cycle, and follows the first.
        again = process("agent", "trigger", "--wait", "--id", "op_1", "--json")
        assert again.returncode == 0
        first, last = again.stdout.splitlines()
        assert (json.loads(first)["operation_id"], json.loads(last)) == ("op_1", cycle)
        assert process("agent", "trigger", "--id", "one").returncode == 2


@pytest.mark.slow
def test_a_command_that_waits_for_a_cycle_has_exit_code_1_if_the_cycle_is_cancelled(
    server: Server, process: Process, terminal: Callable[..., Terminal], environment: pytest.MonkeyPatch
) -> None:
    with serving(KTRDR_REDIS_URL=server.url, AGENT_PHASE_SECONDS="3600") as replica:
        environment.setenv("KTRDR_API_URL", replica.url)
        pipe = subprocess.PIPE
        words = command("agent", "trigger", "--wait", "--interval", "0.1", "--id", "op_1")
        with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as waiting:
            assert waiting.stdout is not None
            assert json.loads(waiting.stdout.readline())["operation_id"] == "op_1"
            assert waiting.stdout.readline() == "designing\n"

            denied = process("agent", "trigger")
            assert denied.returncode == 3
            assert json.loads(denied.stdout)["operation_ids"] == ["op_1"]
            assert denied.stderr.startswith("denied: ")
            assert "Cycle:    op_1\nPhase:    designing\n" in process("agent", "status").stdout

            leaving = terminal("agent", "trigger", "--wait", "--id", "op_1")
            leaving.read_until(lambda text: "designing" in text)
            leaving.type("\x03")
            assert leaving.wait() == 130
            assert "op_1" in process("agent", "status").stdout

            assert process("agent", "cancel", "op_1").stdout.startswith("Cancelled op_1: ")
            out, err = waiting.communicate(timeout=60)
            assert waiting.returncode == 1
            assert out.splitlines()[-1].startswith("cancelled after ")
            assert err.startswith("ktrdr: op_1 cancelled after ")
        for unknown, message in (
            ("op_1", "ktrdr: cycle op_1 is cancelled; it cannot be cancelled\n"),
            ("op_2", "op_2"),
        ):
            ended = process("agent", "cancel", unknown)
            assert (ended.returncode, ended.stdout) == (1, "")
            assert message in ended.stderr


@pytest.mark.slow
def test_the_commands_report_a_denied_cycle_and_an_outage_of_the_store(
    start_server: Callable[..., Server], process: Process, environment: pytest.MonkeyPatch
) -> None:
    store = start_server()
    with serving(KTRDR_REDIS_URL=store.url, KTRDR_TIMEOUT="1", AGENT_DAILY_BUDGET="0.01") as replica:
        environment.setenv("KTRDR_API_URL", replica.url)
        ended = wait_until(lambda: _denied(process("agent", "trigger", "--wait")))
        answer: dict[str, Any] = json.loads(ended.stdout)
        assert (answer["triggered"], answer["reason"]) == (False, "budget_exhausted")
        message = "Daily budget exhausted: budget_exhausted ($0.01 remaining, need $0.15)"
        assert answer["message"] == message
        assert ended.stderr == f"denied: {message}; a retry cannot succeed\n"
        store.kill()
        ended = process("agent", "trigger")
        assert ended.returncode == 4
        assert json.loads(ended.stdout)["reason"] == "budget_unavailable"
        for words in (("status",), ("cycles",), ("cancel", "op_1")):
            ended = process("agent", *words)
            assert (ended.returncode, ended.stdout) == (4, "")
            assert ended.stderr.count("\n") == 1


def _denied(ended: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str] | None:
    """Return the ended process if it was denied; else ``None``, because a short timeout may look like an outage."""
    return ended if ended.returncode == 3 else None


@pytest.mark.slow
def test_a_different_replica_reports_a_cycle_as_failed_if_the_worker_of_the_cycle_is_killed(
    server: Server, process: Process, environment: pytest.MonkeyPatch
) -> None:
    settings = {"KTRDR_REDIS_URL": server.url, "AGENT_PHASE_SECONDS": "3600", "AGENT_CYCLE_TTL": "2"}
    with serving(**settings) as worker, serving(**settings) as other:
        environment.setenv("KTRDR_API_URL", worker.url)
        assert process("agent", "trigger", "--id", "op_1").returncode == 0
        worker.signal(signal.SIGKILL)
        environment.setenv("KTRDR_API_URL", other.url)
        ended = process("agent", "trigger", "--wait", "--interval", "0.1", "--id", "op_1")
        assert ended.returncode == 1
        assert "(worker_lost)" in ended.stderr
        wait_until(lambda: "worker_lost" in process("agent", "status").stdout)
