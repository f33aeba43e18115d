"""Unusual responses (compressed, malformed, by middleware, from Azure), and shared HTTP clients."""

from __future__ import annotations

import gzip
import json
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from examples.local_provider import LocalProvider, Scene
from examples.wire_formats import FORMATS
from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter
from ktrdr_budget.metering.guards import guard

from ...helpers.guarded import CLAUDE, GPT, MESSAGES, entered, http_client_of, next_item, raw_client, resolve
from ...helpers.keyspace import sums

CALL: dict[str, Any] = {"model": CLAUDE, "max_tokens": 5_000, "messages": MESSAGES}
BUDGETS = [Budget("agent", "5.00")]
WORST_OUTPUT = 5_000 * 5_000  # nano-dollars


def _stream_bytes() -> bytes:
    wire_format = FORMATS["/v1/messages"]
    answer = wire_format.answer(CALL, input_tokens=9, output_tokens=4, text=None, cache=(0, 0, 0), silent=False)
    deltas = b"".join(wire_format.delta(answer, token) for token in answer.tokens)
    return wire_format.opening(answer) + deltas + wire_format.closing(answer)


async def _in_parts(content: bytes) -> Any:
    for at in range(0, len(content), 100):  # splits events
        yield content[at : at + 100]


async def _spent(server: Any, response: Any, **more: Any) -> tuple[int, httpx2.Request]:
    """Make a call that receives this response; return its cost in nano-dollars, and its request."""
    requests = []

    async def handle(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return response

    http = httpx2.AsyncClient(transport=httpx2.MockTransport(handle))
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        async with anthropic.AsyncAnthropic(api_key="k", http_client=http, max_retries=0) as client:
            message = await guard(client, limiter).messages.create(**CALL, **more)
            if more:
                _ = [event async for event in message]
    with server.client() as store:
        figures = sums(store)
        assert figures["held"] == 0
        return figures["spent"], requests[0]


async def test_a_compressed_response_is_charged_exactly(server: Any) -> None:
    wire_format = FORMATS["/v1/messages"]
    answer = wire_format.answer(CALL, input_tokens=9, output_tokens=4, text=None, cache=(0, 0, 0), silent=False)
    body = gzip.compress(json.dumps(wire_format.document(answer)).encode())
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    spent, _ = await _spent(server, httpx2.Response(200, headers=headers, content=body))
    assert spent == 9 * 1_000 + 4 * 5_000


@pytest.mark.parametrize("complete", [False, True])
async def test_streams_are_requested_without_compression(server: Any, complete: bool) -> None:
    headers = {"content-type": "text/event-stream; charset=utf-8"}
    content = _stream_bytes() if complete else _in_parts(_stream_bytes())  # caching transports read it completely
    spent, request = await _spent(server, httpx2.Response(200, headers=headers, content=content), stream=True)
    assert request.headers["accept-encoding"] == "identity"
    assert spent == 9 * 1_000 + 4 * 5_000


async def test_a_compressed_stream_is_charged_at_the_worst_case(server: Any) -> None:
    headers = {"content-encoding": "gzip", "content-type": "text/event-stream"}
    content = _in_parts(gzip.compress(_stream_bytes()))
    spent, _ = await _spent(server, httpx2.Response(200, headers=headers, content=content), stream=True)
    assert spent > WORST_OUTPUT


MALFORMED = [
    {"id": "x", "usage": {"input_tokens": "many", "output_tokens": 3}},
    {"id": "x", "usage": {"input_tokens": 1, "output_tokens": -3}},
    {"id": "x", "usage": [1, 2]},
    {"id": "x", "usage": None},
    [1, 2, 3],
    "words",
]


@pytest.mark.parametrize("body", MALFORMED, ids=repr)
async def test_a_response_with_malformed_usage_is_charged_at_the_worst_case(server: Any, body: object) -> None:
    spent, _ = await _spent(server, httpx2.Response(200, json=body))
    assert spent > WORST_OUTPUT


async def test_if_a_middleware_calls_two_models_both_calls_are_charged(provider: LocalProvider, server: Any) -> None:
    async def twice(request: Any, call_next: Any) -> Any:
        await call_next(request)
        return await call_next(request.copy(body={**request.json, "model": "claude-opus-4-5"}))

    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        async with raw_client("anthropic", True, provider, middleware=[twice]) as client:
            await guard(client, limiter).messages.create(**CALL)
        assert [line.model for line in provider.ledger] == [CLAUDE, "claude-opus-4-5"]
        first, second = provider.ledger
        bill = first.input_tokens * 1_000 + first.output_tokens * 5_000
        bill += second.input_tokens * 5_000 + second.output_tokens * 25_000
        assert round((await limiter.status("agent")).spent * 10**9) == bill


async def test_a_retry_with_a_different_model_makes_a_separate_reservation(
    provider: LocalProvider, server: Any
) -> None:
    async def other_model_on_retry(request: Any, call_next: Any) -> Any:
        retried = request.retries_taken > 0
        return await call_next(request.copy(body={**request.json, "model": "claude-opus-4-5"}) if retried else request)

    provider.script(Scene(status=429))
    held = []
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        reserve = limiter.reserve

        async def recording_reserve(amounts: Any, *rest: Any, **named: Any) -> Any:
            held.append(next(iter(amounts.values())))
            return await reserve(amounts, *rest, **named)

        limiter.reserve = recording_reserve
        async with raw_client("anthropic", True, provider, middleware=[other_model_on_retry], max_retries=1) as client:
            await guard(client, limiter).messages.create(**CALL)
        status = await limiter.status("agent")
        assert held[1] > 4 * held[0]
        assert status.held == 0
        (billed,) = provider.ledger
        assert round(status.spent * 10**9) == billed.input_tokens * 5_000 + billed.output_tokens * 25_000


async def test_if_each_chunk_reports_a_running_total_only_the_last_total_is_charged(server: Any) -> None:
    """Some servers with OpenAI's format report the usage so far in every chunk."""

    def chunk(text: str, output_tokens: int, reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
        usage = {"prompt_tokens": 9, "completion_tokens": output_tokens, "total_tokens": 9 + output_tokens}
        frame = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": GPT}
        return b"data: " + json.dumps({**frame, "choices": [choice], "usage": usage}).encode() + b"\n\n"

    content = chunk("a", 1) + chunk("b", 2) + chunk("c", 3, "stop") + b"data: [DONE]\n\n"
    headers = {"content-type": "text/event-stream"}
    response = httpx2.Response(200, headers=headers, content=_in_parts(content))
    http = httpx2.AsyncClient(transport=httpx2.MockTransport(lambda request: response))
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        async with openai.AsyncOpenAI(api_key="k", http_client=http) as client:
            completions = guard(client, limiter).chat.completions
            stream = await completions.create(model=GPT, max_tokens=50, messages=MESSAGES, stream=True)
            assert [chunk.choices[0].delta.content async for chunk in stream] == ["a", "b", "c"]
        assert round((await limiter.status("agent")).spent * 10**9) == 9 * 400 + 3 * 1_600


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("breaks", [False, True])
async def test_closing_a_stream_after_the_finish_reason_still_reads_the_usage_chunk(
    server: Any, is_async: bool, breaks: bool
) -> None:
    frame = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": GPT}
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    events = [
        {**frame, "choices": [{"index": 0, "delta": {"content": "abc"}, "finish_reason": None}]},
        {**frame, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {**frame, "choices": [], "usage": usage},
    ]
    lines = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
    arrived: list[bytes] = []

    def arrive() -> Any:
        for line in lines:
            arrived.append(line)
            if breaks and len(arrived) == 3:
                raise httpx2.ReadError("cut off")
            yield line

    async def arrive_async() -> Any:
        for line in arrive():
            yield line

    def respond(request: httpx2.Request) -> httpx2.Response:
        content = arrive_async() if is_async else arrive()
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=content)

    transport = httpx2.MockTransport(respond)
    limiter_class, client_class, http_class = (
        (AsyncBudgetLimiter, openai.AsyncOpenAI, httpx2.AsyncClient)
        if is_async
        else (BudgetLimiter, openai.OpenAI, httpx2.Client)
    )
    async with entered(limiter_class(server.url, BUDGETS)) as limiter:
        async with entered(client_class(api_key="k", http_client=http_class(transport=transport))) as client:
            completions = guard(client, limiter).chat.completions
            stream = await resolve(completions.create(model=GPT, max_tokens=50, messages=MESSAGES, stream=True))
            assert [(await next_item(stream)).choices[0].finish_reason for _ in "ab"] == [None, "stop"]
            assert len(arrived) == 2
            await resolve(stream.close())
    with server.client() as store:
        exact = 9 * 400 + 3 * 1_600
        assert len(arrived) == 3
        assert sums(store)["held"] == 0
        assert sums(store)["spent"] > exact if breaks else sums(store)["spent"] == exact


async def test_an_allowed_unmetered_call_is_charged_for_the_reported_usage(server: Any) -> None:
    usage = {"input_tokens": 9, "output_tokens": 4, "server_tool_use": {"web_search_requests": 3}}
    http = httpx2.AsyncClient(
        transport=httpx2.MockTransport(lambda request: httpx2.Response(200, json={"usage": usage}))
    )
    tools = [{"type": "web_search_20250305", "name": "web_search"}]
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        async with anthropic.AsyncAnthropic(api_key="k", http_client=http) as client:
            guarded = guard(client, limiter, allow_unmetered=True)
            await guarded.messages.create(**{**CALL, "tools": tools})
        # $10 per thousand searches in genai-prices 0.2.3.
        assert round((await limiter.status("agent")).spent * 10**9) == 9 * 1_000 + 4 * 5_000 + 3 * 10_000_000


async def test_calls_to_azure_cost_the_azure_prices(server: Any) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    paths = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        paths.append(request.url.path)
        return httpx2.Response(200, json={"id": "c", "choices": [], "usage": usage})

    http = httpx2.AsyncClient(transport=httpx2.MockTransport(answer))
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        async with openai.AsyncAzureOpenAI(
            api_key="k", api_version="2025-01-01", azure_endpoint="https://example.test", http_client=http
        ) as client:
            await guard(client, limiter).chat.completions.create(model="gpt-4o", max_tokens=9, messages=MESSAGES)
        assert paths == ["/openai/deployments/gpt-4o/chat/completions"]
        # $2.50 and $10 per million tokens in genai-prices 0.2.3.
        assert round((await limiter.status("agent")).spent * 10**9) == 9 * 2_500 + 3 * 10_000
        (entry,) = (await limiter.ledger("agent")).items
        assert entry.operation.startswith("chat azure/gpt-4o ")


async def test_a_client_that_shares_the_http_client_of_a_guarded_client_is_guarded(
    provider: LocalProvider, server: Any
) -> None:
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        async with raw_client("anthropic", True, provider) as first:
            shared = http_client_of(guard(first, limiter))
            second = anthropic.AsyncAnthropic(api_key="k", base_url=provider.anthropic_url, http_client=shared)
            await second.messages.create(**CALL)
            await guard(second, limiter).messages.create(**CALL)
        bill = sum(line.input_tokens * 1_000 + line.output_tokens * 5_000 for line in provider.ledger)
        assert len(provider.ledger) == 2
        assert round((await limiter.status("agent")).spent * 10**9) == bill
