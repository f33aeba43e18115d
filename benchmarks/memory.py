"""What a hold and a settled operation occupy in the server: ``used_memory``, with everything that belongs to them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.measures import Measure, Settings, at_most
from benchmarks.servers import Server, binary_of, running
from ktrdr_budget import AsyncBudgetLimiter, Budget

__all__ = ["memory"]

_CALLERS = 256


async def memory(settings: Settings) -> list[Measure]:
    """On Valkey, and on Redis where it is installed."""
    measures = []
    for kind in ("valkey", "redis"):
        if binary_of(kind) is None:
            continue
        with running(kind) as server:
            counts = [settings.size(50_000, 20_000)] * settings.rounds(3, 1)
            rounds = [await _bytes_each(server, count) for count in counts]
        detail = f"{counts[0]:,} of them"
        for position, (name, target) in enumerate((("open hold", 500), ("settled operation", 450))):
            measures.append(
                Measure(
                    f"memory_{name.replace(' ', '_')}_{kind}",
                    f"memory of one {name}, {kind} {server.version}",
                    "B",
                    tuple(figures[position] for figures in rounds),
                    at_most(target),
                    detail=detail,
                )
            )
    return measures


async def _bytes_each(server: Server, count: int) -> tuple[float, float]:
    """Bytes of an open hold, and of what is left of it, ledger included, once it is committed."""
    with server.client() as client:
        client.flushall()

        def used() -> int:
            told: Any = client.info("memory")
            return int(told["used_memory"])

        async with AsyncBudgetLimiter(server.url, [Budget("agent", limit="5000000")], timeout=30) as limiter:

            async def reserve() -> Any:
                return await limiter.reserve("agent", "0.0015")

            warm = [await reserve() for _ in range(100)]
            for hold in warm:
                await hold.commit("0.0012")
            before = used()
            holds = await _all(reserve, count)
            open_bytes = (used() - before) / count
            left = iter(holds)

            async def commit() -> None:
                await next(left).commit("0.0012")

            await _all(commit, count)
            return open_bytes, (used() - before) / count


async def _all(call: Callable[[], Awaitable[Any]], count: int) -> list[Any]:
    """The results of so many calls, made by many callers at once."""
    results: list[Any] = []

    async def caller() -> None:
        for _ in range(count // _CALLERS):
            results.append(await call())

    await asyncio.gather(*[caller() for _ in range(_CALLERS)])
    for _ in range(count % _CALLERS):
        results.append(await call())
    return results
