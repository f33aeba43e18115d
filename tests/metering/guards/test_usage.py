"""Parsing of reported usage, the outcome of a call by its HTTP status, and streams whose usage never arrives."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx2
import openai
import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter
from ktrdr_budget.metering.guards import guard, metered_response
from ktrdr_budget.metering.guards.bounds import Bound
from ktrdr_budget.metering.guards.metered_streams import DRAIN_TASK
from ktrdr_budget.metering.guards.openai import OpenAIDialect
from ktrdr_budget.metering.guards.response_parser import ResponseParser
from ktrdr_budget.metering.guards.sdk_call import status_outcome
from ktrdr_budget.metering.prices import ModelPrice, Prices

from ...helpers.guarded import GPT, MESSAGES
from ...helpers.keyspace import ledger_entries, sums
from ...helpers.waiting import until

BUDGETS = [Budget("agent", "5.00")]
FRAME = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": GPT}
STREAMED = {"content-type": "text/event-stream"}


def parse(route: str, *events: dict[str, Any], choices: int = 1) -> ResponseParser:
    usage_parser = OpenAIDialect().usage_parser(route, Bound("m", 1000, 50, choices=choices))
    parser = ResponseParser(usage_parser, events=True, unseen_output_tokens=5)
    for event in events:
        parser.feed(b"data: " + json.dumps(event).encode() + b"\n\n")
    return parser


def chunk(index: int, output_tokens: int, reason: str | None = None) -> dict[str, Any]:
    choice = {"index": index, "delta": {"content": "x"}, "finish_reason": reason}
    usage = {"prompt_tokens": 9, "completion_tokens": output_tokens, "total_tokens": 9 + output_tokens}
    return {**FRAME, "choices": [choice], "usage": usage}


def test_if_only_the_total_includes_reasoning_tokens_these_tokens_are_charged_as_output() -> None:
    """xAI reports reasoning tokens this way: docs.x.ai/docs/key-information/consumption-and-rate-limits."""
    usage = {"prompt_tokens": 10_120, "completion_tokens": 1_499, "total_tokens": 14_428}
    usage["completion_tokens_details"] = {"reasoning_tokens": 2_809}
    parsed = parse("chat/completions", {**FRAME, "choices": [], "usage": usage}).usage
    assert parsed is not None and (parsed.input_tokens, parsed.output_tokens) == (10_120, 1_499 + 2_809)


def test_a_running_total_is_final_only_after_all_answers_have_ended() -> None:
    events = [chunk(0, 1), chunk(1, 2), chunk(0, 3, "stop"), chunk(1, 4), chunk(1, 5, "stop")]
    for count, event in enumerate(events, 1):
        assert parse("chat/completions", *events[:count], choices=2).final == (event is events[-1])
    parsed = parse("chat/completions", *events, choices=2).usage
    assert parsed is not None and parsed.output_tokens == 5


def test_the_estimate_of_a_failed_stream_includes_the_names_of_called_tools() -> None:
    item = {"type": "response.output_item.added", "item": {"type": "function_call", "name": "n" * 20}}
    assert parse("responses", item).estimate().output_tokens >= 20 + 5
    assert parse("responses").estimate().output_tokens == 5


def test_the_outcome_of_a_call_is_unknown_if_azure_replies_with_status_400() -> None:
    assert (status_outcome(400, "azure"), status_outcome(400, "openai")) == ("unknown", "rejected")
    assert (status_outcome(429, "azure"), status_outcome(200, "azure")) == ("rejected", "answered")


async def test_the_reservation_stays_held_if_the_content_filter_of_azure_stops_a_call(server: Any) -> None:
    error = {"error": {"code": "content_filter", "message": "stopped"}}
    http = httpx2.AsyncClient(transport=httpx2.MockTransport(lambda request: httpx2.Response(400, json=error)))
    prices = Prices([ModelPrice("azure", "own", input="1", output="1")])
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        client = openai.AsyncAzureOpenAI(
            azure_endpoint="http://x", azure_deployment="own", api_version="1", api_key="k", http_client=http
        )
        async with guard(client, limiter, pricer=prices) as guarded:
            with pytest.raises(openai.BadRequestError):
                await guarded.chat.completions.create(model=GPT, max_tokens=50, messages=MESSAGES)
        assert (await limiter.status("agent")).held > 0  # at the price of the deployment, the only configured one


# -- usage that never arrives ------------------------------------------------------------------------------------------

LINES = [
    b"data: " + json.dumps({**FRAME, "choices": [choice]}).encode() + b"\n\n"
    for choice in (
        {"index": 0, "delta": {"content": "abc"}, "finish_reason": None},
        {"index": 0, "delta": {}, "finish_reason": "stop"},
    )
]
CALL: dict[str, Any] = {"model": GPT, "max_tokens": 500, "messages": MESSAGES, "stream": True}


async def test_closing_an_async_stream_waits_only_a_limited_time_for_usage(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metered_response, "USAGE_TIMEOUT_S", 0.05)

    async def arrive() -> Any:
        for line in LINES:
            yield line
        await asyncio.Event().wait()

    http = httpx2.AsyncClient(
        transport=httpx2.MockTransport(lambda request: httpx2.Response(200, headers=STREAMED, content=arrive()))
    )
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        async with openai.AsyncOpenAI(api_key="k", http_client=http) as client:
            completions = guard(client, limiter).chat.completions
            stream = await completions.create(**CALL)
            _ = [await anext(stream) for _ in LINES]
            await asyncio.wait_for(stream.close(), 30)
            _check_estimates(server)
            stream = await completions.create(**CALL)
            _ = [await anext(stream) for _ in LINES]
            monkeypatch.setattr(metered_response, "USAGE_TIMEOUT_S", 60)
            closing = asyncio.create_task(stream.close())
            await until(lambda: closing.get_coro().cr_await is not None)
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            _check_estimates(server, calls=2)


async def test_a_cancelled_caller_does_not_wait_for_the_rest_of_the_stream(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metered_response, "USAGE_TIMEOUT_S", 3600)

    async def arrive() -> Any:
        for line in LINES:
            yield line
        await asyncio.Event().wait()

    http = httpx2.AsyncClient(
        transport=httpx2.MockTransport(lambda request: httpx2.Response(200, headers=STREAMED, content=arrive()))
    )
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        async with openai.AsyncOpenAI(api_key="k", http_client=http) as client:
            stream = await guard(client, limiter).chat.completions.create(**CALL)
            _ = [await anext(stream) for _ in LINES]

            async def leave() -> None:
                try:
                    await asyncio.Event().wait()
                finally:
                    await stream.close()

            task = asyncio.create_task(leave())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 60)
            (drain,) = [task for task in asyncio.all_tasks() if task.get_name() == DRAIN_TASK]
            drain.cancel()  # as a closing event loop does
            await drain
            _check_estimates(server)


def test_closing_a_sync_stream_waits_only_a_limited_time_for_usage(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metered_response, "USAGE_TIMEOUT_S", 0.05)
    never = threading.Event()

    def arrive() -> Any:
        yield from LINES
        never.wait()

    http = httpx2.Client(
        transport=httpx2.MockTransport(lambda request: httpx2.Response(200, headers=STREAMED, content=arrive()))
    )
    with BudgetLimiter(server.url, BUDGETS) as limiter, openai.OpenAI(api_key="k", http_client=http) as client:
        stream = guard(client, limiter).chat.completions.create(**CALL)
        _ = [next(stream) for _ in LINES]
        try:
            stream.close()
            _check_estimates(server)
        finally:
            never.set()


def _check_estimates(server: Any, calls: int = 1) -> None:
    """Check that so many calls were settled, each by an estimate."""
    with server.client() as store:
        figures = sums(store)
        assert figures["held"] == 0 and figures["spent"] > 0
        (ledger,) = store.keys("ktrdr:*:l:agent:*")
        labels = [entry.operation for entry in ledger_entries(store, ledger)]
        assert len(labels) == calls and all("estimated" in label for label in labels)
