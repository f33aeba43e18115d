"""Guarded clients: supported kinds, copies, refused requests, and the secrecy of keys and prompts."""

from __future__ import annotations

import json
import logging
import re
from contextlib import nullcontext
from typing import Any

import anthropic
import openai
import pytest
from opentelemetry.trace import StatusCode

from examples.local_provider import LocalProvider, Scene
from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, BudgetLimiter
from ktrdr_budget.errors import InvalidArgument, UnknownBudget, UnknownPrice
from ktrdr_budget.metering.guards import UnmeteredCall, guard
from ktrdr_budget.metering.prices import ModelPrice, Prices

from ...helpers.guarded import (
    API_KEY,
    BASIC,
    BASIC_STREAMS,
    CLAUDE,
    GPT,
    MAX_TOKENS,
    MESSAGES,
    STREAMS,
    Method,
    WithArguments,
    entered,
    http_client_of,
    raw_client,
    resolve,
    run,
)
from ...helpers.recorded_spans import Recorded

BUDGETS = [Budget("agent", "1.00")]


@pytest.mark.parametrize("sdk", ["anthropic", "openai"])
async def test_the_guard_function_returns_the_given_client(opened: Any, sdk: str, provider: LocalProvider) -> None:
    async with opened(sdk) as g:
        client = raw_client(sdk, g.is_async, provider)
        http_client_class = type(http_client_of(client))
        assert guard(client, g.limiter) is client
        assert type(g.client) is type(client)
        assert isinstance(http_client_of(client), http_client_class)
        assert not g.client.is_closed()
        await resolve(client.close())
        assert client.is_closed()


@pytest.mark.parametrize("sdk", ["anthropic", "openai"])
def test_the_guard_function_rejects_a_sync_limiter_for_an_async_client_and_vice_versa(
    sdk: str, provider: LocalProvider, server: Any
) -> None:
    sync, not_sync = BudgetLimiter(server.url, BUDGETS), AsyncBudgetLimiter(server.url, BUDGETS)
    with pytest.raises(InvalidArgument, match="needs an AsyncBudgetLimiter, not BudgetLimiter"):
        guard(raw_client(sdk, True, provider), sync)
    with pytest.raises(InvalidArgument, match="needs a BudgetLimiter, not AsyncBudgetLimiter"):
        guard(raw_client(sdk, False, provider), not_sync)


def test_unsupported_clients_and_invalid_options_are_rejected(provider: LocalProvider, server: Any) -> None:
    limiter = BudgetLimiter(server.url, BUDGETS)
    client = guard(raw_client("anthropic", False, provider), limiter)
    platforms = [anthropic.AnthropicBedrockMantle, anthropic.AnthropicVertex, anthropic.AnthropicFoundry]
    for other in (object(), client, *(kind.__new__(kind) for kind in platforms)):
        with pytest.raises(InvalidArgument, match="guarded"):
            guard(other, limiter)
    for wrong in ({"max_output_tokens": 0}, {"max_input_tokens": True}, {"unseen_output_tokens": -1}):
        with pytest.raises(InvalidArgument, match="must be a whole number"):
            guard(raw_client("anthropic", False, provider), limiter, **wrong)
    for wrong in ({"provider": ""}, {"allow_unmetered": "no"}, {"pricer": "0.15"}):
        with pytest.raises(InvalidArgument, match=next(iter(wrong))):
            guard(raw_client("anthropic", False, provider), limiter, **wrong)
    with pytest.raises(UnknownBudget):
        guard(raw_client("anthropic", False, provider), limiter, budgets=["other"])


@pytest.mark.parametrize("method", BASIC, ids=str)
async def test_copies_of_a_guarded_client_are_guarded(opened: Any, provider: LocalProvider, method: Method) -> None:
    async with opened(method.sdk) as g:
        for copied in (
            g.client.copy(),
            g.client.with_options(timeout=3),
            g.client.with_options(max_retries=1).copy(timeout=2),
            g.client.with_options(http_client=g.http_client.inner),
        ):
            before = len(provider.ledger)
            await run(method, copied)
            assert len(provider.ledger) == before + 1
            assert g.sums["spent"] == g.bill


@pytest.mark.parametrize("method", BASIC, ids=str)
async def test_resources_obtained_before_the_client_was_guarded_are_guarded(
    opened: Any, provider: LocalProvider, method: Method
) -> None:
    async with opened(method.sdk, limit="0.0001") as g:
        client = raw_client(method.sdk, g.is_async, provider)
        resources = client.messages if method.sdk == "anthropic" else (client.chat.completions, client.responses)
        guard(client, g.limiter)
        with pytest.raises(BudgetExceeded):
            await run(method, client)
        assert resources and provider.requests == []
        await resolve(client.close())


REFUSED = [
    ("anthropic", "batches", lambda c: c.messages.batches.create(requests=[])),
    ("anthropic", "beta batches", lambda c: c.beta.messages.batches.create(requests=[])),
    ("anthropic", "sessions", lambda c: c.beta.sessions.create(agent="a", environment_id="e")),
    ("anthropic", "any path", lambda c: c.post("/v1/complete", cast_to=object, body={})),
    ("openai", "images", lambda c: c.images.generate(prompt="a cap")),
    ("openai", "speech", lambda c: c.audio.speech.create(input="x", model="tts-1", voice="alloy")),
    ("openai", "transcription", lambda c: c.audio.transcriptions.create(file=b"x", model="whisper-1")),
    ("openai", "batches", lambda c: c.batches.create(completion_window="24h", endpoint="/v1/x", input_file_id="f")),
    ("openai", "fine tuning", lambda c: c.fine_tuning.jobs.create(model=GPT, training_file="f")),
    ("openai", "vector stores", lambda c: c.vector_stores.files.create(vector_store_id="v", file_id="f")),
    ("openai", "videos", lambda c: c.post("/videos", cast_to=object, body={})),
    ("openai", "compaction", lambda c: c.responses.compact(model=GPT)),
    ("openai", "realtime calls", lambda c: c.realtime.client_secrets.create()),
    ("openai", "runs", lambda c: c.post("/threads/t/runs", cast_to=object, body={})),
    ("openai", "any path", lambda c: c.post("/something/new", cast_to=object, body={})),
]


@pytest.mark.parametrize(("sdk", "name", "call"), REFUSED, ids=[f"{sdk}-{name}" for sdk, name, _ in REFUSED])
async def test_calls_to_unmetered_endpoints_are_refused_unless_unmetered_calls_are_allowed(
    opened: Any, provider: LocalProvider, sdk: str, name: str, call: Any
) -> None:
    async with opened(sdk, client_options={"max_retries": 2}) as g:
        with pytest.raises(UnmeteredCall, match="is not metered"):
            await resolve(call(g.client))
        assert provider.requests == []
    async with opened(sdk, allow_unmetered=True) as g:
        with pytest.raises((anthropic.NotFoundError, openai.NotFoundError)):  # the local provider's reply
            await resolve(call(g.client))


SOCKETS = [
    lambda c: c.responses.connect(),
    lambda c: c.realtime.connect(model="gpt-realtime"),
    lambda c: c.beta.realtime.connect(model="gpt-realtime"),
    lambda c: c.beta.responses.connect(),
]


@pytest.mark.parametrize("connect", SOCKETS, ids=["responses", "realtime", "beta.realtime", "beta.responses"])
async def test_websockets_are_refused(opened: Any, connect: Any) -> None:
    async with opened("openai") as g:
        with pytest.raises(UnmeteredCall, match="WebSockets"):
            async with entered(connect(g.client)):
                pass


@pytest.mark.parametrize("sdk", ["anthropic", "openai"])
async def test_requests_to_free_endpoints_are_sent_without_a_reservation(
    opened: Any, provider: LocalProvider, sdk: str
) -> None:
    async with opened(sdk, limit="0") as g:
        if sdk == "anthropic":
            counted = g.client.messages.count_tokens(model=CLAUDE, messages=MESSAGES)
            assert (await resolve(counted)).input_tokens > 0
        else:
            with pytest.raises(openai.NotFoundError):
                listed = g.client.models.list()
                await resolve(listed)
        assert g.counted == 0


async def test_a_request_sent_directly_with_the_http_client_of_the_sdk_is_guarded(
    opened: Any, provider: LocalProvider
) -> None:
    async with opened("openai", limit="0.0001") as g:
        http = g.http_client
        request = http.build_request("POST", f"{provider.openai_url}/chat/completions", json={"model": GPT, "n": 1})
        with pytest.raises(BudgetExceeded):
            await resolve(http.send(request))
        assert provider.requests == []


@pytest.mark.parametrize("method", BASIC, ids=str)
async def test_a_model_without_a_price_is_refused(opened: Any, provider: LocalProvider, method: Method) -> None:
    async with opened(method.sdk) as g:
        with pytest.raises(UnknownPrice, match="no-such-model"):
            await resolve(method.call(WithArguments(g.client, {"model": "no-such-model"})))
        assert provider.requests == []
        assert g.counted == 0


async def test_calls_cost_the_prices_of_the_provider_named_in_the_provider_option(
    opened: Any, provider: LocalProvider
) -> None:
    prices = Prices([ModelPrice("house", "own-*", input="1", output="1")])
    async with opened("openai", provider="house", pricer=prices) as g:
        result = g.client.chat.completions.create(model="own-1", max_tokens=20, messages=MESSAGES)
        usage = (await resolve(result)).usage
        assert g.sums["spent"] == usage.total_tokens * 1000


# -- secrets, messages, spans ------------------------------------------------------------------------------------------

PROMPT = "a confidential prompt"


@pytest.mark.parametrize("method", [*BASIC, *STREAMS[:1]], ids=str)
async def test_keys_and_prompts_never_appear_in_logs_or_spans_or_errors_or_the_ledger(
    opened: Any, provider: LocalProvider, method: Method, caplog: pytest.LogCaptureFixture, recorded: Recorded
) -> None:
    caplog.set_level(logging.DEBUG, "ktrdr_budget")
    texts = []
    messages = {"messages": [{"role": "user", "content": PROMPT}]}
    prompt = {"input": PROMPT} if method.name.startswith("responses") else messages
    async with opened(method.sdk) as g:
        texts.append(repr(g.client))
        for scene in ({}, {"status": 400}, {"drop_after": 0}, {"silent": True}):
            headers = {"x-scenes": json.dumps([scene])}
            try:
                await run(method, WithArguments(g.client, {**prompt, "extra_headers": headers}))
            except Exception as error:
                texts.append(repr(error))
        texts += [repr(vars(g.client)["request"]), *g.labels, *map(str, g.store.hgetall("ktrdr:{default}:meta"))]
    async with opened(method.sdk, limit="0.0001") as g:
        with pytest.raises(BudgetExceeded) as caught:
            await run(method, g.client)
        texts += [repr(caught.value), str(caught.value)]
    texts += [record.getMessage() for record in caplog.records if record.name.startswith("ktrdr_budget")]
    texts += [f"{span.name} {dict(span.attributes or {})} {span.events}" for span in recorded.spans]
    assert any("gen_ai" in text for text in texts)
    assert len(texts) > 8
    assert not [text for text in texts if API_KEY in text or PROMPT in text]


@pytest.mark.parametrize("method", BASIC, ids=str)
async def test_the_message_of_a_denial_names_the_parameter_that_lowers_the_worst_case(
    opened: Any, method: Method
) -> None:
    parameter = method.limit_parameter
    cases = [({}, str(MAX_TOKENS), f"lower it with {parameter}")]
    if method.sdk == "openai":  # Anthropic's SDK requires a limit
        cases.append(({parameter: openai.omit}, r"[\d,]+", f"the model's maximum; lower it with {parameter}"))
    for arguments, tokens, hint in cases:
        async with opened(method.sdk, limit="0.0001") as g:
            with pytest.raises(BudgetExceeded) as caught:
                await run(method, g.client, **arguments)
        need = f"\\${caught.value.requested:f}"
        model = rf"{method.sdk}/\S+"
        assert re.fullmatch(
            rf"agent: exceeds_limit \(\$0\.0001 remaining, need {need}\); the worst case of {model} is reserved:"
            rf" [\d,]+ input and {tokens} output tokens \({hint}\)",
            str(caught.value),
        )


async def test_the_message_of_a_denied_slot_does_not_mention_tokens(server: Any, provider: LocalProvider) -> None:
    budgets = [Budget("agent", "5.00"), Budget("calls", 0, kind="slots")]
    async with AsyncBudgetLimiter(server.url, budgets) as limiter:
        client = guard(raw_client("anthropic", True, provider), limiter, budgets=["calls", "agent"])
        with pytest.raises(BudgetExceeded) as caught:
            await run(BASIC[0], client)
        assert str(caught.value) == "calls: exceeds_limit (0 slots remaining, need 1 slots)"


FAILED = {
    "400": (Scene(status=400), "400"),
    "429": (Scene(status=429), "429"),
    "500": (Scene(status=500), "500"),
    "dropped": (Scene(drop_after=0), "APIConnectionError"),
}


@pytest.mark.parametrize(("scene", "kind"), FAILED.values(), ids=FAILED)
@pytest.mark.parametrize("method", [*BASIC, *BASIC_STREAMS], ids=str)
async def test_the_span_of_a_failed_call_has_an_error(
    opened: Any, provider: LocalProvider, method: Method, recorded: Recorded, scene: Scene, kind: str
) -> None:
    provider.script(scene)
    async with opened(method.sdk) as g:
        with pytest.raises(Exception, match=r"scripted|Connection error"):
            await run(method, g.client)
        span = recorded[f"chat {CLAUDE if method.sdk == 'anthropic' else GPT}"]
        assert span.status.status_code is StatusCode.ERROR
        assert (span.attributes or {})["error.type"] == kind
        # A call whose retry succeeds has not failed.
        provider.script(Scene(status=429) if kind == "400" else scene)
        await run(method, g.client.with_options(max_retries=1))
        assert recorded.spans[-1].status.status_code is StatusCode.UNSET
        assert "error.type" not in (recorded.spans[-1].attributes or {})


@pytest.mark.parametrize("method", BASIC_STREAMS, ids=str)
async def test_the_span_of_a_stream_with_an_error_event_has_an_error(
    opened: Any, provider: LocalProvider, method: Method, recorded: Recorded
) -> None:
    provider.script(Scene(error_after=3))
    async with opened(method.sdk) as g:
        with nullcontext() if method.name.startswith("responses.") else pytest.raises(Exception, match="scripted"):
            await run(method, g.client)
        span = recorded[f"chat {CLAUDE if method.sdk == 'anthropic' else GPT}"]
        assert span.status.status_code is StatusCode.ERROR
        kinds = {"messages": "overloaded_error", "chat": "server_error", "responses": "server_error"}
        assert (span.attributes or {})["error.type"] == kinds[method.name.partition(".")[0]]


@pytest.mark.parametrize("sdk", ["anthropic", "openai"])
async def test_a_guarded_http_client_refuses_request_methods_other_than_send(
    opened: Any, provider: LocalProvider, sdk: str
) -> None:
    async with opened(sdk) as g:
        http = g.http_client
        for verb in ("post", "put", "patch", "delete", "get"):
            with pytest.raises(UnmeteredCall, match=verb):
                getattr(http, verb)("/v1/chat/completions")
        for verb in ("request", "stream"):
            with pytest.raises(UnmeteredCall, match=verb):
                getattr(http, verb)("POST", "/v1/chat/completions")
        assert provider.requests == []
    async with opened(sdk, allow_unmetered=True) as g:
        assert callable(g.http_client.post)


OPEN_ENDED = {
    "chat": lambda client: client.chat.completions.create(model="no-such-model", messages=MESSAGES),
    "responses": lambda client: client.responses.create(model="no-such-model", input="x"),
    "completions": lambda client: client.completions.create(model="no-such-model", prompt="x"),
}


@pytest.mark.parametrize("call", OPEN_ENDED.values(), ids=OPEN_ENDED)
async def test_an_unknown_model_without_an_output_limit_is_refused_unless_a_fixed_cost_is_configured(
    opened: Any, provider: LocalProvider, call: Any
) -> None:
    async with opened("openai") as g:
        with pytest.raises(UnknownPrice, match="no-such-model"):
            await resolve(call(g.client))
        assert provider.requests == []
        client = raw_client("openai", g.is_async, provider)
        fixed = guard(client, g.limiter, pricer=Prices(fixed_cost="0.05"))
        await resolve(call(fixed))
        assert g.counted == g.sums["spent"] == 50_000_000
        await resolve(client.close())


async def test_with_a_token_budget_an_unknown_model_is_refused_even_if_a_fixed_cost_is_configured(
    server: Any, provider: LocalProvider
) -> None:
    budgets = [Budget("agent", "1.00"), Budget("tokens", 1000, unit="tokens")]
    async with AsyncBudgetLimiter(server.url, budgets) as limiter:
        async with raw_client("openai", True, provider) as client:
            guarded = guard(client, limiter, ["agent", "tokens"], pricer=Prices(fixed_cost="0.05"))
            with pytest.raises(UnmeteredCall, match="max_completion_tokens"):
                await OPEN_ENDED["chat"](guarded)
        assert provider.requests == []


@pytest.mark.parametrize("model", ["openrouter/auto", "openrouter/free", "@preset/mine", "openai/gpt-4o-of-tomorrow"])
async def test_a_call_is_refused_if_its_model_is_a_router_for_which_there_is_no_price(
    opened: Any, provider: LocalProvider, model: str
) -> None:
    """Reported in litellm #42663, PR #30817 and PR #39294, and in bifrost PR #5465."""
    async with opened("openai", provider="openrouter") as g:
        with pytest.raises(UnknownPrice):
            await resolve(g.client.chat.completions.create(model=model, max_tokens=5, messages=MESSAGES))
        assert provider.requests == [] and g.counted == 0
