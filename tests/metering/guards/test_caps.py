"""The cap holds for many concurrent calls, and for calls inside one hold."""

from __future__ import annotations

import asyncio
import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from examples.local_provider import LocalProvider
from ktrdr_budget import BudgetExceeded

from ...helpers.guarded import BASIC, METHODS, Guarded, Method, run
from ...helpers.waiting import until

LIMIT = "0.02"
LIMIT_NANOS = 20_000_000
CALLS = 80

# A lost attempt that the SDK retries is unbilled here: if a provider bills it in addition to the retry, that is not
# counted (docs/metering.md). The set of admitted calls depends on timing.
SCENARIOS = [
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


async def _call(g: Guarded, method: Method, seed: int) -> bool:
    """Make one call in a random scenario; return whether it was denied."""
    chance = random.Random(seed)
    scenes = chance.choice(SCENARIOS)
    items = chance.choice([None, None, 2, 8]) if method.shape == "stream" else None
    client = g.client.with_options(max_retries=2)
    try:
        await run(method, client, items=items, extra_headers={"x-scenes": json.dumps(scenes)})
    except BudgetExceeded:
        return True
    except Exception as error:
        if "scripted" not in str(error) and "onnection" not in str(error):
            raise
    return False


async def _check_cap_continuously(g: Guarded) -> None:
    while True:
        assert g.counted <= LIMIT_NANOS
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("sdk", ["anthropic", "openai"])
async def test_concurrent_calls_never_exceed_the_cap_and_are_charged_at_least_the_bill_of_the_provider(
    opened: Any, provider: LocalProvider, sdk: str
) -> None:
    methods = [method for method in METHODS if method.sdk == sdk and method.shape in ("plain", "stream")]
    async with opened(sdk, limit=LIMIT) as g:
        check = asyncio.create_task(_check_cap_continuously(g))
        calls = [(methods[seed % len(methods)], seed) for seed in range(CALLS)]
        if g.is_async:
            denied = await asyncio.gather(*(_call(g, method, seed) for method, seed in calls))
        else:
            with ThreadPoolExecutor(12) as pool:
                loop = asyncio.get_running_loop()
                jobs = [loop.run_in_executor(pool, asyncio.run, _call(g, method, seed)) for method, seed in calls]
                denied = await asyncio.gather(*jobs)
        await until(lambda: not provider.active)
        assert not check.done(), check.exception()
        check.cancel()
        assert 0 < sum(denied) < CALLS
        assert LIMIT_NANOS >= g.counted >= g.bill > 0


@pytest.mark.parametrize("method", BASIC, ids=str)
async def test_concurrent_successful_calls_are_charged_exactly_the_bill_of_the_provider(
    opened: Any, provider: LocalProvider, method: Method
) -> None:
    async with opened(method.sdk, limit=LIMIT) as g:

        async def is_denied() -> bool:
            try:
                await run(method, g.client)
            except BudgetExceeded:
                return True
            return False

        if g.is_async:
            denied = await asyncio.gather(*(is_denied() for _ in range(CALLS)))
        else:
            with ThreadPoolExecutor(12) as pool:
                denied = list(pool.map(lambda _: asyncio.run(is_denied()), range(CALLS)))
        assert len(provider.ledger) == denied.count(False)
        assert g.counted == g.sums["spent"] == g.bill <= LIMIT_NANOS


# -- inside a hold -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
async def test_calls_inside_a_hold_claim_from_the_hold(opened: Any, provider: LocalProvider, method: Method) -> None:
    async with opened(method.sdk) as g:
        async with g.hold("0.15") as hold:
            for _ in range(3):
                await run(method, g.client)
            assert g.sums["held"] == 150_000_000  # the only reservation
            assert int(hold.accrued["agent"] * 10**9) == g.bill
        assert g.counted == g.sums["spent"] == g.bill > 0
        assert len(g.labels) == 1


@pytest.mark.parametrize("method", BASIC, ids=str)
async def test_a_hold_grows_if_a_call_inside_the_hold_does_not_fit(
    opened: Any, provider: LocalProvider, method: Method
) -> None:
    async with opened(method.sdk) as g:
        async with g.hold("0.000001"):
            await run(method, g.client)
            assert g.sums["held"] > 1_000
        assert g.counted == g.sums["spent"] == g.bill > 0


@pytest.mark.parametrize("method", BASIC, ids=str)
async def test_a_call_is_not_sent_if_the_hold_cannot_grow(opened: Any, provider: LocalProvider, method: Method) -> None:
    async with opened(method.sdk, limit="0.00005") as g:
        with pytest.raises(BudgetExceeded):
            async with g.hold("0.00002"):
                await run(method, g.client)
        assert provider.requests == []
        assert g.counted == 0


@pytest.mark.parametrize(
    "scenes", [[{"drop_after": 0}], [{"drop_after": 0}, {"status": 500}]], ids=["lost", "lost-500"]
)
@pytest.mark.parametrize("method", BASIC, ids=str)
async def test_a_lost_call_inside_a_hold_is_charged_an_estimate(
    opened: Any, provider: LocalProvider, method: Method, scenes: list[Any]
) -> None:
    async with opened(method.sdk) as g:
        async with g.hold("0.15"):
            with pytest.raises(Exception, match=r"scripted|onnection"):
                client = g.client.with_options(max_retries=len(scenes) - 1)
                await run(method, client, extra_headers={"x-scenes": json.dumps(scenes)})
        assert g.counted == g.sums["spent"] >= g.bill > 0
        assert "estimated" in g.labels[0]
