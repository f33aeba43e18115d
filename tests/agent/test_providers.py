"""The providers' SDKs, unmodified, against an emulated provider; and the selection of a model by the environment."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded
from ktrdr_budget.agent import scripted
from ktrdr_budget.agent.llm import Completion, UnusableModel
from ktrdr_budget.agent.providers import ANTHROPIC_MODEL, OPENAI_MODEL, AnthropicLLM, OpenAILLM, make_llm
from ktrdr_budget.agent.research import ExampleResearch
from ktrdr_budget.agent.scripted import ScriptedLLM
from ktrdr_budget.errors import InvalidArgument
from ktrdr_budget.metering.prices import Prices
from ktrdr_budget.metering.usage import Usage
from ktrdr_budget.money import NANOS_PER_USD

from ..helpers.waiting import until

BUDGETS = [Budget("agent", "1.00")]
KEY = "sk-very-secret"
KINDS = ("anthropic", "openai")
MODELS = {"anthropic": ANTHROPIC_MODEL, "openai": OPENAI_MODEL}
BILLED = Usage(input_tokens=700, output_tokens=123, cache_read_tokens=200)


class Provider:
    """Emulates the streams of both providers. It replies like the scripted model, with the usage :data:`BILLED`."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.status = 200
        self.stall = False
        """Whether the provider stops within the reply and waits until the client disconnects."""
        self.left = 0
        """Clients that disconnected during the stall."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        path = head.split()[1]
        self.requests.append((path, headers, body))
        answer = scripted.answer(body["messages"][-1]["content"])
        events = list((anthropic_events if path.endswith("/messages") else openai_events)(body["model"], answer))
        kind = "text/event-stream" if self.status == 200 else "application/json"
        writer.write(f"HTTP/1.1 {self.status} X\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n".encode())
        if self.status != 200:
            writer.write(b'{"error": {"type": "authentication_error", "message": "invalid key"}}')
        elif self.stall:
            writer.writelines(events[:3])
            await writer.drain()
            with suppress(ConnectionResetError):  # a client may close with unread data
                await reader.read()
            self.left += 1
        else:
            writer.writelines(events)
        writer.close()


def event(data: dict[str, Any]) -> bytes:
    name = f"event: {data['type']}\n" if "type" in data else ""
    return f"{name}data: {json.dumps(data)}\n\n".encode()


def anthropic_events(model: str, answer: str) -> Iterator[bytes]:
    fresh = BILLED.input_tokens - BILLED.cache_read_tokens
    usage = {"input_tokens": fresh, "cache_read_input_tokens": BILLED.cache_read_tokens, "output_tokens": 1}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": model, "content": [], "usage": usage}
    yield event({"type": "message_start", "message": message})
    yield event({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
    for part in (answer[:20], answer[20:]):
        yield event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": part}})
    yield event({"type": "content_block_stop", "index": 0})
    ending = {"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": BILLED.output_tokens}}
    yield event({"type": "message_delta", **ending})
    yield event({"type": "message_stop"})


def openai_events(model: str, answer: str) -> Iterator[bytes]:
    chunk = {"id": "c_1", "object": "chat.completion.chunk", "created": 1, "model": model}
    yield event({**chunk, "choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})
    for part in (answer[:20], answer[20:]):
        yield event({**chunk, "choices": [{"index": 0, "delta": {"content": part}, "finish_reason": None}]})
    yield event({**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    usage = {
        "prompt_tokens": BILLED.input_tokens,
        "completion_tokens": BILLED.output_tokens,
        "total_tokens": BILLED.total_tokens,
        "prompt_tokens_details": {"cached_tokens": BILLED.cache_read_tokens},
    }
    yield event({**chunk, "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


@pytest.fixture
async def provider() -> AsyncIterator[tuple[Provider, str]]:
    """An emulated provider and its address."""
    provider = Provider()
    listening = await asyncio.start_server(provider.serve, "127.0.0.1", 0)
    yield provider, f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    listening.close()
    await listening.wait_closed()


def environment(kind: str, address: str = "http://127.0.0.1:9") -> dict[str, str]:
    base = f"{address}/v1" if kind == "openai" else address
    return {"AGENT_LLM": kind, f"{kind.upper()}_API_KEY": KEY, f"{kind.upper()}_BASE_URL": base}


@asynccontextmanager
async def llm_of(kind: str, limiter: AsyncBudgetLimiter, address: str) -> AsyncIterator[AnthropicLLM | OpenAILLM]:
    llm = make_llm(limiter, environment(kind, address))
    assert isinstance(llm, (AnthropicLLM, OpenAILLM))
    yield llm
    await llm.close()


def dollars(kind: str, usage: Usage) -> Decimal:
    return Decimal(Prices().price(kind, MODELS[kind], usage, datetime.now(UTC)).nanos) / NANOS_PER_USD


async def spent(limiter: AsyncBudgetLimiter) -> Decimal:
    return (await limiter.status("agent")).spent


# -- calls -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_a_call_returns_the_reply_and_is_charged_the_billed_usage(limiter, provider, kind: str):
    billing, address = provider
    async with llm_of(kind, limiter, address) as llm:
        completion = await llm.complete("Hello?", system="Be brief.", max_tokens=500)
    assert completion == Completion(scripted.answer("Hello?"), BILLED, MODELS[kind])
    assert await spent(limiter) == dollars(kind, BILLED) > 0
    [(path, headers, body)] = billing.requests
    assert path == ("/v1/messages" if kind == "anthropic" else "/v1/chat/completions")
    assert KEY in (headers.get("x-api-key"), headers.get("authorization", "").removeprefix("Bearer "))
    assert (body["model"], body["stream"]) == (MODELS[kind], True)
    assert body["max_tokens" if kind == "anthropic" else "max_completion_tokens"] == 500 + 3072
    assert body["messages"][-1] == {"role": "user", "content": "Hello?"}
    assert "Be brief." in (body.get("system"), body["messages"][0]["content"])


@pytest.mark.parametrize("kind", KINDS)
async def test_all_model_calls_of_a_cycle_with_a_real_sdk_are_charged_to_a_single_hold(limiter, provider, kind: str):
    billing, address = provider
    async with llm_of(kind, limiter, address) as llm:

        class Context:
            operation_id = "op_1"
            brief = None
            cancelled = False
            ask = staticmethod(llm.complete)

        context, research = Context(), ExampleResearch(phase_seconds=0)
        async with limiter.hold("agent", "0.15"):
            design = await research.design(context)
            training = await research.train(context, design)
            backtest = await research.backtest(context, design, training)
            assessment = await research.assess(context, design, training, backtest)
            assert (await limiter.status("agent")).held == Decimal("0.15"), (
                "calls draw from the hold and reserve nothing else"
            )
    assert assessment.verdict in ("promising", "mediocre", "poor")
    assert len(billing.requests) == 2
    assert await spent(limiter) == 2 * dollars(kind, BILLED)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_denied_call_is_not_sent_to_the_provider(server, provider, kind: str):
    billing, address = provider
    async with (
        AsyncBudgetLimiter(server.url, [Budget("agent", "0.0001")]) as limiter,
        llm_of(kind, limiter, address) as llm,
    ):
        with pytest.raises(BudgetExceeded):
            await llm.complete("Hello?")
        assert await spent(limiter) == 0
    assert not billing.requests


@pytest.mark.parametrize("kind", KINDS)
async def test_a_cancelled_call_disconnects_from_the_provider_and_is_charged_at_least_the_input(
    limiter, provider, kind: str
):
    billing, address = provider
    billing.stall = True
    async with llm_of(kind, limiter, address) as llm:
        task = asyncio.create_task(llm.complete("Hello?"))
        await until(lambda: billing.requests)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: billing.left)
        status = await limiter.status("agent")
    assert status.spent + status.held >= dollars(kind, Usage(input_tokens=10))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_call_rejected_by_the_provider_costs_nothing_and_the_error_shows_no_key(limiter, provider, kind: str):
    billing, address = provider
    billing.status = 401
    async with llm_of(kind, limiter, address) as llm:
        with pytest.raises(Exception, match="invalid key") as raised:
            await llm.complete("Hello?")
    assert type(raised.value).__name__ == "AuthenticationError"
    assert KEY not in f"{raised.value!r} {raised.value} {llm!r}"
    status = await limiter.status("agent")
    assert (status.spent, status.held) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stall", [False, True])
async def test_the_token_counts_of_a_cycle_match_the_billed_usage(make_stage, provider, kind: str, stall: bool):
    billing, address = provider
    billing.stall = stall
    stage = await make_stage(make_llm=lambda limiter: make_llm(limiter, environment(kind, address)))
    started = await stage.agent.trigger()
    if stall:
        await until(lambda: billing.requests)
        await stage.agent.cancel(started.operation_id)
    cycle = await stage.ended(started.operation_id)
    assert cycle.outcome == ("cancelled" if stall else "completed")
    assert Decimal(cycle.progress["spend"]) == (await stage.figures())[0] > 0
    tokens = cycle.progress["tokens"]
    if not stall:
        assert tokens == {"design": BILLED.total_tokens, "assessment": BILLED.total_tokens}
    assert stage.tally.token_counts == {phase: count for phase, count in tokens.items() if count}
    assert tokens["design"] > 0


@pytest.mark.parametrize("kind", KINDS)
async def test_no_span_shows_the_text_of_a_provider_error(make_stage, provider, kind: str, recorded):
    billing, address = provider
    billing.status = 401
    stage = await make_stage(make_llm=lambda limiter: make_llm(limiter, environment(kind, address)))
    cycle = await stage.ended((await stage.agent.trigger()).operation_id)
    assert (cycle.outcome, cycle.progress["tokens"]["design"]) == ("failed", 0)
    assert "invalid key" in cycle.progress["error"]
    await until(lambda: not stage.agent.running)
    assert recorded["agent.research_cycle"].attributes["error"] == "AuthenticationError"
    text = "".join(span.to_json() for span in recorded.spans)
    assert "AuthenticationError" in text
    assert not any(words in text for words in ("invalid key", KEY, "authentication_error"))


# -- selection ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen", [{}, {"AGENT_LLM": " "}, {"AGENT_LLM": "Scripted", "AGENT_MODEL": "ktrdr-scripted-1"}]
)
async def test_the_scripted_model_is_the_default(limiter, chosen: dict[str, str]):
    llm = make_llm(limiter, chosen)
    assert isinstance(llm, ScriptedLLM)
    assert (llm.provider, llm.model) == ("scripted", "ktrdr-scripted-1")


@pytest.mark.parametrize("kind", KINDS)
async def test_the_configured_model_is_used_instead_of_the_default_model(limiter, kind: str, tmp_path):
    prices = tmp_path / "prices.toml"
    prices.write_text(f'[[prices]]\nprovider = "{kind}"\nmodel = "house-1"\ninput = 1\noutput = 2\n')
    chosen = environment(kind) | {"AGENT_MODEL": "house-1", "KTRDR_PRICES_FILE": str(prices)}
    assert make_llm(limiter, chosen).model == "house-1"
    assert make_llm(limiter, environment(kind)).model == MODELS[kind]
    llm = make_llm(limiter, chosen)
    assert llm.using(MODELS[kind]).model == MODELS[kind]
    with pytest.raises(UnusableModel, match="no-such-model"):
        llm.using("no-such-model")


@pytest.mark.parametrize(
    ("chosen", "models"),
    [
        ({}, ["ktrdr-scripted-1", "ktrdr-scripted-1-sonnet", "ktrdr-scripted-1-haiku"]),
        ({"AGENT_LLM": "anthropic"}, ["claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5"]),
    ],
)
async def test_the_short_names_opus_sonnet_and_haiku_select_a_model_of_the_provider(
    limiter, chosen: dict[str, str], models: list[str]
):
    llm = make_llm(limiter, {**environment("anthropic"), "AGENT_LLM": "", **chosen})
    assert [llm.using(name).model for name in ("opus", "Sonnet", "haiku")] == models
    assert [llm.using(name).model for name in models] == models
    await llm.close()


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"AGENT_LLM": "llama"}, "AGENT_LLM: must be 'scripted', 'anthropic' or 'openai', not 'llama'"),
        ({"AGENT_MODEL": "gpt-6-luna"}, "AGENT_MODEL: there is no scripted model 'gpt-6-luna'; choose one of opus, "),
        ({"AGENT_LLM": "anthropic"}, "AGENT_LLM=anthropic needs a key in ANTHROPIC_API_KEY"),
        ({"AGENT_LLM": "openai", "OPENAI_API_KEY": " "}, "AGENT_LLM=openai needs a key in OPENAI_API_KEY"),
        (
            environment("openai") | {"AGENT_MODEL": "unlisted-1"},
            "AGENT_MODEL: no price for openai/unlisted-1: add it to KTRDR_PRICES_FILE",
        ),
    ],
)
async def test_the_error_for_an_unavailable_model_names_the_cause(limiter, chosen: dict[str, str], words: str):
    with pytest.raises(InvalidArgument, match=f"^{words}") as raised:
        make_llm(limiter, chosen)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_error_for_a_missing_package_names_the_package(limiter, monkeypatch, kind: str):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(InvalidArgument, match=rf"^AGENT_LLM={kind} needs more packages: pip install .*\[{kind}\]"):
        make_llm(limiter, environment(kind))


async def test_the_error_for_a_missing_price_list_names_the_package_to_install(limiter, monkeypatch):
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    with pytest.raises(InvalidArgument, match=r"^AGENT_LLM=openai: the price list needs more packages: .*\[llm\]"):
        make_llm(limiter, environment("openai"))
