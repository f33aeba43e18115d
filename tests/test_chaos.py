"""Everything at once: lost requests, lost replies, cancellations, deadlines, retries; and the sum must be right."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, StoreUnavailable
from ktrdr_budget.money import from_units

from .helpers.keyspace import counted, immortal_keys, ledger_sum, sums
from .helpers.proxy import Proxy
from .helpers.waiting import until

LIMIT_UNITS = 3_000_000
WORKERS = 60
ROUNDS = 6


class Chaos:
    """Many workers behind one bad line. Each keeps account of what it knows to be spent."""

    def __init__(self, limiter: AsyncBudgetLimiter, proxy: Proxy, seed: int) -> None:
        self.limiter = limiter
        self.proxy = proxy
        self.random = random.Random(seed)
        self.spent = self.events = 0

    def fate(self) -> str | None:
        """A third of all requests, or of their answers, do not arrive."""
        return self.random.choice(("request", "reply", None, None, None, None))

    async def insists(self, call):
        """What a careful caller does: the same again, until there is an answer."""
        while True:
            try:
                return await call()
            except StoreUnavailable:
                continue

    async def cancelled_now_and_then(self, call):
        """The answer, or `None` for a caller that was cancelled meanwhile."""
        task = asyncio.ensure_future(call())
        if self.random.random() < 0.3:
            await asyncio.sleep(self.random.uniform(0, 0.01))
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            return None

    async def works(self, number: int) -> None:
        for turn in range(ROUNDS):
            hold_id = f"op_{number}_{turn}" if self.random.random() < 0.5 else None
            units = self.random.randrange(1, 60_000)
            amount = from_units(units)
            try:
                hold = await self.cancelled_now_and_then(lambda: self.limiter.reserve("agent", amount, id=hold_id))  # noqa: B023
            except (BudgetExceeded, StoreUnavailable):
                if hold_id is None:
                    continue
                try:
                    hold = await self.insists(lambda: self.limiter.reserve("agent", amount, id=hold_id))  # noqa: B023
                except BudgetExceeded:
                    continue
            if hold is not None:
                await self.settles(hold, units)

    async def settles(self, hold, units: int) -> None:
        actual = self.random.randrange(0, units + 1)
        way = self.random.choice(("commit", "commit", "release", "accrue"))
        if way == "release":
            await self.cancelled_now_and_then(lambda: self.insists(hold.release))
            await self.insists(hold.release)
            return
        if way == "accrue":
            hold.accrue(from_units(actual))
            await self.cancelled_now_and_then(lambda: self.insists(hold.extend))
        # A commit that was begun completes, so that saying it again is a replay.
        await self.cancelled_now_and_then(lambda: self.insists(lambda: hold.commit(from_units(actual))))
        settlement = await self.insists(lambda: hold.commit(from_units(actual)))
        assert settlement.amounts == {"agent": from_units(actual)}
        self.spent += actual
        self.events += 1


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_on_the_way_the_sum_is_exact_and_nothing_stays_held(server, tmp_path_factory, seed):
    path = Path(tmp_path_factory.mktemp("p")) / "s"
    budgets = [Budget("agent", from_units(LIMIT_UNITS))]
    async with (
        Proxy(server.socket_path, path) as proxy,
        AsyncBudgetLimiter(proxy.url, budgets, timeout=0.1) as limiter,
    ):
        chaos = Chaos(limiter, proxy, seed)
        proxy.fate = chaos.fate
        await asyncio.gather(*(chaos.works(number) for number in range(WORKERS)))
        proxy.fate = lambda: None
        with server.client() as client:
            await until(lambda: sums(client)["held"] == 0)
            await until(lambda: limiter.deferred == 0)
            expected = {"spent": chaos.spent, "held": 0, "unconfirmed": 0, "events": chaos.events}
            assert sums(client) == expected
            assert ledger_sum(client) == chaos.spent
            assert counted(client) <= LIMIT_UNITS
            assert immortal_keys(client) == []
            assert client.zcard("ktrdr:{default}:due") == 0
        assert proxy.replies_lost > 5
        assert limiter.losses == 0
