"""Streams that end early: what is known is committed, never less than what was billed, and marked as an estimate."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import nullcontext
from typing import Any

import pytest

from examples.local_provider import LocalProvider, Scene

from ...helpers.guarded import BASIC_STREAMS, CLAUDE, GPT, STREAMS, WAYS, Telling, Way, take
from ...helpers.waiting import until

TOKENS = {"output_tokens": 30}
BROKEN = {
    "dropped-at-once": Scene(drop_after=1, **TOKENS),
    "dropped": Scene(drop_after=20, **TOKENS),
    "error-at-once": Scene(error_after=0, **TOKENS),
    "error": Scene(error_after=20, **TOKENS),
}


async def _closed(stream: Any, is_async: bool) -> None:
    await stream.close() if is_async else stream.close()


async def begun(g: Any, way: Way, tokens_max: int, **options: Any) -> Any:
    """A stream of which one item is read, and a request for so many tokens."""
    most = "max_tokens" if way.sdk == "anthropic" else "max_output_tokens"
    most = "max_completion_tokens" if way.name.startswith("chat") else most
    stream = way.call(Telling(g.client, {most: tokens_max}), **options)
    stream = await stream if g.is_async else stream
    _ = await anext(stream) if g.is_async else next(stream)
    return stream


async def arrived(provider: LocalProvider, tokens: int) -> None:
    """Waits until the provider has sent so much, and the network has brought it."""
    await until(lambda: provider.sent_tokens >= tokens)
    await asyncio.sleep(0.05)


@pytest.mark.parametrize("scene", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("way", STREAMS, ids=str)
async def test_a_stream_that_breaks_off_commits_an_estimate(
    opened: Any, provider: LocalProvider, way: Way, scene: Scene
) -> None:
    provider.script(scene)
    async with opened(way.sdk) as g:
        # An error event of Responses is an event to the SDK; it raises for all others.
        shown = scene.error_after is not None and way.name.startswith("responses.")
        with nullcontext() if shown else pytest.raises(Exception, match="scripted|[cC]onnection"):
            await take(way, g.client)
        await until(lambda: provider.ledger)
        assert g.sums["spent"] == g.counted >= g.bill > 0
        assert "estimated" in g.labels[0]


@pytest.mark.parametrize("items", [1, 3, 10])
@pytest.mark.parametrize("way", STREAMS, ids=str)
async def test_a_stream_that_is_closed_early_commits_an_estimate(
    opened: Any, provider: LocalProvider, way: Way, items: int
) -> None:
    provider.script(Scene(stall_after=20, **TOKENS))
    async with opened(way.sdk) as g:
        assert len(await take(way, g.client, items=items)) == items
        spent = g.sums["spent"]
        await until(lambda: provider.ledger)
        assert g.sums["spent"] == g.counted == spent >= g.bill > 0
        assert "estimated" in g.labels[0]


@pytest.mark.parametrize("way", BASIC_STREAMS, ids=str)
async def test_the_estimate_of_a_model_that_hides_nothing_follows_what_arrived(
    opened: Any, provider: LocalProvider, way: Way
) -> None:
    estimates = []
    for tokens in (4, 24):
        provider.clear()
        provider.script(Scene(stall_after=tokens, output_tokens=30))
        async with opened(way.sdk, unseen_output_tokens=5) as g:
            before = g.sums["spent"]
            stream = await begun(g, way, 5_000)
            await arrived(provider, tokens)
            await _closed(stream, g.is_async)
            await until(lambda: provider.ledger)
            estimates.append(g.sums["spent"] - before)
            assert estimates[-1] >= g.bill
    assert estimates[0] < estimates[1]


@pytest.mark.parametrize("way", BASIC_STREAMS, ids=str)
async def test_a_model_that_may_think_in_secret_is_charged_in_full_when_its_stream_breaks_off(
    opened: Any, provider: LocalProvider, way: Way
) -> None:
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 4096}
    more = thinking if way.sdk == "anthropic" else {"model": "gpt-5-mini"}
    provider.script(Scene(stall_after=20, output_tokens=30))
    async with opened(way.sdk) as g:
        calls = way.call
        loose = Way(way.name, way.sdk, lambda client, **o: calls(Telling(client, more)), way.shape)
        await take(loose, g.client, items=3)
        price = 5_000 if way.sdk == "anthropic" else 2_000
        assert g.sums["spent"] > (4096 if way.sdk == "anthropic" else 50) * price


@pytest.mark.parametrize("way", BASIC_STREAMS, ids=str)
async def test_a_cancelled_stream_commits_an_estimate(guarded_client: Any, provider: LocalProvider, way: Way) -> None:
    provider.script(Scene(stall_after=20, output_tokens=40))
    async with guarded_client(way.sdk, is_async=True) as g:
        seen = []

        async def read() -> None:
            async for item in await way.call(g.client):
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
@pytest.mark.parametrize("way", BASIC_STREAMS, ids=str)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_a_stream_that_is_dropped_without_closing_is_settled_all_the_same(
    opened: Any, provider: LocalProvider, way: Way, started: bool
) -> None:
    provider.script(Scene(stall_after=20, **TOKENS))
    async with opened(way.sdk) as g:
        stream = await way.call(g.client) if g.is_async else way.call(g.client)
        if started:
            _ = await anext(stream) if g.is_async else next(stream)
        del stream
        gc.collect()
        await until(lambda: g.sums["spent"])
        assert g.sums["held"] == 0
        assert "estimated" in g.labels[0]


@pytest.mark.parametrize("way", BASIC_STREAMS, ids=str)
async def test_what_had_arrived_of_a_stream_and_was_not_read_is_charged_when_it_is_closed(
    opened: Any, provider: LocalProvider, way: Way
) -> None:
    provider.script(Scene(stall_after=40, output_tokens=60))
    async with opened(way.sdk, unseen_output_tokens=5) as g:
        stream = await begun(g, way, 50_000)
        await arrived(provider, 40)
        await _closed(stream, g.is_async)
        await until(lambda: provider.ledger)
        assert provider.ledger[0].output_tokens == 40
        assert g.sums["spent"] == g.counted >= g.bill > 0
        assert g.sums["spent"] < 10_000 * 1_600  # what is known, and not the limit
        assert "estimated" in g.labels[0]


@pytest.mark.parametrize("way", BASIC_STREAMS, ids=str)
async def test_a_stream_that_had_arrived_to_its_end_is_charged_exactly_though_it_was_not_read(
    opened: Any, provider: LocalProvider, way: Way
) -> None:
    provider.script(Scene(output_tokens=40))
    async with opened(way.sdk) as g:
        stream = await begun(g, way, 50_000)
        await arrived(provider, 40)
        await until(lambda: provider.ledger)
        await _closed(stream, g.is_async)
        assert g.sums["spent"] == g.counted == g.bill > 0
        assert "estimated" not in g.labels[0]


@pytest.mark.parametrize("left", ["closed", "dropped", "cancelled", "failed"])
@pytest.mark.parametrize("way", BASIC_STREAMS, ids=str)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_more_than_can_be_read_on_is_charged_in_full(
    opened: Any, provider: LocalProvider, way: Way, left: str
) -> None:
    provider.script(Scene(output_tokens=8_000))
    async with opened(way.sdk) as g:

        async def read() -> None:
            stream = await begun(g, way, 16_000)
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
                await _closed(stream, g.is_async)

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
@pytest.mark.parametrize("way", [way for way in WAYS if way.shape == "bytes"], ids=str)
async def test_an_answer_that_is_not_read_at_all_is_charged_all_the_same(
    opened: Any, provider: LocalProvider, way: Way, more: dict[str, Any]
) -> None:
    provider.script(Scene(output_tokens=40))
    async with opened(way.sdk) as g:
        entered = way.call(g.client, **more)
        if g.is_async:
            async with entered:
                await until(lambda: provider.ledger)
        else:
            with entered:
                await until(lambda: provider.ledger)
        assert g.sums["spent"] == g.counted >= g.bill > 0


async def test_a_cancellation_that_comes_together_with_data_loses_none_of_it(
    guarded_client: Any, provider: LocalProvider
) -> None:
    way = next(way for way in WAYS if way.name == "chat.create-stream")
    provider.script(Scene(token_delay_s=0.001, output_tokens=1_500))
    async with guarded_client(way.sdk, is_async=True, unseen_output_tokens=0) as g:
        seen = []

        async def read() -> None:
            async for chunk in await begun(g, way, 50_000):
                seen.append(chunk)

        task = asyncio.create_task(read())
        await until(lambda: seen)
        while provider.sent_tokens < 1_500:
            time.sleep(0.01)  # the loop is busy with something else, and the rest arrives
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: provider.ledger)
        assert g.sums["spent"] == g.counted >= g.bill > 0


async def test_a_stream_that_is_left_at_its_last_word_is_exact(opened: Any, provider: LocalProvider) -> None:
    way = next(way for way in WAYS if way.name == "chat.create-stream")
    async with opened("openai") as g:
        stream = await way.call(g.client) if g.is_async else way.call(g.client)
        while True:
            chunk = await anext(stream) if g.is_async else next(stream)
            if chunk.choices[0].finish_reason:  # as many programs do
                break
        await stream.close() if g.is_async else stream.close()
        assert g.counted == g.sums["spent"] == g.bill > 0
        assert "estimated" not in g.labels[0]


@pytest.mark.parametrize("way", BASIC_STREAMS, ids=str)
async def test_a_stream_that_tells_no_usage_is_an_estimate(opened: Any, provider: LocalProvider, way: Way) -> None:
    provider.script(Scene(silent=True))
    async with opened(way.sdk) as g:
        await take(way, g.client)
        assert g.sums["spent"] == g.counted >= g.bill > 0
        assert "estimated" in g.labels[0]


async def test_usage_is_accrued_as_it_arrives(opened: Any, provider: LocalProvider) -> None:
    way = next(way for way in WAYS if way.name == "messages.create-stream")
    provider.script(Scene(input_tokens=1000, token_delay_s=0.001))
    async with opened("anthropic") as g:
        async with hold_of(g, "0.50") as hold:
            stream = await way.call(g.client) if g.is_async else way.call(g.client)
            _ = await anext(stream) if g.is_async else next(stream)
            assert hold.accrued["agent"] >= 1000 * 1_000 / 1e9  # the input, as soon as it is told
            await stream.close() if g.is_async else stream.close()


def hold_of(g: Any, amount: str) -> Any:
    """``limiter.hold(...)`` as an async context manager, sync or not."""
    return g.limiter.hold("agent", amount) if g.is_async else _Entered(g.limiter.hold("agent", amount))


class _Entered:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    async def __aenter__(self) -> Any:
        return self._inner.__enter__()

    async def __aexit__(self, *error: Any) -> Any:
        return self._inner.__exit__(*error)


def test_the_tables_speak_of_models_that_hide_nothing() -> None:
    from ktrdr_budget.metering.guards.anthropic import _hides_output as claude_hides
    from ktrdr_budget.metering.guards.openai import _hides_output as gpt_hides

    assert not claude_hides(CLAUDE, None) and not claude_hides("claude-sonnet-5", {"type": "disabled"})
    assert claude_hides("claude-sonnet-5", None) and claude_hides(CLAUDE, {"type": "adaptive"})
    assert not gpt_hides(GPT) and not gpt_hides("ft:gpt-4o-mini:own")
    assert gpt_hides("gpt-5-mini") and gpt_hides("o3")
