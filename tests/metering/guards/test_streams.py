"""Streams that end early: an estimate is committed, marked as one, and never below the provider's bill."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import nullcontext
from typing import Any

import pytest

from examples.local_provider import LocalProvider, Scene
from ktrdr_budget.metering.guards.anthropic import hides_output as claude_hides
from ktrdr_budget.metering.guards.openai import hides_output as gpt_hides

from ...helpers.guarded import (
    BASIC_STREAMS,
    CLAUDE,
    GPT,
    METHOD,
    METHODS,
    STREAMS,
    Method,
    WithArguments,
    entered,
    next_item,
    resolve,
    run,
)
from ...helpers.waiting import until

TOKENS = {"output_tokens": 30}
BROKEN = {
    "dropped-at-once": Scene(drop_after=1, **TOKENS),
    "dropped": Scene(drop_after=20, **TOKENS),
    "error-at-once": Scene(error_after=0, **TOKENS),
    "error": Scene(error_after=20, **TOKENS),
}


async def start_stream(g: Any, method: Method, output_tokens_max: int) -> Any:
    """Start a stream with an output limit, and read one item."""
    limited = WithArguments(g.client, {method.limit_parameter: output_tokens_max})
    stream = await resolve(method.call(limited))
    await next_item(stream)
    return stream


async def wait_for_arrival(provider: LocalProvider, tokens: int) -> None:
    """Wait until the provider has sent this number of tokens, and the network has delivered them."""
    await until(lambda: provider.sent_tokens >= tokens)
    await asyncio.sleep(0.05)


@pytest.mark.parametrize("scene", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("method", STREAMS, ids=str)
async def test_a_broken_stream_commits_an_estimate(
    opened: Any, provider: LocalProvider, method: Method, scene: Scene
) -> None:
    provider.script(scene)
    async with opened(method.sdk) as g:
        # The SDK passes on an error event of Responses; it raises those of the other APIs.
        passed_on = scene.error_after is not None and method.name.startswith("responses.")
        with nullcontext() if passed_on else pytest.raises(Exception, match="scripted|[cC]onnection"):
            await run(method, g.client)
        await until(lambda: provider.ledger)
        assert g.sums["spent"] == g.counted >= g.bill > 0
        assert "estimated" in g.labels[0]


@pytest.mark.parametrize("items", [1, 3, 10])
@pytest.mark.parametrize("method", STREAMS, ids=str)
async def test_a_stream_closed_early_commits_an_estimate(
    opened: Any, provider: LocalProvider, method: Method, items: int
) -> None:
    provider.script(Scene(stall_after=20, **TOKENS))
    async with opened(method.sdk) as g:
        assert len(await run(method, g.client, items=items)) == items
        spent = g.sums["spent"]
        await until(lambda: provider.ledger)
        assert g.sums["spent"] == g.counted == spent >= g.bill > 0
        assert "estimated" in g.labels[0]


@pytest.mark.parametrize("method", BASIC_STREAMS, ids=str)
async def test_the_estimate_of_a_closed_stream_is_higher_if_more_output_has_arrived(
    opened: Any, provider: LocalProvider, method: Method
) -> None:
    estimates = []
    for tokens in (4, 24):
        provider.clear()
        provider.script(Scene(stall_after=tokens, output_tokens=30))
        async with opened(method.sdk, unseen_output_tokens=5) as g:
            before = g.sums["spent"]
            stream = await start_stream(g, method, 5_000)
            await wait_for_arrival(provider, tokens)
            await resolve(stream.close())
            await until(lambda: provider.ledger)
            estimates.append(g.sums["spent"] - before)
            assert estimates[-1] >= g.bill
    assert estimates[0] < estimates[1]


@pytest.mark.parametrize("method", BASIC_STREAMS, ids=str)
async def test_if_the_reasoning_is_hidden_a_stream_closed_early_is_charged_the_whole_output_limit(
    opened: Any, provider: LocalProvider, method: Method
) -> None:
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 4096}
    more = thinking if method.sdk == "anthropic" else {"model": "gpt-5-mini"}
    provider.script(Scene(stall_after=20, output_tokens=30))
    async with opened(method.sdk) as g:
        await run(method, WithArguments(g.client, more), items=3)
        price = 5_000 if method.sdk == "anthropic" else 2_000
        assert g.sums["spent"] > (4096 if method.sdk == "anthropic" else 50) * price


@pytest.mark.parametrize("method", BASIC_STREAMS, ids=str)
async def test_a_cancelled_stream_commits_an_estimate(
    guarded_client: Any, provider: LocalProvider, method: Method
) -> None:
    provider.script(Scene(stall_after=20, output_tokens=40))
    async with guarded_client(method.sdk, is_async=True) as g:
        seen = []

        async def read() -> None:
            async for item in await method.call(g.client):
                seen.append(item)

        task = asyncio.create_task(read())
        await until(lambda: len(seen) > 4)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: provider.ledger)
        assert g.sums["spent"] == g.counted >= g.bill > 0
        assert "estimated" in g.labels[0]


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("method", BASIC_STREAMS, ids=str)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_a_garbage_collected_stream_is_settled(
    opened: Any, provider: LocalProvider, method: Method, started: bool
) -> None:
    provider.script(Scene(stall_after=20, **TOKENS))
    async with opened(method.sdk) as g:
        stream = await resolve(method.call(g.client))
        if started:
            await next_item(stream)
        del stream
        gc.collect()
        await until(lambda: g.sums["spent"])
        assert g.sums["held"] == 0
        assert "estimated" in g.labels[0]


@pytest.mark.parametrize("method", BASIC_STREAMS, ids=str)
async def test_a_closed_stream_is_charged_for_output_received_but_not_read(
    opened: Any, provider: LocalProvider, method: Method
) -> None:
    provider.script(Scene(stall_after=40, output_tokens=60))
    async with opened(method.sdk, unseen_output_tokens=5) as g:
        stream = await start_stream(g, method, 50_000)
        await wait_for_arrival(provider, 40)
        await resolve(stream.close())
        await until(lambda: provider.ledger)
        assert provider.ledger[0].output_tokens == 40
        assert g.sums["spent"] == g.counted >= g.bill > 0
        assert g.sums["spent"] < 10_000 * 1_600  # far below the output limit
        assert "estimated" in g.labels[0]


@pytest.mark.parametrize("method", BASIC_STREAMS, ids=str)
async def test_a_closed_stream_is_charged_exactly_if_the_whole_response_has_arrived(
    opened: Any, provider: LocalProvider, method: Method
) -> None:
    provider.script(Scene(output_tokens=40))
    async with opened(method.sdk) as g:
        stream = await start_stream(g, method, 50_000)
        await wait_for_arrival(provider, 40)
        await until(lambda: provider.ledger)
        await resolve(stream.close())
        assert g.sums["spent"] == g.counted == g.bill > 0
        assert "estimated" not in g.labels[0]


@pytest.mark.parametrize("left", ["closed", "dropped", "cancelled", "failed"])
@pytest.mark.parametrize("method", BASIC_STREAMS, ids=str)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_a_closed_stream_commits_an_estimate_if_the_unread_output_exceeds_the_drain_limits(
    opened: Any, provider: LocalProvider, method: Method, left: str
) -> None:
    provider.script(Scene(output_tokens=8_000))
    async with opened(method.sdk) as g:

        async def read() -> None:
            stream = await start_stream(g, method, 16_000)
            if left == "dropped":
                await until(lambda: provider.sent_tokens >= 300)
                return
            try:
                await until(lambda: provider.ledger)
                if left == "cancelled":
                    await asyncio.Event().wait()
                if left == "failed":
                    raise ZeroDivisionError
            finally:
                await resolve(stream.close())

        task = asyncio.create_task(read())
        await asyncio.wait([task], timeout=0.01)
        await until(lambda: provider.sent_tokens >= 300)
        if left == "cancelled":
            await until(lambda: provider.ledger)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        del task
        gc.collect()
        await until(lambda: g.sums["spent"])
        await until(lambda: provider.ledger)
        assert g.sums["spent"] == g.counted >= g.bill > 0
        assert "estimated" in g.labels[0]


@pytest.mark.parametrize("more", [{}, {"stream": True}], ids=["whole", "streamed"])
@pytest.mark.parametrize("method", [method for method in METHODS if method.shape == "bytes"], ids=str)
async def test_an_unread_response_is_charged(
    opened: Any, provider: LocalProvider, method: Method, more: dict[str, Any]
) -> None:
    provider.script(Scene(output_tokens=40))
    async with opened(method.sdk) as g:
        async with entered(method.call(g.client, **more)):
            await until(lambda: provider.ledger)
        assert g.sums["spent"] == g.counted >= g.bill > 0


@pytest.mark.event_loops("asyncio", "uvloop")
async def test_output_that_arrives_at_the_moment_of_a_cancellation_is_charged(
    guarded_client: Any, provider: LocalProvider
) -> None:
    method = METHOD["chat.create-stream"]
    provider.script(Scene(token_delay_s=0.001, output_tokens=1_500))
    async with guarded_client(method.sdk, is_async=True, unseen_output_tokens=0) as g:
        seen = []

        async def read() -> None:
            async for chunk in await start_stream(g, method, 50_000):
                seen.append(chunk)

        task = asyncio.create_task(read())
        await until(lambda: seen)
        while provider.sent_tokens < 1_500:
            time.sleep(0.01)  # blocks the event loop while the rest arrives
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: provider.ledger)
        assert g.sums["spent"] == g.counted >= g.bill > 0


async def test_a_stream_closed_after_the_chunk_with_the_finish_reason_is_charged_exactly(
    opened: Any, provider: LocalProvider
) -> None:
    method = METHOD["chat.create-stream"]
    async with opened("openai") as g:
        stream = await resolve(method.call(g.client))
        while True:
            chunk = await next_item(stream)
            if chunk.choices[0].finish_reason:
                break
        await resolve(stream.close())
        assert g.counted == g.sums["spent"] == g.bill > 0
        assert "estimated" not in g.labels[0]


@pytest.mark.parametrize("method", BASIC_STREAMS, ids=str)
async def test_a_stream_without_usage_commits_an_estimate(opened: Any, provider: LocalProvider, method: Method) -> None:
    provider.script(Scene(silent=True))
    async with opened(method.sdk) as g:
        await run(method, g.client)
        assert g.sums["spent"] == g.counted >= g.bill > 0
        assert "estimated" in g.labels[0]


async def test_the_input_cost_of_a_stream_is_accrued_when_the_first_event_arrives(
    opened: Any, provider: LocalProvider
) -> None:
    method = METHOD["messages.create-stream"]
    provider.script(Scene(input_tokens=1000, token_delay_s=0.001))
    async with opened("anthropic") as g:
        async with g.hold("0.50") as hold:
            stream = await resolve(method.call(g.client))
            await next_item(stream)
            assert hold.accrued["agent"] >= 1000 * 1_000 / 1e9  # the input of the first event
            await resolve(stream.close())


def test_models_with_hidden_reasoning_are_recognised() -> None:
    assert not claude_hides(CLAUDE, None) and not claude_hides("claude-sonnet-5", {"type": "disabled"})
    assert claude_hides("claude-sonnet-5", None) and claude_hides(CLAUDE, {"type": "adaptive"})
    assert not gpt_hides(GPT) and not gpt_hides("ft:gpt-4o-mini:own")
    assert gpt_hides("gpt-5-mini") and gpt_hides("o3")
