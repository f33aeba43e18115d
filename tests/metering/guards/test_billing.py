"""What the provider billed is what the ledger says: to the nano-dollar in every ordinary case."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import openai
import pytest

from examples.local_provider import LocalProvider, Scene
from ktrdr_budget import BudgetExceeded
from ktrdr_budget.metering.prices import ModelPrice, Prices

from ...helpers.guarded import BASIC, EMBEDDING, GPT, WAYS, Way, take

ORDINARY = {
    "plain": Scene(output_tokens=7),
    "cached": Scene(input_tokens=40, cache_read_tokens=20, cache_write_tokens=15, cache_write_1h_tokens=6),
    "truncated": Scene(output_tokens=80),
    "empty": Scene(output_tokens=0),
}


@pytest.mark.parametrize("scene", ORDINARY.values(), ids=ORDINARY)
@pytest.mark.parametrize("way", WAYS, ids=str)
async def test_what_the_provider_bills_is_spent_to_the_nano_dollar(
    opened: Any, provider: LocalProvider, way: Way, scene: Scene
) -> None:
    provider.script(scene)
    async with opened(way.sdk) as g:
        with suppress(openai.LengthFinishReasonError):  # it was paid for all the same
            await take(way, g.client)
        assert len(provider.ledger) == 1
        assert g.sums["spent"] == g.bill > 0
        assert g.sums["held"] == g.sums["unconfirmed"] == 0
        assert g.labels == [label for label in g.labels if "estimated" not in label]
        assert "genai-prices/" in g.labels[0]


TOOL = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
STRICT = {**TOOL, "additionalProperties": False}
TOOLS = {
    "anthropic": [{"name": "weather", "description": "Tells it.", "input_schema": TOOL}],
    "chat": [{"type": "function", "function": {"name": "weather", "parameters": STRICT, "strict": True}}],
    "responses": [{"type": "function", "name": "weather", "parameters": STRICT, "strict": True}],
}
TOOL_WAYS = [way for way in WAYS if "raw" not in way.name and "bytes" not in way.name]


@pytest.mark.parametrize("way", TOOL_WAYS, ids=str)
async def test_calls_of_tools_are_billed_like_words(opened: Any, provider: LocalProvider, way: Way) -> None:
    tools = TOOLS.get(way.name.partition(".")[0], TOOLS["anthropic"])
    async with opened(way.sdk) as g:
        items = await take(way, g.client, tools=tools)
        assert items
        assert provider.requests[0]["tools"]
        assert g.sums["spent"] == g.bill > 0


async def test_other_endpoints_with_usage_are_metered(opened: Any, provider: LocalProvider) -> None:
    prices = Prices([ModelPrice("openai", GPT, input="0.4", output="1.6")])
    async with opened("openai", pricer=prices) as g:
        for made in (
            g.client.embeddings.create(model=EMBEDDING, input=["a text", "another"]),
            g.client.completions.create(model=GPT, prompt=["one", "two"], n=2, max_tokens=9),
        ):
            _ = await made if g.is_async else made
        assert [line.output_tokens for line in provider.ledger] == [0, 36]
        assert g.sums["spent"] == g.bill
        assert g.sums["held"] == 0


async def test_several_answers_are_reserved_and_billed_together(opened: Any, provider: LocalProvider) -> None:
    way = next(way for way in WAYS if way.name == "chat.create-stream")
    async with opened("openai") as g:
        await take(way, g.client, n=3)
        assert provider.ledger[0].output_tokens == 36
        assert g.sums["spent"] == g.bill


async def test_the_usage_chunk_that_nobody_asked_for_is_not_shown(opened: Any, provider: LocalProvider) -> None:
    way = next(way for way in WAYS if way.name == "chat.create-stream")
    async with opened("openai") as g:
        items = await take(way, g.client)
        assert provider.requests[-1]["stream_options"] == {"include_usage": True}
        assert all(chunk.choices and chunk.usage is None for chunk in items)
        asked = await take(way, g.client, stream_options={"include_usage": True})
        assert asked[-1].usage.completion_tokens == 12
        assert g.sums["spent"] == g.bill


@pytest.mark.parametrize("way", BASIC, ids=str)
async def test_calls_through_an_older_http_client_are_guarded(opened: Any, way: Way) -> None:
    if way.sdk == "anthropic":
        import httpx2 as httpx
    else:
        import httpx
    async with opened(way.sdk, client_options={"http_client": None}) as g:
        kind = httpx.AsyncClient if g.is_async else httpx.Client
        other = g.client.copy(http_client=kind())
        await take(way, other)
        assert g.sums["spent"] == g.bill > 0
        await other.close() if g.is_async else other.close()


@pytest.mark.parametrize("way", BASIC, ids=str)
async def test_a_call_that_does_not_fit_is_denied_before_anything_is_sent(
    opened: Any, provider: LocalProvider, way: Way
) -> None:
    async with opened(way.sdk, limit="0.0001") as g:
        with pytest.raises(BudgetExceeded) as caught:
            await take(way, g.client)
        assert caught.value.budget == "agent"
        assert provider.requests == []
        assert g.counted == 0
