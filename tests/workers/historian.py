"""One of several replicas that make random calls about the same ids and record each call with its reply.

Options: `url, limits, tasks, calls, ids, seed, worker`. It prints "ready", waits for a line, and prints its history, a
list of `{call, id, amounts, began, ended, reply, settled, late}`. Times are nanoseconds of the monotonic clock.
"""

import asyncio
import json
import random
import sys
import time

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetError
from ktrdr_budget.money import from_units, to_units


def send(line: object) -> None:
    print(json.dumps(line), flush=True)


def contents(hold_id: str, budgets: list) -> dict:
    """The amounts, in units, that every replica requests for this id."""
    chance = random.Random(hold_id)
    names = chance.sample(budgets, chance.choice((1, 1, 2)))
    return {name: chance.randrange(1, 300) * 10**6 + chance.randrange(2) for name in names}


class Historian:
    def __init__(self, limiter: AsyncBudgetLimiter, options: dict) -> None:
        self.limiter = limiter
        self.options = options
        self.budgets = sorted(options["limits"])
        self.random = random.Random(f"{options['seed']} {options['worker']}")
        self.history: list = []

    async def run(self) -> None:
        for _ in range(self.options["calls"]):
            # New ids come into use gradually, so several replicas meet at each.
            progress = len(self.history) * self.options["ids"] // (self.options["calls"] * self.options["tasks"])
            number = max(0, progress - self.random.randrange(12))
            call = self.random.choice(("reserve",) * 4 + ("commit",) * 3 + ("release", "record", "extend", "grow"))
            await getattr(self, call)(f"{'spent' if call == 'record' else 'op'}-{number}")

    async def reserve(self, hold_id: str) -> None:
        requested = contents(hold_id, self.budgets)
        if self.random.random() < 0.1:  # other contents
            requested = {name: units + 7 for name, units in requested.items()}
        reply = self.limiter.reserve(as_money(requested), id=hold_id, ttl=self.ttl())
        await self.execute("reserve", hold_id, requested, reply)

    async def commit(self, hold_id: str) -> None:
        share = self.random.choice((0, 25, 40, 150))
        spent = {name: units * share // 100 for name, units in contents(hold_id, self.budgets).items()}
        await self.execute("commit", hold_id, spent, self.limiter.commit(hold_id, as_money(spent)))

    async def release(self, hold_id: str) -> None:
        await self.execute("release", hold_id, {}, self.limiter.release(hold_id))

    async def record(self, hold_id: str) -> None:
        spent = contents(hold_id, self.budgets)
        await self.execute("record", hold_id, spent, self.limiter.record(as_money(spent), id=hold_id))

    async def extend(self, hold_id: str) -> None:
        await self.execute("extend", hold_id, {}, self.limiter.extend(hold_id, self.ttl()))

    async def grow(self, hold_id: str) -> None:
        totals = {name: units * 5 // 4 for name, units in contents(hold_id, self.budgets).items()}
        await self.execute("grow", hold_id, totals, self.limiter.grow(hold_id, as_money(totals), ttl=self.ttl()))

    def ttl(self) -> int:
        return self.random.choice((1, 60))

    async def execute(self, call: str, hold_id: str, amounts: dict, awaitable) -> None:
        began = time.monotonic_ns()
        try:
            reply = await awaitable
            settled = {name: to_units(amount) for name, amount in reply.amounts.items()}
            word = "replayed" if getattr(reply, "replayed", False) else "done"
            late = getattr(reply, "late", False)
        except BudgetError as error:
            word, settled, late = type(error).__name__, {}, False
        entry = {"call": call, "id": hold_id, "amounts": amounts, "began": began, "ended": time.monotonic_ns()}
        self.history.append({**entry, "reply": word, "settled": settled, "late": late})


def as_money(amounts: dict) -> dict:
    return {name: from_units(units) for name, units in amounts.items()}


async def main(options: dict) -> None:
    budgets = [Budget(name, limit, period="ever") for name, limit in options["limits"].items()]
    async with AsyncBudgetLimiter(options["url"], budgets, timeout=30.0) as limiter:
        send("ready")
        await asyncio.to_thread(sys.stdin.readline)
        historian = Historian(limiter, options)
        await asyncio.gather(*(historian.run() for _ in range(options["tasks"])))
    send(historian.history)


def run(options: dict) -> None:
    asyncio.run(main(options))
