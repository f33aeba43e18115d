"""The peers: rate limiters for asyncio on Redis. Each is measured by its smallest operation, a hit of one counter.

Their connection pools may open a connection for each caller. With redis-py's default limit of 100 connections, the
peers would fail at 1,000 callers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ["Hit", "hits"]

Hit = Callable[[], Awaitable[Any]]

_UNBOUNDED = 100_000
_LIMIT_PER_DAY = 1_000_000_000


def hits(url: str) -> dict[str, dict[str, Hit]]:
    """Return the hits of each peer, by variant. The reports use the fastest variant of a peer."""
    return {"limits": _limits(url), "throttled-py": {"redis-py": _throttled(url)}}


def _limits(url: str) -> dict[str, Hit]:
    """The peer ``limits`` with a fixed window: a variant on redis-py and, if coredis is installed, one on coredis."""
    from limits import parse
    from limits.aio.storage import RedisStorage
    from limits.aio.strategies import FixedWindowRateLimiter

    item = parse(f"{_LIMIT_PER_DAY}/day")
    storages = {"redis-py": RedisStorage(f"async+{url}", implementation="redispy", max_connections=_UNBOUNDED)}
    if importlib.util.find_spec("coredis") is not None:
        storages["coredis"] = RedisStorage(f"async+{url}")

    def hit_of(storage: RedisStorage) -> Hit:
        limiter = FixedWindowRateLimiter(storage)

        async def hit() -> None:
            assert await limiter.hit(item, "agent")

        return hit

    return {implementation: hit_of(storage) for implementation, storage in storages.items()}


def _throttled(url: str) -> Hit:
    """The peer ``throttled-py`` with a fixed window, on redis-py."""
    from throttled.asyncio import RateLimiterType, RedisStore, Throttled, per_day

    store = RedisStore(server=url, options={"CONNECTION_POOL_KWARGS": {"max_connections": _UNBOUNDED}})
    throttle = Throttled(using=RateLimiterType.FIXED_WINDOW.value, quota=per_day(_LIMIT_PER_DAY), store=store)

    async def hit() -> None:
        assert not (await throttle.limit("agent")).limited

    return hit
