"""Waiting for the repair of a data loss, and prolonging it."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import redis

from ktrdr_budget import StoreUnavailable
from ktrdr_budget.limiter import LimiterBase

from .waiting import until

_PROLONG = """
if redis.call('HEXISTS', KEYS[1], 'recovering_until') == 1 then
  local time = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'recovering_until', string.format('%.0f', time[1] * 1000 + 2900))
end
"""
_PERIOD_S = 0.05


async def replayed(limiter: LimiterBase, losses: int = 1) -> None:
    """Wait until a replica has detected ``losses`` data losses in total, and has replayed its journal."""
    repair = limiter.engine.dispatcher.repair
    repair.suspect()
    await until(lambda: limiter.losses == losses and not repair.active)


@contextmanager
def recovery_prolonged(client: redis.Redis) -> Iterator[None]:
    """Prolong each recovery of the store to the end of the block, also on a slow machine."""
    ended = threading.Event()

    def prolong() -> None:
        while not ended.wait(_PERIOD_S):
            client.eval(_PROLONG, 1, "ktrdr:{default}:meta")

    thread = threading.Thread(target=prolong)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


async def refused_during_repair(call: Callable[[], Awaitable[object]]) -> StoreUnavailable:
    """Repeat a call until its error says that the store is being repaired; return this error.

    On a slow machine, a call may exceed its deadline first.
    """

    async def refused() -> StoreUnavailable | None:
        try:
            result = await call()
        except StoreUnavailable as error:
            return error if "being repaired" in str(error) else None
        raise AssertionError(f"not refused: {result}")

    return await until(refused)
