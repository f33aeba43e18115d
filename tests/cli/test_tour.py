"""A tour of all commands against the real service on an embedded server."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ktrdr_budget.engine import embedded

from ..conftest import Server, free_port
from ..helpers.waiting import wait_until
from .support import FakeService, command

Process = Callable[..., "subprocess.CompletedProcess[str]"]

BUDGETS = """
[[budgets]]
name = "team:quant/eu@fr"
limit = "2.00"

[[budgets]]
name = "requests"
limit = 3
unit = "requests"
period = "hour"
"""


def alive(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.fixture
def data_dir(tmp_path: Path, environment: pytest.MonkeyPatch) -> Path:
    """The data directory of the embedded server, with keys and several budgets configured."""
    (tmp_path / "budgets.toml").write_text(BUDGETS)
    environment.setenv("AGENT_BUDGET_DIR", str(tmp_path / "budget"))
    environment.setenv("KTRDR_BUDGETS_FILE", str(tmp_path / "budgets.toml"))
    environment.setenv("KTRDR_API_KEY", "use-key")
    environment.setenv("KTRDR_ADMIN_KEY", "admin-key")
    return tmp_path / "budget"


@contextmanager
def serving(environment: pytest.MonkeyPatch, log: Path) -> Iterator[int]:
    """``ktrdr serve`` on a free port, until Ctrl-C."""
    port = free_port()
    environment.setenv("KTRDR_API_URL", f"http://127.0.0.1:{port}")
    with log.open("wb") as stderr:
        process = subprocess.Popen(command("serve", "--port", str(port)), stdout=stderr, stderr=stderr)
    try:
        wait_until(lambda: alive(port) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    assert "Traceback" not in log.read_text()


@pytest.fixture
def served(data_dir: Path, environment: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Run the service on an embedded server, which ends when the service ends."""
    with serving(environment, tmp_path / "log"):
        yield data_dir
    wait_until(lambda: embedded.find(data_dir) is None)


@pytest.fixture
def tour(served: Path, process: Process) -> Callable[..., str]:
    """Run a command and check its exit code; return its stdout, or its stderr if an error is expected."""

    def run(*words: str, code: int = 0) -> str:
        ended = process(*words)
        assert ended.returncode == code, ended
        assert ended.stderr.count("\n") == (1 if code else 0), ended
        return ended.stderr if code else ended.stdout

    return run


def document(text: str) -> dict[str, Any]:
    return dict(json.loads(text))


@pytest.mark.slow
def test_the_commands_work_against_a_real_service(tour: Callable[..., str], environment: pytest.MonkeyPatch) -> None:
    # An unused budget.
    lines = tour("agent", "budget").splitlines()
    assert lines[3:] == ["Daily Limit: $5.00", "Today's Spend: $0.00", "Remaining: $5.00", "Cycles Affordable: ~33"]

    # A reservation, its replay, and a conflict.
    assert tour("budget", "reserve", "agent", "0.15", "--id", "op/1", "--operation", "research").startswith(
        "Reserved op/1: agent $0.15; expires 20"
    )
    assert tour("budget", "reserve", "agent", "0.15", "--id", "op/1", "--operation", "research").startswith(
        "Replayed op/1: agent $0.15; open"
    )
    tour("budget", "reserve", "agent", "0.20", "--id", "op/1", code=1)
    assert tour("agent", "budget").splitlines()[4:] == [
        "Today's Spend: $0.00",
        "Held: $0.15",
        "Remaining: $4.85",
        "Cycles Affordable: ~32",
    ]
    assert "op/1  open    $0.15    $0.00" in tour("budget", "holds", "agent")

    # Commits, recorded spend, and unknown holds.
    assert tour("budget", "commit", "op/1", "0.0715") == "Committed op/1: agent $0.0715\n"
    assert "(replayed)" in tour("budget", "commit", "op/1", "0.0715")
    tour("budget", "commit", "op/1", "0.08", code=1)
    assert tour("budget", "record", "agent", "0.02", "--id", "op_2") == "Recorded op_2: agent $0.02\n"
    tour("budget", "release", "unknown", code=1)
    assert tour("budget", "holds", "agent") == "No holds of agent.\n"
    amounts = [entry["amount"] for entry in document(tour("budget", "ledger", "agent", "--json"))["entries"]]
    assert amounts == ["0.02", "0.0715"]
    assert len(tour("budget", "ledger", "agent", "--limit", "1", "--all").splitlines()) == 3

    # Several budgets, all or none; counts; a name with characters that paths reserve.
    team = "team:quant/eu@fr"
    tour("budget", "reserve", "agent=0.15", f"{team}=0.15", "requests=3", "--id", "op_3")
    line = tour("budget", "reserve", "agent=0.15", f"{team}=0.15", "requests=1", code=3)
    assert line.startswith("denied: requests: budget_held (0 requests remaining, need 1 requests); retry in ")
    assert document(tour("budget", "show", team, "--json"))["held"] == "0.15"
    assert tour("budget", "commit", "op_3", f"{team}=0.10", "requests=2").startswith("Committed op_3: ")
    assert document(tour("budget", "show", "requests", "--json"))["spent"] == 2
    assert document(tour("budget", "show", team, "--json"))["spent"] == "0.10"

    # Releases: an operator's on behalf of a dead worker, which may still commit, and the worker's own.
    tour("budget", "reserve", "agent", "1.00", "--id", "op_4", "--ttl", "60", "--on-expiry", "release")
    assert tour("budget", "release", "op_4") == "Released op_4: agent $0.00\n"
    assert "(after expiry or release)" in tour("budget", "commit", "op_4", "0.10")
    with environment.context() as without:
        without.delenv("KTRDR_ADMIN_KEY")
        tour("budget", "reserve", "agent", "1.00", "--id", "op_5")
        assert tour("budget", "release", "op_5") == "Released op_5: agent $0.00\n"
        tour("budget", "commit", "op_5", "0.10", code=1)

    # Limits: set with the admin key only, and overriding the configured one.
    assert "set at run time until" in tour("budget", "set-limit", "agent", "0.20", "--until", "window")
    line = tour("budget", "reserve", "agent", "0.15", code=3)
    assert line.startswith("denied: agent: budget_exhausted ($0.0085 remaining, need $0.15); retry in ")
    assert "$0.20*" in tour("budget", "list")
    assert "Limit:         unlimited (set" in tour("budget", "set-limit", "agent", "unlimited")
    assert "Remaining: unlimited" in tour("agent", "budget")
    assert "Limit:         $5.00\n" in tour("budget", "clear-limit", "agent")
    line = tour("budget", "reserve", "agent", "6", code=3)
    assert line == "denied: agent: exceeds_limit ($4.8085 remaining, need $6.00); a retry cannot succeed\n"
    tour("budget", "set-limit", "agent", "a lot", code=2)
    tour("budget", "set-limit", "unknown", "1", code=1)
    with environment.context() as without:
        without.delenv("KTRDR_ADMIN_KEY")
        assert "KTRDR_ADMIN_KEY" in tour("budget", "set-limit", "agent", "1", code=1)
        without.setenv("KTRDR_API_KEY", "wrong")
        assert "KTRDR_API_KEY" in tour("agent", "budget", code=1)

    # Access keys: one that may read, from its creation to its revocation; the log names who changed what.
    made = document(tour("key", "create", "ci", "--rights", "read", "--expires", "90d", "--json"))
    tour("key", "create", "ci", code=1)
    assert tour("key", "list").splitlines()[1].split()[:2] == ["ci", "read"]
    with environment.context() as other:
        other.delenv("KTRDR_ADMIN_KEY")
        other.setenv("KTRDR_API_KEY", made["secret"])
        assert "Daily Limit: $5.00" in tour("agent", "budget")
        assert "right to use" in tour("budget", "record", "agent", "0.01", code=1)
    assert tour("key", "revoke", "ci", "--reason", "the tour ends") == "Revoked ci\n"
    with environment.context() as other:
        other.setenv("KTRDR_API_KEY", made["secret"])
        assert "was revoked" in tour("agent", "budget", code=1)
    changes = document(tour("budget", "changes", "--json"))["changes"]
    assert [change["kind"] for change in changes] == ["key", "key", "limit", "limit", "limit"]
    assert (changes[0]["reason"], changes[0]["before"].split(";")[0]) == ("the tour ends", "read")

    # An exhausted budget is shown with exit code 0, and adds up.
    tour("budget", "record", "agent", "6.00")
    assert "Remaining: $0.00\nCycles Affordable: ~0" in tour("agent", "budget")
    assert document(tour("agent", "budget", "--json"))["today_spend"] == 6.1915
    tour("budget", "reserve", "agent", "0.01", code=3)
    assert tour("budget", "verify").count("\nok ") == 3


@pytest.mark.slow
def test_the_serve_command_rejects_an_invalid_setting_in_one_line(
    data_dir: Path, process: Process, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("AGENT_DAILY_BUDGET", "a lot")
    ended = process("serve", "--port", str(free_port()))
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("ktrdr: AGENT_DAILY_BUDGET")
    assert "Traceback" not in ended.stderr
    assert not data_dir.exists()


@pytest.mark.slow
def test_the_commands_report_an_outage_of_the_store(
    start_server: Callable[..., Server], process: Process, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = start_server(None, "--appendonly", "yes", "--appendfsync", "always")
    environment.setenv("KTRDR_REDIS_URL", store.url)
    with serving(environment, tmp_path / "log"):
        assert process("budget", "record", "agent", "0.25").returncode == 0
        store.kill()
        for words in (
            ("agent", "budget"),
            ("budget", "list"),
            ("budget", "reserve", "agent", "0.15"),
            ("budget", "verify"),
        ):
            ended = process(*words)
            assert (ended.returncode, ended.stdout) == (4, ""), ended
            assert ended.stderr.startswith("ktrdr: ")
            assert ended.stderr.count("\n") == 1
        store.start()
        wait_until(lambda: process("agent", "budget").returncode == 0)
        assert "Today's Spend: $0.25\n" in process("agent", "budget").stdout


def test_the_serve_command_reports_a_port_in_use_in_one_line(
    service: FakeService, data_dir: Path, process: Process
) -> None:
    ended = process("serve", "--port", str(service.port))
    assert ended.returncode == 1
    message = f"cannot listen on 127.0.0.1 port {service.port}: Address already in use; choose another one with --port"
    assert ended.stderr == f"ktrdr: {message}\n"
    assert not data_dir.exists()
