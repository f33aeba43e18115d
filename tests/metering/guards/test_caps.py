"""The cap holds: with many calls at once, and for calls inside of one hold."""

from __future__ import annotations

import asyncio
import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from examples.local_provider import LocalProvider
from ktrdr_budget import BudgetExceeded

from ...helpers.guarded import BASIC, WAYS, Guarded, Way, take
from ...helpers.waiting import until
from .test_streams import hold_of

LIMIT = "0.02"
LIMIT_NANOS = 20_000_000
CALLS = 80

# An attempt that is lost and retried is not billed here: what a provider bills for it besides the retry is counted by
# nobody (docs/metering.md), and which of these calls are admitted at all depends on the machine.
FATES = [
    [{}],
    [{"cache_read_tokens": 5}],
    [{"status": 429}, {}],
    [{"status": 529}, {"status": 429}, {}],
    [{"status": 400}],
    [{"status": 500}, {}],
    [{"drop_after": 0, "billed": False}, {}],
    [{"drop_after": 3, "output_tokens": 20}],
    [{"error_after": 3, "output_tokens": 20}],
    [{"silent": True}],
]


async def _one(g: Guarded, way: Way, seed: int) -> bool:
    """One call with some fate; whether it was denied."""
    chance = random.Random(seed)
    fate = chance.choice(FATES)
    items = chance.choice([None, None, 2, 8]) if way.shape == "stream" else None
    client = g.client.with_options(max_retries=2)
    try:
        await take(way, client, items=items, extra_headers={"x-scenes": json.dumps(fate)})
    except BudgetExceeded:
        return True
    except Exception as error:
        if "scripted" not in str(error) and "onnection" not in str(error):
            raise
    return False


async def _held(g: Guarded) -> None:
    """The cap, looked at from outside for as long as the calls run."""
    while True:
        found = g.sums
        assert found["spent"] + found["held"] + found["unconfirmed"] <= LIMIT_NANOS
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("sdk", ["anthropic", "openai"])
async def test_many_calls_at_once_pass_neither_the_cap_nor_the_bill(
    opened: Any, provider: LocalProvider, sdk: str
) -> None:
    ways = [way for way in WAYS if way.sdk == sdk and way.shape in ("plain", "stream")]
    async with opened(sdk, limit=LIMIT) as g:
        watch = asyncio.create_task(_held(g))
        calls = [(ways[seed % len(ways)], seed) for seed in range(CALLS)]
        if g.is_async:
            denied = await asyncio.gather(*(_one(g, way, seed) for way, seed in calls))
        else:
            with ThreadPoolExecutor(12) as pool:
                loop = asyncio.get_running_loop()
                jobs = [loop.run_in_executor(pool, asyncio.run, _one(g, way, seed)) for way, seed in calls]
                denied = await asyncio.gather(*jobs)
        await until(lambda: not provider.active)
        assert not watch.done(), watch.exception()
        watch.cancel()
        assert 0 < sum(denied) < CALLS
        assert LIMIT_NANOS >= g.counted >= g.bill > 0


@pytest.mark.parametrize("way", BASIC, ids=str)
async def test_calls_at_once_that_all_succeed_are_billed_exactly(
    opened: Any, provider: LocalProvider, way: Way
) -> None:
    async with opened(way.sdk, limit=LIMIT) as g:

        async def one() -> bool:
            try:
                await take(way, g.client)
            except BudgetExceeded:
                return True
            return False

        if g.is_async:
            denied = await asyncio.gather(*(one() for _ in range(CALLS)))
        else:
            with ThreadPoolExecutor(12) as pool:
                denied = list(pool.map(lambda _: asyncio.run(one()), range(CALLS)))
        assert len(provider.ledger) == denied.count(False)
        assert g.counted == g.sums["spent"] == g.bill <= LIMIT_NANOS


# -- inside a hold -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=str)
async def test_calls_inside_a_hold_draw_from_it(opened: Any, provider: LocalProvider, way: Way) -> None:
    async with opened(way.sdk) as g:
        async with hold_of(g, "0.15") as hold:
            for _ in range(3):
                await take(way, g.client)
            assert g.sums["held"] == 150_000_000  # one reservation, and no other
            assert int(hold.accrued["agent"] * 10**9) == g.bill
        assert g.counted == g.sums["spent"] == g.bill > 0
        assert len(g.labels) == 1


@pytest.mark.parametrize("way", BASIC, ids=str)
async def test_a_hold_grows_for_a_call_that_does_not_fit_into_it(
    opened: Any, provider: LocalProvider, way: Way
) -> None:
    async with opened(way.sdk) as g:
        async with hold_of(g, "0.000001"):
            await take(way, g.client)
            assert g.sums["held"] > 1_000
        assert g.counted == g.sums["spent"] == g.bill > 0


@pytest.mark.parametrize("way", BASIC, ids=str)
async def test_a_hold_that_cannot_grow_stops_the_call(opened: Any, provider: LocalProvider, way: Way) -> None:
    async with opened(way.sdk, limit="0.00005") as g:
        with pytest.raises(BudgetExceeded):
            async with hold_of(g, "0.00002"):
                await take(way, g.client)
        assert provider.requests == []
        assert g.counted == 0


@pytest.mark.parametrize("fate", [[{"drop_after": 0}], [{"drop_after": 0}, {"status": 500}]], ids=["lost", "lost-500"])
@pytest.mark.parametrize("way", BASIC, ids=str)
async def test_what_may_have_been_billed_inside_a_hold_is_accrued_in_full(
    opened: Any, provider: LocalProvider, way: Way, fate: list[Any]
) -> None:
    async with opened(way.sdk) as g:
        async with hold_of(g, "0.15"):
            with pytest.raises(Exception, match=r"scripted|onnection"):
                client = g.client.with_options(max_retries=len(fate) - 1)
                await take(way, client, extra_headers={"x-scenes": json.dumps(fate)})
        assert g.counted == g.sums["spent"] >= g.bill > 0
        assert "estimated" in g.labels[0]
