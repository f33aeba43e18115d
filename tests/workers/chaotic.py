"""One replica of the chaos bench: callers that spend, insist, give up or are cancelled, and write down every call.

Options: `url, tenants, budgets, timeout, timeouts, callers, pause_ms, cancels, leaves, limiter, history, seed, worker,
number`. Each call is written twice: when it begins, and when it has ended; so what was under way when the process was
killed is known. A line of the file, instants in nanoseconds of the machine's monotonic clock:

    {"n", "at", "call", "tenant", "id", "asked", "ttl_ms", "policy"}    begun; amounts in whole units
    {"n", "at", "word", "told", "windows", "ambiguous", "hold_id"}      ended: done, replayed, …, or an error
    {"at", "stood_ns"}    until then, this process did not get to anything: others had the machine, or it was busy

It is told `go`, later `stop`: it then asks again about every call whose outcome it does not know, and says what it saw.
"""

import asyncio
import contextlib
import json
import logging
import os
import random
import sys
import time

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetError, StoreUnavailable
from ktrdr_budget.money import from_units, to_units

SETTLING_S = 120.0
ASKED_AT_ONCE = 50
LOOK_S = 0.005
STOOD_S = 0.01
"""How late a timer of this length is before that counts as standing still."""
SHARED_EACH_S = 0.05
"""A new id that all replicas know is born this often."""


def say(words: object) -> None:
    print(json.dumps(words), flush=True)


class History:
    """Appended line by line with one write each: a killed process leaves all that it had written."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._number = 0

    def begin(self, **words) -> int:
        self._number += 1
        self._write({"n": self._number, "at": time.monotonic_ns(), **words})
        return self._number

    def end(self, number: int, **words) -> None:
        self._write({"n": number, "at": time.monotonic_ns(), **words})

    async def watch(self) -> None:
        """Writes down whenever the event loop stood still: no deadline can be kept meanwhile, and no answer heard."""
        while True:
            before_ns = time.monotonic_ns()
            await asyncio.sleep(LOOK_S)
            stood_ns = time.monotonic_ns() - before_ns - int(LOOK_S * 1e9)
            if stood_ns > STOOD_S * 1e9:
                self._write({"at": time.monotonic_ns(), "stood_ns": stood_ns})

    def _write(self, words: dict) -> None:
        os.write(self._file, json.dumps(words, separators=(",", ":")).encode() + b"\n")


class Told:
    """How a call ended."""

    def __init__(self, word: str, reply=None, *, ambiguous: bool = False) -> None:
        self.word = word
        self.reply = reply
        self.ambiguous = ambiguous

    @property
    def done(self) -> bool:
        return self.word in ("done", "replayed", "unguarded", "prepaid", "deferred")


class Replica:
    """Many callers on one limiter of one tenant."""

    def __init__(self, limiter: AsyncBudgetLimiter, history: History, options: dict) -> None:
        self.limiter = limiter
        self.history = history
        self.options = options
        self.name = f"{options['number']}.{options['worker']}"
        self.random = random.Random(f"{options['seed']} {self.name}")
        self.capped = [b for b in limiter.budgets.values() if b.limit is not None]
        self.uncapped = [b for b in limiter.budgets.values() if b.limit is None]
        self.unknown: dict[tuple[str, str], object] = {}
        """Calls whose outcome nobody knows yet, by name and id: how to ask again."""
        self.stopping = False
        self.began = time.monotonic()

    async def told(self, call: str, hold_id, asked: dict, make, *, cancels: float = 0.0, **words) -> Told:
        """Makes one call, and writes it down."""
        known = {"call": call, "tenant": self.limiter.tenant, "id": hold_id, "asked": asked}
        number = self.history.begin(**known, **words)
        task = asyncio.ensure_future(make())
        if self.random.random() < cancels:
            asyncio.get_running_loop().call_later(self.random.uniform(0, 0.004), task.cancel)
        told = await outcome(task)
        entry: dict = {"word": told.word, "ambiguous": told.ambiguous}
        if told.done:
            entry["told"] = {name: units_of(self.limiter, name, value) for name, value in told.reply.amounts.items()}
            entry["windows"] = dict(getattr(told.reply, "windows", {}))
            entry["hold_id"] = told.reply.id
        self.history.end(number, **entry)
        return told

    async def insists(self, times: int, call: str, hold_id, asked: dict, make, **words) -> Told:
        """The same again while there is no answer; what stays unknown is kept for later."""
        told = await self.told(call, hold_id, asked, make, **words)
        words["cancels"] = 0.0
        if call == "reserve" and told.word == "cancelled":  # what it was granted, the limiter gives back
            return told
        while times > 0 and told.word in ("StoreUnavailable", "cancelled"):
            times -= 1
            told = await self.told(call, hold_id, asked, make, **words)
        if hold_id is not None:
            if told.word in ("StoreUnavailable", "cancelled", "StoreError"):
                self.unknown[call, hold_id] = lambda: self.told(call, hold_id, asked, make, **words)
            else:
                self.unknown.pop((call, hold_id), None)
        return told

    # -- what callers do -----------------------------------------------------------------------------------------------

    async def works(self, number: int) -> None:
        turn = 0
        while not self.stopping:
            await asyncio.sleep(self.random.expovariate(1000 / self.options["pause_ms"]))
            turn += 1
            chance = self.random.random()
            if chance < 0.12:
                await self.records(f"fact-{self.name}-{number}-{turn}")
            elif chance < 0.22:
                await self.holds(f"shared-{int((time.monotonic_ns() / 1e9) / SHARED_EACH_S)}", shared=True)
            elif chance < 0.32:
                await self.holds(None)
            else:
                await self.holds(f"op-{self.name}-{number}-{turn}")

    async def records(self, hold_id: str) -> None:
        budget = self.random.choice(self.uncapped)
        asked = {budget.name: self.random.randrange(1, 10**7)}
        times = self.random.choice((0, 2, 5))
        await self.insists(times, "record", hold_id, asked, lambda: self.limiter.record(as_money(asked), id=hold_id))

    async def holds(self, hold_id: str | None, *, shared: bool = False) -> None:
        chance = random.Random(hold_id) if shared else self.random
        names = [budget.name for budget in chance.sample(self.capped, chance.choice((1, 1, 2, len(self.capped))))]
        asked = {
            name: 1 if self.limiter.budgets[name].kind == "slots" else chance.randrange(1, 300) * 10**6 + 1
            for name in names
        }
        policy = chance.choice(("charge", "charge", "accrued", "release"))
        ttl = chance.choice((1, 2))

        def make():
            return self.limiter.reserve(as_money(asked), id=hold_id, ttl=ttl, on_expiry=policy, operation=self.name)

        words = {"ttl_ms": ttl * 1000, "policy": policy}
        times = 0 if hold_id is None else self.random.choice((0, 1, 3))
        cancels = 0.0 if shared else self.options["cancels"]
        told = await self.insists(times, "reserve", hold_id, asked, make, cancels=cancels, **words)
        if told.done and told.reply.state == "open":
            await self.uses(told.reply, chance, shared)

    async def uses(self, hold, chance: random.Random, shared: bool) -> None:
        share = chance.choice((0, 5, 25, 50, 100))
        spent = {w.budget: 0 if w.flag == "s" else units * share // 100 for w, units in hold.parts}
        if not shared:
            await asyncio.sleep(self.random.expovariate(200))
            if self.random.random() < 0.25:
                await self.reports(hold, spent)
        way = chance.choice(("commit",) * 5 + ("release", "leave") + ("by id",) * 2)
        if way == "leave" and self.options["leaves"]:
            return
        if way == "release":
            await self.insists(4, "release", hold.id, {}, hold.release, cancels=self.options["cancels"])
            return
        own = way == "commit"
        money = as_money(spent)
        make = (lambda: hold.commit(money)) if own else (lambda: self.limiter.commit(hold.id, money))
        await self.insists(4, "commit", hold.id, spent, make, cancels=self.options["cancels"] if own else 0.0)

    async def reports(self, hold, spent: dict) -> None:
        """A heartbeat with a part of what it is going to commit, or growth."""
        if self.random.random() < 0.5:
            accrued = {name: units // 2 for name, units in spent.items() if units // 2}
            hold.accrue_to(as_money(accrued))
            await self.told("extend", hold.id, accrued, hold.extend)
        else:
            more = {w.budget: 10**6 for w, _ in hold.parts if w.flag != "s"}
            grown = {w.budget: units + more.get(w.budget, 0) for w, units in hold.parts}
            await self.told("grow", hold.id, grown, lambda: hold.grow(as_money(more)) if more else hold.extend())

    # -- the end -------------------------------------------------------------------------------------------------------

    async def settles(self) -> None:
        """Asks again about whatever it does not know, until it does."""
        ends = time.monotonic() + SETTLING_S
        while self.unknown and time.monotonic() < ends:
            await asyncio.gather(*(self.asks_again(key) for key in [*self.unknown][:ASKED_AT_ONCE]))
            await asyncio.sleep(0.05)
        while (self.limiter.deferred or getattr(self.limiter, "unresolved", 0)) and time.monotonic() < ends:
            await asyncio.sleep(0.05)

    async def asks_again(self, key: tuple[str, str]) -> None:
        answer = await self.unknown[key]()
        if answer.word in ("StoreUnavailable", "StoreError"):
            self.unknown[key] = self.unknown.pop(key)  # the others come first
            return
        del self.unknown[key]
        if key[0] == "reserve" and answer.done and answer.reply.state == "open":
            await self.insists(9, "release", answer.reply.id, {}, answer.reply.release)

    def report(self) -> dict:
        return {
            "replica": self.limiter.replica_id,
            "tenant": self.limiter.tenant,
            "losses": self.limiter.losses,
            "unknown": len(self.unknown),
            "deferred": self.limiter.deferred,
            "unresolved": getattr(self.limiter, "unresolved", 0),
        }


async def outcome(task: asyncio.Future) -> Told:
    try:
        reply = await task
    except asyncio.CancelledError:
        return Told("cancelled", ambiguous=True)
    except BudgetError as error:
        if type(error) is BudgetError:  # a bug of the limiter: the judge shows its words
            return Told(f"!{error}"[:200])
        ambiguous = isinstance(error, StoreUnavailable) and error.ambiguous
        return Told(type(error).__name__, error, ambiguous=ambiguous)
    except Exception as error:  # no call may end like this: the judge says so
        return Told(f"!{type(error).__name__}: {error}"[:200])
    if not hasattr(reply, "amounts"):  # extend and grow return nothing
        return Told("heard")
    if getattr(reply, "offline", None) is not None:
        return Told("prepaid" if reply.cap_checked else "unguarded", reply)
    if getattr(reply, "deferred", False):
        return Told("deferred", reply)
    return Told("replayed" if getattr(reply, "replayed", False) else "done", reply)


def units_of(limiter: AsyncBudgetLimiter, name: str, amount) -> int:
    return to_units(amount, limiter.budgets[name].unit)


def as_money(asked: dict) -> dict:
    return {name: units if name == "jobs" else from_units(units) for name, units in asked.items()}


async def main(options: dict) -> None:
    history = History(options["history"].format(**options))
    tenant = options["tenants"][(options["number"] + options["worker"]) % len(options["tenants"])]
    budgets = [Budget(**spec) for spec in options["budgets"]]
    timeout = options["timeouts"].get(tenant, options["timeout"])
    limiter = AsyncBudgetLimiter(options["url"], budgets, tenant=tenant, timeout=timeout, **options["limiter"])
    say("ready")
    lines = asyncio.Queue()
    loop = asyncio.get_running_loop()
    loop.run_in_executor(None, listen, loop, lines)
    await lines.get()
    replica = Replica(limiter, history, options)
    watching = asyncio.create_task(history.watch())
    with contextlib.suppress(StoreUnavailable):
        await limiter.start()
    callers = [asyncio.create_task(replica.works(number)) for number in range(options["callers"])]
    await lines.get()
    replica.stopping = True
    await asyncio.gather(*callers)
    await replica.settles()
    say(replica.report())
    await lines.get()
    say(replica.report())
    await limiter.close()
    watching.cancel()


def listen(loop: asyncio.AbstractEventLoop, lines: asyncio.Queue) -> None:
    """A thread hears what the bench says; its end is the end of the bench."""
    for line in iter(sys.stdin.readline, ""):
        loop.call_soon_threadsafe(lines.put_nowait, json.loads(line))
    os._exit(1)


def run(options: dict) -> None:
    # What the limiter says of faults would fill the screen; it goes beside the history.
    logging.basicConfig(filename=options["history"].format(**options) + ".log", format="%(asctime)s %(message)s")
    asyncio.run(main(options))
