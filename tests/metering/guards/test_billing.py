"""In ordinary cases the ledger equals the provider's bill, to the nano-dollar."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import openai
import pytest

from examples.local_provider import LocalProvider, Scene
from ktrdr_budget import BudgetExceeded
from ktrdr_budget.metering.prices import ModelPrice, Prices

from ...helpers.guarded import BASIC, EMBEDDING, GPT, METHOD, METHODS, Method, resolve, run

ORDINARY = {
    "plain": Scene(output_tokens=7),
    "cached": Scene(input_tokens=40, cache_read_tokens=20, cache_write_tokens=15, cache_write_1h_tokens=6),
    "truncated": Scene(output_tokens=80),
    "empty": Scene(output_tokens=0),
}


@pytest.mark.parametrize("scene", ORDINARY.values(), ids=ORDINARY)
@pytest.mark.parametrize("method", METHODS, ids=str)
async def test_the_spend_of_a_call_equals_the_bill_of_the_provider(
    opened: Any, provider: LocalProvider, method: Method, scene: Scene
) -> None:
    provider.script(scene)
    async with opened(method.sdk) as g:
        with suppress(openai.LengthFinishReasonError):  # raised after the call
            await run(method, g.client)
        assert len(provider.ledger) == 1
        assert g.sums["spent"] == g.bill > 0
        assert g.sums["held"] == g.sums["unconfirmed"] == 0
        assert not any("estimated" in label for label in g.labels)
        assert "genai-prices/" in g.labels[0]


TOOL = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
STRICT = {**TOOL, "additionalProperties": False}
TOOLS = {
    "anthropic": [{"name": "weather", "description": "The weather in a city.", "input_schema": TOOL}],
    "chat": [{"type": "function", "function": {"name": "weather", "parameters": STRICT, "strict": True}}],
    "responses": [{"type": "function", "name": "weather", "parameters": STRICT, "strict": True}],
}
TOOL_METHODS = [method for method in METHODS if "raw" not in method.name and "bytes" not in method.name]


@pytest.mark.parametrize("method", TOOL_METHODS, ids=str)
async def test_tool_calls_are_billed_as_output(opened: Any, provider: LocalProvider, method: Method) -> None:
    tools = TOOLS.get(method.name.partition(".")[0], TOOLS["anthropic"])
    async with opened(method.sdk) as g:
        assert await run(method, g.client, tools=tools)
        assert provider.requests[0]["tools"]
        assert g.sums["spent"] == g.bill > 0


async def test_calls_to_the_embeddings_and_completions_endpoints_are_metered(
    opened: Any, provider: LocalProvider
) -> None:
    prices = Prices([ModelPrice("openai", GPT, input="0.4", output="1.6")])
    async with opened("openai", pricer=prices) as g:
        for result in (
            g.client.embeddings.create(model=EMBEDDING, input=["a text", "another"]),
            g.client.completions.create(model=GPT, prompt=["one", "two"], n=2, max_tokens=9),
        ):
            await resolve(result)
        assert [line.output_tokens for line in provider.ledger] == [0, 36]
        assert g.sums["spent"] == g.bill
        assert g.sums["held"] == 0


async def test_a_request_for_several_answers_is_charged_for_all_answers(opened: Any, provider: LocalProvider) -> None:
    method = METHOD["chat.create-stream"]
    async with opened("openai") as g:
        await run(method, g.client, n=3)
        assert provider.ledger[0].output_tokens == 36
        assert g.sums["spent"] == g.bill


async def test_the_usage_chunk_is_hidden_unless_the_caller_requested_usage(
    opened: Any, provider: LocalProvider
) -> None:
    method = METHOD["chat.create-stream"]
    async with opened("openai") as g:
        items = await run(method, g.client)
        assert provider.requests[-1]["stream_options"] == {"include_usage": True}
        assert all(chunk.choices and chunk.usage is None for chunk in items)
        requested = await run(method, g.client, stream_options={"include_usage": True})
        assert requested[-1].usage.completion_tokens == 12
        assert g.sums["spent"] == g.bill


@pytest.mark.parametrize("method", BASIC, ids=str)
async def test_a_copied_client_with_a_different_http_client_is_guarded(opened: Any, method: Method) -> None:
    if method.sdk == "anthropic":
        import httpx2 as httpx
    else:
        import httpx
    async with opened(method.sdk, client_options={"http_client": None}) as g:
        kind = httpx.AsyncClient if g.is_async else httpx.Client
        other = g.client.copy(http_client=kind())
        await run(method, other)
        assert g.sums["spent"] == g.bill > 0
        await resolve(other.close())


@pytest.mark.parametrize("method", BASIC, ids=str)
async def test_if_a_call_does_not_fit_the_budget_no_request_is_sent(
    opened: Any, provider: LocalProvider, method: Method
) -> None:
    async with opened(method.sdk, limit="0.0001") as g:
        with pytest.raises(BudgetExceeded) as caught:
            await run(method, g.client)
        assert caught.value.budget == "agent"
        assert provider.requests == []
        assert g.counted == 0
