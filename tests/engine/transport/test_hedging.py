"""Hedged attempts: which result is used, and that no attempt continues after the call."""

from __future__ import annotations

import asyncio

import pytest

from ktrdr_budget.engine.transport.hedging import hedged


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def never() -> str:
    await asyncio.Event().wait()
    raise AssertionError


async def first() -> str:
    return "first"


async def second() -> str:
    return "second"


async def fails() -> str:
    raise ConnectionError("refused")


async def test_no_second_attempt_starts_if_the_first_attempt_gets_a_quick_reply():
    started = []

    async def record() -> str:
        started.append(True)
        return "second"

    assert await hedged(first, now_s() + 60, record, ()) == "first"
    assert not started


async def test_the_reply_to_the_second_attempt_is_used_if_the_first_attempt_gets_no_reply():
    assert await hedged(never, now_s(), second, ()) == "second"


async def test_if_the_second_attempt_fails_with_an_ignored_error_the_first_attempt_continues():
    failed = asyncio.Event()

    async def waits() -> str:
        await failed.wait()
        for _ in range(10):  # the failure has taken effect, if it has any
            await asyncio.sleep(0)
        return "first"

    async def fails_and_reports() -> str:
        asyncio.get_running_loop().call_soon(failed.set)
        raise ConnectionError("refused")

    assert await hedged(waits, now_s(), fails_and_reports, (ConnectionError,)) == "first"


async def test_if_the_second_attempt_fails_with_an_error_that_is_not_ignored_the_error_is_raised():
    with pytest.raises(ConnectionError, match="refused"):
        await hedged(never, now_s(), fails, (ValueError,))


async def test_if_the_call_is_cancelled_the_second_attempt_is_cancelled_too():
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def waits() -> str:
        started.set()
        try:
            return await never()
        finally:
            cancelled.set()

    call = asyncio.create_task(hedged(never, now_s(), waits, ()))
    await started.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(30):
            await call
    assert cancelled.is_set()


async def test_a_timeout_of_the_first_attempt_is_raised():
    async def times_out() -> str:
        raise TimeoutError("late")

    with pytest.raises(TimeoutError, match="late"):
        await hedged(times_out, now_s() + 60, second, ())
