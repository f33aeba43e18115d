"""Clusters and Sentinel over TLS: the certificate of each server and each sentinel is verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, StoreUnavailable
from ktrdr_budget.audit import verify
from ktrdr_budget.errors import StoreError

from ..conftest import Server
from ..helpers.nodes import Node, free_ports
from ..helpers.stores import own_connections
from ..helpers.tools import need
from ..helpers.waiting import until
from .test_tls import Authority

BUDGETS = [Budget("agent", "5.00")]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    need("openssl")
    return Authority(tmp_path_factory.mktemp("ca"), "authority").make()


@pytest.fixture(scope="module")
def identity(authority: Authority) -> dict[str, str]:
    """TLS options of a server or a sentinel."""
    certificate, key = authority.issue("server", alternative="DNS:localhost,IP:127.0.0.1")
    options = {"tls-cert-file": certificate, "tls-key-file": key, "tls-ca-cert-file": authority.certificate}
    return {**{name: str(path) for name, path in options.items()}, "tls-auth-clients": "no"}


def words(options: dict[str, str]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", value)]


@pytest.fixture
def cluster_port(start_server: Callable[..., Server], identity: dict[str, str]) -> int:
    """A cluster of one node."""
    [port] = free_ports(1)
    options = {"tls-port": str(port), "tls-cluster": "yes", "cluster-enabled": "yes", **identity}
    server = start_server(need("redis-server"), *words(options))
    with server.client() as client:
        client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
    return port


@pytest.fixture
def sentinel_port(start_server: Callable[..., Server], identity: dict[str, str], tmp_path: Path) -> Iterator[int]:
    """One sentinel that monitors a master without replicas."""
    master, port = free_ports(2)
    start_server(need("redis-server"), *words({"tls-port": str(master), **identity}))
    lines = ["port 0", f"tls-port {port}", "tls-replication yes", *(" ".join(pair) for pair in identity.items())]
    (tmp_path / "conf").write_text("\n".join([*lines, f"sentinel monitor budgets 127.0.0.1 {master} 1", ""]))
    node = Node(need("redis-server"), tmp_path, [str(tmp_path / "conf"), "--sentinel"])
    node.start()
    yield port
    node.end()


async def test_a_limiter_and_the_audit_use_a_cluster_over_tls(cluster_port, authority):
    url = f"rediss+cluster://127.0.0.1:{cluster_port}?ssl_ca_certs={authority.certificate}"
    await until(lambda: _works(url))
    assert all(report.adds_up for report in verify(url))
    assert not await _works(f"rediss+cluster://127.0.0.1:{cluster_port}"), "an unknown authority"
    assert "speaks TLS; its URL must start with rediss" in await _refusal(f"redis+cluster://127.0.0.1:{cluster_port}")


async def test_a_limiter_and_the_audit_use_sentinel_over_tls(sentinel_port, authority):
    url = f"rediss+sentinel://localhost:{sentinel_port}/budgets?ssl_ca_certs={authority.certificate}"
    await until(lambda: _works(url))
    assert all(report.adds_up for report in verify(url))
    assert not await _works(f"rediss+sentinel://localhost:{sentinel_port}/budgets"), "an unknown authority"
    assert "speaks TLS; its URL must start with rediss" in await _refusal(
        f"redis+sentinel://localhost:{sentinel_port}/budgets"
    )


async def _works(url: str) -> bool:
    async with AsyncBudgetLimiter(url, BUDGETS, timeout=0.5) as limiter:
        try:
            await limiter.record("agent", "0.01")
        except StoreUnavailable:
            return False
        return bool(own_connections(limiter))


async def _refusal(url: str) -> str:
    limiter = AsyncBudgetLimiter(url, BUDGETS, timeout=20.0)
    with pytest.raises(StoreError) as refused:
        await limiter.start()
    await limiter.close()
    return str(refused.value)
