"""One replica of the chaos bench. Its callers spend, retry, leave holds open or are cancelled; a file has every call.

Options: `url, tenants, budgets, timeout, timeouts, settling_timeout, callers, pause_ms, cancels, leaves, limiter,
history, seed, worker, number`. Each call has two lines in the file: one when it begins, one when it ends. So the file
shows which calls were in flight when the process was killed. The lines, with times in nanoseconds of the machine's
monotonic clock:

    {"n", "at", "call", "tenant", "id", "requested", "ttl_ms", "policy"}    a call begins; amounts in whole units
    {"n", "at", "outcome", "amounts", "windows", "ambiguous", "hold_id"}    it ends: done, replayed, …, or an error
    {"at", "stalled_ns"}    end and length of a stall: the process was busy, or had no core

Commands on stdin: `go`, then `stop`. After `stop`, the replica retries every call with an unknown outcome and prints a
report.
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
RETRIES_AT_ONCE = 50
TIMER_S = 0.005
STALL_MIN_S = 0.01
"""A longer delay of the timer counts as a stall."""
SHARED_EACH_S = 0.05
"""The ids that all replicas share change at this interval."""


def send(line: object) -> None:
    print(json.dumps(line), flush=True)


class History:
    """A file with one write per line: a killed process leaves every line that it has written."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._number = 0

    def begin(self, **fields) -> int:
        self._number += 1
        self._write({"n": self._number, "at": time.monotonic_ns(), **fields})
        return self._number

    def end(self, number: int, **fields) -> None:
        self._write({"n": number, "at": time.monotonic_ns(), **fields})

    async def watch(self) -> None:
        """Write each stall of the event loop to the file; during a stall no call can end and no reply is read."""
        while True:
            began_ns = time.monotonic_ns()
            await asyncio.sleep(TIMER_S)
            stalled_ns = time.monotonic_ns() - began_ns - int(TIMER_S * 1e9)
            if stalled_ns > STALL_MIN_S * 1e9:
                self._write({"at": time.monotonic_ns(), "stalled_ns": stalled_ns})

    def _write(self, fields: dict) -> None:
        os.write(self._file, json.dumps(fields, separators=(",", ":")).encode() + b"\n")


class CallResult:
    """The outcome of a call."""

    def __init__(self, outcome: str, reply=None, *, ambiguous: bool = False) -> None:
        self.outcome = outcome
        self.reply = reply
        self.ambiguous = ambiguous

    @property
    def done(self) -> bool:
        return self.outcome in ("done", "replayed", "unguarded", "prepaid", "deferred")


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
        """Functions that retry a call with an unknown outcome, by call and id."""
        self.stopping = False
        self.began = time.monotonic()

    async def call(self, call: str, hold_id, requested: dict, make, *, cancels: float = 0.0, **fields) -> CallResult:
        """Make one call; write a line when the call begins, and its outcome when it ends."""
        known = {"call": call, "tenant": self.limiter.tenant, "id": hold_id, "requested": requested}
        number = self.history.begin(**known, **fields)
        task = asyncio.ensure_future(make())
        if self.random.random() < cancels:
            asyncio.get_running_loop().call_later(self.random.uniform(0, 0.004), task.cancel)
        result = await result_of(task)
        entry: dict = {"outcome": result.outcome, "ambiguous": result.ambiguous}
        if result.done:
            entry["amounts"] = {
                name: units_of(self.limiter, name, value) for name, value in result.reply.amounts.items()
            }
            entry["windows"] = dict(getattr(result.reply, "windows", {}))
            entry["hold_id"] = result.reply.id
        self.history.end(number, **entry)
        return result

    async def call_with_retries(self, times: int, call: str, hold_id, requested: dict, make, **fields) -> CallResult:
        """Make a call; retry it if no reply arrives. If the outcome stays unknown, keep the call for a later retry."""
        result = await self.call(call, hold_id, requested, make, **fields)
        fields["cancels"] = 0.0
        if call == "reserve" and result.outcome == "cancelled":  # the limiter releases a grant
            return result
        while times > 0 and result.outcome in ("StoreUnavailable", "cancelled"):
            times -= 1
            ambiguous = result.ambiguous
            result = await self.call(call, hold_id, requested, make, **fields)
            result.ambiguous |= ambiguous
        if hold_id is not None:
            if call == "reserve" and result.outcome == "StoreUnavailable" and not result.ambiguous:
                return result  # certainly not granted: its caller gives up
            if result.outcome in ("StoreUnavailable", "cancelled", "StoreError"):
                self.unknown[call, hold_id] = lambda: self.call(call, hold_id, requested, make, **fields)
            else:
                self.unknown.pop((call, hold_id), None)
        return result

    # -- callers -------------------------------------------------------------------------------------------------------

    async def work(self, number: int) -> None:
        turn = 0
        while not self.stopping:
            await asyncio.sleep(self.random.expovariate(1000 / self.options["pause_ms"]))
            turn += 1
            chance = self.random.random()
            if chance < 0.12:
                await self.record(f"fact-{self.name}-{number}-{turn}")
            elif chance < 0.22:
                await self.hold(f"shared-{int((time.monotonic_ns() / 1e9) / SHARED_EACH_S)}", shared=True)
            elif chance < 0.32:
                await self.hold(None)
            else:
                await self.hold(f"op-{self.name}-{number}-{turn}")

    async def record(self, hold_id: str) -> None:
        budget = self.random.choice(self.uncapped)
        requested = {budget.name: self.random.randrange(1, 10**7)}
        times = self.random.choice((0, 2, 5))
        await self.call_with_retries(
            times, "record", hold_id, requested, lambda: self.limiter.record(as_money(requested), id=hold_id)
        )

    async def hold(self, hold_id: str | None, *, shared: bool = False) -> None:
        chance = random.Random(hold_id) if shared else self.random
        names = [budget.name for budget in chance.sample(self.capped, chance.choice((1, 1, 2, len(self.capped))))]
        requested = {
            name: 1 if self.limiter.budgets[name].kind == "slots" else chance.randrange(1, 300) * 10**6 + 1
            for name in names
        }
        policy = chance.choice(("charge", "charge", "accrued", "release"))
        ttl = chance.choice((1, 2))

        def make():
            return self.limiter.reserve(as_money(requested), id=hold_id, ttl=ttl, on_expiry=policy, operation=self.name)

        fields = {"ttl_ms": ttl * 1000, "policy": policy}
        times = 0 if hold_id is None else self.random.choice((0, 1, 3))
        cancels = 0.0 if shared else self.options["cancels"]
        result = await self.call_with_retries(times, "reserve", hold_id, requested, make, cancels=cancels, **fields)
        if result.done and result.reply.state == "open":
            await self.use(result.reply, chance, shared)

    async def use(self, hold, chance: random.Random, shared: bool) -> None:
        percent = chance.choice((0, 5, 25, 50, 100))
        spent = {w.budget: 0 if w.flag == "s" else units * percent // 100 for w, units in hold.parts}
        if not shared:
            await asyncio.sleep(self.random.expovariate(200))
            if self.random.random() < 0.25:
                await self.extend_or_grow(hold, spent)
        way = chance.choice(("commit",) * 5 + ("release", "leave") + ("by id",) * 2)
        if way == "leave" and self.options["leaves"]:
            return
        if way == "release":
            await self.call_with_retries(4, "release", hold.id, {}, hold.release, cancels=self.options["cancels"])
            return
        own = way == "commit"
        money = as_money(spent)
        make = (lambda: hold.commit(money)) if own else (lambda: self.limiter.commit(hold.id, money))
        await self.call_with_retries(4, "commit", hold.id, spent, make, cancels=self.options["cancels"] if own else 0.0)

    async def extend_or_grow(self, hold, spent: dict) -> None:
        """Extend the hold and report half of its later cost, or grow the hold."""
        if self.random.random() < 0.5:
            accrued = {name: units // 2 for name, units in spent.items() if units // 2}
            hold.accrue_to(as_money(accrued))
            await self.call("extend", hold.id, accrued, hold.extend)
        else:
            more = {w.budget: 10**6 for w, _ in hold.parts if w.flag != "s"}
            grown = {w.budget: units + more.get(w.budget, 0) for w, units in hold.parts}
            await self.call("grow", hold.id, grown, lambda: hold.grow(as_money(more)) if more else hold.extend())

    # -- after the faults ----------------------------------------------------------------------------------------------

    async def resolve_unknown(self) -> None:
        """Retry each call with an unknown outcome until the outcome is known, for at most ``SETTLING_S``."""
        ends = time.monotonic() + SETTLING_S
        while self.unknown and time.monotonic() < ends:
            if self.limiter.store_state == "closed":  # otherwise calls fail fast, and keep the machine busy
                await asyncio.gather(*(self.retry_unknown(key) for key in [*self.unknown][:RETRIES_AT_ONCE]))
            await asyncio.sleep(0.05)
        while (self.limiter.deferred or getattr(self.limiter, "unresolved", 0)) and time.monotonic() < ends:
            await asyncio.sleep(0.05)

    async def retry_unknown(self, key: tuple[str, str]) -> None:
        result = await self.unknown[key]()
        if result.outcome in ("StoreUnavailable", "StoreError"):
            self.unknown[key] = self.unknown.pop(key)  # after the others
            return
        del self.unknown[key]
        if key[0] == "reserve" and result.done and result.reply.state == "open":
            await self.call_with_retries(9, "release", result.reply.id, {}, result.reply.release)

    def report(self) -> dict:
        return {
            "replica": self.limiter.replica_id,
            "tenant": self.limiter.tenant,
            "losses": self.limiter.losses,
            "unknown": len(self.unknown),
            "deferred": self.limiter.deferred,
            "unresolved": getattr(self.limiter, "unresolved", 0),
        }


async def result_of(task: asyncio.Future) -> CallResult:
    try:
        reply = await task
    except asyncio.CancelledError:
        return CallResult("cancelled", ambiguous=True)
    except BudgetError as error:
        if type(error) is BudgetError:  # a bug of the limiter: the judge shows the message
            return CallResult(f"!{error}"[:200])
        ambiguous = isinstance(error, StoreUnavailable) and error.ambiguous
        return CallResult(type(error).__name__, error, ambiguous=ambiguous)
    except Exception as error:  # no call may end with it: a violation for the judge
        return CallResult(f"!{type(error).__name__}: {error}"[:200])
    if not hasattr(reply, "amounts"):  # extend and grow return nothing
        return CallResult("extended")
    if getattr(reply, "offline", None) is not None:
        return CallResult("prepaid" if reply.cap_checked else "unguarded", reply)
    if getattr(reply, "deferred", False):
        return CallResult("deferred", reply)
    return CallResult("replayed" if getattr(reply, "replayed", False) else "done", reply)


def units_of(limiter: AsyncBudgetLimiter, name: str, amount) -> int:
    return to_units(amount, limiter.budgets[name].unit)


def as_money(requested: dict) -> dict:
    return {name: units if name == "jobs" else from_units(units) for name, units in requested.items()}


async def main(options: dict) -> None:
    history = History(options["history"].format(**options))
    tenant = options["tenants"][(options["number"] + options["worker"]) % len(options["tenants"])]
    budgets = [Budget(**spec) for spec in options["budgets"]]
    timeout = options["timeouts"].get(tenant, options["timeout"])
    limiter = AsyncBudgetLimiter(options["url"], budgets, tenant=tenant, timeout=timeout, **options["limiter"])
    send("ready")
    lines = asyncio.Queue()
    loop = asyncio.get_running_loop()
    loop.run_in_executor(None, listen, loop, lines)
    await lines.get()
    replica = Replica(limiter, history, options)
    watching = asyncio.create_task(history.watch())
    with contextlib.suppress(StoreUnavailable):
        await limiter.start()
    callers = [asyncio.create_task(replica.work(number)) for number in range(options["callers"])]
    await lines.get()
    replica.stopping = True
    limiter.engine.set_timeout(max(timeout, options["settling_timeout"]))
    await asyncio.gather(*callers)
    await replica.resolve_unknown()
    send(replica.report())
    await lines.get()
    await replica.resolve_unknown()  # a chunk of a lease may have met a timeout meanwhile
    send(replica.report())
    await limiter.close()
    watching.cancel()


def listen(loop: asyncio.AbstractEventLoop, lines: asyncio.Queue) -> None:
    """Read the commands of the bench, in a thread; when the input ends, end the process."""
    for line in iter(sys.stdin.readline, ""):
        loop.call_soon_threadsafe(lines.put_nowait, json.loads(line))
    os._exit(1)


def run(options: dict) -> None:
    # Log messages about faults would fill the screen.
    logging.basicConfig(filename=options["history"].format(**options) + ".log", format="%(asctime)s %(message)s")
    asyncio.run(main(options))
