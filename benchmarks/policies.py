"""The cost of the outage policies while the store is reachable. Limiters with different policies take turns."""

from __future__ import annotations

import statistics
from contextlib import AsyncExitStack
from typing import Any

from benchmarks.client import Call, per_call_us
from benchmarks.measures import Measure, Settings, at_most
from benchmarks.servers import running
from ktrdr_budget import AsyncBudgetLimiter, Budget

__all__ = ["policies"]

_CALLERS = 100
_CALLS = 500
_POLICIES: dict[str, dict[str, Any]] = {
    "deny": {},
    "allow": {"on_store_error": "allow"},
    "lease": {"on_store_error": "lease", "lease_slab": "10"},
}


def _reserve(limiter: AsyncBudgetLimiter) -> Call:
    return lambda: limiter.reserve("agent", "0.0015")


async def policies(settings: Settings) -> list[Measure]:
    """Compare the time of a reservation under ``allow`` and ``lease`` with its time under ``deny``."""
    rounds, turns = settings.rounds(15), settings.size(15, 5)
    with running(settings.store) as server:
        async with AsyncExitStack() as stack:
            limiters = {
                name: await stack.enter_async_context(
                    AsyncBudgetLimiter(server.url, [Budget("agent", "5000000")], timeout=30, max_holds=10**7, **options)
                )
                for name, options in _POLICIES.items()
            }

            order = list(limiters)

            async def round_us() -> dict[str, float]:
                taken: dict[str, list[float]] = {name: [] for name in limiters}
                for _ in range(turns):
                    for name in order:
                        taken[name].append(await per_call_us(_reserve(limiters[name]), _CALLERS, _CALLS))
                    order.append(order.pop(0))  # so that no policy always follows the same one
                return {name: statistics.median(blocks) for name, blocks in taken.items()}

            await round_us()  # connects
            taken = [await round_us() for _ in range(rounds)]
    plain = statistics.median(one["deny"] for one in taken)
    return [
        Measure(
            f"policy_{name}_to_deny",
            f"reserve, {_CALLERS} callers, policy {name}, to policy deny",
            "x",
            tuple(one[name] / one["deny"] for one in taken),
            at_most(1.03),
            detail=f"deny {plain:.1f} µs",
        )
        for name in ("allow", "lease")
    ]
