"""The user of the product in ``docker/redis/users.acl`` has the permissions that the product needs, and no others."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
import yaml
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, StoreUnavailable, UnknownKey
from ktrdr_budget.access_keys import AccessKeys
from ktrdr_budget.agent.cycle_store import CycleStore, Progress
from ktrdr_budget.audit import Auditor
from ktrdr_budget.errors import StoreError

from ..conftest import Server, valkey_binary
from ..helpers.clusters import Cluster
from ..helpers.keyspace import window_key
from ..helpers.tools import compose

DIRECTORY = Path(__file__).parents[2] / "docker" / "redis"
PASSWORD = "correct horse/battery@staple"
BUDGETS = [
    Budget("agent", "5.00"),
    Budget("tokens", 1000, unit="tokens", period="ever"),
    Budget("jobs", 2, kind="slots"),
]
PERMISSIONS = re.findall(r"\+(\S+)", (DIRECTORY / "users.acl").read_text(encoding="utf-8"))
OF_CONNECTING = {"auth", "hello", "select", "ping", "client|setname"}


@dataclass
class GuardedServer(Server):
    """A server started by `docker/redis/start.sh`; the method `client` logs in as the user of the product."""

    @property
    def url(self) -> str:
        return f"unix://ktrdr:correct%20horse%2Fbattery%40staple@{self.socket_path}"

    def client(self, **options) -> redis.Redis:
        retry = Retry(NoBackoff(), 0)
        options = {"username": "ktrdr", "password": PASSWORD, "decode_responses": True, "retry": retry, **options}
        return redis.Redis(unix_socket_path=str(self.socket_path), **options)


@pytest.fixture(scope="module", params=["valkey", "redis"])
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedServer]:
    binary = valkey_binary() if request.param == "valkey" else shutil.which("redis-server")
    if binary is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("redis-server is not installed")
    directory = Path(tmp_path_factory.mktemp("a"))
    environment = {"KTRDR_REDIS_PASSWORD": PASSWORD, "REDIS_SERVER": binary, "TMPDIR": str(directory)}
    server = GuardedServer(str(DIRECTORY / "start.sh"), directory, (), environment)
    server.start()
    # No user of the file can administer the server; the tests need one that can.
    users = directory / "users.acl"
    server.kill()
    users.write_text(users.read_text() + "user operator on nopass ~* &* +@all\n")
    server.binary, server.options = binary, ("--aclfile", str(users))
    yield server.start()
    server.kill()


@pytest.fixture
def operator(guarded: GuardedServer) -> Iterator[redis.Redis]:
    """A client with all permissions; the store is empty, and the product's user is as in the file."""
    with guarded.client(username="operator", password="") as client:
        client.flushall()
        client.script_flush()
        rules = re.search("^user ktrdr (.*)$", (guarded.directory / "users.acl").read_text(), re.MULTILINE)
        client.execute_command("ACL", "SETUSER", "ktrdr", "reset", *rules[1].split(" "))
        client.execute_command("ACL", "LOG", "RESET")
        yield client


# -- allowed -----------------------------------------------------------------------------------------------------------


async def everything(url: str) -> None:
    """Use each feature of the product that sends commands to the store, once."""
    async with AsyncBudgetLimiter(url, BUDGETS, timeout=10) as limiter:
        assert set((await limiter.check()).values()) == {None}
        hold = await limiter.reserve({"agent": "0.15", "tokens": 100, "jobs": 1}, id="one", operation="op")
        hold.accrue({"agent": "0.05"})
        await hold.extend()
        await hold.grow({"agent": "0.05"})
        with pytest.raises(BudgetExceeded):
            await limiter.reserve("agent", "5.00")
        await hold.commit({"agent": "0.30", "tokens": 10})
        await (await limiter.reserve("agent", "0.15")).release()
        await limiter.record("agent", "0.02", id="two")
        assert (await limiter.get("one")).state == "committed"
        await limiter.reserve("agent", "0.15", id="three", ttl=1)
        await limiter.release("three", operator=True)
        await limiter.commit("three", "0.01")
        assert len(await limiter.holds("agent")) == 0
        assert len(await limiter.ledger("agent")) == 3
        await limiter.set_limit("agent", "6.00", until="window")
        assert (await limiter.clear_limit("agent")).limit == 5
        assert len(await limiter.changes()) == 2
        await access(AccessKeys(limiter))
        await limiter.reserve("tokens", 5, ttl=1)
        await research(CycleStore(limiter))
        while not (await limiter.status("tokens")).unconfirmed:
            await asyncio.sleep(0.02)
    with Auditor(url) as auditor:
        assert all(report.adds_up for report in await asyncio.to_thread(auditor.check))
        assert (await asyncio.to_thread(auditor.repair)).changes == []


async def access(keys: AccessKeys) -> None:
    made = await keys.create("ci", expires="90d")
    assert await keys.find(made.secret) == made.key
    assert [key.name for key in await keys.list()] == ["ci"]
    await keys.revoke("ci")
    with pytest.raises(UnknownKey):
        await keys.revoke("ci")


async def research(cycle_store: CycleStore) -> None:
    assert await cycle_store.start("cycle_1", "me", 60_000, Progress())
    assert await cycle_store.beat("cycle_1", "me", Progress(phase="training")) == "running"
    assert await cycle_store.cancel("cycle_1") == "cancelling"
    await cycle_store.end("cycle_1", "me", "cancelled", None, Progress())
    assert (await cycle_store.get("cycle_1")).status == "cancelled"
    assert [cycle.operation_id for cycle in (await cycle_store.list(5, "cycle_1")).ended] == []


async def test_the_permissions_in_the_acl_file_suffice_for_the_limiter_and_the_service(guarded, operator):
    await everything(guarded.url)
    # Redis 7.0 has no CLIENT SETINFO, so the file cannot grant it; redis-py works without it.
    assert {entry["object"] for entry in operator.acl_log()} <= {"client|setinfo"}


async def test_the_user_of_the_acl_file_can_repair_damaged_windows(guarded, operator):
    async with AsyncBudgetLimiter(guarded.url, BUDGETS, timeout=10) as limiter:
        await limiter.reserve("agent", "0.15", id="one")
    operator.hincrby(window_key(operator), "held", 7)
    operator.zrem("ktrdr:{default}:due", "one")
    with Auditor(guarded.url) as auditor:
        repair = await asyncio.to_thread(auditor.repair)
    assert [change.counter for change in repair.changes] == ["held"]
    assert [change.hold_id for change in repair.index_changes] == ["one"]


# -- each permission is needed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("permission", sorted(set(PERMISSIONS) - OF_CONNECTING - {"eval", "evalsha"}))
async def test_readiness_names_each_missing_permission(guarded, operator, permission):
    operator.execute_command("ACL", "SETUSER", "ktrdr", f"-{permission}")
    limiter = AsyncBudgetLimiter(guarded.url, BUDGETS, timeout=10)
    checks = await limiter.check()
    await limiter.close()
    assert permission in " ".join(text for text in checks.values() if text).lower()


async def test_the_error_of_a_call_names_the_refused_command(guarded, operator):
    operator.execute_command("ACL", "SETUSER", "ktrdr", "-time")
    limiter = AsyncBudgetLimiter(guarded.url, BUDGETS, timeout=10)
    with pytest.raises(StoreError, match="no permissions to run the 'time' command$|can't run this command"):
        await limiter.reserve("agent", "0.15")
    await limiter.close()


@pytest.mark.parametrize("permission", ["eval", "evalsha"])
async def test_without_permission_to_run_scripts_the_start_fails_and_the_error_names_the_permission(
    guarded, operator, permission
):
    operator.execute_command("ACL", "SETUSER", "ktrdr", f"-{permission}")
    with pytest.raises(StoreError, match=permission):
        await everything(guarded.url)


# -- forbidden ---------------------------------------------------------------------------------------------------------

FORBIDDEN = [
    "FLUSHALL", "FLUSHDB", "KEYS *", "CONFIG GET maxmemory", "CONFIG SET maxmemory 1", "CONFIG RESETSTAT",
    "DEBUG SLEEP 0", "SCRIPT KILL", "SCRIPT FLUSH", "SCRIPT LOAD x", "SHUTDOWN", "ACL LIST",
    "ACL SETUSER me on", "MONITOR", "SAVE", "REPLICAOF NO ONE", "CLIENT LIST", "CLIENT KILL ID 1",
    "CLUSTER NODES", "SWAPDB 0 1", "MIGRATE h 1 k 0 1", "RANDOMKEY", "RENAME ktrdr:a ktrdr:b", "DUMP ktrdr:a",
    "RESTORE ktrdr:a 0 x", "MODULE LIST", "SLOWLOG GET", "LATENCY RESET", "PUBLISH c m", "SUBSCRIBE c",
    "OBJECT ENCODING ktrdr:a", "MEMORY USAGE ktrdr:a", "FUNCTION LIST", "WAIT 0 0",
]  # fmt: skip


@pytest.mark.parametrize("command", FORBIDDEN)
def test_commands_that_the_limiter_does_not_need_are_refused(guarded, operator, command):
    with guarded.client() as client, pytest.raises(redis.ResponseError, match="permissions|^DEBUG command not allowed"):
        client.execute_command(*command.split(" "))


def test_the_user_of_the_acl_file_cannot_access_keys_of_other_programs_even_from_a_script(guarded, operator):
    operator.set("another:key", "secret")
    with guarded.client() as client:
        for command in ("GET another:key", "SET another:key x", "DEL another:key", "MGET ktrdr:a another:key"):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command.split(" "))
        for script in ("return redis.call('GET', 'another:key')", "return redis.call('FLUSHALL')"):
            with pytest.raises(redis.ResponseError, match="permission|can't (run|access)"):
                client.eval(script, 0)
    assert operator.get("another:key") == "secret"


def test_the_default_user_and_anonymous_logins_are_refused(guarded, operator):
    for login in ({"username": None, "password": None}, {"username": "default", "password": ""}, {"password": "wrong"}):
        with guarded.client(**login) as client, pytest.raises(redis.AuthenticationError):
            client.ping()


async def test_a_wrong_password_is_refused_and_not_shown(guarded):
    url = guarded.url.replace("correct", "wr0ng")
    with pytest.raises(StoreUnavailable) as refused:
        async with AsyncBudgetLimiter(url, BUDGETS, timeout=10):
            pass
    assert "invalid username-password pair" in str(refused.value)
    assert not re.search("wr0ng|battery|staple", str(refused.value))


# -- the file itself ---------------------------------------------------------------------------------------------------


def test_no_file_contains_a_password_in_clear_text(guarded):
    text = (DIRECTORY / "users.acl").read_text(encoding="utf-8")
    assert "#PASSWORD_SHA256" in text
    assert not re.search(r"[ >]>|nopass|#[0-9a-f]{64}", text)
    written = (guarded.directory / "users.acl").read_text()
    assert re.search(r" #[0-9a-f]{64} ", written)
    assert "battery" not in written


def test_without_a_password_the_server_does_not_start():
    words = ["sh", str(DIRECTORY / "start.sh")]
    done = subprocess.run(
        words, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "KTRDR_REDIS_PASSWORD: must be set to the password of the user ktrdr" in done.stderr


def test_the_compose_overlay_starts_redis_with_the_acl_file_and_passes_the_password_to_the_backends():
    root = DIRECTORY.parents[1]
    files = ["--file", str(root / "docker-compose.yml"), "--file", str(DIRECTORY / "compose.yml")]
    environment = {"PATH": os.environ["PATH"], "KTRDR_REDIS_PASSWORD": "s3cret"}
    done = subprocess.run(
        [*compose(), *files, "config"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    for name in ("backend-1", "backend-2"):
        assert services[name]["environment"]["KTRDR_REDIS_URL"] == "redis://ktrdr:s3cret@redis:6379/0"
        assert services[name]["environment"]["OTEL_SERVICE_NAME"] == "ktrdr-backend", "the other variables remain"
    store = services["redis"]
    assert store["entrypoint"] == ["sh", "/etc/ktrdr/start.sh"]
    plain = yaml.safe_load((root / "docker-compose.yml").read_text())["services"]["redis"]
    assert plain["command"] == ["redis-server", *store["command"]]
    targets = {volume["target"] if isinstance(volume, dict) else volume.split(":")[1] for volume in store["volumes"]}
    assert targets == {"/data", "/etc/ktrdr"}
    assert store["read_only"] is True
    environment.pop("KTRDR_REDIS_PASSWORD")
    done = subprocess.run(
        [*compose(), *files, "config"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "must be set" in done.stderr


# -- a cluster ---------------------------------------------------------------------------------------------------------

OF_A_CLUSTER = ["+cluster|slots", "+asking"]
"""The permissions that a cluster requires in addition, as in docs/security.md."""


async def test_the_documented_cluster_permissions_suffice_on_a_cluster(tmp_path_factory):
    with Cluster(valkey_binary(), tmp_path_factory.mktemp("c"), masters=3) as cluster:
        for node in cluster.masters:
            rules = [f"+{permission}" for permission in PERMISSIONS]
            node.client.execute_command("ACL", "SETUSER", "ktrdr", "on", ">right", "~ktrdr:*", *rules, *OF_A_CLUSTER)
        await everything(cluster.url.replace("://", "://ktrdr:right@"))
        refused = {entry["object"] for node in cluster.masters for entry in node.client.acl_log()}
        assert refused <= {"client|setinfo"}
    document = (DIRECTORY.parents[1] / "docs" / "security.md").read_text(encoding="utf-8")
    assert f"On a **cluster** add `{' '.join(OF_A_CLUSTER)}`" in " ".join(document.split())


def test_the_security_document_lists_exactly_the_commands_of_the_acl_file():
    document = (DIRECTORY.parents[1] / "docs" / "security.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z \\|]+)` \| .* \|$", document, re.MULTILINE)
    assert sorted(" ".join(rows).replace("\\|", "|").split()) == sorted(PERMISSIONS)
    assert f"may run {len(PERMISSIONS)} commands" in " ".join(document.split())
