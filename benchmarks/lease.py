"""The time that a lease takes for a decision, with the time of an empty call for comparison.

A block of decisions is timed as a whole, because reading a clock takes as long as a decision. A round's figure is the
median of its blocks.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Callable
from decimal import Decimal

from benchmarks.client import per_call_us
from benchmarks.measures import Measure, Settings, at_least, at_most
from benchmarks.peers import hits
from benchmarks.servers import running
from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter
from ktrdr_budget.lease import AsyncLease

__all__ = ["lease"]

_AMPLE = "5000000"
_SLAB = "4000000"
_BLOCK = 200
_SMALL_SLAB = "10"
_CENTS = Decimal("0.004")
_TITLES = {
    "spend_str": ("spend, a text", 1.5),
    "spend_decimal": ("spend, a Decimal", 1.5),
    "spend_sync": ("spend, a text, sync limiter", 1.5),
    "reserve": ("reserve, a text", 1.5),
    "reserve_commit": ("reserve and commit: two decisions", 3),
    "acquire_commit": ("acquire and commit, of a slab of 2,500 calls that is refilled: two decisions", 3),
}


async def lease(settings: Settings) -> list[Measure]:
    """Measure decisions of leases of the async and the sync limiter."""
    rounds, blocks = settings.rounds(9), settings.size(500, 100)
    with running(settings.store) as server:
        taken = await _decisions_us(server.url, rounds, blocks)
        with (
            BudgetLimiter(server.url, [Budget("sync", limit=_AMPLE)]) as limiter,
            limiter.lease("sync", _SLAB, idle=None) as shared,
        ):
            taken["spend_sync"] = _rounds_us(lambda: shared.spend("0.004"), rounds, blocks)
        peers = {} if settings.quick else await _peers_us(server.url, settings)
    nothing = statistics.median(_rounds_us(lambda: None, rounds, blocks))
    measures = [
        Measure(
            f"lease_{name}",
            f"lease: {title}",
            "µs",
            tuple(taken[name]),
            at_most(target),
            detail=f"an empty call: {nothing:.2f} µs",
        )
        for name, (title, target) in _TITLES.items()
    ]
    for peer, us in peers.items():
        name, ratios = f"lease_spend_to_{peer.replace('-', '_')}", tuple(us / own for own in taken["spend_str"])
        title, detail = f"lease: spend, to a hit of {peer}, one caller at a time", f"hit {us:.0f} µs"
        measures.append(Measure(name, title, "x", ratios, at_least(30), detail=detail))
    return measures


async def _decisions_us(url: str, rounds: int, blocks: int) -> dict[str, list[float]]:
    async with (
        AsyncBudgetLimiter(url, [Budget("agent", limit=_AMPLE)]) as limiter,
        limiter.lease("agent", _SLAB, idle=None) as large,
        limiter.lease("agent", _SMALL_SLAB, idle=None) as small,
    ):

        def reserve_and_commit() -> None:
            large.reserve("0.004").commit("0.003")

        taken = {
            "spend_str": _rounds_us(lambda: large.spend("0.004"), rounds, blocks),
            "spend_decimal": _rounds_us(lambda: large.spend(_CENTS), rounds, blocks),
            "reserve": _rounds_us(lambda: large.reserve("0.004"), rounds, blocks),
            "reserve_commit": _rounds_us(reserve_and_commit, rounds, blocks),
            "acquire_commit": [],
        }
        for number in range(rounds + 1):
            blocks_us = [await _acquired_us(small) for _ in range(blocks)]
            if number:
                taken["acquire_commit"].append(statistics.median(blocks_us))
        return taken


async def _acquired_us(small: AsyncLease) -> float:
    """Return the microseconds per decision of one block, for a chunk that is refilled between the blocks."""
    await asyncio.sleep(0)
    begun = time.perf_counter()
    for _ in range(_BLOCK):
        (await small.acquire("0.004")).commit("0.003")
    return (time.perf_counter() - begun) / _BLOCK * 1e6


def _rounds_us(call: Callable[[], object], rounds: int, blocks: int) -> list[float]:
    """Microseconds of the median block of each round; the first round does not count."""
    medians = []
    for _ in range(rounds + 1):
        gc.collect()
        taken = []
        for _ in range(blocks):
            begun = time.perf_counter()
            for _ in range(_BLOCK):
                call()
            taken.append((time.perf_counter() - begun) / _BLOCK * 1e6)
        medians.append(statistics.median(taken))
    return medians[1:]


async def _peers_us(url: str, settings: Settings) -> dict[str, float]:
    """Return the microseconds per hit of each peer's fastest variant, with one caller at a time."""
    found = {}
    for peer, variants in hits(url).items():
        took = []
        for hit in variants.values():
            await hit()
            took.append(statistics.median([await per_call_us(hit, 1, settings.size(500, 100)) for _ in range(3)]))
        found[peer] = min(took)
    return found
