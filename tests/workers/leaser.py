"""One replica that spends from a lease until the budget has no room for the smallest of its amounts.

Options: `url, limit, slab, amounts, callers, ttl, seed, worker`. It prints "ready", reads a line, spends, and prints
how many units it has spent and the reason of the last denial.
"""

import asyncio
import json
import random
import sys

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded
from ktrdr_budget.money import to_units


def send(line: object) -> None:
    print(json.dumps(line), flush=True)


async def main(options: dict) -> None:
    chance = random.Random(options["seed"] + options["worker"])
    amounts = options["amounts"]
    smallest = min(amounts, key=to_units)
    budget = Budget("agent", options["limit"])
    spent = 0
    last = ""
    async with AsyncBudgetLimiter(options["url"], [budget], timeout=20.0) as limiter:
        async with limiter.lease("agent", options["slab"], ttl=options["ttl"], idle=0.2) as lease:
            send("ready")
            await asyncio.to_thread(sys.stdin.readline)

            async def spend() -> None:
                nonlocal spent, last
                while True:
                    amount = chance.choice(amounts)
                    try:
                        grant = await lease.acquire(amount)
                    except BudgetExceeded as denied:
                        last = denied.reason
                        if denied.reason == "budget_held":  # other leases may return their rest
                            await asyncio.sleep(0.02)
                        elif amount == smallest:
                            return
                        continue
                    if chance.random() < 0.2:
                        await asyncio.sleep(0)
                    if chance.random() < 0.1:
                        grant.release()
                        continue
                    cost = to_units(amount) if chance.random() < 0.5 else chance.randrange(1, to_units(amount) + 1)
                    grant.commit(f"{cost / 10**9:.9f}")
                    spent += cost

            await asyncio.gather(*(spend() for _ in range(options["callers"])))
            assert to_units(lease.spent) == spent
    send({"spent": spent, "last": last})


def run(options: dict) -> None:
    asyncio.run(main(options))
