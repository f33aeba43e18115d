"""The service as processes of its own: its start, its workers and its end."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from ktrdr_budget import Budget
from ktrdr_budget.api import Settings
from ktrdr_budget.api import serving as module
from ktrdr_budget.api.serving import ServeError, serve
from ktrdr_budget.api.startup_report import budget_line
from ktrdr_budget.engine import embedded
from ktrdr_budget.environment import ZERO_BUDGET

from ..helpers.waiting import wait_until
from .processes import Service, serving
from .support import V1

RESERVATION = {"amounts": {"agent": "0.15"}}


def figures(service: Service) -> dict:
    return service.get(f"{V1}/agent/budget").json()


# -- its start ---------------------------------------------------------------------------------------------------------


def test_it_serves_with_an_embedded_server_and_no_configuration(tmp_path):
    with serving(cwd=tmp_path) as service:
        assert service.post(f"{V1}/reservations", RESERVATION).status_code == 201
        assert figures(service)["held"] == 0.15
        assert service.stop() == 0
        assert service.said == [
            "store: embedded, data/budget",
            "budget agent: $5.00 a day (UTC)",
            "budget agent:cycles: 1 slots at a time",
            f"listening on {service.url}",
        ]
    with serving(cwd=tmp_path) as again:  # spend survives a restart
        assert figures(again)["held"] == 0.15


def test_what_it_has_is_told_at_its_start(server, budgets_file):
    with serving(
        KTRDR_REDIS_URL=f"{server.url}?password=",
        KTRDR_BUDGETS_FILE=budgets_file,
        AGENT_DAILY_BUDGET="0",
        KTRDR_ADMIN_KEY="secret-key",
    ) as service:
        service.stop()
    assert service.said == [
        f"store: {server.url}",
        "budget agent: $0.00 a day (UTC): denies all",
        "budget team/a:b@c: $1.00 a month (Europe/Rome)",
        "budget team/holds: $2.50 a day (UTC)",
        "budget cycles: 3 cycles a day (UTC)",
        "budget calls: 2 requests an hour",
        "budget jobs: 1 slots at a time",
        "budget free: unlimited in all",
        "budget agent:cycles: 1 slots at a time",
        f"warning: {ZERO_BUDGET}",
        f"listening on {service.url}",
    ]


def test_a_daily_budget_of_unlimited_runs_without_a_limit_and_without_a_warning(server):
    with serving(KTRDR_REDIS_URL=server.url, AGENT_DAILY_BUDGET="unlimited", AGENT_PHASE_SECONDS=0) as service:
        assert service.post(f"{V1}/agent/trigger").status_code == 202
        assert service.get(f"{V1}/agent/budget").json()["remaining"] is None
        service.stop()
    assert service.said[1] == "budget agent: unlimited a day (UTC)"
    assert not [line for line in service.said if line.startswith("warning")]


def test_spend_and_exhaustion_are_logged_by_default_and_no_secret_is(server):
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
    assert "secret" not in "\n".join(service.said)


def logged(service: Service, event: str) -> list[str]:
    return [line for line in service.said if f": {event}: " in line]


def test_a_period_is_told_in_words():
    assert budget_line(Budget("b", "1", period="week")) == "budget b: $1.00 a week (UTC)"
    assert budget_line(Budget("b", 0, unit="calls", period="hour")) == "budget b: 0 calls an hour: denies all"


def test_secrets_are_not_told(server):
    with server.client() as redis:
        redis.execute_command("ACL", "SETUSER", "service", "on", ">secret-word", "~*", "+@all")
    url = f"unix://service:secret-word@{server.socket_path}"
    with serving(KTRDR_REDIS_URL=url, KTRDR_API_KEY="secret-key") as service:
        headers = {"Authorization": "Bearer secret-key"}
        assert service.post(f"{V1}/reservations", RESERVATION, headers=headers).status_code == 201
        service.stop()
    assert service.said[0] == f"store: unix://service:***@{server.socket_path}"
    assert "secret" not in "\n".join(service.said)


def test_a_limit_of_run_time_that_hides_the_configured_one_is_warned_about(server):
    with serving(KTRDR_REDIS_URL=server.url) as service:
        changed = service.request("PUT", f"{V1}/budgets/agent/limit", json={"limit": "10.00", "until": "window"})
        assert changed.status_code == 200
    with serving(KTRDR_REDIS_URL=server.url, AGENT_DAILY_BUDGET="7") as service:
        assert figures(service)["daily_limit"] == 10.0
        service.stop()
    [warning] = [line for line in service.said if line.startswith("warning")]
    assert warning.startswith("warning: budget agent: run-time limit $10.00 is in force until ")
    assert warning.endswith("; configured $7.00 is not (ktrdr budget clear-limit agent)")
    with serving(KTRDR_REDIS_URL=server.url, AGENT_DAILY_BUDGET="10") as service:  # nothing is hidden
        service.stop()
    assert not [line for line in service.said if line.startswith("warning")]


def test_a_store_that_evicts_is_warned_about(start_server):
    own = start_server(None, "--maxmemory-policy", "allkeys-lru")
    with serving(KTRDR_REDIS_URL=own.url) as service:
        service.stop()
    assert any(line.startswith("warning: the store is not ready: maxmemory-policy") for line in service.said)


def test_a_budget_that_is_defined_otherwise_elsewhere_is_warned_about(server, tmp_path):
    path = tmp_path / "budgets.toml"
    path.write_text('[[budgets]]\nname = "count"\nlimit = 5\nunit = "calls"\n')
    with serving(KTRDR_REDIS_URL=server.url, KTRDR_BUDGETS_FILE=path) as service:
        assert service.post(f"{V1}/reservations", {"amounts": {"count": 1}}).status_code == 201
    path.write_text('[[budgets]]\nname = "count"\nlimit = 5\nunit = "tokens"\n')
    with serving(KTRDR_REDIS_URL=server.url, KTRDR_BUDGETS_FILE=path) as service:
        service.stop()
    assert any(line.startswith("warning: budget count: ") for line in service.said)


def test_it_starts_without_its_store_and_recovers_by_itself(start_server):
    own = start_server()
    own.kill()
    with serving(KTRDR_REDIS_URL=own.url, KTRDR_TIMEOUT="0.2") as service:
        assert service.get("/livez").status_code == 200
        assert service.get("/readyz").status_code == 503
        own.start()
        wait_until(lambda: service.get("/readyz").status_code == 200)
        wait_until(lambda: service.post(f"{V1}/reservations", RESERVATION).status_code == 201)
        service.stop()
    assert any(line.startswith("warning: cannot connect to") for line in service.said)


def refused(*, code: int = 2, host: str = "127.0.0.1", port: int = 0, **environment) -> str:
    """What a service says that does not start: one line."""
    service = Service(host, port, 1, environment, None)
    try:
        assert service.end() == code
    finally:
        service.stop()
    [line] = service.said
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
def test_a_setting_that_is_not_usable_is_one_line(variable, value):
    assert variable in refused(**{variable: value})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_without_keys_it_binds_to_this_machine_only(host):
    assert "KTRDR_AUTH=none" in refused(host=host)


@pytest.mark.parametrize("environment", [{"KTRDR_API_KEY": "k"}, {"KTRDR_ADMIN_KEY": "k"}, {"KTRDR_AUTH": "none"}])
def test_with_keys_or_if_it_is_said_it_binds_elsewhere(server, environment):
    with serving(host="0.0.0.0", KTRDR_REDIS_URL=server.url, **environment) as service:
        assert service.get(f"{V1}/budgets").status_code == (200 if "KTRDR_AUTH" in environment else 401)
        service.stop()
    warned = any("KTRDR_AUTH=none" in line for line in service.said)
    assert warned is ("KTRDR_AUTH" in environment)


@pytest.mark.parametrize("host", ["localhost", "::1"])
def test_this_machine_has_several_names(server, host):
    service = Service(host, 0, 1, {"KTRDR_REDIS_URL": server.url}, None)
    try:
        service.wait_told()
        where = service.said[-1].removeprefix("listening on ")
        assert httpx.get(f"{where}/livez", timeout=60).status_code == 200
    finally:
        assert service.stop() == 0


def test_a_host_that_is_none_is_one_line():
    assert "nowhere.invalid" in refused(host="nowhere.invalid")
    assert "''" in refused(host="")


def test_a_port_that_is_taken_is_one_line(server):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(code=1, port=port, KTRDR_REDIS_URL=server.url)
    assert f"127.0.0.1 port {port}" in line
    assert "already in use" in line


def test_a_data_directory_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused(code=1, AGENT_BUDGET_DIR=tmp_path / "file" / "budget")


def test_settings_can_be_given(server, monkeypatch):
    with pytest.raises(ServeError) as caught:
        serve(host="0.0.0.0", settings=Settings(redis_url=server.url))
    assert caught.value.exit_code == 2


# -- its end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_ends_it_well(server, number, workers):
    with serving(workers=workers, KTRDR_REDIS_URL=server.url) as service:
        with httpx.Client(base_url=service.url, timeout=60) as kept_alive:  # an idle connection holds nothing up
            assert kept_alive.get("/livez").status_code == 200
            service.signal(number)
            assert service.end() == 0
    assert service.said[-1] == f"listening on {service.url}", service.said


def test_a_signal_before_it_serves_ends_it_well(start_server):
    own = start_server()
    own.pause()  # so that its start takes as long as its deadline
    try:
        service = Service("127.0.0.1", 0, 1, {"KTRDR_REDIS_URL": own.url, "KTRDR_TIMEOUT": "60"}, None)
        service.wait_told("budget agent")
        service.signal(signal.SIGTERM)
        assert service.end() == 0
        assert not any("Traceback" in line for line in service.said)
    finally:
        service.stop()
        own.resume()


def test_what_is_under_way_is_finished(start_server):
    own = start_server()
    with serving(KTRDR_REDIS_URL=own.url, KTRDR_TIMEOUT="60") as service:
        assert service.post(f"{V1}/reservations", {**RESERVATION, "id": "op_1"}).status_code == 201
        own.pause()
        body = b'{"amounts": "0.07"}'
        head = f"POST {V1}/reservations/op_1/commit HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            service.get("/livez")  # by now the commit is under way, for the process has one event loop
            service.signal(signal.SIGTERM)
            wait_until(lambda: not service.is_listening())
            own.resume()
            assert b'"state":"committed"' in client.makefile("rb").read()
        assert service.end() == 0


def test_a_client_that_hung_up_before_it_was_told_an_id_holds_nothing(start_server):
    own = start_server()
    with serving(KTRDR_REDIS_URL=own.url, KTRDR_TIMEOUT="60") as service:
        assert figures(service)["held"] == 0
        own.pause()
        body = b'{"amounts": {"agent": "0.15"}}'
        head = f"POST {V1}/reservations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            service.get("/livez")  # by now the reservation is under way, for the process has one event loop
        service.get("/livez")  # and by now the process knows that nobody awaits it
        own.resume()

        def granted_and_released() -> bool:
            with own.client() as redis:
                return any(redis.get(key)[0] == "r" for key in redis.scan_iter("*:h:*"))

        wait_until(granted_and_released)
        assert figures(service)["held"] == 0


def test_the_embedded_server_ends_with_its_last_user(tmp_path):
    with serving(workers=2, AGENT_BUDGET_DIR=tmp_path) as service:
        wait_until(lambda: service.get("/readyz").status_code == 200)
        assert embedded.find(tmp_path)
        assert service.stop() == 0
    wait_until(lambda: embedded.find(tmp_path) is None)


# -- its workers -------------------------------------------------------------------------------------------------------


def workers_of(service: Service) -> set[int]:
    """The processes that serve: children that took the metrics directory along."""
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
    return {
        int(child)
        for child in children
        if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
    }


def counted(service: Service) -> float:
    text = service.get("/metrics").text
    [line] = [
        line for line in text.splitlines() if line.startswith('ktrdr_budget_reservations_total{outcome="granted"')
    ]
    return float(line.rpartition(" ")[2])


@pytest.mark.slow
def test_workers_share_a_port_a_budget_and_their_counts(tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with serving(workers=3, AGENT_BUDGET_DIR=tmp_path / "budget", TMPDIR=temporary) as service:
        wait_until(lambda: len(workers_of(service)) == 3)
        with ThreadPoolExecutor(16) as threads:  # a connection each, so that all workers get some
            answers = list(
                threads.map(lambda _: service.post(f"{V1}/reservations", RESERVATION).status_code, range(60))
            )
        assert sorted(answers) == [201] * 33 + [429] * 27
        for _ in range(5):  # whichever worker is asked
            assert counted(service) == 33
            assert figures(service)["held"] == 4.95
        assert list(temporary.glob("ktrdr-metrics-*"))
        assert service.stop() == 0
    assert not list(temporary.iterdir())
    assert service.said.count("budget agent: $5.00 a day (UTC)") == 1


@pytest.mark.slow
def test_a_worker_that_stands_still_for_some_seconds_is_not_replaced(server):
    """As on a machine that is so busy that the workers' start takes as long: they would never serve."""
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
def test_a_worker_that_dies_is_replaced_and_nothing_is_lost(tmp_path):
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
        assert 'ktrdr_budget_spend_total{budget="agent",unit="usd"} ' in text  # also what the dead had counted
        assert service.stop() == 0


@pytest.mark.slow
def test_workers_that_cannot_start_end_the_service(server, monkeypatch):
    monkeypatch.setattr(module, "create_app", _no_app)
    with pytest.raises(ServeError) as caught:
        serve(port=0, workers=2, settings=Settings(redis_url=server.url))
    assert caught.value.exit_code == 1


def _no_app(settings: Settings) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        raise RuntimeError("no app")
        yield

    return FastAPI(lifespan=lifespan)


def test_several_workers_and_unchecked_spend_are_warned_about(server):
    with serving(workers=2, KTRDR_REDIS_URL=server.url, KTRDR_ON_STORE_ERROR="allow") as service:
        service.stop()
    assert any("KTRDR_ON_STORE_ERROR=allow" in line for line in service.said)
