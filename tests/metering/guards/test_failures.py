"""Errors, retries, timeouts and lost connections: never less is counted than the provider billed."""

from __future__ import annotations

import asyncio
import socket
from contextlib import nullcontext
from typing import Any

import pytest

from examples.local_provider import LocalProvider, Scene
from ktrdr_budget import StoreUnavailable

from ...helpers.guarded import BASIC, BASIC_STREAMS, PLAIN, Telling, Way, bill_nanos, guarded, take
from ...helpers.waiting import until

EITHER = [*BASIC, *BASIC_STREAMS]
REJECTED = (400, 401, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 504, 529)


@pytest.mark.parametrize("status", REJECTED)
@pytest.mark.parametrize("way", EITHER, ids=str)
async def test_what_the_provider_did_not_accept_is_released(
    opened: Any, provider: LocalProvider, way: Way, status: int
) -> None:
    provider.script(Scene(status=status))
    async with opened(way.sdk) as g:
        with pytest.raises(Exception, match="scripted") as caught:
            await take(way, g.client)
        assert caught.value.status_code == status  # type: ignore[attr-defined]
        assert g.counted == g.bill == 0


@pytest.mark.parametrize("way", EITHER, ids=str)
async def test_a_connection_that_nobody_accepts_costs_nothing(opened: Any, way: Way) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens there
        async with opened(way.sdk) as g:
            nowhere = g.client.with_options(base_url=f"http://127.0.0.1:{taken.getsockname()[1]}")
            with pytest.raises(Exception, match="Connection error"):
                await take(way, nowhere)
            assert g.counted == 0


KEPT = {
    "dropped": Scene(drop_after=0),
    "timeout": Scene(delay_s=0.7),
}


@pytest.mark.parametrize("scene", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("way", EITHER, ids=str)
async def test_what_the_provider_may_have_done_is_kept_in_full(
    opened: Any, provider: LocalProvider, way: Way, scene: Scene
) -> None:
    provider.script(scene)
    async with opened(way.sdk) as g:
        with pytest.raises(Exception, match=r"Connection error|timed out"):
            await take(way, g.client.with_options(timeout=0.3 if scene.delay_s else 30))
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
@pytest.mark.parametrize("way", EITHER, ids=str)
async def test_retries_of_the_sdk_reserve_once_and_commit_what_was_reported_in_the_end(
    opened: Any, provider: LocalProvider, way: Way, first: tuple[Scene, ...]
) -> None:
    provider.script(*first)
    async with opened(way.sdk) as g:
        reservations = []
        reserve = g.limiter.reserve
        g.limiter.reserve = lambda *args, **named: (reservations.append(args), reserve(*args, **named))[1]
        await take(way, g.client.with_options(max_retries=2, timeout=0.3 if first[0].delay_s else 30))
        assert len(provider.requests) == len(first) + 1
        assert len(reservations) == 1
        await until(lambda: not provider.active)
        final = next(line for line in provider.ledger if line.complete)
        assert g.counted == g.sums["spent"] == bill_nanos([final]) > 0


@pytest.mark.parametrize(
    "then", [Scene(status=500), Scene(status=429), Scene(drop_after=0)], ids=["500", "429", "lost"]
)
@pytest.mark.parametrize("way", BASIC, ids=str)
async def test_an_attempt_that_was_lost_is_kept_if_no_retry_was_answered(
    opened: Any, provider: LocalProvider, way: Way, then: Scene
) -> None:
    provider.script(Scene(drop_after=0), then)
    async with opened(way.sdk) as g:
        with pytest.raises(Exception, match=r"scripted|Connection error"):
            await take(way, g.client.with_options(max_retries=1))
        assert len(provider.requests) == 2
        kept = g.sums["held"]
        assert g.sums["spent"] == 0 and kept == g.counted >= bill_nanos(provider.ledger[:1]) > 0
        provider.clear()
        await take(way, g.client)  # the next call reserves anew
        assert g.sums["held"] == kept and g.sums["spent"] == g.bill


@pytest.mark.parametrize("way", BASIC, ids=str)
async def test_retries_need_no_more_room_than_the_first_attempt(opened: Any, provider: LocalProvider, way: Way) -> None:
    async with opened(way.sdk) as g:
        with pytest.raises(Exception, match="Connection error"):
            provider.script(Scene(drop_after=0))
            await take(way, g.client)
        once = g.sums["held"]
    g.store.flushall()
    provider.clear()
    provider.script(Scene(drop_after=0), Scene(status=500), Scene(status=503))
    async with opened(way.sdk, limit=f"{once * 1.5 / 1e9:.9f}") as g:
        await take(way, g.client.with_options(max_retries=3))
        assert len(provider.requests) == 4
        assert g.sums["held"] == 0 < g.sums["spent"]


@pytest.mark.parametrize("way", BASIC, ids=str)
async def test_retries_inside_a_hold_draw_once(guarded_client: Any, provider: LocalProvider, way: Way) -> None:
    provider.script(Scene(status=500), Scene(status=503))
    async with guarded_client(way.sdk, is_async=True) as g:
        async with g.limiter.hold("agent", "0.15"):
            await take(way, g.client.with_options(max_retries=2))
        assert g.counted == g.sums["spent"] == g.bill > 0


@pytest.mark.parametrize("way", PLAIN, ids=str)
async def test_an_answer_that_tells_no_usage_is_charged_in_full_and_marked(
    opened: Any, provider: LocalProvider, way: Way
) -> None:
    provider.script(Scene(silent=True, output_tokens=900))
    async with opened(way.sdk) as g:
        most = {"max_tokens": 1000} if way.sdk == "anthropic" else {"max_output_tokens": 1000}
        most = {"max_completion_tokens": 1000} if way.name.startswith("chat") else most
        wide = Way(way.name, way.sdk, lambda client, **o: way.call(Telling(client, most), **o))
        await take(wide, g.client)
        assert provider.ledger[0].output_tokens == 900
        assert g.counted == g.sums["spent"] > g.bill
        assert "estimated" in g.labels[0]


@pytest.mark.parametrize("way", BASIC, ids=str)
async def test_a_cancelled_call_is_kept_because_the_provider_goes_on(
    guarded_client: Any, provider: LocalProvider, way: Way
) -> None:
    provider.script(Scene(delay_s=0.05))
    async with guarded_client(way.sdk, is_async=True) as g:
        task = asyncio.create_task(take(way, g.client))
        await until(lambda: provider.requests)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: provider.ledger)
        assert g.counted >= g.bill > 0


CANCELLED = [BASIC[0], BASIC_STREAMS[1]]


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in-a-hold"])
@pytest.mark.parametrize("way", CANCELLED, ids=str)
async def test_a_call_that_is_cancelled_at_any_step_counts_no_less_than_its_bill(
    guarded_client: Any, provider: LocalProvider, way: Way, inside: bool
) -> None:
    async with guarded_client(way.sdk, is_async=True) as g:
        loop, steps, ended = asyncio.get_running_loop(), 0, False
        while not ended:  # later and later, until the call has ended before
            task = asyncio.create_task(_made(g, way, inside))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            ended = (await asyncio.gather(task, return_exceptions=True))[0] is None
            steps += 1 + steps // 8
            await until(lambda: not provider.active)
            await until(lambda: not inside or g.sums["held"] == 0)  # a grant that came too late goes back
            assert g.counted >= g.bill
            # Nothing keeps a reservation alive that nobody waits for.
            assert "_Heartbeat" not in repr([timer for timer in loop._scheduled if not timer.cancelled()])  # type: ignore[attr-defined]
        assert steps > 5


async def _made(g: Any, way: Way, inside: bool) -> None:
    async with g.limiter.hold("agent", "0.15") if inside else nullcontext():
        await take(way, g.client)


@pytest.mark.parametrize("way", BASIC, ids=str)
async def test_a_store_that_is_down_stops_calls_before_they_are_sent(
    is_async: bool, provider: LocalProvider, way: Way, start_server: Any
) -> None:
    own = start_server()
    async with guarded(way.sdk, is_async, provider, own) as g:
        await take(way, g.client)
        own.kill()
        sent = len(provider.requests)
        with pytest.raises(StoreUnavailable):
            await take(way, g.client.with_options(max_retries=2))
        assert len(provider.requests) == sent
