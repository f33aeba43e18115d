"""The service in its own processes: start, workers and end."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from ktrdr_budget.api import Settings
from ktrdr_budget.api import serving as module
from ktrdr_budget.api.serving import ServeError, serve
from ktrdr_budget.engine import embedded
from ktrdr_budget.environment import ZERO_BUDGET

from ..conftest import free_port
from ..helpers.waiting import wait_until
from .processes import ServiceProcess, serving
from .support import V1

RESERVATION = {"amounts": {"agent": "0.15"}}


def figures(service: ServiceProcess) -> dict:
    return service.get(f"{V1}/agent/budget").json()


# -- its start ---------------------------------------------------------------------------------------------------------


def test_without_configuration_the_service_uses_an_embedded_server(tmp_path):
    with serving(cwd=tmp_path) as service:
        assert service.post(f"{V1}/reservations", RESERVATION).status_code == 201
        assert figures(service)["held"] == 0.15
        assert service.stop() == 0
        assert service.output == [
            "store: embedded, data/budget",
            "budget agent: $5.00 a day (UTC)",
            "budget agent:cycles: 1 at a time",
            f"listening on {service.url}",
        ]
    with serving(cwd=tmp_path) as again:  # spend survives a restart
        assert figures(again)["held"] == 0.15


def test_the_startup_report_lists_the_store_and_the_budgets(server, budgets_file):
    with serving(
        KTRDR_REDIS_URL=f"{server.url}?password=",
        KTRDR_BUDGETS_FILE=budgets_file,
        AGENT_DAILY_BUDGET="0",
        KTRDR_ADMIN_KEY="secret-key",
    ) as service:
        service.stop()
    assert service.output == [
        f"store: {server.url}",
        "budget agent: $0.00 a day (UTC): denies all",
        "budget team/a:b@c: $1.00 a month (Europe/Rome)",
        "budget team/holds: $2.50 a day (UTC)",
        "budget cycles: 3 cycles a day (UTC)",
        "budget calls: 2 requests an hour",
        "budget jobs: 1 at a time",
        "budget free: unlimited in all",
        "budget agent:cycles: 1 at a time",
        f"warning: {ZERO_BUDGET}",
        f"listening on {service.url}",
    ]


def test_the_startup_report_has_one_warning_line_if_the_store_is_unreachable():
    url = f"redis://127.0.0.1:{free_port()}"
    with serving(KTRDR_REDIS_URL=url, KTRDR_TIMEOUT="0.5") as service:
        service.wait_for_line("WARNING: ktrdr_budget: starting without the store: ")
        service.stop()
    assert [line for line in service.output if not line.startswith(("ERROR: ", "WARNING: "))] == [
        f"store: {url}",
        "budget agent: $5.00 a day (UTC)",
        "budget agent:cycles: 1 at a time",
        f"warning: cannot connect to {url} (connection refused); gave up after 0.5 s",
        f"listening on {service.url}",
    ]


def test_the_startup_report_has_no_warning_if_the_daily_budget_is_unlimited(server):
    with serving(KTRDR_REDIS_URL=server.url, AGENT_DAILY_BUDGET="unlimited", AGENT_PHASE_SECONDS=0) as service:
        assert service.post(f"{V1}/agent/trigger").status_code == 202
        assert service.get(f"{V1}/agent/budget").json()["remaining"] is None
        service.stop()
    assert service.output[1] == "budget agent: unlimited a day (UTC)"
    assert not [line for line in service.output if line.startswith("warning")]


def test_recorded_spend_and_budget_denials_are_logged_without_secrets(server):
    keys = {"KTRDR_API_KEY": "secret-use-key", "KTRDR_ADMIN_KEY": "secret-admin-key"}
    use, admin = ({"Authorization": f"Bearer {key}"} for key in keys.values())
    with serving(KTRDR_REDIS_URL=server.url, AGENT_PHASE_SECONDS=0, **keys) as service:
        spend = {"amounts": {"agent": "0.07"}, "id": "op_1"}
        assert service.post(f"{V1}/spend", spend, headers=use).status_code == 201
        wait_until(lambda: logged(service, "Budget spend recorded"))
        limit = service.request("PUT", f"{V1}/budgets/agent/limit", json={"limit": "0.08"}, headers=admin)
        assert limit.status_code == 200
        for _ in range(2):
            assert service.post(f"{V1}/agent/trigger", headers=use).status_code == 429
            assert service.post(f"{V1}/reservations", RESERVATION, headers=use).status_code == 429
        service.stop()
    assert logged(service, "Budget spend recorded") == [
        "INFO: ktrdr_budget: Budget spend recorded: $0.07 for op_1 (total: $0.07, remaining: $4.93)"
    ]
    exhausted = "WARNING: ktrdr_budget: Budget exhausted: budget_exhausted ($0.01 remaining, need $0.15)"
    assert logged(service, "Budget exhausted") == [exhausted] * 2
    [denied] = logged(service, "Reservation denied")
    assert denied.startswith("WARNING: ktrdr_budget: Reservation denied: agent: exceeds_limit ($0.01 remaining, need")
    assert "secret" not in "\n".join(service.output)


def logged(service: ServiceProcess, event: str) -> list[str]:
    return [line for line in service.output if f": {event}: " in line]


def test_the_startup_report_has_no_secrets(server):
    with server.client() as redis:
        redis.execute_command("ACL", "SETUSER", "service", "on", ">secret-word", "~*", "+@all")
    url = f"unix://service:secret-word@{server.socket_path}"
    with serving(KTRDR_REDIS_URL=url, KTRDR_API_KEY="secret-key") as service:
        headers = {"Authorization": "Bearer secret-key"}
        assert service.post(f"{V1}/reservations", RESERVATION, headers=headers).status_code == 201
        service.stop()
    assert service.output[0] == f"store: unix://service:***@{server.socket_path}"
    assert "secret" not in "\n".join(service.output)


def test_a_limit_set_over_http_causes_a_warning_at_the_next_start_if_the_configured_limit_differs(server):
    with serving(KTRDR_REDIS_URL=server.url) as service:
        changed = service.request("PUT", f"{V1}/budgets/agent/limit", json={"limit": "10.00", "until": "window"})
        assert changed.status_code == 200
    with serving(KTRDR_REDIS_URL=server.url, AGENT_DAILY_BUDGET="7") as service:
        assert figures(service)["daily_limit"] == 10.0
        service.stop()
    [warning] = [line for line in service.output if line.startswith("warning")]
    assert warning.startswith("warning: budget agent: run-time limit $10.00 is in force until ")
    assert warning.endswith("; configured $7.00 is not (ktrdr budget clear-limit agent)")
    with serving(KTRDR_REDIS_URL=server.url, AGENT_DAILY_BUDGET="10") as service:  # equal to the run-time limit
        service.stop()
    assert not [line for line in service.output if line.startswith("warning")]


def test_a_store_that_evicts_keys_causes_a_warning(start_server):
    own = start_server(None, "--maxmemory-policy", "allkeys-lru")
    with serving(KTRDR_REDIS_URL=own.url) as service:
        service.stop()
    assert any(line.startswith("warning: the store is not ready: maxmemory-policy") for line in service.output)


def test_the_service_prints_a_warning_if_the_store_has_a_different_definition_of_a_budget(server, tmp_path):
    path = tmp_path / "budgets.toml"
    path.write_text('[[budgets]]\nname = "count"\nlimit = 5\nunit = "calls"\n')
    with serving(KTRDR_REDIS_URL=server.url, KTRDR_BUDGETS_FILE=path) as service:
        assert service.post(f"{V1}/reservations", {"amounts": {"count": 1}}).status_code == 201
    path.write_text('[[budgets]]\nname = "count"\nlimit = 5\nunit = "tokens"\n')
    with serving(KTRDR_REDIS_URL=server.url, KTRDR_BUDGETS_FILE=path) as service:
        service.stop()
    assert any(line.startswith("warning: budget count: ") for line in service.output)


def test_a_service_started_without_the_store_works_when_the_store_returns(start_server):
    own = start_server()
    own.kill()
    with serving(KTRDR_REDIS_URL=own.url, KTRDR_TIMEOUT="0.2") as service:
        assert service.get("/livez").status_code == 200
        assert service.get("/readyz").status_code == 503
        own.start()
        wait_until(lambda: service.get("/readyz").status_code == 200)
        wait_until(lambda: service.post(f"{V1}/reservations", RESERVATION).status_code == 201)
        service.stop()
    assert any(line.startswith("warning: cannot connect to") for line in service.output)


def refused(*, code: int = 2, host: str = "127.0.0.1", port: int = 0, **environment) -> str:
    """The output of a service that does not start: one line."""
    service = ServiceProcess(host, port, 1, environment, None)
    try:
        assert service.end() == code
    finally:
        service.stop()
    [line] = service.output
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AGENT_DAILY_BUDGET", "much"),
        ("KTRDR_REDIS_URL", "http://store"),
        ("KTRDR_REDIS_URL", "redis://store:port"),
        ("KTRDR_BUDGETS_FILE", "/nowhere.toml"),
        ("KTRDR_AUTH", "maybe"),
        ("KTRDR_TIMEOUT", "-1"),
    ],
)
def test_an_invalid_setting_is_reported_in_one_line(variable, value):
    assert variable in refused(**{variable: value})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_a_service_without_keys_refuses_to_bind_to_a_non_loopback_address(host):
    assert "KTRDR_AUTH=none" in refused(host=host)


@pytest.mark.parametrize("environment", [{"KTRDR_API_KEY": "k"}, {"KTRDR_ADMIN_KEY": "k"}, {"KTRDR_AUTH": "none"}])
def test_a_service_can_bind_to_any_address_if_keys_are_set_or_auth_is_none(server, environment):
    with serving(host="0.0.0.0", KTRDR_REDIS_URL=server.url, **environment) as service:
        assert service.get(f"{V1}/budgets").status_code == (200 if "KTRDR_AUTH" in environment else 401)
        service.stop()
    warned = any("KTRDR_AUTH=none" in line for line in service.output)
    assert warned is ("KTRDR_AUTH" in environment)


@pytest.mark.parametrize("host", ["localhost", "::1"])
def test_the_service_can_bind_to_localhost_and_to_the_ipv6_loopback_address(server, host):
    service = ServiceProcess(host, 0, 1, {"KTRDR_REDIS_URL": server.url}, None)
    try:
        service.wait_for_line()
        where = service.output[-1].removeprefix("listening on ")
        assert httpx.get(f"{where}/livez", timeout=60).status_code == 200
    finally:
        assert service.stop() == 0


def test_an_invalid_host_is_reported_in_one_line():
    assert "nowhere.invalid" in refused(host="nowhere.invalid")
    assert "''" in refused(host="")


def test_a_taken_port_is_reported_in_one_line(server):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(code=1, port=port, KTRDR_REDIS_URL=server.url)
    assert f"127.0.0.1 port {port}" in line
    assert "already in use" in line


def test_an_unusable_data_directory_is_reported_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused(code=1, AGENT_BUDGET_DIR=tmp_path / "file" / "budget")


def test_serve_can_be_called_with_settings_instead_of_the_environment(server, monkeypatch):
    with pytest.raises(ServeError) as caught:
        serve(host="0.0.0.0", settings=Settings(redis_url=server.url))
    assert caught.value.exit_code == 2


# -- its end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_stops_the_service_with_exit_code_0(server, number, workers):
    with serving(workers=workers, KTRDR_REDIS_URL=server.url) as service:
        with httpx.Client(base_url=service.url, timeout=60) as kept_alive:  # an idle connection must not delay the end
            assert kept_alive.get("/livez").status_code == 200
            service.signal(number)
            assert service.end() == 0
    assert service.output[-1] == f"listening on {service.url}", service.output


def test_a_signal_during_the_start_stops_the_service_with_exit_code_0(start_server):
    own = start_server()
    own.pause()  # the start takes as long as the deadline
    try:
        service = ServiceProcess("127.0.0.1", 0, 1, {"KTRDR_REDIS_URL": own.url, "KTRDR_TIMEOUT": "60"}, None)
        service.wait_for_line("budget agent")
        service.signal(signal.SIGTERM)
        assert service.end() == 0
        assert not any("Traceback" in line for line in service.output)
    finally:
        service.stop()
        own.resume()


def test_requests_in_flight_are_finished_before_the_service_stops(start_server):
    own = start_server()
    with serving(KTRDR_REDIS_URL=own.url, KTRDR_TIMEOUT="60") as service:
        assert service.post(f"{V1}/reservations", {**RESERVATION, "id": "op_1"}).status_code == 201
        own.pause()
        body = b'{"amounts": "0.07"}'
        head = f"POST {V1}/reservations/op_1/commit HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            service.get("/livez")  # the commit is in flight now: the process has one event loop
            service.signal(signal.SIGTERM)
            wait_until(lambda: not service.is_listening())
            own.resume()
            assert b'"state":"committed"' in client.makefile("rb").read()
        assert service.end() == 0


def test_a_hold_is_released_if_the_client_disconnects_before_receiving_the_id(start_server):
    own = start_server()
    with serving(KTRDR_REDIS_URL=own.url, KTRDR_TIMEOUT="60") as service:
        assert figures(service)["held"] == 0
        own.pause()
        body = b'{"amounts": {"agent": "0.15"}}'
        head = f"POST {V1}/reservations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            service.get("/livez")  # the reservation is in flight now: the process has one event loop
        service.get("/livez")  # the process has seen the disconnect now
        own.resume()

        def granted_and_released() -> bool:
            with own.client() as redis:
                return any(redis.get(key)[0] == "r" for key in redis.scan_iter("*:h:*"))

        wait_until(granted_and_released)
        assert figures(service)["held"] == 0


def test_the_embedded_server_stops_after_the_last_worker_has_stopped(tmp_path):
    with serving(workers=2, AGENT_BUDGET_DIR=tmp_path) as service:
        wait_until(lambda: service.get("/readyz").status_code == 200)
        assert embedded.find(tmp_path)
        assert service.stop() == 0
    wait_until(lambda: embedded.find(tmp_path) is None)


# -- its workers -------------------------------------------------------------------------------------------------------


def workers_of(service: ServiceProcess) -> set[int]:
    """The worker processes: children that multiprocessing has spawned."""
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
    return {int(child) for child in children if "spawn_main" in command_of(child)}


def command_of(process: str) -> str:
    """The command line of a process; empty if the process has ended meanwhile."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    return ""


def counted(service: ServiceProcess) -> float:
    text = service.get("/metrics").text
    [line] = [
        line for line in text.splitlines() if line.startswith('ktrdr_budget_reservations_total{outcome="granted"')
    ]
    return float(line.rpartition(" ")[2])


@pytest.mark.slow
def test_all_workers_share_one_port_and_the_same_budgets_and_counters(tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with serving(workers=3, AGENT_BUDGET_DIR=tmp_path / "budget", TMPDIR=temporary) as service:
        wait_until(lambda: len(workers_of(service)) == 3)
        with ThreadPoolExecutor(16) as threads:  # many connections, so that each worker gets some
            answers = list(
                threads.map(lambda _: service.post(f"{V1}/reservations", RESERVATION).status_code, range(60))
            )
        assert sorted(answers) == [201] * 33 + [429] * 27
        for _ in range(5):  # any worker may reply
            assert counted(service) == 33
            assert figures(service)["held"] == 4.95
        assert list(temporary.glob("ktrdr-metrics-*"))
        assert service.stop() == 0
    assert not list(temporary.iterdir())
    assert service.output.count("budget agent: $5.00 a day (UTC)") == 1


@pytest.mark.slow
def test_a_worker_that_hangs_for_some_seconds_is_not_replaced(server):
    """On a busy machine a worker needs some seconds to start; if it were replaced then, no worker would ever start."""
    with serving(workers=2, KTRDR_REDIS_URL=server.url) as service:
        wait_until(lambda: len(workers_of(service)) == 2)
        before = workers_of(service)
        stopped_at = time.monotonic()
        for worker in before:
            os.kill(worker, signal.SIGSTOP)
        wait_until(lambda: time.monotonic() > stopped_at + 7)
        for worker in before:
            os.kill(worker, signal.SIGCONT)
        assert service.get("/livez").status_code == 200
        assert workers_of(service) == before
        assert service.stop() == 0


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_no_recorded_spend_is_lost(tmp_path):
    with serving(workers=2, AGENT_BUDGET_DIR=tmp_path) as service:
        wait_until(lambda: len(workers_of(service)) == 2)
        for _ in range(10):
            assert service.post(f"{V1}/spend", {"amounts": {"agent": "0.10"}}).status_code == 201
        url = embedded.find(tmp_path)
        before = workers_of(service)
        for worker in before:
            os.kill(worker, signal.SIGKILL)
        wait_until(lambda: len(workers_of(service) - before) == 2)
        assert figures(service)["today_spend"] == 1.0
        assert embedded.find(tmp_path) == url
        text = service.get("/metrics").text
        assert 'ktrdr_budget_spend_total{budget="agent",unit="usd"} ' in text  # with the counters of the dead worker
        assert service.stop() == 0


@pytest.mark.slow
def test_the_service_exits_with_an_error_if_the_workers_cannot_start(server, monkeypatch):
    monkeypatch.setattr(module, "worker_app", _no_app)
    with pytest.raises(ServeError) as caught:
        serve(port=0, workers=2, settings=Settings(redis_url=server.url))
    assert caught.value.exit_code == 1


def _no_app(settings: Settings) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        raise RuntimeError("no app")
        yield

    return FastAPI(lifespan=lifespan)


def test_a_warning_is_printed_if_several_workers_use_the_outage_policy_allow(server):
    with serving(workers=2, KTRDR_REDIS_URL=server.url, KTRDR_ON_STORE_ERROR="allow") as service:
        service.stop()
    assert any("KTRDR_ON_STORE_ERROR=allow" in line for line in service.output)
