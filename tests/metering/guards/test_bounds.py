"""Bounds of requests: a bound is never below the provider's count, and a request without a bound is refused."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.local_provider import LocalProvider, Scene
from examples.wire_formats import FORMATS
from ktrdr_budget import Budget, BudgetLimiter
from ktrdr_budget.metering.guards import UnmeteredCall
from ktrdr_budget.metering.guards.anthropic import AnthropicDialect
from ktrdr_budget.metering.guards.bounds import ROUTING_FIELDS, Bound, GuardOptions, text_size
from ktrdr_budget.metering.guards.openai import OpenAIDialect
from ktrdr_budget.metering.meter import Meter

from ...helpers.guarded import BASIC, CLAUDE, GPT, MESSAGES, Method, WithArguments, resolve, run

LIMITER = BudgetLimiter("redis://127.0.0.1:1", [Budget("agent", "1.00")])  # never connected
METER = Meter(LIMITER, ["agent"])
PIXELS = "A" * 400_000
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXELS}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PIXELS}}
NOTE = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a note"}}
DATA_URL = f"data:image/png;base64,{PIXELS}"


def bound(route: str, body: dict[str, Any], **options: Any) -> Bound:
    dialect = AnthropicDialect() if route == "messages" else OpenAIDialect()
    provider = "anthropic" if route == "messages" else "openai"
    defaults = {"max_tokens": 100} if route == "messages" else {}
    body = {"model": CLAUDE if route == "messages" else GPT, **defaults, **body}
    size = len(json.dumps(body, ensure_ascii=False).encode())
    return dialect.bound(route, body["model"], body, size, GuardOptions(METER, provider, **options))


def user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


def response_input(*parts: Any) -> dict[str, Any]:
    return {"input": [{"type": "message", "role": "user", "content": list(parts)}]}


texts = st.text(st.characters(codec="utf-8"), max_size=60)


@settings(max_examples=60)
@given(texts, texts)
def test_the_input_bound_is_at_least_one_token_per_byte_of_text(system: str, text: str) -> None:
    bytes_read = len((system + text).encode())
    for route, body in (
        ("messages", {"system": system, **user({"type": "text", "text": text})}),
        ("chat/completions", {"messages": [{"role": "system", "content": system}, {"role": "user", "content": text}]}),
        ("responses", {"instructions": system, "input": text}),
    ):
        bounds = bound(route, body)
        assert bounds.input_tokens_max >= bytes_read + 1000
        assert bounds.input_tokens_max >= FORMATS[f"/v1/{route}"].count(body)


IMAGES = [
    ("messages", user(IMAGE), 5_000),
    ("messages", user({"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}), 5_000),
    ("messages", user({"type": "tool_result", "tool_use_id": "t", "content": [IMAGE, IMAGE]}), 10_000),
    ("messages", user({"type": "document", "source": {"type": "content", "content": [IMAGE]}}), 5_000),
    ("chat/completions", user({"type": "image_url", "image_url": {"url": DATA_URL}}), 50_000),
    ("chat/completions", user({"type": "image_url", "image_url": {"url": "https://x/y.png"}}), 50_000),
    ("responses", response_input({"type": "input_image", "image_url": DATA_URL}), 50_000),
    ("responses", response_input({"type": "input_image", "file_id": "file_1"}), 50_000),
]


@pytest.mark.parametrize(("route", "body", "tokens"), IMAGES)
def test_an_image_adds_a_fixed_number_of_tokens_to_the_input_bound(
    route: str, body: dict[str, Any], tokens: int
) -> None:
    assert tokens <= bound(route, body).input_tokens_max < tokens + 3_000


FETCHED = {"type": "web_fetch_tool_result", "content": {"type": "web_fetch_result", "url": "u", "content": PDF}}
UNKNOWN_SIZE = [
    ("messages", user(FETCHED)),
    ("messages", user(PDF)),
    ("messages", user({"type": "document", "source": {"type": "file", "file_id": "f"}})),
    ("messages", user({"type": "tool_result", "tool_use_id": "t", "content": [PDF]})),
    ("messages", user({"type": "something_new"})),
    ("messages", {**user(NOTE), "thread": {"id": "t"}}),
    ("chat/completions", user({"type": "file", "file": {"file_data": PIXELS}})),
    ("chat/completions", user({"type": "something_new"})),
    ("responses", response_input({"type": "input_file", "file_id": "f"})),
    ("responses", {"input": "x", "previous_response_id": "r"}),
    ("responses", {"input": "x", "conversation": "c"}),
    ("responses", {"input": [{"type": "item_reference", "id": "i"}]}),
    ("responses", {"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}),
]


@pytest.mark.parametrize(("route", "body"), UNKNOWN_SIZE)
def test_a_request_with_input_of_unknown_size_is_refused_without_max_input_tokens(
    route: str, body: dict[str, Any]
) -> None:
    with pytest.raises(UnmeteredCall, match="max_input_tokens"):
        bound(route, body)
    assert 90_000 < bound(route, body, max_input_tokens=90_000).input_tokens_max < 93_000
    assert bound(route, body, allow_unmetered=True).input_tokens_max > 0


UNBOUNDED = [
    ("messages", {**user(NOTE), "tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
    ("messages", {**user(NOTE), "tools": [{"type": "code_execution_20260120", "name": "code_execution"}]}),
    ("messages", {**user(NOTE), "mcp_servers": [{"type": "url", "name": "m", "url": "https://x"}]}),
    ("messages", {**user(NOTE), "container": "c"}),
    ("messages", {**user(NOTE), "inference_geo": "us"}),
    ("messages", {**user(NOTE), "fallbacks": [{"model": "claude-opus-4-1"}]}),
    ("messages", {**user(NOTE), "context_management": {"edits": [{"type": "compact_20260112"}]}}),
    ("messages", user({"type": "container_upload", "file_id": "f"})),
    ("chat/completions", {**user(), "web_search_options": {"search_context_size": "low"}}),
    ("chat/completions", {**user(), "modalities": ["text", "audio"], "audio": {"voice": "alloy"}}),
    ("chat/completions", user({"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}})),
    ("responses", {"input": "x", "tools": [{"type": "web_search"}]}),
    ("responses", {"input": "x", "tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]}),
    ("responses", {"input": "x", "tools": [{"type": "mcp", "server_label": "m"}]}),
    ("responses", {"input": "x", "background": True}),
    ("responses", {"prompt": {"id": "p"}}),
    ("responses", {"input": [{"type": "additional_tools", "role": "developer", "tools": [{"type": "web_search"}]}]}),
    ("responses", {"input": [{"type": "tool_search_output", "tools": [{"type": "web_search"}]}]}),
    ("responses", {"input": [{"type": "compaction_trigger"}]}),
    ("responses", {"input": "x", "reasoning": {"mode": "pro"}}),
    (
        "messages",
        user({"type": "tool_addition", "tool": {"type": "tool_definition", "definition": {"type": "web_search_1"}}}),
    ),
    ("chat/completions", {"messages": [{"role": "assistant", "audio": {"id": "audio_1"}}]}),
    ("chat/completions", {**user(), "max_tokens": 10, "model": "gpt-4o-search-preview"}),
    ("responses", {"input": "x", "max_output_tokens": 10, "model": "o3-deep-research"}),
    ("chat/completions", {**user(), "max_tokens": 10, "model": "openai/gpt-4o:online"}),
]


@pytest.mark.parametrize(("route", "body"), UNBOUNDED)
def test_a_feature_of_unbounded_cost_is_refused_unless_unmetered_calls_are_allowed(
    route: str, body: dict[str, Any]
) -> None:
    with pytest.raises(UnmeteredCall, match="cannot be bounded"):
        bound(route, body, max_input_tokens=90_000)
    assert bound(route, body, allow_unmetered=True).output_tokens_max > 0


ROUTES = ["chat/completions", "responses", "completions", "embeddings", "messages"]
ROUTING = {
    "models": ["gpt-5", "claude-opus-4-1"],
    "plugins": [{"id": "web", "max_results": 10}],
    "route": "fallback",
    "preset": "mine",
    "fallbacks": [{"model": "claude-opus-4-1"}],
    "web_search_options": {"search_context_size": "low"},
    "search_parameters": {"mode": "on"},
    "deferred": True,
    "enable_search": True,
    "search_options": {"forced_search": True},
    "search_settings": {"country": "france"},
    "compound_custom": {"tools": {"enabled_tools": ["web_search"]}},
    "multi_agent": {"max_concurrent_subagents": 5},
}


@pytest.mark.parametrize("field", ROUTING)
@pytest.mark.parametrize("route", ROUTES)
def test_a_request_with_a_routing_field_is_refused(route: str, field: str) -> None:
    """A gateway may use fallback models or paid plugins (openwiki #85)."""
    body = {**user(), "input": "x", "max_tokens": 10}
    with pytest.raises(UnmeteredCall, match=f"'{field}'"):
        bound(route, {**body, field: ROUTING[field]}, max_output_tokens=10)
    assert bound(route, {**body, field: ROUTING[field]}, allow_unmetered=True).input_tokens_max > 0
    assert bound(route, {**body, field: None}).input_tokens_max > 0  # null is the same as absent


def test_the_test_of_routing_fields_covers_every_routing_field() -> None:
    assert set(ROUTING) == set(ROUTING_FIELDS)


@pytest.mark.parametrize("method", BASIC, ids=str)
@pytest.mark.parametrize("field", ["models", "plugins", "route"])
async def test_a_request_with_fallback_models_or_plugins_is_not_sent(
    opened: Any, provider: LocalProvider, method: Method, field: str
) -> None:
    async with opened(method.sdk) as g:
        with pytest.raises(UnmeteredCall, match=f"'{field}'"):
            await run(method, g.client, extra_body={field: ROUTING[field]})
        assert provider.requests == [] and g.counted == 0


READABLE = [
    ("messages", user(NOTE, {"type": "text", "text": "x"}, {"type": "thinking", "thinking": "x", "signature": "x"})),
    ("messages", {**user(NOTE), "tools": [{"name": "t", "input_schema": {"type": "object"}}]}),
    ("messages", {**user(NOTE), "tools": [{"type": "bash_20250124", "name": "bash"}]}),
    ("messages", {**user(NOTE), "inference_geo": "global", "container": None, "mcp_servers": []}),
    ("messages", user({"type": "web_search_tool_result", "content": {"type": "web_search_tool_result_error"}})),
    ("messages", user({"type": "web_search_tool_result", "content": [{"type": "web_search_result", "url": "u"}]})),
    ("chat/completions", {**user({"type": "text", "text": "x"}), "tools": [{"type": "function"}]}),
    ("messages", user({"type": "tool_addition", "tool": {"type": "tool_reference", "name": "t"}})),
    ("responses", {"input": [{"type": "additional_tools", "tools": [{"type": "function"}]}]}),
    ("responses", {"input": [{"role": "user", "content": "x"}, {"type": "function_call_output", "output": "y"}]}),
    ("responses", {"input": [{"type": "reasoning", "encrypted_content": "x"}], "tools": [{"type": "custom"}]}),
]


@pytest.mark.parametrize(("route", "body"), READABLE)
def test_ordinary_requests_are_accepted_without_guard_options(route: str, body: dict[str, Any]) -> None:
    assert bound(route, body).input_tokens_max < 3_500


OUTPUT = [
    ("messages", {"max_tokens": 321, **user()}, 321),
    ("chat/completions", {"max_tokens": 321, **user()}, 321),
    ("chat/completions", {"max_tokens": 9, "max_completion_tokens": 321, **user()}, 321),
    ("chat/completions", {"max_completion_tokens": 107, "n": 3, **user()}, 321),
    ("responses", {"max_output_tokens": 321, "input": "x"}, 321),
    ("completions", {"max_tokens": 107, "prompt": ["a", "b"], "n": 1}, 214),
    ("completions", {"max_tokens": 10, "prompt": [[1, 2], [3]], "n": 2, "best_of": 5}, 100),
    ("completions", {"prompt": "a"}, 16),
    ("completions", {"max_tokens": 10, "prompt": "a", "n": 0}, 10),
    ("chat/completions", {"max_tokens": 21, "prediction": {"type": "content", "content": "x" * 300}, **user()}, 321),
    ("embeddings", {"input": ["a", "b"]}, 0),
]


@pytest.mark.parametrize(("route", "body", "tokens"), OUTPUT)
def test_the_output_bound_is_computed_from_the_output_limit_in_the_request(
    route: str, body: dict[str, Any], tokens: int
) -> None:
    assert bound(route, body).output_tokens_max == tokens


def test_without_a_limit_in_the_request_the_output_bound_is_the_configured_limit_or_the_model_maximum() -> None:
    assert bound("responses", {"input": "x"}).output_tokens_max == 32_768  # published for gpt-4.1-mini
    assert (
        bound("responses", {"input": "x", "model": "gpt-oss-120b"}).output_tokens_max == 131_072
    )  # the context window
    configured = bound("responses", {"input": "x"}, max_output_tokens=500)
    assert configured.output_tokens_max == 500 and configured.changes == {"max_output_tokens": 500}
    with pytest.raises(UnmeteredCall, match="max_output_tokens"):
        bound("responses", {"input": "x", "model": "gpt-4.5-preview"})


def test_for_deepseek_the_configured_output_limit_is_sent_as_max_tokens() -> None:
    options = GuardOptions(METER, "deepseek", max_output_tokens=500)
    chat = OpenAIDialect().bound("chat/completions", "deepseek-chat", user(), 100, options)
    assert chat.changes == {"max_tokens": 500}  # not all providers support max_completion_tokens
    completion = OpenAIDialect().bound("completions", "deepseek-chat", {"prompt": "x"}, 100, options)
    assert (completion.output_tokens_max, completion.changes) == (500, {"max_tokens": 500})


def test_each_reference_to_a_tool_counts_as_much_input_as_the_tool_definition() -> None:
    tool = {"name": "t", "description": "x" * 5_000, "input_schema": {}, "defer_loading": True}
    references = [{"type": "tool_reference", "tool_name": "t"}] * 3
    for block in (
        {"type": "tool_result", "tool_use_id": "t", "content": references},
        {"type": "tool_search_tool_result", "content": {"type": "r_result", "tool_references": references}},
    ):
        assert bound("messages", {**user(block), "tools": [tool]}).input_tokens_max > 4 * 5_000


@pytest.mark.parametrize("escaped", [False, True])
def test_the_size_of_a_text_is_at_least_the_size_after_unicode_normalization(escaped: bool) -> None:
    body = {"text": "\ufdfa" * 100}
    content = json.dumps(body, ensure_ascii=escaped).encode()
    assert text_size(content, body) >= len(unicodedata.normalize("NFKC", body["text"]).encode()) == 3_300
    assert text_size(b'{"text":"plain"}', {"text": "plain"}) == 16


def test_the_model_of_an_azure_request_is_the_name_of_the_deployment() -> None:
    model = OpenAIDialect().model
    assert model("/openai/deployments/own/chat/completions", {"model": GPT}) == "own"
    assert model("/openai/v1/chat/completions", {"model": GPT}) == GPT


@pytest.mark.parametrize("wrong", [-1, 1.5, "10", True, [5]])
def test_an_invalid_output_limit_is_refused(wrong: object) -> None:
    with pytest.raises(UnmeteredCall, match="must be a whole, non-negative number"):
        bound("chat/completions", {"max_tokens": wrong, **user()})


TIERS = [
    ("messages", {}, None),
    ("messages", {"service_tier": "standard_only"}, ""),
    ("messages", {"speed": "fast"}, "fast"),
    ("chat/completions", {}, None),
    ("chat/completions", {"service_tier": "auto"}, None),
    ("chat/completions", {"service_tier": "default"}, ""),
    ("responses", {"input": "x", "service_tier": "priority"}, "priority"),
]


@pytest.mark.parametrize(("route", "more", "tier"), TIERS)
def test_the_bound_of_a_request_contains_the_requested_service_tier(
    route: str, more: dict[str, Any], tier: str | None
) -> None:
    assert bound(route, {**user(), **more}).service_tier == tier


@pytest.mark.parametrize("method", [method for method in BASIC if method.sdk == "openai"], ids=str)
async def test_the_configured_output_limit_is_sent_with_the_request(
    opened: Any, provider: LocalProvider, method: Method
) -> None:
    provider.script(Scene(output_tokens=500))
    async with opened("openai", max_output_tokens=20) as g:
        await run(method, WithArguments(g.client, {method.limit_parameter: None}))
        assert provider.ledger[0].output_tokens == 20
        assert g.sums["spent"] == g.bill


async def test_a_request_with_a_malformed_body_is_refused(opened: Any, provider: LocalProvider) -> None:
    async with opened("openai") as g:
        for content in (b"[]", b"{", b'{"messages": 5, "model": "gpt-4.1-mini"}'):
            http = g.http_client
            request = http.build_request("POST", f"{provider.openai_url}/chat/completions", content=content)
            with pytest.raises(UnmeteredCall, match="not a JSON object|unknown format"):
                await resolve(http.send(request))
        assert provider.requests == [] and g.counted == 0


def test_the_bound_of_a_request_contains_the_model_named_in_the_request() -> None:
    assert {CLAUDE, GPT} == {bound("messages", user()).model, bound("responses", {"input": MESSAGES}).model}
