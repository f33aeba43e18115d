"""Reported usage: whether it is credible, where in a stream it arrives, and how other providers report caches."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded
from ktrdr_budget.metering.guards import guard
from ktrdr_budget.metering.prices import ModelPrice, Prices

from ...helpers.guarded import CLAUDE, GPT, MESSAGES
from ...helpers.keyspace import ledger_entries, sums

BUDGETS = [Budget("agent", "5.00")]
INPUT, OUTPUT, CACHED, WRITE = 1_000, 4_000, 100, 1_250
"""Nano-dollars per token."""
PRICES = Prices(
    [
        ModelPrice(provider, model, input="1", output="4", cached_input="0.1", cache_write="1.25")
        for provider, model in (("openai", GPT), ("anthropic", CLAUDE))
    ]
)
MAX_TOKENS = 50
STREAMED = {"content-type": "text/event-stream"}
APIS = ["chat", "responses", "messages"]
NAMES = {
    "chat": ("prompt_tokens", "completion_tokens"),
    "responses": ("input_tokens", "output_tokens"),
    "messages": ("input_tokens", "output_tokens"),
}


def _document(api: str, usage: Any) -> dict[str, Any]:
    if api == "chat":
        message = {"role": "assistant", "content": "yes"}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        document: dict[str, Any] = {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": GPT,
            "choices": choices,
        }
    elif api == "responses":
        document = {"id": "r", "object": "response", "created_at": 1, "model": GPT, "output": [], "status": "completed"}
    else:
        document = {"id": "m", "type": "message", "role": "assistant", "model": CLAUDE, "content": []}
        document |= {"stop_reason": "end_turn", "stop_sequence": None}
    return document if usage is None else {**document, "usage": usage}


def _chunk(choices: list[Any], usage: Any = None) -> dict[str, Any]:
    frame = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": GPT}
    return {**frame, "choices": choices, **({} if usage is None else {"usage": usage})}


def _events(api: str, first: Any, last: Any, *later: Any) -> list[dict[str, Any] | str]:
    """A stream that reports the usage ``first`` at its beginning, ``last`` at its end, and ``later`` after the end."""
    if api == "chat":
        word = {"index": 0, "delta": {"content": "yes"}, "finish_reason": None}
        stop = {"index": 0, "delta": {}, "finish_reason": "stop"}
        return [
            _chunk([word], first),
            _chunk([stop]),
            *(_chunk([], usage) for usage in (last, *later) if usage is not None),
            "[DONE]",
        ]
    if api == "responses":
        created = {"type": "response.created", "sequence_number": 0, "response": _document(api, first)}
        delta = {"type": "response.output_text.delta", "sequence_number": 1, "delta": "yes", "item_id": "i"}
        delta |= {"output_index": 0, "content_index": 0, "logprobs": []}
        return [
            created,
            delta,
            {"type": "response.completed", "sequence_number": 2, "response": _document(api, last)},
        ]
    start = {**_document(api, first), "stop_reason": None}
    return [
        {"type": "message_start", "message": start},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "yes"}},
        {"type": "content_block_stop", "index": 0},
        *(
            {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": usage or {}}
            for usage in (last, *later)
        ),
        {"type": "message_stop"},
    ]


def _stream_response(events: list[Any]) -> httpx2.Response:
    """A stream of server-sent events."""
    lines = []
    for event in events:
        kind = event.get("type") if isinstance(event, dict) else None
        data = json.dumps(event) if isinstance(event, dict) else event
        lines.append((f"event: {kind}\n" if kind else "") + f"data: {data}\n\n")

    async def arrive() -> Any:
        for line in lines:
            yield line.encode()

    return httpx2.Response(200, headers=STREAMED, content=arrive())


class Caller:
    """A guarded client that receives a given response."""

    def __init__(self, api: str, limiter: AsyncBudgetLimiter, server: Any, **options: Any) -> None:
        self.api = api
        self.answer: Any = None
        self.requests: list[dict[str, Any]] = []
        self.reserved: list[int] = []
        """The held amount during each call, in nano-dollars."""
        self._server = server
        http = httpx2.AsyncClient(transport=httpx2.MockTransport(self._handle))
        kind: Any = anthropic.AsyncAnthropic if api == "messages" else openai.AsyncOpenAI
        self.client = guard(kind(api_key="k", http_client=http, max_retries=0), limiter, pricer=PRICES, **options)

    async def _handle(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(json.loads(request.content))
        with self._server.client() as store:
            self.reserved.append(sums(store)["held"])
        if isinstance(self.answer, list):
            return _stream_response(self.answer)
        return httpx2.Response(200, json=self.answer)

    async def call(self, answer: Any, **more: Any) -> list[Any]:
        """Make a call, and read its response, which is a stream if ``answer`` is a list."""
        self.answer = answer
        stream = {"stream": True} if isinstance(answer, list) else {}
        if self.api == "messages":
            result = self.client.messages.create(
                model=CLAUDE, max_tokens=MAX_TOKENS, messages=MESSAGES, **stream, **more
            )
        elif self.api == "chat":
            result = self.client.chat.completions.create(
                model=GPT, max_tokens=MAX_TOKENS, messages=MESSAGES, **stream, **more
            )
        else:
            result = self.client.responses.create(model=GPT, max_output_tokens=MAX_TOKENS, input="?", **stream, **more)
        response = await result
        return [item async for item in response] if stream else [response]


def _spent(server: Any) -> int:
    with server.client() as store:
        figures = sums(store)
        assert figures["held"] == figures["unconfirmed"] == 0
        return figures["spent"]


def _estimated(server: Any) -> list[bool]:
    """Whether each ledger entry is an estimate, oldest first."""
    with server.client() as store:
        (ledger,) = store.keys("ktrdr:*:l:agent:*")
        return ["estimated" in entry.operation for entry in ledger_entries(store, ledger)]


def _counts(api: str, input_tokens: Any, output_tokens: Any) -> dict[str, Any]:
    return dict(zip(NAMES[api], (input_tokens, output_tokens), strict=True))


def _other_names(api: str) -> dict[str, Any]:
    return _counts("messages" if api == "chat" else "chat", 20, 3)


NOT_CREDIBLE = {
    "none": lambda api: None,
    "empty": lambda api: {},
    "zeros": lambda api: _counts(api, 0, 0),
    "nulls": lambda api: _counts(api, None, None),
    "no input": lambda api: _counts(api, 0, 3),
    "input alone": lambda api: {NAMES[api][0]: 20},
    "output alone": lambda api: {NAMES[api][1]: 3},
    "negative": lambda api: _counts(api, -20, -3),
    "strings": lambda api: _counts(api, "many", "few"),
    "the other API's names": _other_names,
}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("usage_of", NOT_CREDIBLE.values(), ids=NOT_CREDIBLE)
@pytest.mark.parametrize("api", APIS)
async def test_if_the_reported_usage_is_not_credible_the_worst_case_is_charged_as_an_estimate(
    limiter: Any, server: Any, api: str, usage_of: Any, streamed: bool
) -> None:
    """Reported in ProbOS #1078, camel-ai #4217 and spring-ai #1307."""
    caller = Caller(api, limiter, server)
    usage = usage_of(api)
    await caller.call(_events(api, usage, usage) if streamed else _document(api, usage))
    assert _spent(server) == caller.reserved[0] > MAX_TOKENS * OUTPUT
    assert _estimated(server) == [True]


CREDIBLE = {
    "no output": (lambda api: _counts(api, 20, 0), 20 * INPUT),
    "both": (lambda api: _counts(api, 20, 3), 20 * INPUT + 3 * OUTPUT),
    "whole floats": (lambda api: _counts(api, 20.0, 3.0), 20 * INPUT + 3 * OUTPUT),
}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("usage_of", "spent"), CREDIBLE.values(), ids=CREDIBLE)
@pytest.mark.parametrize("api", APIS)
async def test_credible_usage_is_charged_exactly(
    limiter: Any, server: Any, api: str, usage_of: Any, spent: int, streamed: bool
) -> None:
    usage = usage_of(api)
    await Caller(api, limiter, server).call(_events(api, usage, usage) if streamed else _document(api, usage))
    assert _spent(server) == spent
    assert _estimated(server) == [False]


async def test_a_usage_is_credible_if_all_input_was_cached(limiter: Any, server: Any) -> None:
    """Anthropic does not include cached input in ``input_tokens``."""
    usage = {"input_tokens": 0, "output_tokens": 3, "cache_read_input_tokens": 500, "cache_creation_input_tokens": 40}
    await Caller("messages", limiter, server).call(_document("messages", usage))
    assert _spent(server) == 500 * CACHED + 40 * WRITE + 3 * OUTPUT
    assert _estimated(server) == [False]


@pytest.mark.parametrize("api", APIS)
async def test_calls_without_credible_usage_never_exceed_the_cap(server: Any, api: str) -> None:
    async with AsyncBudgetLimiter(server.url, [Budget("agent", "0.05")]) as limiter:
        caller = Caller(api, limiter, server)
        denied = 0
        for number in range(100):
            usage = list(NOT_CREDIBLE.values())[number % len(NOT_CREDIBLE)](api)
            try:
                await caller.call(_document(api, usage))
            except BudgetExceeded:
                denied += 1
        assert 0 < len(caller.requests) == 100 - denied < 100
        assert _spent(server) == sum(caller.reserved) <= 50_000_000


# -- the maximum of each field within a stream -------------------------------------------------------------------------

SPREAD = {
    "a later zero": ((20_000, 1), (0, 12)),
    "a later null": ((20_000, 1), (None, 12)),
    "a later lower count": ((20_000, 7), (150, 12)),
    "a later negative": ((20_000, 1), (-5, 12)),
    "zeros first": ((0, 0), (20_000, 12)),
    "a higher output first": ((20_000, 12), (20_000, 3)),
}


@pytest.mark.parametrize(("first", "last"), SPREAD.values(), ids=SPREAD)
@pytest.mark.parametrize("api", ["chat", "messages"])
async def test_if_a_stream_reports_usage_twice_the_higher_count_of_each_field_is_charged(
    limiter: Any, server: Any, api: str, first: Any, last: Any
) -> None:
    """Reported in envoyproxy/ai-gateway PR #1631."""
    await Caller(api, limiter, server).call(_events(api, _counts(api, *first), _counts(api, *last)))
    assert _spent(server) == 20_000 * INPUT + 12 * OUTPUT
    assert _estimated(server) == [False]


@pytest.mark.parametrize("api", ["chat", "messages"])
async def test_a_second_usage_report_at_the_end_of_a_stream_is_charged(limiter: Any, server: Any, api: str) -> None:
    events = _events(api, None, _counts(api, 20_000, 5), _counts(api, 0, 12))
    await Caller(api, limiter, server).call(events)
    assert _spent(server) == 20_000 * INPUT + 12 * OUTPUT


async def test_if_every_chunk_reports_a_running_total_only_the_last_total_is_charged(limiter: Any, server: Any) -> None:
    """Usage reports are cumulative (tensorzero #5481, pydantic-ai #5260)."""
    running = [
        _chunk([{"index": 0, "delta": {"content": "x"}, "finish_reason": None}], _counts("chat", 20, tokens))
        for tokens in range(1, 9)
    ]
    stop = _chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}], _counts("chat", 20, 9))
    await Caller("chat", limiter, server).call([*running, stop, "[DONE]"])
    assert _spent(server) == 20 * INPUT + 9 * OUTPUT
    assert _estimated(server) == [False]


WORD = _chunk([{"index": 0, "delta": {"content": "yes"}, "finish_reason": None}])
LAST_WORD = _chunk([{"index": 0, "delta": {"content": "yes"}, "finish_reason": "stop"}])
STOP = _chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}])


@pytest.mark.parametrize("choices", [[], None], ids=["no choices", "null"])
@pytest.mark.parametrize(
    "output", [[WORD, STOP], [WORD], [LAST_WORD]], ids=["finished", "no finish_reason", "all in the last chunk"]
)
async def test_a_stream_is_charged_the_worst_case_if_usage_was_reported_only_before_the_output(
    limiter: Any, server: Any, output: list[Any], choices: Any
) -> None:
    """The reported usage does not count the output that follows."""
    caller = Caller("chat", limiter, server)
    first = {**_chunk([], _counts("chat", 20, 0)), "choices": choices}
    await caller.call([first, *output, "[DONE]"])
    assert _spent(server) == caller.reserved[0]
    assert _estimated(server) == [True]


async def test_a_closed_stream_is_charged_for_output_that_followed_the_usage_report(limiter: Any, server: Any) -> None:
    caller = Caller("chat", limiter, server)
    caller.answer = [_chunk([], _counts("chat", 20, 0)), WORD, WORD, WORD]  # and then the stream breaks off
    stream = await caller.client.chat.completions.create(model=GPT, max_tokens=5_000, messages=MESSAGES, stream=True)
    _ = await anext(stream)
    await stream.close()
    assert 20 * INPUT < _spent(server) <= caller.reserved[0]
    assert _estimated(server) == [True]


USAGE = _chunk([], _counts("chat", 20, 3))


@pytest.mark.parametrize(
    "events",
    [[WORD, STOP, USAGE], [WORD, USAGE, STOP], [WORD, USAGE]],
    ids=["last", "before the finish_reason", "no finish_reason"],
)
async def test_usage_reported_after_the_last_output_is_charged_exactly(
    limiter: Any, server: Any, events: list[Any]
) -> None:
    await Caller("chat", limiter, server).call([*events, "[DONE]"])
    assert _spent(server) == 20 * INPUT + 3 * OUTPUT
    assert _estimated(server) == [False]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("api", APIS)
async def test_usage_above_the_bound_is_charged_and_counted_as_an_overrun(
    limiter: Any, server: Any, api: str, streamed: bool
) -> None:
    """Spent money is recorded, even above the bound (litellm #20615)."""
    usage = _counts(api, 4_000_000, 3)
    await Caller(api, limiter, server).call(_events(api, usage, usage) if streamed else _document(api, usage))
    assert _spent(server) == 4_000_000 * INPUT + 3 * OUTPUT
    assert (await limiter.status("agent")).overruns == 1


async def test_a_later_usage_report_does_not_reduce_the_charged_cached_tokens(limiter: Any, server: Any) -> None:
    cached = {"cache_read_input_tokens": 500, "cache_creation": {"ephemeral_1h_input_tokens": 40}}
    first = {**_counts("messages", 100, 1), **cached, "cache_creation_input_tokens": 40}
    last = {**_counts("messages", 0, 12), "cache_read_input_tokens": 0, "cache_creation_input_tokens": None}
    await Caller("messages", limiter, server).call(_events("messages", first, last))
    assert _spent(server) == 100 * INPUT + 500 * CACHED + 40 * WRITE + 12 * OUTPUT


@pytest.mark.parametrize("api", ["chat", "messages"])
async def test_the_worst_case_is_charged_if_only_the_first_event_reports_usage(
    limiter: Any, server: Any, api: str
) -> None:
    caller = Caller(api, limiter, server)
    await caller.call(_events(api, _counts(api, 20, 1), None))
    assert _spent(server) == caller.reserved[0]
    assert _estimated(server) == [True]


@pytest.mark.parametrize("api", ["chat", "messages"])
async def test_a_stream_closed_early_without_credible_usage_commits_an_estimate(
    limiter: Any, server: Any, api: str
) -> None:
    caller = Caller(api, limiter, server)
    caller.answer = _events(api, _counts(api, 0, 0), _counts(api, 0, 0))
    create = caller.client.messages.create if api == "messages" else caller.client.chat.completions.create
    model = CLAUDE if api == "messages" else GPT
    stream = await create(model=model, max_tokens=5_000, messages=MESSAGES, stream=True)
    _ = await anext(stream)
    await stream.close()
    assert 0 < _spent(server) <= caller.reserved[0]
    assert _estimated(server) == [True]


# -- fields of other providers -----------------------------------------------------------------------------------------

WITH_CACHE = {
    "OpenAI": {"prompt_tokens_details": {"cached_tokens": 800}},
    "Moonshot": {"cached_tokens": 800},
    "DeepSeek": {"prompt_cache_hit_tokens": 800, "prompt_cache_miss_tokens": 200},
    "DeepSeek, both": {"prompt_cache_hit_tokens": 800, "prompt_tokens_details": {"cached_tokens": 800}},
    "a zero beside it": {"cached_tokens": 800, "prompt_tokens_details": {"cached_tokens": 0}},
    "null details": {"cached_tokens": 800, "prompt_tokens_details": None},
    "LiteLLM": {"cache_read_input_tokens": 800, "total_tokens": 1_003},
    "a detail": {"prompt_tokens_details": {"cache_read_tokens": 800}},
}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("fields", WITH_CACHE.values(), ids=WITH_CACHE)
async def test_cache_reads_are_recognised_in_the_usage_fields_of_each_provider(
    limiter: Any, server: Any, fields: dict[str, Any], streamed: bool
) -> None:
    """Reported in vera-bench PR #97 and pi #8075."""
    usage = {**_counts("chat", 1_000, 3), **fields}
    await Caller("chat", limiter, server).call(_events("chat", None, usage) if streamed else _document("chat", usage))
    assert _spent(server) == 200 * INPUT + 800 * CACHED + 3 * OUTPUT
    assert _estimated(server) == [False]


WITH_WRITES = {
    "OpenRouter": {"prompt_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 800}},
    "LiteLLM": {"prompt_tokens_details": {"cached_tokens": 0, "cache_creation_tokens": 800}},
    "Qwen": {"prompt_tokens_details": {"cached_tokens": 0, "cache_creation_input_tokens": 800}},
    "Anthropic's": {"cache_creation_input_tokens": 800, "cache_read_input_tokens": 0},
}


@pytest.mark.parametrize("fields", WITH_WRITES.values(), ids=WITH_WRITES)
async def test_cache_writes_are_recognised_in_the_usage_fields_of_each_provider(
    limiter: Any, server: Any, fields: dict[str, Any]
) -> None:
    await Caller("chat", limiter, server).call(_document("chat", {**_counts("chat", 1_000, 3), **fields}))
    assert _spent(server) == 200 * INPUT + 800 * WRITE + 3 * OUTPUT


@pytest.mark.parametrize(
    ("prompt", "total"), [(100, None), (100, 903), (1_000, 1_803)], ids=["more than all", "more, in total", "in total"]
)
async def test_cached_input_is_charged_in_addition_if_the_reported_input_excludes_cached_input(
    limiter: Any, server: Any, prompt: int, total: int | None
) -> None:
    """Reported for Bedrock behind Portkey (gateway #1210), and in langsmith-sdk PR #2519."""
    usage = {**_counts("chat", prompt, 3), "cache_read_input_tokens": 800, "total_tokens": total}
    await Caller("chat", limiter, server).call(_document("chat", usage))
    assert _spent(server) == prompt * INPUT + 800 * CACHED + 3 * OUTPUT


async def test_cache_reads_of_the_responses_api_are_charged_at_the_cached_input_price(
    limiter: Any, server: Any
) -> None:
    usage = {**_counts("responses", 1_000, 3), "input_tokens_details": {"cached_tokens": 800}}
    await Caller("responses", limiter, server).call(_document("responses", usage))
    assert _spent(server) == 200 * INPUT + 800 * CACHED + 3 * OUTPUT


# -- servers without stream_options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"include_usage": False}, None),
        ({"include_usage": False, "include_obfuscation": False}, {"include_obfuscation": False}),
    ],
)
async def test_a_stream_is_charged_the_worst_case_if_the_caller_disables_usage_reports(
    limiter: Any, server: Any, given: dict[str, Any], sent: Any
) -> None:
    """Some gateways reject ``stream_options`` (opencode #4698)."""
    caller = Caller("chat", limiter, server)
    items = await caller.call(_events("chat", None, None), stream_options=given)
    assert [choice.delta.content for item in items for choice in item.choices] == ["yes", None]
    assert caller.requests[0].get("stream_options") == sent
    assert ("stream_options" in caller.requests[0]) == (sent is not None)
    assert _spent(server) == caller.reserved[0]
    assert _estimated(server) == [True]


async def test_reported_usage_is_charged_even_if_the_caller_disables_usage_reports(limiter: Any, server: Any) -> None:
    caller = Caller("chat", limiter, server)
    events = _events("chat", None, _counts("chat", 20, 3))
    items = await caller.call(events, stream_options={"include_usage": False})
    assert items[-1].usage.prompt_tokens == 20  # passed on, because the guard did not request it
    assert _spent(server) == 20 * INPUT + 3 * OUTPUT


@pytest.mark.parametrize("given", [None, {}, {"include_usage": None}, {"include_usage": True}])
async def test_the_guard_requests_the_usage_of_a_stream(limiter: Any, server: Any, given: Any) -> None:
    caller = Caller("chat", limiter, server)
    await caller.call(_events("chat", None, _counts("chat", 20, 3)), stream_options=given)
    assert caller.requests[0]["stream_options"]["include_usage"] is True
    assert _spent(server) == 20 * INPUT + 3 * OUTPUT
