"""The dialect of OpenAI's Chat Completions, Responses, Completions and Embeddings APIs, as used by the SDK ``openai``.

Sources: the types and docstrings of the SDK, version 3.54; for images, the bill for an image of one tile at
community.openai.com/t/1262691.
"""

from __future__ import annotations

import re
from typing import Any

from ktrdr_budget.metering.guards.bounds import (
    Bound,
    GuardOptions,
    InputBound,
    output_bound,
    output_hint,
    refuse_routing,
    text_bytes,
    whole_number,
)
from ktrdr_budget.metering.guards.dialect import Route
from ktrdr_budget.metering.guards.usage_parser import UsageParser, count_of
from ktrdr_budget.metering.usage import Usage

__all__ = ["OpenAIDialect"]

IMAGE_TOKENS_MAX = 50_000
"""Upper bound for one image. gpt-4o-mini bills the most tokens: 2,833, and 5,667 more for each tile, of which there are
at most 8."""
COMPLETIONS_TOKENS_DEFAULT = 16

_METERED = re.compile(r"/(chat/completions|responses|completions|embeddings)/?$")
_FREE = re.compile(
    r"/(moderations|files|uploads(/.*)?|conversations(/.*)?|organization/.*|projects/.*|webhook_endpoints(/.*)?"
    r"|responses/input_tokens|(responses|batches|fine_tuning/jobs)/[^/]+/cancel|chat/completions/[^/]+)/?$"
)
_RENTED = re.compile(r"/(vector_stores|containers|agents)/")
"""Paths of resources that are billed by size or time."""
_DEPLOYMENT = re.compile(r"/deployments/([^/]+)/")
"""The path of an Azure deployment. Azure uses the model of that deployment, and ignores the model in the body."""
_CHAT_UNBOUNDED = ("audio",)
_RESPONSES_UNBOUNDED = ("background", "context_management", "image", "prompt")
"""``prompt``: a stored prompt may contain tools that the provider runs."""
_SEARCHES = re.compile(r"search-preview|search-api|deep-research|:online$")
"""Models that always search the web, for a price per search; ``:online`` is OpenRouter's web plugin."""
CACHE_READ_FIELDS: tuple[tuple[str, ...], ...] = (
    ("details", "cached_tokens"),  # OpenAI, Azure, OpenRouter, xAI, Groq, Qwen, Mistral, …
    ("details", "cache_read_tokens"),
    ("cached_tokens",),  # Moonshot: platform.kimi.ai/docs/api/chat
    ("prompt_cache_hit_tokens",),  # DeepSeek: api-docs.deepseek.com/guides/kv_cache
    ("cache_read_input_tokens",),  # LiteLLM, and gateways to Anthropic
)
"""Fields in which providers report cache reads; ``details`` is ``prompt_tokens_details`` or ``input_tokens_details``.
Several fields may report the same tokens, so only the largest number is used."""
CACHE_WRITE_FIELDS: tuple[tuple[str, ...], ...] = (
    ("details", "cache_write_tokens"),  # OpenRouter
    ("details", "cache_creation_tokens"),  # LiteLLM
    ("details", "cache_creation_input_tokens"),  # Qwen
    ("cache_creation_input_tokens",),  # LiteLLM, and gateways to Anthropic
)
"""Fields in which providers report cache writes."""
SEPARATE_CACHE_FIELDS = ("cache_read_input_tokens", "cache_creation_input_tokens")
"""Anthropic's fields. Anthropic itself and some gateways do not include these tokens in the count of the input; other
gateways do."""
_OWN = ("openai", "azure")
"""Providers that support ``max_completion_tokens``, and that have a default output limit for legacy completions."""
_CLIENT_TOOLS = (None, "function", "custom", "local_shell", "apply_patch")
_TEXT = ("text", "refusal", "input_text", "output_text", "reasoning_text", "summary_text")
_SHOWS_ALL = re.compile(r"^(ft:)?(gpt-3\.5|gpt-4|chatgpt-4o|text-|davinci|babbage)")
"""Models without reasoning."""


class OpenAIDialect:
    """See :class:`~.dialect.Dialect`."""

    def route(self, method: str, path: str) -> Route:
        """See :meth:`Dialect.route`. Unmetered endpoints that may cost money (images, batches, …) are refused."""
        if method != "POST":
            return "free"
        metered = _METERED.search(path)
        if metered:
            return metered[1]
        return "free" if _FREE.search(path) and not _RENTED.search(path) else "refused"

    def model(self, path: str, body: dict[str, Any]) -> str:
        """See :meth:`Dialect.model`."""
        deployment = _DEPLOYMENT.search(path)
        return deployment[1] if deployment else str(body.get("model") or "")

    def bound(self, route: Route, model: str, body: dict[str, Any], size: int, options: GuardOptions) -> Bound:
        """See :meth:`Dialect.bound`."""
        input_bound = InputBound(options, size)
        refuse_routing(input_bound, body)
        if _SEARCHES.search(model):
            input_bound.refuse(f"{model!r}, which searches the web,")
        if route == "embeddings":
            return Bound(model, input_bound.total(), 0, operation="embeddings", service_tier="")
        if route == "responses":
            return _bound_response(input_bound, body, model, options)
        if route == "chat/completions":
            return _bound_chat(input_bound, body, model, options)
        return _bound_completion(input_bound, body, model, options)

    def usage_parser(self, route: Route, bound: Bound) -> UsageParser:
        """See :meth:`Dialect.usage_parser`."""
        return _ResponsesUsageParser(bound) if route == "responses" else _ChatUsageParser(bound)


def _bound_chat(input_bound: InputBound, body: dict[str, Any], model: str, options: GuardOptions) -> Bound:
    _refuse(input_bound, body, _CHAT_UNBOUNDED)
    if "audio" in (body.get("modalities") or []):
        input_bound.refuse("audio")
    for tool in body.get("tools") or []:
        _bound_tool(input_bound, tool)
    for message in body.get("messages") or []:
        _bound_parts(input_bound, message.get("content"))
        if message.get("audio"):
            input_bound.refuse("audio")
    deprecated_limit = body.get("max_tokens")
    limit = deprecated_limit if body.get("max_completion_tokens") is None else body["max_completion_tokens"]
    parameter = "max_completion_tokens" if options.provider in _OWN else "max_tokens"
    output, changes = output_bound(options, model, limit, parameter)
    # Rejected tokens of a prediction are billed as output too.
    predicted = text_bytes((body.get("prediction") or {}).get("content"))
    choices = _choices(body, "n")
    return Bound(
        model=model,
        input_tokens_max=input_bound.total(),
        output_tokens_max=(output + predicted) * choices,
        output_hint=output_hint(options, limit, parameter),
        service_tier=_requested_tier(body),
        choices=choices,
        hidden_output=predicted > 0 or hides_output(model),
        **_with_usage_report(body, changes),
    )


def _bound_response(input_bound: InputBound, body: dict[str, Any], model: str, options: GuardOptions) -> Bound:
    _refuse(input_bound, body, _RESPONSES_UNBOUNDED)
    for name, what in (
        ("previous_response_id", "an earlier response"),
        ("conversation", "a stored conversation"),
    ):
        if body.get(name) is not None:
            input_bound.add_unknown_size(what)
    for tool in body.get("tools") or []:
        _bound_tool(input_bound, tool)
    for item in body["input"] if isinstance(body.get("input"), list) else []:
        _bound_item(input_bound, item)
    if (body.get("reasoning") or {}).get("mode") not in (None, "standard"):
        input_bound.refuse("a reasoning mode other than 'standard'")
    output, changes = output_bound(options, model, body.get("max_output_tokens"), "max_output_tokens")
    return Bound(
        model=model,
        input_tokens_max=input_bound.total(),
        output_tokens_max=output,
        output_hint=output_hint(options, body.get("max_output_tokens"), "max_output_tokens"),
        service_tier=_requested_tier(body),
        hidden_output=hides_output(model),
        changes=changes,
    )


def _bound_completion(input_bound: InputBound, body: dict[str, Any], model: str, options: GuardOptions) -> Bound:
    limit = body.get("max_tokens")
    if limit is None and options.provider in _OWN:
        limit = COMPLETIONS_TOKENS_DEFAULT
    output, changes = output_bound(options, model, limit, "max_tokens")
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)) else 1
    choices = prompts * max(_choices(body, "n"), _choices(body, "best_of"))
    return Bound(
        model=model,
        input_tokens_max=input_bound.total(),
        output_tokens_max=output * choices,
        output_hint=output_hint(options, limit, "max_tokens"),
        operation="text_completion",
        service_tier="",
        choices=choices,
        **_with_usage_report(body, changes),
    )


def _with_usage_report(body: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a :class:`Bound` that make a stream report its usage.

    A caller sets ``include_usage: False`` if the server does not support this option; the option is then not sent.
    """
    if not body.get("stream"):
        return {"changes": changes}
    options = dict(body.get("stream_options") or {})
    include_usage = options.pop("include_usage", None)
    if include_usage is False:
        return {"changes": {**changes, "stream_options": options or None}, "reports_usage": False}
    if not include_usage:
        changes = {**changes, "stream_options": {**options, "include_usage": True}}
    return {"changes": changes, "hide_usage": not include_usage}


def _choices(body: dict[str, Any], name: str) -> int:
    """The requested number of answers."""
    return 1 if body.get(name) is None else max(1, whole_number(body[name], name))


def _refuse(input_bound: InputBound, body: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if body.get(name):
            input_bound.refuse(f"{name!r}")


def _bound_tool(input_bound: InputBound, tool: dict[str, Any]) -> None:
    if tool.get("type") not in _CLIENT_TOOLS:
        input_bound.refuse(f"the provider's tool {tool.get('type')!r}")


def _bound_parts(input_bound: InputBound, parts: Any) -> None:
    """Add the parts of a message's content to the bound."""
    for part in parts if isinstance(parts, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image_url":
            url = part.get("image_url")
            _bound_image(input_bound, url.get("url") if isinstance(url, dict) else url)
        elif kind in ("input_image", "computer_screenshot"):
            _bound_image(input_bound, part.get("image_url"))
        elif kind == "input_audio":
            input_bound.refuse("audio")
        elif kind in ("file", "input_file"):
            file = part.get("file") if isinstance(part.get("file"), dict) else part
            input_bound.replace(file.get("file_data"), 0)
            input_bound.add_unknown_size("a file")
        elif kind not in _TEXT:
            input_bound.add_unknown_size(f"a part of type {kind!r}")


def _bound_image(input_bound: InputBound, url: Any) -> None:
    input_bound.replace(url if isinstance(url, str) and url.startswith("data:") else None, IMAGE_TOKENS_MAX)


def _bound_item(input_bound: InputBound, item: Any) -> None:
    """Add one item of the input of the Responses API to the bound."""
    if not isinstance(item, dict):
        return
    kind = item.get("type", "message")
    for tool in item.get("tools") or ():  # items may add tools
        _bound_tool(input_bound, tool)
    if kind == "message":
        _bound_parts(input_bound, item.get("content"))
    elif kind in ("function_call_output", "custom_tool_call_output"):
        _bound_parts(input_bound, item.get("output"))
    elif kind == "compaction_trigger":
        input_bound.refuse("compaction")
    elif kind == "item_reference":
        input_bound.add_unknown_size("a stored item")
    elif kind == "reasoning" and not item.get("encrypted_content"):
        input_bound.add_unknown_size("stored reasoning")
    elif kind == "computer_call_output":
        _bound_parts(input_bound, [item.get("output")])
    elif kind == "image_generation_call":
        input_bound.replace(item.get("result"), IMAGE_TOKENS_MAX)
    # Other items (calls, reasoning, …) are text in the request.


def _requested_tier(body: dict[str, Any]) -> str | None:
    tier = body.get("service_tier")
    if tier in (None, "auto"):
        return None
    return "" if tier == "default" else str(tier)


def hides_output(model: str) -> bool:
    """Whether a model may reason. Reasoning is billed, but the answer does not show it."""
    # Some models reason although the request disables it: community.openai.com/t/1378362
    return not _SHOWS_ALL.search(model)


def _count_at(counts: dict[str, Any], *path: str) -> int:
    """Return the count at a path within a usage object, or 0 if there is none."""
    value: Any = counts
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return count_of(value) or 0


class _OpenAIUsageParser(UsageParser):
    """Base class of the formats. The formats differ in the names of the input count and the output count."""

    _input = "prompt_tokens"
    _output = "completion_tokens"

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        self._tier: object = None

    def parse_document(self, document: dict[str, Any]) -> None:
        self._tier = document.get("service_tier")
        self.final = self.merge(document.get("usage"))

    def usage_of(self, counts: dict[str, Any]) -> Usage | None:
        if self._input not in counts:
            return None
        all_input, total = _count_at(counts, self._input), _count_at(counts, "total_tokens")
        output = count_of(counts.get(self._output))
        details = {"details": counts.get(f"{self._input}_details")}
        read = max(_count_at({**counts, **details}, *path) for path in CACHE_READ_FIELDS)
        written = max(_count_at({**counts, **details}, *path) for path in CACHE_WRITE_FIELDS)
        cached = read + written
        separate = any(name in counts for name in SEPARATE_CACHE_FIELDS) and total == all_input + (output or 0) + cached
        if cached > all_input or separate:
            all_input += cached
        if not self.is_credible(all_input, output):
            return None
        # Some providers, such as xAI, include reasoning only in the total:
        # docs.x.ai/docs/key-information/consumption-and-rate-limits
        return Usage(
            input_tokens=all_input,
            output_tokens=max(output or 0, total - all_input),
            cache_read_tokens=read,
            cache_write_tokens=written,
            service_tier="" if self._tier in (None, "default", "auto") else str(self._tier),
        )


class _ChatUsageParser(_OpenAIUsageParser):
    """Chat completions, legacy completions and embeddings, which report usage in the same format."""

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        self._finished: set[object] = set()
        """Indices of the finished answers."""
        self._ends_with_usage = False
        """Whether the latest event is a separate usage report. At the end of the stream, such a report is final, even
        without a ``finish_reason``."""

    def parse_event(self, event: dict[str, Any]) -> None:
        self._tier = event.get("service_tier") or self._tier
        choices = event.get("choices")
        self._finished |= {choice.get("index") for choice in choices or () if choice.get("finish_reason")}
        self.model_finished = len(self._finished) >= self.bound.choices
        # Some servers report a running usage with each chunk, or a usage before the first output; such a report is not
        # final before the model has finished.
        if self.merge(event.get("usage")):
            self.final, self._ends_with_usage = self.model_finished, not choices
        elif any(choice.get("delta") or choice.get("text") for choice in choices or ()):
            self._ends_with_usage = False

    def skip(self, data: bytes) -> None:
        self._ends_with_usage = self._ends_with_usage and b'"choices"' not in data

    def end(self) -> None:
        self.final = self.final or self._ends_with_usage
        super().end()

    def is_usage_only(self, event: dict[str, Any]) -> bool:
        return event.get("choices") == [] and isinstance(event.get("usage"), dict)


class _ResponsesUsageParser(_OpenAIUsageParser):
    _input = "input_tokens"
    _output = "output_tokens"

    def parse_event(self, event: dict[str, Any]) -> None:
        if event.get("type") in ("response.completed", "response.incomplete", "response.failed"):
            self.parse_document(event.get("response") or {})
            self.ended = True
