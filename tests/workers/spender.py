"""One replica in a race for a cap: it reserves until the budget is exhausted.

Options: `url, limit, amounts, callers, ttl, settle, worker`. It prints "ready", reads a line, reserves, and prints how
many units were granted to it and how many it has committed.
"""

import asyncio
import json
import random
import sys
from decimal import Decimal

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded
from ktrdr_budget.money import to_units


def send(line: object) -> None:
    print(json.dumps(line), flush=True)


class Spender:
    def __init__(self, limiter: AsyncBudgetLimiter, options: dict) -> None:
        self.limiter = limiter
        self.options = options
        self.random = random.Random(options["worker"])
        self.granted = self.committed = self.grants = 0

    async def spend(self) -> None:
        owner = f"worker-{self.options['worker']}"
        while True:
            amount = Decimal(self.random.choice(self.options["amounts"]))
            try:
                hold = await self.limiter.reserve(
                    "agent", amount, ttl=self.options["ttl"], owner=owner, operation=owner
                )
            except BudgetExceeded as denial:
                # Held money may be released: by a commit of less, or on expiry.
                if denial.reason == "budget_held" and self.options["settle"]:
                    await asyncio.sleep(0.002)
                    continue
                return
            self.granted += to_units(amount)
            self.grants += 1
            if self.options["settle"]:
                await self.settle(hold, amount)

    async def settle(self, hold, amount: Decimal) -> None:
        fraction = self.random.choice(("0", "0.25", "0.5", "1", None))
        if fraction is None:
            await hold.release()
        else:
            settlement = await hold.commit(amount * Decimal(fraction))
            self.committed += to_units(settlement.amounts["agent"])


async def main(options: dict) -> None:
    budget = Budget("agent", options["limit"])
    async with AsyncBudgetLimiter(options["url"], [budget], timeout=20.0) as limiter:
        send("ready")
        await asyncio.to_thread(sys.stdin.readline)
        spender = Spender(limiter, options)
        await asyncio.gather(*(spender.spend() for _ in range(options["callers"])))
    send({"granted": spender.granted, "committed": spender.committed, "grants": spender.grants})


def run(options: dict) -> None:
    asyncio.run(main(options))
