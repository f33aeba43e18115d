"""Limiters and the audit use TLS with a real server, with and without client certificates."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter, StoreUnavailable
from ktrdr_budget.audit import verify
from ktrdr_budget.errors import StoreError

from ..conftest import Server, free_port
from ..helpers.stores import own_connections
from ..helpers.tools import need

BUDGETS = [Budget("agent", "5.00")]


@dataclass
class Authority:
    """A certificate authority for the tests."""

    directory: Path
    name: str

    @property
    def certificate(self) -> Path:
        return self.directory / f"{self.name}.crt"

    def make(self) -> Authority:
        self._openssl("req", "-x509", *self._new_key(self.name), "-subj", f"/CN={self.name}", "-out", self.certificate)
        return self

    def issue(self, name: str, *, alternative: str) -> tuple[Path, Path]:
        """Issue a certificate; return it and its key."""
        request, certificate = self.directory / f"{name}.csr", self.directory / f"{name}.crt"
        extensions = self.directory / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternative}\n")
        self._openssl("req", *self._new_key(name), "-subj", f"/CN={name}", "-out", request)
        signing = ("-CA", self.certificate, "-CAkey", self._key(self.name), "-CAcreateserial", "-days", "2")
        self._openssl("x509", "-req", "-in", request, *signing, "-extfile", extensions, "-out", certificate)
        return certificate, self._key(name)

    def _key(self, name: str) -> Path:
        return self.directory / f"{name}.key"

    def _new_key(self, name: str) -> tuple[object, ...]:
        return "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", self._key(name)

    def _openssl(self, *words: object) -> None:
        done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@dataclass
class TlsServer(Server):
    port: int = 0

    def url_with(self, host: str = "localhost", **options: object) -> str:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"rediss://{host}:{self.port}/0?{query}"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    need("openssl")
    return Authority(tmp_path_factory.mktemp("ca"), "authority").make()


@pytest.fixture(scope="module", params=["no", "yes"], ids=["server only", "mutual"])
def tls(request: pytest.FixtureRequest, authority: Authority, tmp_path_factory) -> Iterator[TlsServer]:
    """Debian's Redis with TLS; the embedded Valkey does not support TLS."""
    binary = shutil.which("redis-server") or need("redis-server")
    certificate, key = authority.issue(f"server-{request.param}", alternative="DNS:localhost,IP:127.0.0.1")
    port = free_port()
    options = ("--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key))
    options += ("--tls-ca-cert-file", str(authority.certificate), "--tls-auth-clients", request.param)
    server = TlsServer(binary, Path(tmp_path_factory.mktemp("t")), options, port=port)
    yield server.start()
    server.kill()


@pytest.fixture
def identity(authority: Authority, tls: TlsServer) -> dict[str, object]:
    """The URL options with which this server accepts a client."""
    certificate, key = authority.issue("client", alternative="DNS:client")
    trust = {"ssl_ca_certs": authority.certificate}
    mutual = "yes" in tls.options
    return {**trust, "ssl_certfile": certificate, "ssl_keyfile": key} if mutual else trust


async def test_with_tls_all_connections_for_batches_are_encrypted(tls, identity):
    async with AsyncBudgetLimiter(tls.url_with(**identity), BUDGETS, timeout=10) as limiter:
        holds = await asyncio.gather(*[limiter.reserve("agent", "0.01") for _ in range(300)])
        await asyncio.gather(*[hold.commit("0.005") for hold in holds])
        assert str((await limiter.status("agent")).spent) == "1.50"
        connections = own_connections(limiter)
        assert connections
        assert all(connection.is_encrypted for connection in connections)


def test_the_sync_limiter_and_the_audit_use_tls(tls, identity):
    url = tls.url_with(**identity)
    with BudgetLimiter(url, BUDGETS, timeout=10) as limiter:
        limiter.reserve("agent", "0.15").commit("0.10")
    assert all(report.adds_up for report in verify(url))


async def refusal(url: str, words: str = "") -> str:
    """Return the error of a call, and check that the audit fails as well.

    Retry until the error matches ``words``, since a busy machine may not finish the handshake in time.
    """
    for _ in range(5):
        if re.search(words, message := await _refusal(url), re.IGNORECASE):
            return message
    raise AssertionError(message)


async def _refusal(url: str) -> str:
    async with AsyncBudgetLimiter(url, BUDGETS, timeout=1.0) as limiter:
        with pytest.raises(StoreUnavailable) as refused:
            await limiter.reserve("agent", "0.01")
        checks = await limiter.check()
        assert checks["store"]
    with pytest.raises(StoreUnavailable):
        await asyncio.to_thread(verify, url, timeout=1.0)
    return str(refused.value)


async def test_a_server_certificate_of_an_unknown_authority_is_refused(tls, identity, tmp_path):
    other = Authority(tmp_path, "other").make()
    message = await refusal(
        tls.url_with(**{**identity, "ssl_ca_certs": other.certificate}), "certificate verify failed"
    )
    assert str(tmp_path) not in message


async def test_by_default_server_certificates_are_checked_against_the_authorities_of_the_system(tls, identity):
    identity.pop("ssl_ca_certs")
    await refusal(tls.url_with(**identity), "certificate verify failed")


async def test_a_server_certificate_for_a_different_host_is_refused(authority, tls, identity):
    await works(tls.url_with("127.0.0.1", **identity))
    await refusal(tls.url_with("127.0.0.2", **identity), "mismatch")


async def test_if_a_url_without_tls_leads_to_a_tls_port_the_error_names_the_right_scheme(tls):
    limiter = AsyncBudgetLimiter(f"redis://localhost:{tls.port}/0", BUDGETS, timeout=20.0)
    with pytest.raises(StoreError, match="speaks TLS; its URL must start with rediss, not redis"):
        await limiter.reserve("agent", "0.01")
    assert "speaks TLS" in str((await limiter.check())["store"])
    await limiter.close()


async def test_a_server_that_requires_client_certificates_refuses_a_client_without_a_certificate(authority, tls):
    url = tls.url_with(ssl_ca_certs=authority.certificate)
    if "yes" in tls.options:
        # With TLS 1.3 the client gets the alert after its handshake, and the connection may be closed before the alert.
        await refusal(url, "certificate required|reset by peer|closed|broken pipe")
    else:
        await works(url)


async def works(url: str) -> None:
    async with AsyncBudgetLimiter(url, BUDGETS, timeout=10) as limiter:
        await (await limiter.reserve("agent", "0.01")).release()


async def test_connections_are_reopened_after_a_restart_of_the_server(tls, identity):
    async with AsyncBudgetLimiter(tls.url_with(**identity), BUDGETS, timeout=20.0) as limiter:
        await limiter.status("agent")
        tls.kill()
        tls.start()
        assert (await limiter.status("agent")).remaining == 5
    with redis.Redis(unix_socket_path=str(tls.socket_path)) as client:
        client.flushall()
