"""What answers tell of their usage, and what their status says of the bill."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx2
import openai
import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter
from ktrdr_budget.metering.guards import guard, taps
from ktrdr_budget.metering.guards.bounds import Bound
from ktrdr_budget.metering.guards.dialect import Listener
from ktrdr_budget.metering.guards.exchange import judge_status
from ktrdr_budget.metering.guards.openai import OpenAIDialect
from ktrdr_budget.metering.prices import ModelPrice, Prices

from ...helpers.guarded import GPT, MESSAGES
from ...helpers.keyspace import ledger_entries, sums
from ...helpers.waiting import until

BUDGETS = [Budget("agent", "5.00")]
FRAME = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": GPT}
STREAMED = {"content-type": "text/event-stream"}


def heard(route: str, *events: dict[str, Any], choices: int = 1) -> Listener:
    ear = OpenAIDialect().ear(route, Bound("m", 1000, 50, choices=choices))
    listener = Listener(ear, events=True, unseen_output_tokens=5)
    for event in events:
        listener.hear(b"data: " + json.dumps(event).encode() + b"\n\n")
    return listener


def chunk(index: int, made: int, reason: str | None = None) -> dict[str, Any]:
    choice = {"index": index, "delta": {"content": "x"}, "finish_reason": reason}
    usage = {"prompt_tokens": 9, "completion_tokens": made, "total_tokens": 9 + made}
    return {**FRAME, "choices": [choice], "usage": usage}


def test_reasoning_that_a_provider_counts_in_the_total_alone_is_output() -> None:
    """As xAI does: docs.x.ai/docs/key-information/consumption-and-rate-limits."""
    usage = {"prompt_tokens": 10_120, "completion_tokens": 1_499, "total_tokens": 14_428}
    usage["completion_tokens_details"] = {"reasoning_tokens": 2_809}  # type: ignore[assignment]
    told = heard("chat/completions", {**FRAME, "choices": [], "usage": usage}).usage
    assert told is not None and (told.input_tokens, told.output_tokens) == (10_120, 1_499 + 2_809)


def test_a_running_usage_is_final_when_the_last_of_several_answers_has_ended() -> None:
    events = [chunk(0, 1), chunk(1, 2), chunk(0, 3, "stop"), chunk(1, 4), chunk(1, 5, "stop")]
    for count, event in enumerate(events, 1):
        assert heard("chat/completions", *events[:count], choices=2).final == (event is events[-1])
    told = heard("chat/completions", *events, choices=2).usage
    assert told is not None and told.output_tokens == 5


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_events_may_be_cut_anywhere_and_end_in_any_way(line_end: str, size: int) -> None:
    text = "".join(f"data: {json.dumps(chunk(0, made))}\n\n" for made in (1, 2, 3)) + "data: [DONE]\n\n"
    data = text.replace("\n", line_end).encode()
    listener = heard("chat/completions")
    shown = b"".join(listener.hear(data[at : at + size]) for at in range(0, len(data), size)) + listener.end()
    assert shown == data
    assert listener.usage is not None and listener.usage.output_tokens == 3


def test_the_name_of_a_tool_counts_when_a_stream_breaks_off() -> None:
    begun = {"type": "response.output_item.added", "item": {"type": "function_call", "name": "n" * 20}}
    assert heard("responses", begun).estimate().output_tokens >= 20 + 5
    assert heard("responses").estimate().output_tokens == 5


def test_a_bad_request_to_azure_may_have_been_billed() -> None:
    assert (judge_status(400, "azure"), judge_status(400, "openai")) == ("unknown", "rejected")
    assert (judge_status(429, "azure"), judge_status(200, "azure")) == ("rejected", "answered")


async def test_what_azure_s_content_filter_stops_is_kept(server: Any) -> None:
    error = {"error": {"code": "content_filter", "message": "stopped"}}
    http = httpx2.AsyncClient(transport=httpx2.MockTransport(lambda request: httpx2.Response(400, json=error)))
    prices = Prices([ModelPrice("azure", "own", input="1", output="1")])
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        client = openai.AsyncAzureOpenAI(
            azure_endpoint="http://x", azure_deployment="own", api_version="1", api_key="k", http_client=http
        )
        async with guard(client, limiter, pricer=prices) as guarded:
            with pytest.raises(openai.BadRequestError):
                await guarded.chat.completions.create(model=GPT, max_tokens=50, messages=MESSAGES)  # type: ignore[arg-type]
        assert (await limiter.status("agent")).held > 0  # by the price of the deployment: this has no other


# -- a last word that does not come ------------------------------------------------------------------------------------

LINES = [
    b"data: " + json.dumps({**FRAME, "choices": [choice]}).encode() + b"\n\n"
    for choice in (
        {"index": 0, "delta": {"content": "abc"}, "finish_reason": None},
        {"index": 0, "delta": {}, "finish_reason": "stop"},
    )
]
CALL: dict[str, Any] = {"model": GPT, "max_tokens": 500, "messages": MESSAGES, "stream": True}


async def test_a_last_word_is_awaited_for_no_longer_than_it_is_worth(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taps, "DRAIN_TIMEOUT_S", 0.05)

    async def arrive() -> Any:
        for line in LINES:
            yield line
        await asyncio.Event().wait()

    http = httpx2.AsyncClient(
        transport=httpx2.MockTransport(lambda request: httpx2.Response(200, headers=STREAMED, content=arrive()))
    )
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        async with openai.AsyncOpenAI(api_key="k", http_client=http) as client:
            made = guard(client, limiter).chat.completions
            stream = await made.create(**CALL)
            _ = [await anext(stream) for _ in LINES]
            await asyncio.wait_for(stream.close(), 30)
            _check(server)
            stream = await made.create(**CALL)
            _ = [await anext(stream) for _ in LINES]
            monkeypatch.setattr(taps, "DRAIN_TIMEOUT_S", 60)
            closing = asyncio.create_task(stream.close())
            await until(lambda: closing.get_coro().cr_await is not None)  # type: ignore[union-attr]
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            _check(server, calls=2)


async def test_a_cancelled_caller_is_not_kept_while_his_stream_is_read_on(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taps, "DRAIN_TIMEOUT_S", 3600)

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
            (reading,) = taps._background
            reading.cancel()  # as a loop does that ends
            await reading
            _check(server)


def test_sync_code_awaits_a_last_word_no_longer_either(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "DRAIN_TIMEOUT_S", 0.05)
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
            _check(server)
        finally:
            never.set()


def _check(server: Any, calls: int = 1) -> None:
    """Each call is settled, by an estimate."""
    with server.client() as store:
        found = sums(store)
        assert found["held"] == 0 and found["spent"] > 0
        (ledger,) = store.keys("ktrdr:*:l:agent:*")
        labels = [entry.operation for entry in ledger_entries(store, ledger)]
        assert len(labels) == calls and all("estimated" in label for label in labels)
