"""Build Jaeger, start it on loopback with a stack, and check the traces of cycles on its query API.

Run by ``make jaeger``. Needs Go 1.24 or newer; without Go, it prints one line and does nothing. The binary is built
once, in minutes, from the Go module proxy into ${XDG_CACHE_HOME:-~/.cache}/ktrdr-budget. The stack has its own embedded
server in a temporary directory, and free ports. One cycle is cancelled, one fails at a gate, and scripts/verify.sh
completes one, then finds all three by service and ``operation.id``. All parts are stopped afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
MODULE = "github.com/jaegertracing/jaeger"
VERSION = "v1.76.0"
GO_LEAST = (1, 24)
READY_WITHIN_S = 120.0
ENDS_WITHIN_S = 120.0
OUTCOMES = ("completed", "failed", "cancelled")


class JaegerError(Exception):
    """A part does not start or fails; the message is one line."""


# -- the binary --------------------------------------------------------------------------------------------------------


def cached_binary() -> Path:
    """Return the path of the binary, which may not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME", "").strip() or Path.home() / ".cache"
    return Path(cache) / "ktrdr-budget" / f"jaeger-{VERSION}"


def go_is_missing() -> str:
    """Return the reason why nothing can be built; empty if Go is usable."""
    least = ".".join(map(str, GO_LEAST))
    go = shutil.which("go")
    if go is None:
        return f"Go {least} or newer is not installed"
    version = run_go(go, "env", "GOVERSION").stdout.strip()
    found = re.match(r"go(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) < GO_LEAST:
        return f"Go {least} or newer is needed, not {version or 'this one'}"
    return ""


def run_go(go: str, *words: str, directory: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the go command."""
    return subprocess.run(  # noqa: S603 -- the go that this machine has, with words of this file
        [go, *words], cwd=directory, capture_output=True, text=True, check=False
    )


def build(binary: Path) -> None:
    """Build Jaeger as a tool of a scratch module: ``go install`` rejects a module with replace directives.

    Raises:
        JaegerError: the build failed.
    """
    say(f"jaeger: building {MODULE}/cmd/jaeger {VERSION}; this takes some minutes, once")
    binary.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ktrdr-jaeger-", dir=binary.parent) as directory:
        built = Path(directory) / "jaeger"
        for words in (
            ("mod", "init", "jaeger-tool"),
            ("get", f"{MODULE}/cmd/jaeger@{VERSION}"),
            ("build", "-o", str(built), f"{MODULE}/cmd/jaeger"),
        ):
            done = run_go("go", *words, directory=directory)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no output"])[-1]
                raise JaegerError(f"go {words[0]} failed: {last}")
        built.replace(binary)


def config(otlp: str, query: str, query_grpc: str, health: str) -> dict[str, Any]:
    """Return a configuration with traces in memory and these addresses. (JSON is YAML.)"""
    return {
        "service": {
            "extensions": ["jaeger_storage", "jaeger_query", "healthcheckv2"],
            "pipelines": {
                "traces": {"receivers": ["otlp"], "processors": ["batch"], "exporters": ["jaeger_storage_exporter"]}
            },
            "telemetry": {"metrics": {"level": "none"}, "logs": {"level": "error"}},
        },
        "extensions": {
            "healthcheckv2": {"use_v2": True, "http": {"endpoint": health}},
            "jaeger_query": {
                "storage": {"traces": "memory"},
                "http": {"endpoint": query},
                "grpc": {"endpoint": query_grpc},
            },
            "jaeger_storage": {"backends": {"memory": {"memory": {"max_traces": 10_000}}}},
        },
        "receivers": {"otlp": {"protocols": {"http": {"endpoint": otlp}}}},
        "processors": {"batch": {"timeout": "200ms"}},
        "exporters": {"jaeger_storage_exporter": {"trace_storage": "memory"}},
    }


# -- parts -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(log: Path, *words: str | Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process with its output in a file; end it with SIGTERM, as a service manager does."""
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 -- parts of this stack
            [str(word) for word in words],
            env={**clean_environment(), **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def clean_environment() -> dict[str, str]:
    """Return the environment without settings of the service, so that the cycles use no real budget."""
    own = ("KTRDR_", "AGENT_", "OTEL_", "TRAINING_GATE_", "BACKTEST_GATE_", "PROMETHEUS_", "JAEGER_", "GRAFANA_")
    return {name: value for name, value in os.environ.items() if not name.startswith(own)}


def wait_for(what: str, check: Callable[[], Any], process: subprocess.Popen[bytes], log: Path) -> Any:
    """Poll ``check`` until it returns a true value; return that.

    Raises:
        JaegerError: the process ended first, or the wait timed out.
    """
    ends = time.monotonic() + READY_WITHIN_S
    while not (found := check()):
        if process.poll() is not None or time.monotonic() > ends:
            last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            raise JaegerError(f"{what} is not ready: {last}")
        time.sleep(0.1)
    return found


def answers(url: str) -> bool:
    """Whether a URL replies with success."""
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310 -- our own
            return True
    except OSError:
        return False


def logged(log: Path, pattern: str) -> Callable[[], str]:
    """Return a function that searches a process's log for a pattern."""

    def search() -> str:
        found = re.search(pattern, log.read_text(errors="replace"), re.MULTILINE)
        return found[1] if found else ""

    return search


def ask(url: str, method: str = "GET") -> Any:
    """Send a request; return the JSON of the reply."""
    request = urllib.request.Request(url, method=method)  # noqa: S310 -- our own
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return json.load(answer)


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def say(line: str) -> None:
    """Write a line to stdout without buffering."""
    print(line, flush=True)  # noqa: T201


# -- the check ---------------------------------------------------------------------------------------------------------


def ended(service: str, operation_id: str) -> str:
    """Wait until a cycle has ended; return its outcome.

    Raises:
        JaegerError: the wait timed out.
    """
    ends = time.monotonic() + ENDS_WITHIN_S
    while time.monotonic() < ends:
        for cycle in ask(f"{service}/api/v1/agent/cycles?limit=10")["cycles"]:
            if cycle["operation_id"] == operation_id and cycle["outcome"] is not None:
                return str(cycle["outcome"])
        time.sleep(0.2)
    raise JaegerError(f"cycle {operation_id} has not ended")


def run_cycles(stack: str, strict: str) -> None:
    """Run a cycle that is cancelled, and one that fails at a gate.

    Args:
        stack: the URL of the stack.
        strict: the URL of a replica whose training gate always fails.

    Raises:
        JaegerError: a cycle ended otherwise.
    """
    cancelled = ask(f"{stack}/api/v1/agent/trigger", "POST")["operation_id"]
    ask(f"{stack}/api/v1/agent/cancel/{cancelled}", "DELETE")
    outcomes = {cancelled: ended(stack, cancelled)}
    failed = ask(f"{strict}/api/v1/agent/trigger", "POST")["operation_id"]
    outcomes[failed] = ended(stack, failed)
    if list(outcomes.values()) != ["cancelled", "failed"]:
        raise JaegerError(f"unexpected outcomes of the cycles: {outcomes}")


def check(binary: Path, directory: Path, ports: argparse.Namespace) -> int:
    """Start all parts, run cycles, and check their traces with verify.sh; return its exit code."""
    query_port, otlp_port = ports.query_port or free_port(), ports.otlp_port or free_port()
    query, otlp, health = f"{HOST}:{query_port}", f"{HOST}:{otlp_port}", f"{HOST}:{free_port()}"
    file = directory / "jaeger.json"
    file.write_text(json.dumps(config(otlp, query, f"{HOST}:{free_port()}", health)))
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{otlp}",
        "AGENT_BUDGET_DIR": str(directory / "budget"),
        "AGENT_PHASE_SECONDS": "1",
        "KTRDR_TIMEOUT": "10",
    }
    python, serve = sys.executable, ("-m", "ktrdr_budget.cli", "serve", "--port", "0")
    with contextlib.ExitStack() as parts:
        log = directory / "jaeger.log"
        process = parts.enter_context(running(log, binary, "--config", file))
        wait_for("Jaeger", lambda: answers(f"http://{health}/status"), process, log)
        log = directory / "stack.log"
        options = ("--port", "0", "--replica-port", "0", "--no-prometheus")
        process = parts.enter_context(running(log, python, ROOT / "scripts" / "stack.py", *options, **variables))
        wait_for("the stack", logged(log, r"^stack: (ready)"), process, log)
        stack = logged(log, r"^stack: service +(\S+)")()
        replicas = " ".join(logged(log, rf"^stack: replica-{number} +(\S+)")() for number in (1, 2))
        log = directory / "strict.log"
        process = parts.enter_context(running(log, python, *serve, TRAINING_GATE_MIN_ACCURACY="0.99", **variables))
        strict = wait_for("a replica", logged(log, r"^listening on (\S+)"), process, log)
        wait_for("a replica", lambda: answers(f"{strict}/readyz"), process, log)
        say(f"jaeger: query API http://{query}, OTLP http://{otlp}; stack {stack}")
        run_cycles(stack, strict)
        verify = {
            "KTRDR_API_URL": stack,
            "KTRDR_REPLICAS": replicas,
            "JAEGER_URL": f"http://{query}",
            "TRACE_OUTCOMES": " ".join(OUTCOMES),
            "PYTHON": python,
        }
        words = ["bash", str(ROOT / "scripts" / "verify.sh"), "cycle", "traces"]
        verified = subprocess.run(words, env={**clean_environment(), **verify}, check=False)  # noqa: S603 -- our own
        return verified.returncode


def main() -> int:
    """Run the check; return the exit code."""
    parser = argparse.ArgumentParser(
        description="Check the traces of cycles on a real Jaeger.", epilog="0: a free port."
    )
    parser.add_argument("--query-port", type=int, default=16686, help="(default: %(default)s)")
    parser.add_argument("--otlp-port", type=int, default=4318, help="(default: %(default)s)")
    ports = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    binary = cached_binary()
    try:
        if not binary.exists():
            if missing := go_is_missing():
                say(f"jaeger: skipped: {missing}")
                return 0
            build(binary)
        with tempfile.TemporaryDirectory(prefix="ktrdr-jaeger-") as directory:
            return check(binary, Path(directory), ports)
    except (JaegerError, urllib.error.URLError) as error:
        say(f"jaeger: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
