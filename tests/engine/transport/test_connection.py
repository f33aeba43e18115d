"""Connections for batches: taken over from redis-py, reused, and closed when a reply does not arrive."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from decimal import Decimal

import pytest
import redis.asyncio
import wrapt

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.engine.transport import resp
from ktrdr_budget.engine.transport.connection import ConnectionPool, ReplyError
from ktrdr_budget.engine.transport.redis_pool import pool_of
from ktrdr_budget.errors import StoreError

from ...helpers.stores import own_connections

BUDGETS = [Budget("agent", limit="5.00")]


@pytest.fixture
async def client(server):
    client = redis.asyncio.Redis.from_pool(pool_of(server.url, protocol=2))
    yield client
    await client.aclose()


@pytest.fixture
async def pool():
    pool = ConnectionPool()
    yield pool
    await pool.close()
    assert not pool.opened


def soon(seconds: float = 5.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_replies_arrive_in_order_over_one_connection(client, pool):
    connection = await pool.connect(client)
    for number in range(3):
        assert await connection.execute(("ECHO", f"{number}"), soon()) == str(number).encode()
    assert await connection.execute(("ECHO", "x" * 1_000_000), soon()) == b"x" * 1_000_000, "a reply in many pieces"
    assert pool.check_out() is None, "it is checked out until its release"
    connection.release()
    assert pool.check_out() is connection
    assert pool.check_out() is None, "it is checked out"


async def test_after_the_reply_the_callback_runs_once_and_the_connection_returns_to_the_pool(client, pool):
    connection = await pool.connect(client)
    replies: asyncio.Queue[object] = asyncio.Queue()
    connection.send(("ECHO", "a"), soon(), replies.put_nowait)
    assert await replies.get() == b"a"
    assert pool.check_out() is connection
    assert replies.empty()


async def test_an_error_reply_is_raised_and_the_connection_stays_usable(client, pool):
    connection = await pool.connect(client)
    with pytest.raises(ReplyError, match="^unknown command 'NOSUCH'"):
        await connection.execute(("NOSUCH",), soon())
    with pytest.raises(ReplyError, match="^NOSCRIPT "):
        await connection.execute(("EVALSHA", "0" * 40, 0), soon())
    assert await connection.execute(("ECHO", "a"), soon()) == b"a"


async def test_a_connection_is_closed_if_its_request_times_out(client, pool, server):
    connection = await pool.connect(client)
    with pytest.raises(TimeoutError):
        await connection.execute(("BLPOP", "nothing", 0), soon(0.05))
    assert not connection.is_open
    connection.release()
    assert pool.check_out() is None


async def test_each_request_on_a_connection_times_out_at_its_own_deadline(client, pool):
    connection = await pool.connect(client)
    for seconds in (0.05, 30, 0.05):  # the timer is set for the first, then too early, then too late
        await connection.execute(("ECHO", "a"), soon(seconds))
    await connection.execute(("BLPOP", "nothing", "0.1"), soon())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(30):
            await connection.execute(("BLPOP", "nothing", 0), soon(0.05))


async def test_a_cancelled_request_closes_its_connection(client, pool):
    connection = await pool.connect(client)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await connection.execute(("BLPOP", "nothing", 0), soon())
    await connection.closed
    assert pool.check_out() is None


async def test_if_a_connection_is_killed_its_request_fails_and_the_connection_is_not_reused(client, pool):
    busy, idle = await pool.connect(client), await pool.connect(client)
    await idle.execute(("ECHO", "a"), soon())
    idle.release()
    waiting = asyncio.create_task(busy.execute(("BLPOP", "nothing", 0), soon()))
    async with asyncio.timeout(30):
        while not any(each["cmd"] == "blpop" for each in await client.client_list()):
            await asyncio.sleep(0)
        await client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
        with pytest.raises(ConnectionResetError):
            await waiting
        await idle.closed
    assert pool.check_out() is None


async def test_a_refused_login_raises_an_error(server, pool):
    url = f"{server.url}?password=wrong&username=nobody"
    wrong = redis.asyncio.Redis.from_pool(pool_of(url, protocol=2))
    with pytest.raises(redis.RedisError, match="invalid username-password"):
        await pool.connect(wrong)
    await wrong.aclose()
    limiter = AsyncBudgetLimiter(url, BUDGETS)
    for call in (limiter.start, lambda: limiter.reserve("agent", "0.15")):
        with pytest.raises(StoreError, match="invalid username-password"):
            await call()
    await limiter.close()


async def test_requests_use_the_redis_py_client_if_hiredis_is_missing_or_redis_py_is_instrumented(
    client, pool, monkeypatch
):
    monkeypatch.setattr(resp, "Reader", None)
    assert await pool.connect(client) is None
    monkeypatch.undo()
    instrumented = wrapt.wrap_function_wrapper(
        redis.asyncio.Redis, "execute_command", lambda call, _, words, more: call(*words, **more)
    )
    try:
        assert await pool.connect(client) is None
    finally:
        redis.asyncio.Redis.execute_command = instrumented.__wrapped__


@pytest.mark.parametrize("way", ["hiredis", "client"])
async def test_a_limiter_works_with_its_own_connections_and_with_the_redis_py_client(server, monkeypatch, way):
    if way == "client":
        monkeypatch.setattr(resp, "Reader", None)
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        holds = await asyncio.gather(*[limiter.reserve("agent", "0.01") for _ in range(300)])
        await asyncio.gather(*[hold.commit("0.005") for hold in holds])
        status = await limiter.status("agent")
        assert (status.spent, status.held) == (Decimal("1.50"), 0)
        assert bool(own_connections(limiter)) == (way == "hiredis")
        with server.client() as observer:
            observer.script_flush()
        await limiter.reserve("agent", "0.01")


def test_importing_the_limiter_does_not_import_hiredis_or_redis_py():
    code = (
        "import sys; from ktrdr_budget import AsyncBudgetLimiter; sys.exit(bool({'hiredis', 'redis'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
