"""A process of `benchmarks/cluster.py`: reads a number per line, and makes that many reservations for a tenant."""

from __future__ import annotations

import asyncio
import json
import sys
import time

from benchmarks.client import per_call_us
from ktrdr_budget import AsyncBudgetLimiter, Budget


async def main(url: str, tenant: str, callers: int) -> None:
    """Print a line when the process is ready, then a line with the begin and the end of each block of calls."""
    budgets = [Budget("agent", limit="5000000")]
    async with AsyncBudgetLimiter(url, budgets, tenant=tenant, timeout=30, max_holds=10**7) as limiter:
        begun = time.time()
        while True:
            print(json.dumps([begun, time.time()]), flush=True)
            line = await asyncio.to_thread(sys.stdin.readline)
            if not line:
                return
            begun = time.time()
            await per_call_us(lambda: limiter.reserve("agent", "0.0015"), callers, int(line))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
