"""``ktrdr budget verify`` against real servers."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result

from ktrdr_budget import Budget, BudgetLimiter, audit
from ktrdr_budget.engine import embedded

from ..conftest import Server
from ..helpers.keyspace import public

Run = Callable[..., Result]
BUDGETS = [Budget("agent", "5.00"), Budget("tokens", 1000, unit="tokens", period="ever")]


def spend(url: str) -> None:
    """Spend of all kinds: $0.09 spent, $0.15 held, 100 tokens spent and 10 held."""
    with BudgetLimiter(url, BUDGETS) as limiter:
        limiter.reserve("agent", "0.15", id="op_1").commit("0.07")
        limiter.record({"agent": "0.02", "tokens": 100}, id="op_2")
        limiter.reserve({"agent": "0.15", "tokens": 10}, id="op_3")


@pytest.fixture
def store(server: Server, environment: pytest.MonkeyPatch) -> Server:
    """A store with some spend, configured for the command."""
    spend(server.url)
    environment.setenv("KTRDR_REDIS_URL", server.url)
    return server


def window_key(store: Server, budget: str) -> str:
    with store.client() as client:
        (key,) = client.keys(f"ktrdr:{{default}}:w:{budget}:*")
    return str(key)


def corrupt(store: Server, field: str, by: int) -> None:
    with store.client() as client:
        client.hincrby(window_key(store, "agent"), field, by)


def test_the_verify_command_prints_one_line_per_window_and_exits_with_0_if_all_windows_add_up(
    ktrdr: Run, store: Server
) -> None:
    day = public(window_key(store, "agent").rpartition(":")[2])
    result = ktrdr("budget", "verify")
    assert (result.exit_code, result.stderr) == (0, "")
    assert sorted(line.split() for line in result.stdout.splitlines()[1:]) == [
        ["ok", "agent", day, "$0.09", "$0.00", "$0.09", "$0.15", "$0.15"],
        ["ok", "tokens", "ever", "100", "0", "100", "10", "10"],
    ]


def test_the_verify_command_names_an_unreadable_window_and_checks_the_other_windows(ktrdr: Run, store: Server) -> None:
    with store.client() as client:
        key = window_key(store, "agent")
        client.delete(key)
        client.set(key, "not a hash")
    result = ktrdr("budget", "verify")
    assert (result.exit_code, result.stderr) == (1, "ktrdr: 1 of 2 windows do not add up\n")
    lines = {line.split("  ")[0]: line for line in result.stdout.splitlines()[1:]}
    assert set(lines) == {"ok", "UNREADABLE"}
    assert lines["UNREADABLE"].split()[3:] == ["unknown"] * 5
    found = {each["budget"]: each for each in json.loads(ktrdr("budget", "verify", "--json").stdout)["windows"]}
    assert (found["agent"]["spent"], found["agent"]["adds_up"]) == (None, False)
    assert "WRONGTYPE" in found["agent"]["fault"]
    assert found["tokens"]["adds_up"]
    result = ktrdr("budget", "verify", "--repair")
    assert result.exit_code == 1


@pytest.mark.parametrize(("field", "by"), [("spent", 1), ("held", -1), ("unconfirmed", 1)])
def test_the_verify_command_names_a_window_that_does_not_add_up_and_exits_with_1(
    ktrdr: Run, store: Server, field: str, by: int
) -> None:
    corrupt(store, field, by)
    result = ktrdr("budget", "verify")
    assert result.exit_code == 1
    assert result.stderr == "ktrdr: 1 of 2 windows do not add up\n"
    lines = {line.split("  ")[0]: line for line in result.stdout.splitlines()[1:]}
    assert set(lines) == {"ok", "DOES NOT ADD UP"}
    assert " agent " in lines["DOES NOT ADD UP"]


def test_the_verify_command_with_json_prints_the_sums_of_each_window(ktrdr: Run, store: Server) -> None:
    result = ktrdr("budget", "verify", "--json")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["adds_up"]) == (0, True)
    (agent,) = (window for window in document["windows"] if window["budget"] == "agent")
    assert agent == {
        "budget": "agent",
        "window": public(window_key(store, "agent").rpartition(":")[2]),
        "unit": "usd",
        "spent": "0.09",
        "unconfirmed": "0.00",
        "ledger_sum": "0.09",
        "held": "0.15",
        "holds_sum": "0.15",
        "conclusive": True,
        "adds_up": True,
    }


def test_the_verify_command_with_json_marks_each_window_that_does_not_add_up(ktrdr: Run, store: Server) -> None:
    corrupt(store, "spent", 1)
    result = ktrdr("budget", "verify", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["adds_up"] is False
    assert {window["budget"]: window["adds_up"] for window in document["windows"]} == {"agent": False, "tokens": True}
    assert "0.090000001" in {window["spent"] for window in document["windows"]}


def test_the_verify_command_has_exit_code_0_if_a_window_is_inconclusive(
    ktrdr: Run, store: Server, environment: pytest.MonkeyPatch
) -> None:
    report = audit.WindowReport("key", "agent", "2026-11-23", "usd", 10**9, 0, 0, 0, 0, conclusive=False)
    environment.setattr(audit.Auditor, "check", lambda auditor: [report])
    result = ktrdr("budget", "verify")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1].startswith("inconclusive  agent")


def test_the_verify_command_reads_only_the_windows_of_the_configured_tenant(
    ktrdr: Run, store: Server, environment: pytest.MonkeyPatch
) -> None:
    corrupt(store, "spent", 1)
    environment.setenv("KTRDR_TENANT", "other")
    result = ktrdr("budget", "verify")
    assert (result.exit_code, result.stdout) == (0, "No windows.\n")


# --- The embedded server --------------------------------------------------------------------------


@pytest.fixture
def data_dir(tmp_path: Path, environment: pytest.MonkeyPatch) -> Path:
    environment.setenv("AGENT_BUDGET_DIR", str(tmp_path / "budget"))
    return tmp_path / "budget"


@pytest.fixture
def running(data_dir: Path) -> Iterator[embedded.EmbeddedServer]:
    with embedded.start(data_dir) as server:
        yield server


def test_the_verify_command_reads_a_running_embedded_server(ktrdr: Run, running: embedded.EmbeddedServer) -> None:
    spend(running.url)
    result = ktrdr("budget", "verify")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\nok ") == 2


def test_the_verify_command_fails_and_starts_no_server_if_no_embedded_server_is_running(
    ktrdr: Run, data_dir: Path
) -> None:
    result = ktrdr("budget", "verify")
    assert result.exit_code == 4
    assert result.stderr == (
        f"ktrdr: no embedded server is running in {data_dir}; start one with 'ktrdr serve', or set KTRDR_REDIS_URL\n"
    )
    assert not data_dir.exists()


# --- Unreadable stores ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "exit_code"),
    [
        ("redis://:hunter2@127.0.0.1:1/0", 4),
        ("unix:///nowhere/store.sock", 4),
        ("http://user:hunter2@127.0.0.1", 2),
        ("hunter2", 2),
        ("redis://:hunter2@127.0.0.1:port", 2),
        ("redis://user:hunter2/x@127.0.0.1", 2),
        ("redis://:hunter2@127.0.0.1/?socket_timeout=soon", 2),
    ],
)
def test_the_verify_command_prints_one_line_without_the_password_if_the_store_cannot_be_read(
    ktrdr: Run, environment: pytest.MonkeyPatch, url: str, exit_code: int
) -> None:
    environment.setenv("KTRDR_REDIS_URL", url)
    result = ktrdr("budget", "verify")
    assert result.exit_code == exit_code, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "hunter2" not in result.stderr


def test_the_verify_command_reports_a_missing_password_of_the_store_in_one_line(
    ktrdr: Run, start_server: Callable[..., Server], environment: pytest.MonkeyPatch
) -> None:
    store = start_server(None)
    with store.client() as client:
        client.config_set("requirepass", "hunter2")
    environment.setenv("KTRDR_REDIS_URL", store.url)
    result = ktrdr("budget", "verify")
    assert result.exit_code == 4
    assert result.stderr.startswith("ktrdr: ")
    assert result.stderr.count("\n") == 1


def test_an_invalid_tenant_is_a_usage_error(ktrdr: Run, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("KTRDR_TENANT", "a b")
    assert ktrdr("budget", "verify").exit_code == 2


# --- Repair ---------------------------------------------------------------------------------------


def test_the_verify_command_with_repair_lists_the_changes_and_has_exit_code_0(ktrdr: Run, store: Server) -> None:
    corrupt(store, "spent", 10_000_000)
    corrupt(store, "events", 2)
    day = public(window_key(store, "agent").rpartition(":")[2])
    result = ktrdr("budget", "verify", "--repair")
    assert result.exit_code == 0, result.stderr
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["BUDGET", "WINDOW", "COUNTER", "BEFORE", "AFTER"],
        ["agent", day, "spent", "$0.10", "$0.09"],
        ["agent", day, "events", "4", "2"],
    ]
    assert ktrdr("budget", "verify").exit_code == 0


def test_the_verify_command_with_repair_prints_a_message_if_nothing_has_changed(ktrdr: Run, store: Server) -> None:
    result = ktrdr("budget", "verify", "--repair")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Nothing to repair in 2 windows.\n", "")


def test_the_verify_command_with_repair_and_json_prints_each_changed_counter_and_index_entry(
    ktrdr: Run, store: Server
) -> None:
    corrupt(store, "held", -150_000_000)
    with store.client() as client:
        client.zadd("ktrdr:{default}:due", {"ghost": 9e12})
    day = public(window_key(store, "agent").rpartition(":")[2])
    document = json.loads(ktrdr("budget", "verify", "--repair", "--json").stdout)
    assert document["changes"] == [
        {"budget": "agent", "window": day, "unit": "usd", "counter": "held", "before": "0.00", "after": "0.15"}
    ]
    assert document["index_changes"] == [{"index": "due", "hold_id": "ghost", "change": "removed"}]
    assert document["adds_up"] is True
    assert {window["held"] for window in document["windows"]} == {"0.15", 10}


def test_the_verify_command_with_repair_has_exit_code_1_if_a_window_remains_inconclusive(
    ktrdr: Run, store: Server, environment: pytest.MonkeyPatch
) -> None:
    report = audit.WindowReport("key", "agent", "2026-11-23", "usd", 10**9, 0, 0, 0, 0, conclusive=False)
    environment.setattr(audit.Auditor, "repair", lambda auditor: audit.Repair([report]))
    result = ktrdr("budget", "verify", "--repair")
    assert (result.exit_code, result.stderr) == (1, "ktrdr: 1 of 1 windows do not add up or are inconclusive\n")


def test_the_options_repair_and_watch_cannot_be_combined(ktrdr: Run, store: Server) -> None:
    result = ktrdr("budget", "verify", "--repair", "--watch")
    assert (result.exit_code, result.stdout) == (2, "")


# --- Watch ----------------------------------------------------------------------------------------


@pytest.fixture
def watching(store: Server) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command as a separate process."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "ktrdr_budget.cli", "budget", "verify", "--watch", "--interval", "0.1", *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(words, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], part: str) -> list[str]:
    """Return all lines up to the first line that contains this part."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if part in line:
            return lines
    raise AssertionError(f"the output ended without {part!r}: {lines}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_verify_command_with_watch_has_exit_code_0_if_all_checks_passed(
    watching: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    process = watching()
    lines = [read_until(process, "ok, windows: 2")[-1] for _ in range(3)]
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d  ok, windows: 2", line) for line in lines)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")


def test_the_verify_command_with_watch_reports_each_change_once_and_exits_with_1_if_a_check_failed(
    watching: Callable[..., subprocess.Popen[str]], store: Server
) -> None:
    process = watching()
    read_until(process, "ok, windows: 2")
    corrupt(store, "spent", 10_000_000)
    change = read_until(process, "DOES NOT ADD UP")[-1]
    assert "DOES NOT ADD UP: agent " in change
    assert "spent $0.10, unconfirmed $0.00, ledger $0.09, held $0.15, holds $0.15" in change
    assert "1 of 2 windows DO NOT ADD UP" in read_until(process, "windows")[-1]
    assert "windows DO NOT ADD UP" in read_until(process, "windows")[-1], "a change is reported once"
    corrupt(store, "spent", -10_000_000)
    assert "ok: agent" in read_until(process, "ok")[-1]
    read_until(process, "ok, windows: 2")
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (1, "ktrdr: 1 windows did not add up\n")


def test_the_verify_command_with_watch_and_json_writes_one_line_per_check(
    watching: Callable[..., subprocess.Popen[str]],
) -> None:
    process = watching("--json")
    documents = [json.loads(read_until(process, "adds_up")[-1]) for _ in range(2)]
    assert [len(document["windows"]) for document in documents] == [2, 2]
    assert all(document["adds_up"] for document in documents)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_the_verify_command_with_watch_continues_after_an_outage_of_the_store(
    start_server: Callable[..., Server],
    watching: Callable[..., subprocess.Popen[str]],
    environment: pytest.MonkeyPatch,
) -> None:
    own = start_server()
    spend(own.url)
    environment.setenv("KTRDR_REDIS_URL", own.url)
    process = watching()
    read_until(process, "ok, windows: 2")
    own.kill()
    assert process.stderr is not None
    assert "cannot verify: cannot connect to" in process.stderr.readline()
    own.start()
    read_until(process, "ok, windows: 0")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 0
    process = watching()
    read_until(process, "ok, windows: 0")
    own.kill()
    assert process.stderr is not None
    assert "cannot verify: cannot connect to" in process.stderr.readline()
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 4
