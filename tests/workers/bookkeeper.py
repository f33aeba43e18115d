"""A replica that does everything that books must follow, until it is told to stop; then it says what it has spent.

Options: `url, callers, worker`. Some of its holds expire, and are committed, revived or released after that.
"""

import asyncio
import json
import random
import sys
import time
from decimal import Decimal

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.money import to_units

BUDGETS = [
    Budget("agent", "4000000"),
    Budget("tokens", 10**9, unit="tokens", period="ever"),
    Budget("jobs", 10**6, kind="slots"),
]
FORGOTTEN_FOR_S = 1.3


def say(words: object) -> None:
    print(json.dumps(words), flush=True)


class Bookkeeper:
    def __init__(self, limiter: AsyncBudgetLimiter, options: dict) -> None:
        self.limiter = limiter
        self.random = random.Random(options["worker"])
        self.stop = asyncio.Event()
        self.spent = self.calls = 0
        self.forgotten: list = []

    async def work(self) -> None:
        while not self.stop.is_set():
            self.calls += 1
            amount = Decimal(self.random.choice(("0.01", "0.003", "0.0000007")))
            dice = self.random.random()
            if dice < 0.1:
                self.take(await self.limiter.record("agent", amount))
                continue
            if dice < 0.12:
                hold = await self.limiter.reserve({"agent": amount, "tokens": 7}, ttl=1, on_expiry=self.policy())
                self.forgotten.append((time.monotonic() + FORGOTTEN_FOR_S, hold))
                continue
            hold = await self.limiter.reserve({"agent": amount, "tokens": 5, "jobs": 1}, ttl=60)
            hold.accrue({"agent": amount * 2})
            if dice < 0.3:
                await hold.extend()
            elif dice < 0.4:
                await hold.grow({"agent": "0.01"})
            await self.settle(hold)
            while self.forgotten and self.forgotten[0][0] < time.monotonic():
                await self.remember(self.forgotten.pop(0)[1])

    def policy(self) -> str:
        return self.random.choice(("charge", "accrued", "release"))

    async def remember(self, hold) -> None:
        dice = self.random.random()
        if dice < 0.3:
            await hold.extend(60)
        if dice < 0.9:
            await self.settle(hold)

    async def settle(self, hold) -> None:
        if self.random.random() < 0.3:
            await hold.release()
        else:
            self.take(await hold.commit())

    def take(self, settlement) -> None:
        self.spent += to_units(settlement.amounts["agent"])


async def main(options: dict) -> None:
    async with AsyncBudgetLimiter(options["url"], BUDGETS, timeout=20.0) as limiter:
        say("ready")
        await asyncio.to_thread(sys.stdin.readline)
        keeper = Bookkeeper(limiter, options)
        callers = [asyncio.create_task(keeper.work()) for _ in range(options["callers"])]
        await asyncio.to_thread(sys.stdin.readline)
        keeper.stop.set()
        await asyncio.gather(*callers)
    say({"spent": keeper.spent, "calls": keeper.calls})


def run(options: dict) -> None:
    asyncio.run(main(options))
