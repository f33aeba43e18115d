"""``scripts/verify.sh``: a sound stack passes, a broken stack fails, and the script leaves nothing changed."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..api.processes import serving
from ..conftest import Server, free_port
from ..helpers.otlp_receiver import OtlpReceiver
from ..helpers.waiting import wait_until
from .observers import answering, grafana, jaeger
from .support import ROOT, Stack, environment, stack

SCRIPT = ROOT / "scripts" / "verify.sh"
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "agent.json"
CHECKS = ["ready", "budget", "cli", "metrics", "gauge", "cycle", "ledger", "counters", "agreement", "traces"]
CHECKS += ["exhaustion", "restored", "prometheus", "grafana"]


@dataclass
class Verified:
    """The output of the script and its exit code."""

    code: int
    output: str

    @property
    def results(self) -> dict[str, str]:
        """The result of each check: ``PASS``, ``FAIL`` or ``SKIP``."""
        lines = [line.split() for line in self.output.splitlines() if line[:5] in ("PASS ", "FAIL ", "SKIP ")]
        return {words[1]: words[0] for words in lines}

    def line(self, check: str) -> str:
        [line] = [line for line in self.output.splitlines() if line[6:].startswith(f"{check} ")]
        return line


def command(*checks: str) -> list[str]:
    return ["bash", str(SCRIPT), *checks]


def verify(url: str, *checks: str, **variables: Any) -> Verified:
    ended = subprocess.run(
        command(*checks),
        env=environment(KTRDR_API_URL=url, PYTHON=sys.executable, **variables),
        capture_output=True,
        text=True,
        timeout=100,
    )
    return Verified(ended.returncode, ended.stdout + ended.stderr)


def budget(url: str) -> dict[str, Any]:
    return dict(httpx.get(f"{url}/api/v1/budgets/agent", timeout=60).json())


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def running(receiver: OtlpReceiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two replicas on an embedded server; their cycles are short, and they export traces."""
    data_dir = tmp_path_factory.mktemp("stack") / "budget"
    with stack(AGENT_BUDGET_DIR=data_dir, AGENT_PHASE_SECONDS="0.1", **receiver.environment) as running:
        yield running


def replicas(running: Stack) -> str:
    return f"{running.url('replica-1')} {running.url('replica-2')}"


# --- The README ----------------------------------------------------------------------------------


def shape(line: str) -> str:
    """Replace the parts of a line that vary; remove the mention of a trace id, which the README does not show."""
    line = line.removesuffix(" with its trace id")
    return re.sub(r"op_\w+", "ID", re.sub(r"[\d.]*\d", "N", re.sub(r"op_\w+", "ID", line)))


@pytest.mark.slow
def test_the_readme_shows_the_output_of_the_verify_script(running: Stack) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```text\n(\$ [^\n]*scripts/verify\.sh)\n(.*?)```", readme, re.DOTALL)
    called, shown = block[0], block[1].splitlines()
    assert called == '$ KTRDR_REPLICAS="http://127.0.0.1:8001 http://127.0.0.1:8002" scripts/verify.sh'
    tools = {"KTRDR_REPLICAS": replicas(running)}
    has_prometheus = shutil.which("prometheus") is not None
    if has_prometheus:
        tools["PROMETHEUS_URL"] = running.url("prometheus")
    found = verify(
        running.url("service"), *(check for check in CHECKS if check not in ("restored", *OBSERVERS)), **tools
    )
    lines = [line for line in shown if line[6:].split(maxsplit=1)[0] not in OBSERVERS]
    if not has_prometheus:
        lines = [line for line in lines if not line.startswith("PASS  prometheus")]
        found.output = "\n".join(line for line in found.output.splitlines() if not line.startswith("SKIP  prometheus"))
    assert [shape(line) for line in found.output.splitlines()[:-1]] == [shape(line) for line in lines[:-1]]
    assert shown[-1] == "verify: 12 passed, 0 failed, 2 skipped"
    assert [line[:4] for line in shown].count("PASS") == 12


OBSERVERS = ("traces", "grafana")
"""The test ignores these checks: they use default addresses, where a developer's machine may run other programs."""


# --- A sound stack --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_correct_stack_passes_every_check_of_the_verify_script(running: Stack, receiver: OtlpReceiver) -> None:
    url = running.url("service")
    before = budget(url)
    tools = {"KTRDR_REPLICAS": replicas(running)}
    has_prometheus = shutil.which("prometheus") is not None
    if has_prometheus:
        tools["PROMETHEUS_URL"] = running.url("prometheus")
    with answering(jaeger(receiver)) as jaeger_url, answering(grafana(DASHBOARD)) as grafana_url:
        found = verify(url, **tools, JAEGER_URL=jaeger_url, GRAFANA_URL=grafana_url)
    expected = dict.fromkeys(CHECKS, "PASS") | ({} if has_prometheus else {"prometheus": "SKIP"})
    assert (found.results, found.code) == (expected, 0), found.output
    assert list(found.results) == CHECKS
    assert "ktrdr_budget.agent" not in found.output
    assert "Daily budget exhausted: budget_exhausted ($0.00 remaining, need $0.15)" in found.line("exhaustion")
    assert '"Agent Research Cycles"' in found.line("grafana")

    after = budget(url)
    assert float(after["spent"]) > float(before["spent"])
    unchanged = ("limit", "limit_source", "limit_until")
    assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}
    assert not receiver.errors


@pytest.mark.slow
def test_an_interrupted_verify_script_restores_the_limit_that_was_set_at_run_time(running: Stack) -> None:
    url = running.url("service")
    limit = httpx.put(f"{url}/api/v1/budgets/agent/limit", json={"limit": "3.00", "until": "window"}, timeout=60)
    set_before = limit.json()
    try:
        variables = environment(KTRDR_API_URL=url, KTRDR_REPLICAS=replicas(running), PYTHON=sys.executable)
        pipe = subprocess.PIPE
        with subprocess.Popen(command("exhaustion"), env=variables, stdout=pipe, stderr=pipe, text=True) as process:
            wait_until(lambda: budget(url)["limit"] == "0.01")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, ""), out
        assert "FAIL" not in out
        after = budget(url)
        names = ("limit", "limit_source", "limit_until")
        assert {name: after[name] for name in names} == {name: set_before[name] for name in names}
        assert after["limit_source"] == "runtime"
    finally:
        httpx.delete(f"{url}/api/v1/budgets/agent/limit", timeout=60)


def cancelled_cycle(url: str) -> str:
    """Start and cancel cycles until one is cancelled before its end; return the id of that cycle."""
    while True:
        operation_id = httpx.post(f"{url}/api/v1/agent/trigger", timeout=60).json()["operation_id"]
        answer = httpx.delete(f"{url}/api/v1/agent/cancel/{operation_id}", timeout=60)
        if answer.status_code == 200:
            wait_until(lambda: budget(url)["held"] == "0.00")
            return str(operation_id)
        assert answer.json()["code"] == "cycle-ended", answer.text


@pytest.mark.slow
def test_the_verify_script_fails_if_a_cycle_has_no_trace(running: Stack, receiver: OtlpReceiver) -> None:
    url = running.url("service")
    operation_id = cancelled_cycle(url)
    with answering(jaeger(receiver)) as jaeger_url:
        tools = {"JAEGER_URL": jaeger_url, "WAIT_SECONDS": 20}
        found = verify(url, "cycle", "traces", TRACE_OUTCOMES="completed cancelled", **tools)
        assert (found.results, found.code) == ({"cycle": "PASS", "traces": "PASS"}, 0), found.output
        assert "2 cycle(s), completed cancelled: " in found.line("traces")
        receiver.clear()
        found = verify(url, "cycle", "traces", TRACE_OUTCOMES="cancelled", **{**tools, "WAIT_SECONDS": 2})
        assert found.results == {"cycle": "PASS", "traces": "FAIL"}, found.output
        assert f"cycle {operation_id}: no trace has arrived" in found.line("traces")


# --- A broken one ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_verify_script_fails_if_a_replica_cannot_reach_its_store(tmp_path: Path) -> None:
    with serving(KTRDR_REDIS_URL=f"unix://{tmp_path / 'nothing'}", KTRDR_TIMEOUT="0.2") as replica:
        found = verify(replica.url, "ready", "budget", "cli", "metrics", "gauge", "cycle", "exhaustion", "ledger")
    assert found.code == 1
    results = found.results
    assert results.pop("ledger") == "SKIP"
    assert set(results.values()) == {"FAIL"}, found.output
    assert found.output.splitlines()[-1] == f"verify: 0 passed, {len(results)} failed, 1 skipped"
    assert "Traceback" not in found.output


def test_the_verify_script_fails_if_the_service_is_unreachable(server: Server) -> None:
    checks = ("ready", "budget", "cli", "metrics", "cycle", "agreement", "traces", "exhaustion")
    found = verify(f"http://127.0.0.1:{free_port()}", *checks, JAEGER_URL="http://[::1]:1")
    assert (set(found.results.values()), found.code) == ({"FAIL"}, 1)
    for check in checks:
        assert len(found.line(check).split(maxsplit=2)) == 3, f"{check} has a reason"


@pytest.mark.slow
def test_the_verify_script_fails_if_a_trace_is_incomplete(running: Stack, receiver: OtlpReceiver) -> None:
    """The trace has a different defect each time."""

    def without_root(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [span for span in spans if span["operationName"] != "agent.research_cycle"]

    def without_a_phase(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [span for span in spans if span["operationName"] != "agent.phase.training"]

    def without_an_id(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*spans[:-1], {**spans[-1], "tags": []}]

    url = running.url("service")
    whole = jaeger(receiver)
    for spoil, message in (
        (without_root, "no span agent.research_cycle"),
        (without_a_phase, "no span agent.phase.training"),
        (without_an_id, "has not the operation.id"),
    ):

        def answer(path: str, spoil: Any = spoil) -> Any:
            document = whole(path)
            for trace in document["data"] if document and path != "/api/services" else ():
                trace["spans"] = spoil(trace["spans"])
            return document

        with answering(answer) as jaeger_url:
            found = verify(url, "cycle", "traces", JAEGER_URL=jaeger_url, WAIT_SECONDS=2)
        assert (found.results, found.code) == ({"cycle": "PASS", "traces": "FAIL"}, 1), found.output
        assert message in found.line("traces")


# --- What it may not do ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_verify_script_passes_if_the_budget_is_exhausted_or_the_admin_key_is_missing(
    server: Server,
) -> None:
    keys = {"KTRDR_API_KEY": "use-key", "KTRDR_ADMIN_KEY": "admin-key"}
    with serving(KTRDR_REDIS_URL=server.url, AGENT_DAILY_BUDGET="0.01", **keys) as replica:
        found = verify(replica.url, "ready", "budget", "cycle", "exhaustion", **keys)
        expected = {"ready": "PASS", "budget": "PASS", "cycle": "SKIP", "exhaustion": "PASS", "restored": "PASS"}
        assert (found.results, found.code) == (expected, 0), found.output
        found = verify(replica.url, "budget", "exhaustion", KTRDR_API_KEY="use-key")
        assert (found.results, found.code) == ({"budget": "PASS", "exhaustion": "SKIP"}, 0), found.output
        assert "admin key" in found.line("exhaustion")
        found = verify(replica.url, "budget", "exhaustion")
        assert (found.results, found.code) == ({"budget": "FAIL", "exhaustion": "FAIL"}, 1), found.output
        assert "-key" not in found.output.replace("KTRDR_API_KEY", "")


def test_the_verify_script_rejects_the_name_of_an_unknown_check() -> None:
    found = verify("http://127.0.0.1:1", "ready", "everything")
    assert found.code == 2
    assert found.output.startswith("verify: no check everything; there are ready budget ")


def test_the_verify_script_fails_if_the_python_interpreter_has_no_ktrdr_budget_package() -> None:
    ended = subprocess.run(command(), env=environment(PYTHON="false"), capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "verify: false has no ktrdr-budget; set PYTHON\n"
