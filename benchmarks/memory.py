"""The memory of holds, settled operations and windows in the server, measured as the growth of ``used_memory``."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from benchmarks.measures import Measure, Settings, at_most
from benchmarks.servers import Server, binary_of, running
from ktrdr_budget import AsyncBudgetLimiter, Budget

__all__ = ["memory"]

_CALLERS = 256


async def memory(settings: Settings) -> list[Measure]:
    """Measure memory on Valkey, and on Redis where it is installed."""
    measures = []
    kinds: tuple[Literal["valkey", "redis"], ...] = "valkey", "redis"
    for kind in kinds:
        if binary_of(kind) is None:
            continue
        with running(kind) as server:
            counts = [settings.size(50_000, 20_000)] * settings.rounds(3, 1)
            rounds = [await _bytes_each(server, count) for count in counts]
            windows = settings.size(6_000, 3_000)
        of_windows = [await _bytes_of_a_window(kind, windows) for _ in counts]
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
        bare, with_record = (tuple(figures[position] for figures in of_windows) for position in (0, 1))
        measures.append(
            Measure(
                f"memory_window_{kind}",
                f"memory of a window with one settled operation, ledger and indexes included, {kind} {server.version}",
                "B",
                bare,
                at_most(600),
                detail=f"{windows:,} of them; {statistics.median(with_record):.0f} B with the record of the operation",
            )
        )
    return measures


async def _bytes_of_a_window(kind: Literal["valkey", "redis"], count: int) -> tuple[float, float]:
    """Return the bytes of a window with one settled operation: without the operation's record, then with the record.

    The measurement uses a new server, which frees nothing meanwhile.
    """
    budgets = [Budget(f"user/{number:06d}", limit="5.00") for number in range(count)]
    with running(kind) as server, server.client() as client:
        async with AsyncBudgetLimiter(server.url, budgets, timeout=30, max_budgets=count) as limiter:

            async def settle(budget: Budget) -> None:
                await (await limiter.reserve(budget.name, "0.0015")).commit("0.0012")

            await settle(budgets[0])
            before = _used(client)
            for budget in budgets[1:]:
                await settle(budget)
            with_record = _used(client) - before
            for key in client.scan_iter("*:h:*", count=1000):
                client.delete(key)
            return (_used(client) - before) / (count - 1), with_record / (count - 1)


def _used(client: Any) -> int:
    found: Any = client.info("memory")
    return int(found["used_memory"])


async def _bytes_each(server: Server, count: int) -> tuple[float, float]:
    """Bytes of an open hold, and of a settled operation with its ledger entry."""
    with server.client() as client:
        client.flushall()
        async with AsyncBudgetLimiter(server.url, [Budget("agent", limit="5000000")], timeout=30) as limiter:

            async def reserve() -> Any:
                return await limiter.reserve("agent", "0.0015")

            warm = [await reserve() for _ in range(100)]
            for hold in warm:
                await hold.commit("0.0012")
            before = _used(client)
            holds = await _all(reserve, count)
            open_bytes = (_used(client) - before) / count
            left = iter(holds)

            async def commit() -> None:
                await next(left).commit("0.0012")

            await _all(commit, count)
            return open_bytes, (_used(client) - before) / count


async def _all(call: Callable[[], Awaitable[Any]], count: int) -> list[Any]:
    """Make calls by many callers at once; return the results."""
    results: list[Any] = []

    async def caller() -> None:
        for _ in range(count // _CALLERS):
            results.append(await call())

    await asyncio.gather(*[caller() for _ in range(_CALLERS)])
    for _ in range(count % _CALLERS):
        results.append(await call())
    return results
