"""Rotating credentials: every client fetches them for each new connection, and no output shows them.

envoyproxy/ratelimit #799, litellm PR #38413.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from redis.credentials import CredentialProvider, UsernamePasswordCredentialProvider

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter, BudgetTracker, StoreUnavailable
from ktrdr_budget.audit import Auditor, verify
from ktrdr_budget.engine.transport import resp
from ktrdr_budget.errors import InvalidArgument, StoreError
from ktrdr_budget.telemetry.audit import Audit

from ..conftest import Server, valkey_binary
from ..helpers.clusters import Cluster
from ..helpers.patience import away
from ..helpers.sentinels import SentinelGroup
from ..helpers.stores import store_of

BUDGETS = [Budget("agent", "5.00")]


class Vault:
    """A credential provider (a callable) for the user `worker`; the test rotates the password."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.calls = 0
        self.password = ""
        self.rotate("first-secret")

    def __call__(self) -> tuple[str, str]:
        self.calls += 1
        return "worker", self.password

    def rotate(self, password: str) -> None:
        """Replace the password; the server closes connections that used the old one."""
        self.password = password
        with self._server.client() as client:
            client.execute_command("ACL", "DELUSER", "worker")
            client.execute_command("ACL", "SETUSER", "worker", "on", f">{password}", "~*", "&*", "+@all")


class Provider(CredentialProvider):
    """A credential provider in the form that redis-py defines."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    def get_credentials(self) -> tuple[str, str]:
        return self._vault()


class AsyncProvider(Provider):
    async def get_credentials_async(self) -> tuple[str, str]:
        await asyncio.sleep(0)
        return self._vault()


@pytest.fixture
def own(start_server: Callable[..., Server]):
    """A server for one test; its clients log in as `worker`."""
    made = start_server()
    with made.client() as client:
        client.execute_command("ACL", "SETUSER", "operator", "on", ">operator", "~*", "&*", "+@all")
    yield made
    made.kill()


FORMS = {"callable": lambda vault: vault, "provider": Provider, "async provider": AsyncProvider}


@pytest.mark.parametrize("way", ["connections", "client"])
@pytest.mark.parametrize("form", FORMS)
async def test_the_credential_provider_is_called_for_each_new_connection(own, form, way, monkeypatch, caplog):
    if way == "client":
        monkeypatch.setattr(resp, "Reader", None)
    vault = Vault(own)
    async with AsyncBudgetLimiter(own.url, BUDGETS, credential_provider=FORMS[form](vault)) as limiter:
        await limiter.reserve("agent", "0.15")
        before = vault.calls
        assert before >= 1
        vault.rotate("second-secret")
        await limiter.reserve("agent", "0.15")
        await limiter.status("agent")
        assert vault.calls > before
        with own.client() as client:
            assert {each["user"] for each in client.client_list()} == {"default", "worker"}
        assert "secret" not in repr(limiter) + repr(store_of(limiter)) + repr(limiter.store_credentials)
    assert "secret" not in caplog.text
    assert "backward compatibility" not in caplog.text


def test_the_sync_limiter_and_the_audit_use_the_credential_provider(own):
    vault = Vault(own)
    with BudgetLimiter(own.url, BUDGETS, credential_provider=vault) as limiter:
        limiter.reserve("agent", "0.15").commit("0.10")
        vault.rotate("second-secret")
        assert limiter.reserve("agent", "0.15").state == "open"
    assert all(report.adds_up for report in verify(own.url, credential_provider=vault))
    with Auditor(own.url, credential_provider=Provider(vault)) as auditor:
        assert auditor.check()
        vault.rotate("third-secret")
        assert auditor.check()


def test_the_tracker_uses_the_credential_provider(own, monkeypatch):
    vault = Vault(own)
    monkeypatch.setenv("KTRDR_REDIS_URL", own.url)
    with BudgetTracker(5, credential_provider=vault) as tracker:
        tracker.record_spend("0.10", "op_1")
        before = vault.calls
        assert before >= 1
        vault.rotate("second-secret")
        assert tracker.get_today_spend() == 0.1
        assert vault.calls > before


async def test_the_audit_metric_logs_in_with_the_credentials_of_its_limiter(own):
    vault = Vault(own)
    with own.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "nopass", "-@all")
    audit = Audit()
    async with AsyncBudgetLimiter(own.url, BUDGETS, credential_provider=vault) as limiter:
        await limiter.record("agent", "0.10")
        await audit.check(limiter)
        [family] = audit.collect()
        assert {sample.labels["budget"]: sample.value for sample in family.samples} == {"agent": 1.0}
    audit.close()


@pytest.mark.parametrize("given", ["first-secret", ("first-secret",), ("default", "first-secret")])
async def test_a_password_without_a_user_name_logs_in_the_default_user(own, given):
    with own.client() as client:
        client.config_set("requirepass", "first-secret")
    async with AsyncBudgetLimiter(own.url, BUDGETS, credential_provider=lambda: given) as limiter:
        assert (await limiter.reserve("agent", "0.15")).state == "open"


async def test_a_failing_credential_provider_makes_the_store_unavailable_and_no_secret_is_shown(own, caplog):
    vault, down = Vault(own), [True]

    def provider() -> tuple[str, str]:
        if down:
            raise RuntimeError("vault error: secret-token-1")
        return vault()

    limiter = AsyncBudgetLimiter(own.url, BUDGETS, timeout=0.3, credential_provider=provider)
    with away(own.url):
        with pytest.raises(StoreUnavailable, match="credential_provider raised RuntimeError") as refused:
            await limiter.reserve("agent", "0.15")
    assert not refused.value.ambiguous
    assert not isinstance(refused.value, StoreError)
    down.clear()
    assert (await limiter.reserve("agent", "0.15")).state == "open"
    await limiter.close()
    assert "secret" not in str(refused.value) + caplog.text


@pytest.mark.parametrize("given", [None, 1, ("a", "b", "c"), ("a", None), b"secret"])
async def test_the_error_for_invalid_credentials_does_not_show_the_credentials(own, given):
    limiter = AsyncBudgetLimiter(own.url, BUDGETS, credential_provider=lambda: given)
    with pytest.raises(StoreError, match="must return a password, or a user name and a password") as refused:
        await limiter.reserve("agent", "0.15")
    assert "secret" not in str(refused.value)
    await limiter.close()


@pytest.mark.parametrize(
    ("url", "provider", "words"),
    [
        ("redis://me:secret@store", lambda: "x", "not both"),
        ("redis://store?password=secret", lambda: "x", "not both"),
        ("redis+cluster://:secret@store", lambda: "x", "not both"),
        (None, lambda: "x", "the embedded server has no users"),
        ("redis://store", "secret", "must be a CredentialProvider of redis-py, or a callable"),
    ],
)
def test_the_constructor_refuses_a_credential_provider_that_cannot_be_used(url, provider, words):
    for make in (
        lambda: AsyncBudgetLimiter(url, BUDGETS, credential_provider=provider),
        lambda: BudgetLimiter(url, BUDGETS, credential_provider=provider),
    ):
        with pytest.raises(InvalidArgument, match=words) as refused:
            make()
        assert "secret" not in str(refused.value)


async def test_cluster_nodes_are_queried_with_the_provided_credentials(tmp_path_factory):
    with Cluster(valkey_binary(), Path(tmp_path_factory.mktemp("c")), masters=3) as cluster:
        passwords = ["first-secret"]
        for node in cluster.masters:
            node.client.execute_command("ACL", "SETUSER", "worker", "on", ">first-secret", "~*", "&*", "+@all")
            node.client.execute_command("ACL", "SETUSER", "operator", "on", ">operator", "~*", "&*", "+@all")
        provider = lambda: ("worker", passwords[-1])  # noqa: E731
        async with AsyncBudgetLimiter(cluster.url, BUDGETS, timeout=20.0, credential_provider=provider) as limiter:
            await limiter.record("agent", "0.10")
            passwords.append("second-secret")
            for node in cluster.masters:
                node.client.execute_command("ACL", "DELUSER", "worker")
                node.client.execute_command("ACL", "SETUSER", "worker", "on", ">second-secret", "~*", "&*", "+@all")
            await limiter.record("agent", "0.10")
            users = {each["user"] for node in cluster.masters for each in node.client.client_list()}
            assert "worker" in users
        reports = await asyncio.to_thread(verify, cluster.url, credential_provider=provider)
        assert [report.adds_up for report in reports] == [True]


async def test_the_master_behind_sentinel_is_used_with_the_provided_credentials(tmp_path_factory):
    with SentinelGroup(valkey_binary(), Path(tmp_path_factory.mktemp("s"))) as group:
        master = group.master
        master.client.execute_command("ACL", "SETUSER", "worker", "on", ">first-secret", "~*", "&*", "+@all")
        provider = UsernamePasswordCredentialProvider("worker", "first-secret")
        async with AsyncBudgetLimiter(group.url, BUDGETS, timeout=20.0, credential_provider=provider) as limiter:
            await limiter.record("agent", "0.10")
            assert "worker" in {each["user"] for each in master.client.client_list()}
        reports = await asyncio.to_thread(verify, group.url, credential_provider=provider)
        assert [report.adds_up for report in reports] == [True]
