"""A replica that makes every kind of call that changes the ledger. When it reads a line, it stops and prints its spend.

Options: `url, callers, worker`. Some of its holds expire; most of those are later committed, released or extended.
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
ABANDONED_FOR_S = 1.3


def send(line: object) -> None:
    print(json.dumps(line), flush=True)


class Bookkeeper:
    def __init__(self, limiter: AsyncBudgetLimiter, options: dict) -> None:
        self.limiter = limiter
        self.random = random.Random(options["worker"])
        self.stop = asyncio.Event()
        self.spent = self.calls = 0
        self.abandoned: list = []

    async def work(self) -> None:
        while not self.stop.is_set():
            self.calls += 1
            amount = Decimal(self.random.choice(("0.01", "0.003", "0.0000007")))
            chance = self.random.random()
            if chance < 0.1:
                self.count(await self.limiter.record("agent", amount))
                continue
            if chance < 0.12:
                hold = await self.limiter.reserve({"agent": amount, "tokens": 7}, ttl=1, on_expiry=self.policy())
                self.abandoned.append((time.monotonic() + ABANDONED_FOR_S, hold))
                continue
            hold = await self.limiter.reserve({"agent": amount, "tokens": 5, "jobs": 1}, ttl=60)
            hold.accrue({"agent": amount * 2})
            if chance < 0.3:
                await hold.extend()
            elif chance < 0.4:
                await hold.grow({"agent": "0.01"})
            await self.settle(hold)
            while self.abandoned and self.abandoned[0][0] < time.monotonic():
                await self.resume(self.abandoned.pop(0)[1])

    def policy(self) -> str:
        return self.random.choice(("charge", "accrued", "release"))

    async def resume(self, hold) -> None:
        chance = self.random.random()
        if chance < 0.3:
            await hold.extend(60)
        if chance < 0.9:
            await self.settle(hold)

    async def settle(self, hold) -> None:
        if self.random.random() < 0.3:
            await hold.release()
        else:
            self.count(await hold.commit())

    def count(self, settlement) -> None:
        self.spent += to_units(settlement.amounts["agent"])


async def main(options: dict) -> None:
    async with AsyncBudgetLimiter(options["url"], BUDGETS, timeout=20.0) as limiter:
        send("ready")
        await asyncio.to_thread(sys.stdin.readline)
        keeper = Bookkeeper(limiter, options)
        callers = [asyncio.create_task(keeper.work()) for _ in range(options["callers"])]
        await asyncio.to_thread(sys.stdin.readline)
        keeper.stop.set()
        await asyncio.gather(*callers)
    send({"spent": keeper.spent, "calls": keeper.calls})


def run(options: dict) -> None:
    asyncio.run(main(options))
