"""One replica under policy `lease`: it reads one command per line and prints one reply per line.

Options: `url, limit, slab, seed, worker`. The reply to `{"do": "ready"}` comes once the replica has its prepaid chunk.
The command `{"do": "spend", "amounts": […]}`, sent during an outage, reserves and commits each amount; the reply has
the number of units spent and the number of refused reservations.
"""

import asyncio
import json
import random
import sys

from ktrdr_budget import AsyncBudgetLimiter, Budget, StoreUnavailable
from ktrdr_budget.money import to_units


def say(words: object) -> None:
    print(json.dumps(words), flush=True)


async def spend(limiter: AsyncBudgetLimiter, amounts: list[str], chance: random.Random) -> dict:
    spent = refused = 0
    for amount in amounts:
        try:
            hold = await limiter.reserve("agent", amount)
        except StoreUnavailable:
            refused += 1
            continue
        assert hold.offline is not None
        assert hold.cap_checked
        if chance.random() < 0.2:
            await hold.release()
            continue
        cost = chance.randrange(1, to_units(amount) + 1)
        settlement = await hold.commit(f"{cost / 10**9:.9f}")
        assert settlement.deferred
        spent += cost
    return {"spent": spent, "refused": refused}


async def main(options: dict) -> None:
    budget = Budget("agent", options["limit"])
    chance = random.Random(options["seed"] + options["worker"])
    async with AsyncBudgetLimiter(
        options["url"], [budget], timeout=0.3, on_store_error="lease", lease_slab=options["slab"]
    ) as limiter:
        say("ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            order = json.loads(line)
            if order["do"] == "ready":
                while limiter.prepaid != {"agent": budget.limit.__class__(options["slab"])}:
                    await asyncio.sleep(0.01)
                say("prepaid")
            else:
                say(await spend(limiter, order["amounts"], chance))


def run(options: dict) -> None:
    asyncio.run(main(options))
