"""No failure shows a secret in an error, log, repr, response, span, metric or output."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetError, BudgetLimiter
from ktrdr_budget.audit import Auditor
from ktrdr_budget.engine.transport.urls import mask_url, parse_url

from ..api.processes import serving
from ..conftest import Server, free_port
from ..helpers.otlp_receiver import OtlpReceiver
from ..helpers.waiting import wait_until

BUDGETS = [Budget("agent", "5.00")]
# Each secret contains this word, which must not appear anywhere.
WORD = "geheim"
PASSWORD = "pw%2Fgeheim%40%3Azz"
KEYS = {
    "KTRDR_API_KEY": "use-geheim-1",
    "KTRDR_ADMIN_KEY": "admin-geheim-2",
    "OPENAI_API_KEY": "sk-proj-geheim-3",
    "ANTHROPIC_API_KEY": "sk-ant-geheim-4",
    "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20geheim-5",
}
SECRET = "ktrdr_" + "geheim-6".ljust(43, "x")
"""A text of the form of an access key's secret."""


def clean(*texts: object) -> None:
    found = [line for text in texts for line in str(text).splitlines() if WORD in line.lower()]
    assert not found, found


# -- the library -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(start_server) -> Server:
    """A server on a TCP port; the password of its user is none of those that the tests try."""
    port = free_port()
    server = start_server(None, "--port", str(port))
    server.port = port
    with server.client() as client:
        client.acl_setuser("agent", enabled=True, passwords=["+right"], keys=["*"], categories=["+@all"])
    return server


def urls(guarded: Server) -> Iterator[str]:
    unused = f"127.0.0.1:{free_port()}"
    for place in (f"127.0.0.1:{guarded.port}", unused):
        yield f"redis://agent:{PASSWORD}@{place}/0"
        yield f"redis://:{PASSWORD}@{place}/0"
        yield f"redis://{place}/0?username=agent&password={PASSWORD}"
        yield f"rediss://agent:{PASSWORD}@{place}/0?ssl_password={PASSWORD}"
        yield f"redis+cluster://agent:{PASSWORD}@{place}"
        yield f"redis+sentinel://agent:{PASSWORD}@{place}/master?sentinel_password={PASSWORD}"
    yield f"unix://agent:{PASSWORD}@{guarded.socket_path}"
    yield f"unix://agent:{PASSWORD}@/nowhere/s"


UNUSABLE = [
    "redis://agent:geheim@host:port/0",
    "redis://agent:geheim/x@host/0",
    "redis://agent:geheim?x@host/0",
    "redis://agent:ge heim-geheim@host",
    "redis://agent:geheim#x@host",
    "http://agent:geheim@host",
    "geheim",
    "redis://agent:1?geheim=1@host",
    "redis://h/geheim",
    "redis://[geheim",
    "rediss://h/0?ssl_cert_reqs=geheim",
    "redis+sentinel://:geheim@h",
    "redis://agent:geheim@a,b",
]


@pytest.mark.parametrize("url", UNUSABLE)
def test_the_error_for_an_unusable_url_contains_no_secret(url, caplog):
    for refuse in (parse_url, lambda url: BudgetLimiter(url, BUDGETS), lambda url: Auditor(url)):
        with pytest.raises(BudgetError) as refused:
            refuse(url)
        clean("".join(traceback.format_exception(refused.value)))
    clean(mask_url(url), caplog.text)


async def test_errors_and_logs_of_the_library_contain_no_secret(guarded, caplog):
    shown: list[Any] = []
    with caplog.at_level(logging.DEBUG):
        await asyncio.gather(*[fail(url, shown) for url in urls(guarded)])
    assert len(shown) > 100
    clean(*shown, caplog.text)
    assert any("invalid username-password pair" in str(text) for text in shown), "a login failed"


async def fail(url: str, shown: list[Any]) -> None:
    limiter = AsyncBudgetLimiter(url, BUDGETS, timeout=0.2)
    shown += [repr(limiter), limiter.store_url, repr(limiter.engine.store), repr(parse_url(url)), mask_url(url)]

    async def tried(call) -> None:
        try:
            shown.append(await call)
        except BudgetError as error:
            shown.extend([repr(error), "".join(traceback.format_exception(error))])

    for call in (limiter.start, limiter.statuses, limiter.check):
        await tried(call())
    await tried(limiter.reserve("agent", "0.01"))
    await tried(limiter.record("agent", "0.01"))
    with Auditor(url, timeout=0.2) as auditor:
        shown.append(repr(auditor))
        await tried(asyncio.to_thread(auditor.check))
        await tried(asyncio.to_thread(auditor.repair))
    await limiter.close()


def test_errors_and_logs_of_the_sync_limiter_contain_no_secret(guarded, caplog):
    shown = []
    with caplog.at_level(logging.DEBUG):
        for url in list(urls(guarded))[:2]:
            limiter = BudgetLimiter(url, BUDGETS, timeout=0.2)
            shown.append(repr(limiter))
            with contextlib.suppress(BudgetError):  # after a timeout it starts without the store
                limiter.start()
            for call in (limiter.statuses, lambda limiter=limiter: limiter.reserve("agent", "0.01")):
                with pytest.raises(BudgetError) as refused:
                    call()
                shown.append("".join(traceback.format_exception(refused.value)))
            limiter.close()
    clean(*shown, caplog.text)


# -- the service, its traces and its log -------------------------------------------------------------------------------


@pytest.mark.slow
def test_responses_and_logs_of_the_service_contain_no_secret(guarded):
    with OtlpReceiver() as receiver:
        environment = {**KEYS, **receiver.environment, "AGENT_PHASE_SECONDS": 0, "KTRDR_TIMEOUT": "0.3"}
        environment["KTRDR_REDIS_URL"] = f"redis://agent:{PASSWORD}@127.0.0.1:{guarded.port}/0"
        responses = []
        with serving(**environment) as service:
            logins = [{"Authorization": f"Bearer {KEYS[name]}"} for name in ("KTRDR_API_KEY", "KTRDR_ADMIN_KEY")]
            logins += [{"Authorization": "Bearer wrong-geheim-key"}, {"Authorization": "Basic geheim=="}, {}]
            logins.append({"Authorization": f"Bearer {SECRET}"})  # read from the store, which refuses the login
            for headers in logins:
                for path in (
                    "/livez",
                    "/readyz",
                    "/metrics",
                    "/api/v1/budgets",
                    "/api/v1/agent/status",
                    "/openapi.json",
                ):
                    responses.append(service.get(path, headers=headers))
                responses.append(service.post("/api/v1/reservations", {"amounts": {"agent": "0.01"}}, headers=headers))
                responses.append(service.post("/api/v1/agent/trigger", {}, headers=headers))
                responses.append(service.request("POST", "/api/v1/reservations", content=b"{", headers=headers))
                responses.append(
                    service.request("PUT", "/api/v1/budgets/agent/limit", json={"limit": 1}, headers=headers)
                )
            wait_until(lambda: receiver.named("POST /api/v1/reservations"))
            assert service.stop() == 0
        assert {401, 503} <= {response.status_code for response in responses}
        clean(*(f"{response.headers} {response.text}" for response in responses))
        clean(*service.output)
        assert any("invalid username-password pair" in line for line in service.output)
        clean(*(f"{span} {span.attributes} {span.events} {span.resource}" for span in receiver.spans))
        assert not receiver.errors


class _Refusing(BaseHTTPRequestHandler):
    """An LLM provider that quotes the received API key in its error."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        key = self.headers["authorization"]
        message = f"Incorrect API key provided: {key}"
        body = json.dumps({"type": "error", "error": {"type": "authentication_error", "message": message}}).encode()
        self.send_response(401)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Log nothing."""


@pytest.fixture
def provider() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.slow
def test_if_a_provider_quotes_an_api_key_in_an_error_the_key_is_hidden(server, provider):
    with OtlpReceiver() as receiver:
        environment = {**KEYS, **receiver.environment, "KTRDR_REDIS_URL": server.url, "AGENT_PHASE_SECONDS": 0}
        environment |= {"AGENT_LLM": "openai", "AGENT_MODEL": "gpt-4o-mini"}
        environment |= {"OPENAI_BASE_URL": f"{provider}/v1"}
        with serving(**environment) as service:
            headers = {"Authorization": f"Bearer {KEYS['KTRDR_ADMIN_KEY']}"}
            triggered = service.post("/api/v1/agent/trigger", {}, headers=headers)
            assert triggered.status_code == 202, triggered.text

            def ended() -> Any:
                response = service.get("/api/v1/agent/cycles", headers=headers)
                return response if response.json()["cycles"][0]["outcome"] else None

            response = wait_until(ended)
            assert "ncorrect API key provided" in response.text
            clean(response.text)
            receiver.wait_named("agent.research_cycle")
            clean(service.get("/metrics", headers=headers).text)
        clean(*service.output)
        clean(*(f"{span} {span.attributes} {span.events} {span.resource}" for span in receiver.spans))


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_output_of_the_command_line_contains_no_secret(guarded, tmp_path):
    clean_environment = {name: value for name, value in os.environ.items() if not re.match("KTRDR_|AGENT_|OTEL_", name)}
    store = {"KTRDR_REDIS_URL": f"redis://agent:{PASSWORD}@127.0.0.1:{guarded.port}/0"}
    unusable = {"KTRDR_REDIS_URL": "redis://agent:geheim/x@host/0"}
    unused = f"http://user:{PASSWORD}@127.0.0.1:{free_port()}"
    for words, more in (
        (("budget", "verify"), store),
        (("budget", "verify"), unusable),
        (("serve", "--port", "0"), unusable),
        (("--api-url", unused, "budget", "list"), {}),
        (("agent", "budget"), {"KTRDR_API_KEY": "two words geheim"}),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ktrdr_budget.cli", *words],
            env={**clean_environment, **KEYS, **more},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode not in (0, -1), words
        clean(done.stdout, done.stderr)
        assert done.stderr
