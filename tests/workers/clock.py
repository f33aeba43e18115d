"""One replica, whose clock may be wrong: it spends, and prints its own date and the window of its spend.

Options: `url, budget, timezone, started`. It prints "ready", reads a line, spends, and prints its figures.
"""

import asyncio
import json
import sys
from datetime import UTC, datetime

from ktrdr_budget import AsyncBudgetLimiter, Budget


def send(line: object) -> None:
    print(json.dumps(line), flush=True)


async def main(options: dict) -> None:
    send("ready")
    sys.stdin.readline()
    budget = Budget(options["budget"], "5.00", timezone=options["timezone"])
    limiter = AsyncBudgetLimiter(options["url"], [budget], timeout=10.0)
    if options["started"]:
        await limiter.start()
    hold = await limiter.reserve(budget.name, "0.15")
    await hold.commit("0.07")
    await limiter.record(budget.name, "0.02")
    status = await limiter.status(budget.name)
    send(
        {
            "own_date": f"{datetime.now(UTC):%Y-%m-%d}",
            "window": hold.windows[budget.name],
            "status_window": status.window,
            "spent": str(status.spent),
            "as_of": status.as_of.isoformat(),
        }
    )
    await limiter.close()


def run(options: dict) -> None:
    asyncio.run(main(options))
