"""An emulated service with its replies, and the command on a real terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STATUS: dict[str, Any] = {
    "date": "2026-11-23",
    "daily_limit": 5.0,
    "today_spend": 0.15,
    "remaining": 4.85,
    "cycles_affordable": 32,
    "spend_events": 1,
    "held": 0.0,
    "unconfirmed": 0.0,
    "resets_at": "2026-11-24T00:00:00Z",
}
BUDGET: dict[str, Any] = {
    "name": "agent",
    "unit": "usd",
    "kind": "spend",
    "period": "day",
    "timezone": "UTC",
    "window": "2026-11-23",
    "starts_at": "2026-11-23T00:00:00Z",
    "resets_at": "2026-11-24T00:00:00Z",
    "limit": "5.00",
    "spent": "0.15",
    "held": "0.30",
    "unconfirmed": "0.00",
    "remaining": "4.55",
    "spend_events": 1,
    "overruns": 0,
    "limit_source": "configured",
    "limit_until": None,
    "configured_limit": "5.00",
    "as_of": "2026-11-23T12:00:00Z",
}
HOLD: dict[str, Any] = {
    "id": "op_1",
    "state": "open",
    "amounts": {"agent": "0.15"},
    "accrued": {"agent": "0.00"},
    "charged": {},
    "windows": {"agent": "2026-11-23"},
    "on_expiry": "charge",
    "created_at": "2026-11-23T12:00:00Z",
    "expires_at": "2026-11-23T12:15:00Z",
    "operation": "research",
    "scope": {},
    "replayed": False,
}
SETTLED: dict[str, Any] = {
    "id": "op_1",
    "state": "committed",
    "amounts": {"agent": "0.07"},
    "replayed": False,
    "overrun": False,
    "late": False,
}
DENIAL: dict[str, Any] = {
    "type": "about:blank",
    "title": "Budget exceeded",
    "status": 429,
    "detail": "agent: budget_exhausted ($0.10 remaining, need $0.15)",
    "code": "budget_exceeded",
    "budget": "agent",
    "reason": "budget_exhausted",
    "limit": "5.00",
    "spent": "4.90",
    "held": "0.00",
    "unconfirmed": "0.00",
    "remaining": "0.10",
    "requested": "0.15",
    "fits": "0.10",
    "retry_after": 3600,
}

STARTED: dict[str, Any] = {"triggered": True, "operation_id": "op_1", "message": "Research cycle op_1 started"}
NOT_STARTED: dict[str, Any] = {
    "type": "urn:ktrdr-budget:problem:budget-exceeded",
    "title": "A budget has no room",
    "status": 429,
    "detail": "agent: budget_exhausted ($0.01 remaining, need $0.15)",
    "code": "budget-exceeded",
    "triggered": False,
    "reason": "budget_exhausted",
    "denial_reason": "budget_exhausted",
    "message": "Daily budget exhausted: budget_exhausted ($0.01 remaining, need $0.15)",
    "budget": "agent",
    "remaining": "0.01",
    "requested": "0.15",
    "retry_after": 3600,
}
CYCLE: dict[str, Any] = {
    "operation_id": "op_1",
    "operation_type": "agent_research",
    "status": "running",
    "phase": "designing",
    "started_at": "2026-11-23T12:00:00Z",
    "ended_at": None,
    "elapsed_seconds": 0.25,
    "spend": "0.00",
    "estimate": "0.15",
    "tokens": {"design": 0, "assessment": 0},
    "strategy_name": None,
    "gates": [],
    "outcome": None,
    "reason": None,
    "error": None,
    "results": {},
    "replica": "r1",
    "trace_id": "0af7651916cd43dd8448eb211c80319c",
}
DESIGNED: dict[str, Any] = {
    "phase": "training",
    "elapsed_seconds": 1.5,
    "spend": "0.0312",
    "tokens": {"design": 1234, "assessment": 0},
    "strategy_name": "momentum_12_26",
}
PASSED = {"gate": "training", "passed": True, "reason": "accuracy 0.531 >= 0.1"}
REFUSED = {"gate": "training", "passed": False, "reason": "accuracy 0.05 < 0.1"}
TRAINED = {**DESIGNED, "phase": "backtesting", "gates": [PASSED], "results": {"accuracy": 0.531, "final_loss": 0.69}}
COMPLETED: dict[str, Any] = {
    **TRAINED,
    "phase": "assessing",
    "status": "completed",
    "outcome": "completed",
    "ended_at": "2026-11-23T12:00:05Z",
    "elapsed_seconds": 5.0421,
    "spend": "0.0715",
    "tokens": {"design": 1234, "assessment": 766},
    "gates": [PASSED, {"gate": "backtest", "passed": True, "reason": ""}],
    "results": {
        "accuracy": 0.531,
        "final_loss": 0.69,
        "win_rate": 0.55,
        "max_drawdown": 0.12,
        "sharpe_ratio": 1.25,
        "trades": 34,
        "verdict": "promising",
        "summary": "It works.",
    },
}
GATED: dict[str, Any] = {
    **DESIGNED,
    "status": "failed",
    "outcome": "failed",
    "reason": "gate_failed",
    "ended_at": "2026-11-23T12:00:02Z",
    "elapsed_seconds": 2.0,
    "gates": [REFUSED],
    "results": {"accuracy": 0.05, "final_loss": 0.69},
}


def cycle(**changes: Any) -> dict[str, Any]:
    """A cycle's document."""
    return {**CYCLE, **changes}


def agent_status(*active: dict[str, Any], last: dict[str, Any] | None = None) -> dict[str, Any]:
    """The document of /agent/status for these cycles."""
    now = active[0]["phase"] if active else "idle"
    return {
        "status": now,
        "active_cycles": list(active),
        "last_cycle": last,
        "budget": {"remaining": "4.8501", "daily_limit": "5.00"},
        "capacity": {"active": len(active), "free": 3 - len(active), "limit": 3},
        "as_of": "2026-11-23T12:00:06Z",
    }


def problem(status: int, title: str, detail: str) -> tuple[int, dict[str, Any]]:
    """A reply of ``application/problem+json``."""
    return status, {"type": "about:blank", "title": title, "status": status, "detail": detail, "code": "x"}


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class FakeService:
    """Maps each ``METHOD path`` to a status and a document, or to raw bytes that replace the HTTP reply."""

    port: int = 0
    answers: dict[str, Any] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, call: str, document: Any = None, status: int = 200) -> None:
        """Set the reply to a call: a document, raw bytes, or a function from the request to a status and a document."""
        self.answers[call] = document if callable(document) or isinstance(document, bytes) else (status, document)


def handler(service: FakeService) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(size)) if size else None
            request = Request(self.command, self.path, dict(self.headers.items()), body)
            service.requests.append(request)
            answer = service.answers.get(
                f"{self.command} {self.path}", problem(404, "Not Found", "there is no such path")
            )
            if callable(answer):
                answer = answer(request)
            if isinstance(answer, bytes):
                self.wfile.write(answer)
                self.close_connection = True
                return
            status, document = answer
            content = document.encode() if isinstance(document, str) else json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = handle_one  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    return Handler


class QuietServer(ThreadingHTTPServer):
    daemon_threads = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect, as tests do on purpose."""


def command(*words: str) -> list[str]:
    """The command line of a real process."""
    return [sys.executable, "-m", "ktrdr_budget.cli", *words]


_ON_TERMINAL = (
    "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    " os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class Terminal:
    """The command on its own pseudo-terminal."""

    def __init__(self, *words: str, columns: int = 80, rows: int = 24) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        arguments = [sys.executable, "-c", _ON_TERMINAL, "-m", "ktrdr_budget.cli", *words]
        self._process = subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.text = ""

    def read_until(self, condition: Callable[[str], bool], timeout_s: float = 60.0) -> str:
        """Read until the condition holds for all output so far; return that output."""
        ends = time.monotonic() + timeout_s
        while not condition(self.text):
            assert time.monotonic() < ends, f"not shown in time: {self.text[-500:]!r}"
            if not self._read(0.1) and self._process.poll() is not None:
                break
        assert condition(self.text), self.text[-500:]
        return self.text

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self._ours], [], [], timeout_s)[0]:
            return False
        try:
            data = os.read(self._ours, 65_536)
        except OSError:  # Linux raises EIO when the other side is closed
            return False
        self.text += data.decode().replace("\r\n", "\n")
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait(self) -> int:
        """Read the remaining output; return the exit code."""
        ends = time.monotonic() + 60
        while self._process.poll() is None:
            assert time.monotonic() < ends, self.text[-500:]
            self._read(0.05)
        while self._read(0.05):
            pass
        return self._process.returncode

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        os.close(self._ours)
