"""The settable clock of the test servers, as scripts read it, on Valkey and on Redis."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

SCRIPT = "local now = redis.call('TIME') return now[1] .. '.' .. now[2]"
NEAR = timedelta(milliseconds=10)


def test_scripts_and_key_expiry_follow_the_settable_clock(clocked_server):
    with clocked_server.client() as client:
        client.set("short", "1", px=60_000)
        client.set("long", "1", ex=7200)
        clocked_server.advance(3600)
        assert client.get("short") is None
        assert abs(float(client.eval(SCRIPT, 0)) - datetime.now(UTC).timestamp() - 3600) < 1
        assert 3500 < client.ttl("long") <= 3600


def test_a_frozen_clock_moves_by_a_few_milliseconds_at_most(clocked_server):
    noon = datetime(2026, 11, 23, 12, 0, 0, 500_000, tzinfo=UTC)
    clocked_server.set(noon, frozen=True)
    with clocked_server.client() as client:
        shown = [float(client.eval(SCRIPT, 0)) - noon.timestamp() for _ in range(200)]
        assert all(0 <= seconds < 0.01 for seconds in shown)
        clocked_server.advance(1.001)
        assert timedelta(0) <= clocked_server.now() - noon - timedelta(seconds=1.001) < NEAR


def test_the_settable_clock_also_works_with_redis(start_clocked_server: Callable, redis_server_binary: str):
    server = start_clocked_server(redis_server_binary)
    midnight = datetime(2026, 3, 29, 0, 0, tzinfo=UTC)
    server.set(midnight, frozen=True)
    assert timedelta(0) <= server.now() - midnight < NEAR
    server.advance(-0.5)
    assert timedelta(0) <= server.now() - midnight + timedelta(seconds=0.5) < NEAR
    server.kill()


@pytest.fixture
def redis_server_binary() -> str:
    import shutil

    found = shutil.which("redis-server")
    assert found, "redis-server is not installed"
    return found
