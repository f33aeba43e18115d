"""One replica whose own clock may be wrong by a day: spends once, and tells its own date and the window it spent in.

Options: `url, budget, timezone, started`. Says "ready", waits for a line, and says what it did.
"""

import asyncio
import json
import sys
from datetime import UTC, datetime

from ktrdr_budget import AsyncBudgetLimiter, Budget


def say(words: object) -> None:
    print(json.dumps(words), flush=True)


async def main(options: dict) -> None:
    say("ready")
    sys.stdin.readline()
    budget = Budget(options["budget"], "5.00", timezone=options["timezone"])
    limiter = AsyncBudgetLimiter(options["url"], [budget], timeout=10.0)
    if options["started"]:
        await limiter.start()
    hold = await limiter.reserve(budget.name, "0.15")
    await hold.commit("0.07")
    await limiter.record(budget.name, "0.02")
    status = await limiter.status(budget.name)
    say(
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
