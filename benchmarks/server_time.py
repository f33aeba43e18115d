"""Server time of a lifecycle (reserve + commit), as the server counts it: ``usec`` of ``INFO commandstats``.

Each figure is reported with its floor: the time of the bare commands of one lifecycle (``benchmarks.floor``), measured
in the same round. Only the calls of scripts are counted, because a script's time includes the time of its commands.
"""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from benchmarks.client import per_call_us
from benchmarks.floor import Floor
from benchmarks.measures import Measure, Settings, at_most
from benchmarks.servers import Server, running
from ktrdr_budget import AsyncBudgetLimiter, Budget

__all__ = ["full_store", "server_time"]

_CALLERS = 512
_BATCH_LEAST = 64
_SCRIPT_CALLS = ("cmdstat_eval", "cmdstat_evalsha")  # a lifecycle sends nothing else
_BUDGETS = [Budget(name, limit="5000000") for name in ("agent", "b2", "b3", "b4", "b5", "b6")]
_ONE, _SIX = {"agent": "0.0015"}, {budget.name: "0.0015" for budget in _BUDGETS}
_FLOOR_LIFECYCLES = 500


class Figures(NamedTuple):
    """The figures of one round."""

    lifecycle_us: float
    floor_us: float
    batch: float
    """The number of operations (reservations or commits) in one call of a script."""


class Meter:
    """Runs lifecycles against one server, and reads the time that they took there."""

    def __init__(self, server: Server, limiter: AsyncBudgetLimiter) -> None:
        self._client = server.client()
        self._limiter = limiter
        self._floors = {n_budgets: Floor(self._client, n_budgets) for n_budgets in (1, 6)}

    async def lifecycle_us(self, amounts: dict[str, str], lifecycles: int, *, batched: bool) -> tuple[float, float]:
        """Return the server time of one lifecycle in µs, and the number of operations in one call of a script.

        Raises:
            RuntimeError: the batches were too small for a figure of batched lifecycles.
        """
        callers = _CALLERS if batched else 1
        spent = dict.fromkeys(amounts, "0.0012")
        done = 0

        async def lifecycle() -> None:
            nonlocal done
            hold = await self._limiter.reserve(amounts)
            await hold.commit(spent)
            done += 1

        self._client.config_resetstat()
        await per_call_us(lifecycle, callers, lifecycles)
        usec, calls = self._counted()
        batch = 2 * done / calls
        if batched and batch < _BATCH_LEAST:
            raise RuntimeError(f"a batch carried only {batch:.0f} operations")
        return usec / done, batch

    def floor_us(self, n_budgets: int) -> float:
        """Server time of the bare commands of one lone lifecycle in µs."""
        self._client.config_resetstat()
        self._floors[n_budgets].run(_FLOOR_LIFECYCLES)
        return self._counted()[0] / _FLOOR_LIFECYCLES

    def _counted(self) -> tuple[int, int]:
        stats: Any = self._client.info("commandstats")
        counted = [stats[name] for name in _SCRIPT_CALLS if name in stats]
        return sum(each["usec"] for each in counted), sum(each["calls"] for each in counted)


async def server_time(settings: Settings) -> list[Measure]:
    """Measure lifecycles with 1 and with 6 budgets in a reservation, in batches and singly."""
    plans = {
        ("1 budget", True): (_ONE, settings.size(8_000, 3_000), 0.30),
        ("1 budget", False): (_ONE, settings.size(1_000, 300), 1.6),
        ("6 budgets", True): (_SIX, settings.size(4_000, 1_500), 0.30),
        ("6 budgets", False): (_SIX, settings.size(1_000, 300), 1.6),
    }
    taken: dict[tuple[str, bool], list[Figures]] = {key: [] for key in plans}
    with running(settings.store) as server:
        async with AsyncBudgetLimiter(server.url, _BUDGETS, timeout=30) as limiter:
            meter = Meter(server, limiter)
            for number in range(settings.rounds(11, 5) + 1):
                for key, (amounts, lifecycles, _) in plans.items():
                    floor_us = meter.floor_us(len(amounts))
                    us, batch = await meter.lifecycle_us(amounts, lifecycles, batched=key[1])
                    if number:
                        taken[key].append(Figures(us, floor_us, batch))
    measures = []
    for (budgets, batched), rounds in taken.items():
        how = "batched" if batched else "single"
        us, floor_us, size = (statistics.median(column) for column in zip(*rounds, strict=True))
        measures.append(
            Measure(
                f"server_time_{budgets.replace(' ', '_')}_{how}",
                f"server time of a lifecycle, {budgets}, {how}, to its bare commands in a script each",
                "x",
                tuple(figures.lifecycle_us / figures.floor_us for figures in rounds),
                at_most(plans[budgets, batched][2]),
                detail=f"{us:.1f} µs; bare commands {floor_us:.1f} µs; {size:.0f} operations a call",
            )
        )
    return measures


async def full_store(settings: Settings) -> list[Measure]:
    """Compare the server time of a lifecycle in a store full of holds and ledger entries and in an empty store."""
    count = settings.size(1_000_000, 100_000)
    plans = {"batched": settings.size(8_000, 3_000), "single": settings.size(1_000, 300)}
    ratios: dict[str, list[float]] = {how: [] for how in plans}
    figures: dict[str, list[tuple[float, float, float]]] = {how: [] for how in plans}
    with running(settings.store) as server, running(settings.store) as empty_server:
        async with (
            AsyncBudgetLimiter(server.url, _BUDGETS, timeout=60, max_holds=10 * count) as limiter,
            AsyncBudgetLimiter(empty_server.url, _BUDGETS, timeout=60) as empty_limiter,
        ):
            await _fill(limiter, count)
            full, empty = Meter(server, limiter), Meter(empty_server, empty_limiter)
            for number in range(settings.rounds(11, 5) + 1):
                for how, lifecycles in plans.items():
                    batched = how == "batched"
                    theirs, _ = await empty.lifecycle_us(_ONE, lifecycles, batched=batched)
                    own, _ = await full.lifecycle_us(_ONE, lifecycles, batched=batched)
                    if number:
                        ratios[how].append(own / theirs)
                        figures[how].append((own, theirs, empty.floor_us(1)))
    return [
        Measure(
            f"server_time_full_store_{how}",
            f"the same with {count:,} open holds and {count:,} ledger entries, 1 budget, {how}, to an empty store",
            "x",
            tuple(ratios[how]),
            at_most(1.4),
            detail="{:.1f} µs; empty {:.1f} µs; bare commands {:.1f} µs".format(
                *(statistics.median(column) for column in zip(*figures[how], strict=True))
            ),
        )
        for how in plans
    ]


async def _fill(limiter: AsyncBudgetLimiter, count: int) -> None:
    """Fill the store by public calls, so that its content is that of real use."""

    async def hold() -> None:
        await limiter.reserve("agent", "0.0001", ttl=86_400)

    async def entry() -> None:
        await limiter.record("agent", "0.0001")

    for call in (hold, entry):
        await per_call_us(call, _CALLERS, count)
