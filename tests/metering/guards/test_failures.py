"""Errors, retries, timeouts and lost connections: the counted amount is never below the provider's bill."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import nullcontext
from typing import Any

import pytest

from examples.local_provider import LocalProvider, Scene
from ktrdr_budget import StoreUnavailable

from ...helpers.guarded import BASIC, BASIC_STREAMS, PLAIN, Method, WithArguments, bill_nanos, guarded, run
from ...helpers.timers import pending_heartbeats
from ...helpers.waiting import until, wait_until

EITHER = [*BASIC, *BASIC_STREAMS]
REJECTED = (400, 401, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 504, 529)


@pytest.mark.parametrize("status", REJECTED)
@pytest.mark.parametrize("method", EITHER, ids=str)
async def test_the_reservation_of_a_rejected_call_is_released(
    opened: Any, provider: LocalProvider, method: Method, status: int
) -> None:
    provider.script(Scene(status=status))
    async with opened(method.sdk) as g:
        with pytest.raises(Exception, match="scripted") as caught:
            await run(method, g.client)
        assert caught.value.status_code == status
        assert g.counted == g.bill == 0


@pytest.mark.parametrize("method", EITHER, ids=str)
async def test_a_refused_connection_costs_nothing(opened: Any, method: Method) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # without listening
        async with opened(method.sdk) as g:
            unreachable = g.client.with_options(base_url=f"http://127.0.0.1:{unused.getsockname()[1]}")
            with pytest.raises(Exception, match="Connection error"):
                await run(method, unreachable)
            assert g.counted == 0


KEPT = {
    "dropped": Scene(drop_after=0),
    "timeout": Scene(delay_s=0.7),
}


@pytest.mark.parametrize("scene", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("method", EITHER, ids=str)
async def test_the_reservation_of_a_call_with_an_unknown_outcome_stays_held(
    opened: Any, provider: LocalProvider, method: Method, scene: Scene
) -> None:
    provider.script(scene)
    async with opened(method.sdk) as g:
        with pytest.raises(Exception, match=r"Connection error|timed out"):
            await run(method, g.client.with_options(timeout=0.3 if scene.delay_s else 30))
        assert g.sums["spent"] == 0
        assert g.sums["held"] > 0
        await until(lambda: not provider.active)
        assert g.counted >= g.bill > 0


RETRIED = {
    "429": (Scene(status=429),),
    "529": (Scene(status=529),),
    "429-529": (Scene(status=429), Scene(status=529)),
    "503-500": (Scene(status=503), Scene(status=500)),
    "dropped": (Scene(drop_after=0),),
    "timeout": (Scene(delay_s=0.7),),
    "timeout-502": (Scene(delay_s=0.7), Scene(status=502)),
}


@pytest.mark.parametrize("first", RETRIED.values(), ids=RETRIED)
@pytest.mark.parametrize("method", EITHER, ids=str)
async def test_all_retries_of_a_call_by_the_sdk_share_one_reservation(
    opened: Any, provider: LocalProvider, method: Method, first: tuple[Scene, ...]
) -> None:
    provider.script(*first)
    async with opened(method.sdk) as g:
        reservations = []
        reserve = g.limiter.reserve
        g.limiter.reserve = lambda *args, **named: (reservations.append(args), reserve(*args, **named))[1]
        client = g.client.with_options(max_retries=2, timeout=0.3 if first[0].delay_s else 30)
        timeout = threading.Thread(target=_raise_timeout_after_first_request, args=[client, provider])
        timeout.start()
        await run(method, client)
        timeout.join()
        assert len(provider.requests) == len(first) + 1
        assert len(reservations) == 1
        await until(lambda: not provider.active)
        final = next(line for line in provider.ledger if line.complete)
        assert g.counted == g.sums["spent"] == bill_nanos([final]) > 0


def _raise_timeout_after_first_request(client: Any, provider: LocalProvider) -> None:
    wait_until(lambda: provider.requests)
    client.timeout = 30


@pytest.mark.parametrize(
    "then", [Scene(status=500), Scene(status=429), Scene(drop_after=0)], ids=["500", "429", "lost"]
)
@pytest.mark.parametrize("method", BASIC, ids=str)
async def test_the_reservation_stays_held_if_an_attempt_was_lost_and_the_retry_fails(
    opened: Any, provider: LocalProvider, method: Method, then: Scene
) -> None:
    provider.script(Scene(drop_after=0), then)
    async with opened(method.sdk) as g:
        with pytest.raises(Exception, match=r"scripted|Connection error"):
            await run(method, g.client.with_options(max_retries=1))
        assert len(provider.requests) == 2
        kept = g.sums["held"]
        assert g.sums["spent"] == 0 and kept == g.counted >= bill_nanos(provider.ledger[:1]) > 0
        provider.clear()
        await run(method, g.client)  # the next call reserves separately
        assert g.sums["held"] == kept and g.sums["spent"] == g.bill


@pytest.mark.parametrize("method", BASIC, ids=str)
async def test_retries_need_no_more_budget_than_the_first_attempt(
    opened: Any, provider: LocalProvider, method: Method
) -> None:
    async with opened(method.sdk) as g:
        with pytest.raises(Exception, match="Connection error"):
            provider.script(Scene(drop_after=0))
            await run(method, g.client)
        once = g.sums["held"]
    g.store.flushall()
    provider.clear()
    provider.script(Scene(drop_after=0), Scene(status=500), Scene(status=503))
    async with opened(method.sdk, limit=f"{once * 1.5 / 1e9:.9f}") as g:
        await run(method, g.client.with_options(max_retries=3))
        assert len(provider.requests) == 4
        assert g.sums["held"] == 0 < g.sums["spent"]


@pytest.mark.parametrize("method", BASIC, ids=str)
async def test_a_retried_call_inside_a_hold_is_charged_only_once(
    guarded_client: Any, provider: LocalProvider, method: Method
) -> None:
    provider.script(Scene(status=500), Scene(status=503))
    async with guarded_client(method.sdk, is_async=True) as g:
        async with g.limiter.hold("agent", "0.15"):
            await run(method, g.client.with_options(max_retries=2))
        assert g.counted == g.sums["spent"] == g.bill > 0


@pytest.mark.parametrize("method", PLAIN, ids=str)
async def test_a_response_without_usage_commits_the_worst_case_as_an_estimate(
    opened: Any, provider: LocalProvider, method: Method
) -> None:
    provider.script(Scene(silent=True, output_tokens=900))
    async with opened(method.sdk) as g:
        await run(method, WithArguments(g.client, {method.limit_parameter: 1000}))
        assert provider.ledger[0].output_tokens == 900
        assert g.counted == g.sums["spent"] > g.bill
        assert "estimated" in g.labels[0]


@pytest.mark.parametrize("method", BASIC, ids=str)
async def test_a_call_cancelled_after_the_request_was_sent_is_charged_at_least_the_bill_of_the_provider(
    guarded_client: Any, provider: LocalProvider, method: Method
) -> None:
    provider.script(Scene(delay_s=0.05))
    async with guarded_client(method.sdk, is_async=True) as g:
        task = asyncio.create_task(run(method, g.client))
        await until(lambda: provider.requests)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: provider.ledger)
        assert g.counted >= g.bill > 0


CANCELLED = [BASIC[0], BASIC_STREAMS[1]]


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in-a-hold"])
@pytest.mark.parametrize("method", CANCELLED, ids=str)
async def test_a_call_cancelled_at_any_step_is_charged_at_least_the_bill_of_the_provider(
    guarded_client: Any, provider: LocalProvider, method: Method, inside: bool
) -> None:
    async with guarded_client(method.sdk, is_async=True) as g:
        loop, steps, ended = asyncio.get_running_loop(), 0, False
        while not ended:  # cancel at a later step each time, until the call ends first
            task = asyncio.create_task(_call(g, method, inside))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            ended = (await asyncio.gather(task, return_exceptions=True))[0] is None
            steps += 1 + steps // 8
            await until(lambda: not provider.active)
            await until(lambda: not inside or g.sums["held"] == 0)  # a late grant is released
            assert g.counted >= g.bill
            assert not pending_heartbeats(loop)
        assert steps > 5


async def _call(g: Any, method: Method, inside: bool) -> None:
    async with g.limiter.hold("agent", "0.15") if inside else nullcontext():
        await run(method, g.client)


@pytest.mark.parametrize("method", BASIC, ids=str)
async def test_calls_are_not_sent_to_the_provider_during_an_outage_of_the_store(
    is_async: bool, provider: LocalProvider, method: Method, start_server: Any
) -> None:
    own = start_server()
    async with guarded(method.sdk, is_async, provider, own) as g:
        await run(method, g.client)
        own.kill()
        sent = len(provider.requests)
        with pytest.raises(StoreUnavailable):
            await run(method, g.client.with_options(max_retries=2))
        assert len(provider.requests) == sent
