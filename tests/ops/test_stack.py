"""``make stack``: all parts on one store, with a clean end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from ktrdr_budget.engine import embedded

from ..conftest import Server
from ..helpers.waiting import wait_until
from .support import FREE_PORTS, ROOT, Stack, answers, environment, stack

PARTS = ("service", "replica-1", "replica-2")


def spend(url: str) -> float:
    return float(httpx.get(f"{url}/api/v1/agent/budget", timeout=60).json()["today_spend"])


def recorded(url: str) -> int:
    """Return the number of records counted by a replica."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    [count] = re.findall(r'^ktrdr_budget_call_seconds_count\{operation="record"\} (\d+)', text, re.MULTILINE)
    return int(count)


def record(url: str, amount: str) -> None:
    httpx.post(f"{url}/api/v1/spend", json={"amounts": {"agent": amount}}, timeout=60).raise_for_status()


@pytest.mark.slow
def test_two_replicas_share_an_embedded_server_until_ctrl_c_ends_the_stack(tmp_path: Path) -> None:
    data_dir = tmp_path / "budget"
    with stack("--no-prometheus", AGENT_BUDGET_DIR=data_dir, AGENT_DAILY_BUDGET="1.00") as running:
        urls = [running.url(part) for part in PARTS]
        assert len(set(urls)) == 3
        record(urls[1], "0.25")
        record(urls[2], "0.50")
        assert [spend(url) for url in urls] == [0.75] * 3

        # Round robin: each record uses a new connection.
        before = [recorded(url) for url in urls[1:]]
        for _ in range(4):
            record(urls[0], "0.01")
        assert [recorded(url) - count for url, count in zip(urls[1:], before, strict=True)] == [2, 2]
        large = httpx.post(f"{urls[0]}/api/v1/spend", json=["x" * 1_000_000], timeout=60)
        assert large.status_code == 413

        assert [line for line in running.lines if "budget agent: $1.00 a day" in line][1:]
        assert running.place("prometheus") == "not started (--no-prometheus)"
        assert running.place("traces").startswith("not sent")
        running.signal(signal.SIGINT)
        assert running.end() == 0
    assert not [url for url in urls if answers(url)]
    wait_until(lambda: embedded.find(data_dir) is None)
    assert not [line for line in running.lines if "Traceback" in line]


@pytest.mark.slow
def test_an_installed_prometheus_scrapes_each_replica_of_the_stack(server: Server) -> None:
    with stack(KTRDR_REDIS_URL=server.url, OTEL_EXPORTER_OTLP_ENDPOINT="http://user:hunter2@127.0.0.1:9") as running:
        assert running.place("traces") == "to http://...@127.0.0.1:9"
        if shutil.which("prometheus") is None:
            assert running.place("prometheus") == "not installed on this machine"
            return
        url = f"{running.url('prometheus')}/api/v1/query"

        def ups() -> list[Any]:
            found = httpx.get(url, params={"query": "up"}, timeout=60).json()["data"]["result"]
            return [(series["metric"]["job"], series["value"][1]) for series in found]

        wait_until(lambda: ups() == [("ktrdr-backend", "1")] * 2)
        running.signal(signal.SIGTERM)
        assert running.end() == 0
        assert not answers(running.url("prometheus"))


@pytest.mark.slow
def test_a_dead_replica_ends_the_stack_with_exit_code_1(server: Server) -> None:
    with stack("--no-prometheus", KTRDR_REDIS_URL=server.url) as running:
        urls = [running.url(part) for part in PARTS]
        os.kill(running.pid("replica-2"), signal.SIGKILL)
        assert running.end() == 1
        assert "stack: replica-2 has ended with exit code -9; stopping" in running.lines
        assert not [url for url in urls if answers(url)]


@pytest.mark.slow
def test_the_stack_ends_with_exit_code_1_if_the_embedded_server_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    running = Stack(*FREE_PORTS, AGENT_BUDGET_DIR=tmp_path / "file" / "budget")
    assert running.end() == 1
    assert running.lines[-1].startswith("stack: cannot run the embedded server in ")


def test_a_port_in_use_is_reported_with_exit_code_1(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        running = Stack("--port", str(port), KTRDR_REDIS_URL=server.url)
        assert running.end() == 1
    assert running.lines == [f"stack: cannot listen on 127.0.0.1 port {port}: Address already in use; stopping"]


@pytest.mark.slow
def test_an_invalid_setting_ends_the_stack(server: Server) -> None:
    running = Stack(*FREE_PORTS, KTRDR_REDIS_URL=server.url, AGENT_DAILY_BUDGET="a lot")
    assert running.end() == 1
    assert [line for line in running.lines if "| ktrdr: AGENT_DAILY_BUDGET" in line]
    assert "has ended with exit code 2; stopping" in running.lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_start_ends_the_stack(server: Server, number: signal.Signals) -> None:
    running = Stack(*FREE_PORTS, KTRDR_REDIS_URL=server.url)
    wait_until(lambda: running.printed("replica-"))
    running.signal(number)
    assert running.end() == 0
    assert running.lines[-1].startswith(("stack: stopping", "replica-"))


def test_the_stack_target_runs_the_stack_script_with_the_given_port() -> None:
    words = ["make", "--no-print-directory", "-n", "stack", "PORT=8100"]
    shown = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    words = shown.stdout.splitlines()[-1].split()
    assert words[1:] == ["scripts/stack.py", "--port", "8100", "--replica-port", "8001", "--prometheus-port", "9090"]
