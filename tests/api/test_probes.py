"""Liveness, readiness and metrics, with and without a reliable store."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ktrdr_budget import Budget, BudgetLimiter

from ..conftest import redis_binary, valkey_binary
from ..helpers.patience import away
from ..helpers.waiting import until
from .support import V1, problem, reserved


async def test_the_liveness_probe_succeeds_without_the_store(start, tmp_path):
    client = (await start(redis_url=f"unix://{tmp_path}/nothing", timeout=0.1)).client
    response = await client.get("/livez")
    assert (response.status_code, response.json()) == (200, {"status": "alive"})


async def test_the_index_lists_the_paths_of_the_service(start, tmp_path):
    """The index needs neither a key nor the store. Every listed path exists."""
    client = (await start(redis_url=f"unix://{tmp_path}/nothing", timeout=0.1, api_key="use-1")).client
    response = await client.get("/")
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    document = response.json()
    assert document.pop("service") == "ktrdr-budget"
    assert document.pop("version") == version("ktrdr-budget")
    assert {"docs", "api", "health", "metrics"} <= document.keys()
    prefix = document.pop("api")
    assert document["agent_budget"].startswith(f"{prefix}/")
    statuses = {name: (await client.get(path)).status_code for name, path in document.items()}
    assert statuses == dict.fromkeys(["docs", "openapi", "liveness", "metrics"], 200) | {
        "health": 503,
        "agent_budget": 401,
        "budgets": 401,
    }
    assert (await client.head("/")).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
async def test_the_probes_support_head_requests(client, path):
    assert (await client.head(path)).status_code == 200
    problem(await client.post(path), 405, "method-not-allowed")


async def test_the_service_is_ready_if_the_store_passes_all_checks(client):
    response = await client.get("/readyz")
    assert response.status_code == 200
    assert response.json() == {"status": "ready", "checks": {"store": "ok", "policy": "ok", "scripts": "ok"}}


async def test_a_service_started_without_the_store_becomes_ready_when_the_store_returns(start, start_server):
    own = start_server()
    own.kill()
    client = (await start(redis_url=own.url, timeout=0.1)).client
    document = problem(await client.get("/readyz"), 503, "not-ready")
    assert document["checks"].keys() == {"store", "policy", "scripts"}
    assert "ok" not in document["checks"].values()
    problem(await client.get(f"{V1}/agent/budget"), 503, "store-unavailable")
    assert "ktrdr_budget_store_up 0.0" in (await client.get("/metrics")).text
    own.start()

    async def ready() -> bool:
        return (await client.get("/readyz")).status_code == 200

    await until(ready)
    await reserved(client)
    assert "agent_budget_remaining_dollars 4.85" in (await client.get("/metrics")).text


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_the_service_is_not_ready_if_the_store_evicts_keys(start, start_server, policy):
    own = start_server(None, "--maxmemory-policy", policy)
    client = (await start(redis_url=own.url)).client
    document = problem(await client.get("/readyz"), 503, "not-ready")
    assert document["checks"]["store"] == document["checks"]["scripts"] == "ok"
    assert policy in document["checks"]["policy"]
    assert "noeviction" in document["detail"]
    with own.client() as redis:
        redis.config_set("maxmemory-policy", "noeviction")
    assert (await client.get("/readyz")).status_code == 200


async def test_the_service_is_not_ready_if_the_eviction_policy_cannot_be_read(start, server):
    with server.client() as redis:
        redis.execute_command("ACL", "SETUSER", "worker", "on", ">pw", "~*", "+@all", "-info")
        client = (await start(redis_url=f"{server.url}?username=worker&password=pw")).client
        document = problem(await client.get("/readyz"), 503, "not-ready")
        assert document["checks"]["policy"].startswith("unknown")
        assert "pw" not in document["detail"]
        redis.execute_command("ACL", "DELUSER", "worker")


async def test_the_service_is_not_ready_if_the_store_refuses_scripts(start, server):
    with server.client() as redis:
        redis.execute_command("ACL", "SETUSER", "reader", "on", ">pw", "~*", "+@all", "-eval", "-evalsha")
        client = (await start(redis_url=f"{server.url}?username=reader&password=pw")).client
        document = problem(await client.get("/readyz"), 503, "not-ready")
        assert document["checks"]["policy"] == "ok"
        assert document["checks"]["scripts"] != "ok"
        redis.execute_command("ACL", "DELUSER", "reader")


def test_the_check_of_a_sync_limiter_finds_no_fault_in_a_reliable_store(server):
    with BudgetLimiter(server.url, [Budget("agent", "5.00")]) as limiter:
        assert limiter.check() == {"store": None, "policy": None, "scripts": None}


UNABLE = {
    "a read-only replica": (("--replicaof", "127.0.0.1", "1"), "store", "read-only replica"),
    "a full store": (("--maxmemory", "100kb"), "store", "it is full, and refuses SET: OOM"),
    "too few replicas": (("--min-replicas-to-write", "1"), "store", "NOREPLICAS"),
    "TIME is renamed": (("--rename-command", "TIME", ""), "scripts", "the store refuses TIME"),
    "HINCRBY is renamed": (
        ("--rename-command", "HINCRBY", "", "--rename-command", "RPUSH", ""),
        "scripts",
        "HINCRBY, RPUSH",
    ),
    "scripts are renamed": (("--rename-command", "EVAL", ""), "scripts", "unknown command 'EVAL'"),
}
BINARIES = [binary for binary in (valkey_binary(), redis_binary()) if binary]


@pytest.mark.parametrize("binary", BINARIES, ids=lambda binary: binary.rpartition("/")[2])
@pytest.mark.parametrize("kind", UNABLE)
async def test_the_readiness_check_reports_the_reason_if_the_store_cannot_reserve(start, start_server, kind, binary):
    """In spring-cloud-gateway #3379, for example, a managed store refused a command in scripts."""
    options, check, words = UNABLE[kind]
    own = start_server(binary, *options)
    with away(own.url):
        client = (await start(redis_url=own.url, timeout=2.0)).client
        document = problem(await client.get("/readyz"), 503, "not-ready")
        assert words in document["checks"][check]
        assert words in document["detail"]
        assert (await client.post(f"{V1}/reservations", json={"amounts": {"agent": "0.15"}})).status_code == 503
    own.kill()


@pytest.mark.parametrize("command", ["time", "hincrby", "rpush"])
async def test_the_readiness_check_names_a_command_that_the_store_user_may_not_run(start, server, command):
    with server.client() as redis:
        redis.execute_command("ACL", "SETUSER", "managed", "on", ">pw", "~*", "+@all", f"-{command}")
        client = (await start(redis_url=f"{server.url}?username=managed&password=pw")).client
        document = problem(await client.get("/readyz"), 503, "not-ready")
        assert document["checks"] == {
            "store": "ok", "policy": "ok", "scripts": f"the store's user may not run {command.upper()}"
        }  # fmt: skip
        redis.execute_command("ACL", "DELUSER", "managed")


@pytest.mark.parametrize("login", ["?password=wrong", "?username=unknown&password=wrong"])
async def test_a_wrong_password_is_reported_by_the_readiness_check(start, start_server, login):
    own = start_server()
    with own.client() as redis:
        redis.config_set("requirepass", "right")
    client = (await start(redis_url=f"{own.url}{login}")).client
    document = problem(await client.get("/readyz"), 503, "not-ready")
    assert "invalid username-password pair" in document["checks"]["store"]
    assert "ok" not in document["checks"].values()
    assert "wrong" not in str(document)
    own.kill()


async def test_a_readiness_check_leaves_no_keys_in_the_store(client, server):
    await client.get("/readyz")
    with server.client() as redis:
        assert redis.dbsize() == 0


async def test_the_readiness_check_loads_the_scripts_again_after_a_script_flush(client, server):
    with server.client() as redis:
        redis.script_flush()
    assert (await client.get("/readyz")).status_code == 200


async def test_the_metrics_count_reservations_and_show_the_remaining_amount_of_each_budget(client):
    hold = await reserved(client)
    await client.post(f"{V1}/reservations/{hold['id']}/commit", json={"amounts": "0.07"})
    await client.post(f"{V1}/reservations", json={"amounts": {"agent": "9"}})
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert families["agent_budget_remaining_dollars"].samples[0].value == 4.93
    assert {
        (sample.labels["budget"], sample.labels["unit"]) for sample in families["ktrdr_budget_remaining"].samples
    } == {
        ("agent", "usd"),
        ("team/a:b@c", "usd"),
        ("team/holds", "usd"),
        ("cycles", "cycles"),
        ("calls", "requests"),
        ("jobs", "slots"),
        ("agent:cycles", "slots"),
    }
    counted = {
        (sample.labels["outcome"], sample.labels["reason"]): sample.value
        for sample in families["ktrdr_budget_reservations"].samples
    }
    assert (counted["granted", ""], counted["denied", "exceeds_limit"]) == (1, 1)


async def test_the_metrics_are_available_in_the_openmetrics_format(client):
    response = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


async def test_the_counters_continue_when_an_app_is_started_a_second_time(start, server):
    """Each run has its own limiter; the counters continue."""
    running = await start()
    await reserved(running.client, id="op_1")
    async with running.app.router.lifespan_context(running.app):
        await reserved(running.client, id="op_2")
        text = (await running.client.get("/metrics")).text
    assert 'ktrdr_budget_reservations_total{outcome="granted",reason=""} 2.0' in text


@pytest.mark.parametrize(("durability", "words"), [("disk", "needs appendonly to be on"), ("replica", "no replica")])
async def test_the_service_is_not_ready_if_the_store_lacks_the_configured_durability(start, server, durability, words):
    with away(server.url):
        client = (await start(redis_url=server.url, durability=durability, timeout=1.0)).client
        assert words in problem(await client.get("/readyz"), 503, "not-ready")["detail"]
