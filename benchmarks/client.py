"""Throughput with many callers and latency with one caller, in one Python process.

The throughput is compared with the throughput of the peers, which are rate limiters on Redis.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.measures import Measure, Settings, at_least, at_most
from benchmarks.peers import hits
from benchmarks.servers import running
from ktrdr_budget import AsyncBudgetLimiter, Budget

__all__ = ["concurrency", "latency", "per_call_us"]

Call = Callable[[], Awaitable[Any]]

_AMPLE = "5000000"


async def per_call_us(call: Call, callers: int, calls: int) -> float:
    """Microseconds per call while each caller makes its next call as soon as the last one returns."""
    each = max(1, calls // callers)

    async def caller() -> None:
        for _ in range(each):
            await call()

    gc.collect()
    begun = time.perf_counter()
    await asyncio.gather(*[caller() for _ in range(callers)])
    return (time.perf_counter() - begun) / (each * callers) * 1e6


async def concurrency(settings: Settings) -> list[Measure]:
    """Compare reservations and lifecycles per second with each peer's hits per second, at 100 and 1,000 callers."""
    with running(settings.store) as server:
        options: dict[str, Any] = {"timeout": 30, "max_holds": 10**7}  # none is ever settled
        async with AsyncBudgetLimiter(server.url, [Budget("agent", limit=_AMPLE)], **options) as limiter:

            async def reserve() -> None:
                await limiter.reserve("agent", "0.0015")

            async def lifecycle() -> None:
                hold = await limiter.reserve("agent", "0.0015")
                await hold.commit("0.0012")

            many, few = settings.size(20_000, 4_000), settings.size(5_000, 1_000)
            plans: dict[tuple[str, int], tuple[Call, int]] = {
                ("reserve", 100): (reserve, many),
                ("reserve", 1000): (reserve, many),
                ("lifecycle", 100): (lifecycle, many // 2),
            }
            peers = hits(server.url)
            for peer, variants in peers.items():
                for variant, hit in variants.items():
                    plans |= {(f"{peer} {variant}", callers): (hit, few) for callers in (100, 1000)}
            taken = await _interleaved(plans, settings.rounds(7))
    measures = []
    for what, callers, target in (("reserve", 100, 4), ("reserve", 1000, 4), ("lifecycle", 100, 2)):
        for peer, variants in peers.items():
            own = taken[what, callers]
            fastest = min((taken[f"{peer} {variant}", callers] for variant in variants), key=statistics.median)
            ratios = tuple(theirs / ours for theirs, ours in zip(fastest, own, strict=True))
            did = "reserve" if what == "reserve" else "reserve + commit"
            measures.append(
                Measure(
                    f"{what}_{callers}_callers_to_{peer.replace('-', '_')}",
                    f"{did}, {callers:,} callers, to a hit of {peer}",
                    "x",
                    ratios,
                    at_least(target),
                    detail=f"{statistics.median(own):.1f} µs; hit {statistics.median(fastest):.1f} µs",
                )
            )
    return measures


async def _interleaved(
    plans: dict[tuple[str, int], tuple[Call, int]], rounds: int
) -> dict[tuple[str, int], list[float]]:
    """Run all plans in each round. Return the microseconds per call, by plan, without the round that connects.

    A plan is named by its call and its number of callers.
    """
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in plans}
    order = list(plans)
    for number in range(rounds + 1):
        for key in order:
            call, calls = plans[key]
            us = await per_call_us(call, key[1], calls if number else key[1])
            if number:
                taken[key].append(us)
        order.reverse()  # so that no plan always follows the same one
    return taken


async def latency(settings: Settings) -> list[Measure]:
    """Compare the time of a reservation with the time of an empty script. Each has one caller at a time."""
    import redis.asyncio

    rounds, blocks, each = settings.rounds(9, 5), settings.size(40, 20), 20
    ratios, own_us, empty_us = [], [], []
    with running(settings.store) as server:
        client = redis.asyncio.Redis.from_url(server.url)
        sha = await client.script_load("return 1")
        async with AsyncBudgetLimiter(server.url, [Budget("agent", limit=_AMPLE)]) as limiter:

            async def reserve() -> None:
                await limiter.reserve("agent", "0.0015")

            async def empty() -> None:
                await client.evalsha(sha, 0)

            for number in range(rounds + 1):
                own: list[float] = []
                theirs: list[float] = []
                for _ in range(blocks if number else 3):
                    theirs += await _latencies_us(empty, each)
                    own += await _latencies_us(reserve, each)
                if number:
                    own_us.append(statistics.median(own))
                    empty_us.append(statistics.median(theirs))
                    ratios.append(own_us[-1] / empty_us[-1])
        await client.aclose()
    detail = f"{statistics.median(own_us):.0f} µs; empty EVALSHA {statistics.median(empty_us):.0f} µs"
    title = "reserve, one caller at a time, to an empty EVALSHA"
    return [Measure("reserve_latency_to_empty_evalsha", title, "x", tuple(ratios), at_most(1.4), detail=detail)]


async def _latencies_us(call: Call, calls: int) -> list[float]:
    taken = []
    for _ in range(calls):
        begun = time.perf_counter()
        await call()
        taken.append((time.perf_counter() - begun) * 1e6)
    return taken
