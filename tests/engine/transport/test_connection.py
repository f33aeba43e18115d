"""Connections for batches: taken over from redis-py, used again, given up when an answer stays out."""

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
async def wires():
    wires = ConnectionPool()
    yield wires
    await wires.close()
    assert not wires.opened


def soon(seconds: float = 5.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_answers_come_in_order_over_one_connection(client, wires):
    wire = await wires.connect(client)
    for number in range(3):
        assert await wire.execute(("ECHO", f"{number}"), soon()) == str(number).encode()
    assert await wire.execute(("ECHO", "x" * 1_000_000), soon()) == b"x" * 1_000_000, "an answer in many pieces"
    assert wires.check_out() is None, "it is lent until it is given back"
    wire.release()
    assert wires.check_out() is wire
    assert wires.check_out() is None, "nobody else gets it meanwhile"


async def test_a_sent_command_tells_its_answer_once_and_frees_the_connection(client, wires):
    wire = await wires.connect(client)
    told: asyncio.Queue[object] = asyncio.Queue()
    wire.send(("ECHO", "a"), soon(), told.put_nowait)
    assert await told.get() == b"a"
    assert wires.check_out() is wire
    assert told.empty()


async def test_an_error_of_the_store_is_told_in_its_words_and_the_connection_goes_on(client, wires):
    wire = await wires.connect(client)
    with pytest.raises(ReplyError, match="^unknown command 'NOSUCH'"):
        await wire.execute(("NOSUCH",), soon())
    with pytest.raises(ReplyError, match="^NOSCRIPT "):
        await wire.execute(("EVALSHA", "0" * 40, 0), soon())
    assert await wire.execute(("ECHO", "a"), soon()) == b"a"


async def test_an_answer_that_stays_out_ends_the_connection(client, wires, server):
    wire = await wires.connect(client)
    with pytest.raises(TimeoutError):
        await wire.execute(("BLPOP", "nothing", 0), soon(0.05))
    assert not wire.is_open
    wire.release()
    assert wires.check_out() is None


async def test_the_one_timer_serves_later_and_earlier_deadlines(client, wires):
    wire = await wires.connect(client)
    for seconds in (0.05, 30, 0.05):  # its timer is set for the first, then too early, then too late
        await wire.execute(("ECHO", "a"), soon(seconds))
    await wire.execute(("BLPOP", "nothing", "0.1"), soon())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(30):
            await wire.execute(("BLPOP", "nothing", 0), soon(0.05))


async def test_a_caller_that_stops_waiting_ends_the_connection(client, wires):
    wire = await wires.connect(client)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await wire.execute(("BLPOP", "nothing", 0), soon())
    await wire.closed
    assert wires.check_out() is None


async def test_a_connection_that_is_killed_is_told_at_once_or_noticed_when_idle(client, wires):
    asking, idle = await wires.connect(client), await wires.connect(client)
    await idle.execute(("ECHO", "a"), soon())
    idle.release()
    waiting = asyncio.create_task(asking.execute(("BLPOP", "nothing", 0), soon()))
    async with asyncio.timeout(30):
        while not any(who["cmd"] == "blpop" for who in await client.client_list()):
            await asyncio.sleep(0)
        await client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
        with pytest.raises(ConnectionResetError):
            await waiting
        await idle.closed
    assert wires.check_out() is None


async def test_a_user_whom_the_store_refuses_gets_no_connection(server, wires):
    url = f"{server.url}?password=wrong&username=nobody"
    wrong = redis.asyncio.Redis.from_pool(pool_of(url, protocol=2))
    with pytest.raises(redis.RedisError, match="invalid username-password"):
        await wires.connect(wrong)
    await wrong.aclose()
    limiter = AsyncBudgetLimiter(url, BUDGETS)
    for call in (limiter.start, lambda: limiter.reserve("agent", "0.15")):
        with pytest.raises(StoreError, match="invalid username-password"):
            await call()
    await limiter.close()


async def test_the_client_is_asked_instead_without_hiredis_or_while_it_is_watched(client, wires, monkeypatch):
    monkeypatch.setattr(resp, "Reader", None)
    assert await wires.connect(client) is None
    monkeypatch.undo()
    watched = wrapt.wrap_function_wrapper(
        redis.asyncio.Redis, "execute_command", lambda call, _, words, more: call(*words, **more)
    )
    try:
        assert await wires.connect(client) is None
    finally:
        redis.asyncio.Redis.execute_command = watched.__wrapped__


@pytest.mark.parametrize("way", ["hiredis", "client"])
async def test_a_limiter_does_the_same_either_way(server, monkeypatch, way):
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


def test_hiredis_is_imported_with_the_first_connection_only():
    code = (
        "import sys; from ktrdr_budget import AsyncBudgetLimiter; sys.exit(bool({'hiredis', 'redis'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
