"""OpenAI's Chat Completions, Responses, Completions and Embeddings APIs, as the SDK ``openai`` speaks them.

Sources: the types and docstrings of the SDK, version 3.54; of images, what was billed for one of one tile,
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
from ktrdr_budget.metering.guards.dialect import Ear, Route, count_of
from ktrdr_budget.metering.usage import Usage

__all__ = ["OpenAIDialect"]

IMAGE_TOKENS_MAX = 50_000
"""The dearest scale is that of gpt-4o-mini: 2,833 tokens, and 5,667 for each of at most 8 tiles."""
COMPLETIONS_TOKENS_DEFAULT = 16

_METERED = re.compile(r"/(chat/completions|responses|completions|embeddings)/?$")
_FREE = re.compile(
    r"/(moderations|files|uploads(/.*)?|conversations(/.*)?|organization/.*|projects/.*|webhook_endpoints(/.*)?"
    r"|responses/input_tokens|(responses|batches|fine_tuning/jobs)/[^/]+/cancel|chat/completions/[^/]+)/?$"
)
_RENTED = re.compile(r"/(vector_stores|containers|agents)/")
"""What is uploaded there is billed by its size or by time."""
_DEPLOYMENT = re.compile(r"/deployments/([^/]+)/")
"""Azure asks the model that is deployed by this name, whatever model the body names."""
_CHAT_UNBOUNDED = ("audio",)
_RESPONSES_UNBOUNDED = ("background", "context_management", "image", "prompt")
"""A stored prompt may bring tools that the provider runs."""
_SEARCHES = re.compile(r"search-preview|search-api|deep-research|:online$")
"""Models that search the web unasked, for a price per search; ``:online`` is OpenRouter's name for its plugin."""
CACHE_READ_FIELDS: tuple[tuple[str, ...], ...] = (
    ("details", "cached_tokens"),  # OpenAI, Azure, OpenRouter, xAI, Groq, Qwen, Mistral, …
    ("details", "cache_read_tokens"),
    ("cached_tokens",),  # Moonshot: platform.kimi.ai/docs/api/chat
    ("prompt_cache_hit_tokens",),  # DeepSeek: api-docs.deepseek.com/guides/kv_cache
    ("cache_read_input_tokens",),  # LiteLLM, and gateways to Anthropic
)
"""Where providers report input that came from a cache; ``details`` is ``prompt_tokens_details`` or
``input_tokens_details``. Several may stand for the same tokens: the largest counts."""
CACHE_WRITE_FIELDS: tuple[tuple[str, ...], ...] = (
    ("details", "cache_write_tokens"),  # OpenRouter
    ("details", "cache_creation_tokens"),  # LiteLLM
    ("details", "cache_creation_input_tokens"),  # Qwen
    ("cache_creation_input_tokens",),  # LiteLLM, and gateways to Anthropic
)
"""The same of input that was written to a cache."""
SEPARATE_CACHE_FIELDS = ("cache_read_input_tokens", "cache_creation_input_tokens")
"""Anthropic's own, which do not count in its input; some gateways to it count them in, others do not."""
_OWN = ("openai", "azure")
"""The providers that know ``max_completion_tokens``, and limit legacy completions by themselves."""
_CLIENT_TOOLS = (None, "function", "custom", "local_shell", "apply_patch")
_TEXT = ("text", "refusal", "input_text", "output_text", "reasoning_text", "summary_text")
_SHOWS_ALL = re.compile(r"^(ft:)?(gpt-3\.5|gpt-4|chatgpt-4o|text-|davinci|babbage)")
"""Models that do not reason."""


class OpenAIDialect:
    """See :class:`~.dialect.Dialect`."""

    def route(self, method: str, path: str) -> Route:
        """What spends and is not metered (images, audio, batches, …) is refused."""
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
        found = InputBound(options, size)
        refuse_routing(found, body)
        if _SEARCHES.search(model):
            found.refuse(f"{model!r}, which searches the web by itself,")
        if route == "embeddings":
            return Bound(model, found.total(), 0, operation="embeddings", service_tier="")
        if route == "responses":
            return _bound_response(found, body, model, options)
        if route == "chat/completions":
            return _bound_chat(found, body, model, options)
        return _bound_completion(found, body, model, options)

    def ear(self, route: Route, bound: Bound) -> Ear:
        """See :meth:`Dialect.ear`."""
        return _ResponsesEar(bound) if route == "responses" else _ChatEar(bound)


def _bound_chat(found: InputBound, body: dict[str, Any], model: str, options: GuardOptions) -> Bound:
    _refuse(found, body, _CHAT_UNBOUNDED)
    if "audio" in (body.get("modalities") or []):
        found.refuse("audio")
    for tool in body.get("tools") or []:
        _bound_tool(found, tool)
    for message in body.get("messages") or []:
        _bound_parts(found, message.get("content"))
        if message.get("audio"):
            found.refuse("audio")
    older = body.get("max_tokens")
    asked = older if body.get("max_completion_tokens") is None else body["max_completion_tokens"]
    parameter = "max_completion_tokens" if options.provider in _OWN else "max_tokens"
    output, changes = output_bound(options, model, asked, parameter)
    # What is predicted and does not come true is billed as output, too.
    predicted = text_bytes((body.get("prediction") or {}).get("content"))
    choices = _choices(body, "n")
    return Bound(
        model=model,
        input_tokens_max=found.total(),
        output_tokens_max=(output + predicted) * choices,
        output_hint=output_hint(options, asked, parameter),
        service_tier=_asked_tier(body),
        choices=choices,
        hidden_output=predicted > 0 or _hides_output(model),
        **_asking_for_usage(body, changes),
    )


def _bound_response(found: InputBound, body: dict[str, Any], model: str, options: GuardOptions) -> Bound:
    _refuse(found, body, _RESPONSES_UNBOUNDED)
    for name, what in (
        ("previous_response_id", "an earlier response"),
        ("conversation", "a stored conversation"),
    ):
        if body.get(name) is not None:
            found.unseen(what)
    for tool in body.get("tools") or []:
        _bound_tool(found, tool)
    for item in body["input"] if isinstance(body.get("input"), list) else []:
        _bound_item(found, item)
    if (body.get("reasoning") or {}).get("mode") not in (None, "standard"):
        found.refuse("reasoning in another mode than 'standard'")
    output, changes = output_bound(options, model, body.get("max_output_tokens"), "max_output_tokens")
    return Bound(
        model=model,
        input_tokens_max=found.total(),
        output_tokens_max=output,
        output_hint=output_hint(options, body.get("max_output_tokens"), "max_output_tokens"),
        service_tier=_asked_tier(body),
        hidden_output=_hides_output(model),
        changes=changes,
    )


def _bound_completion(found: InputBound, body: dict[str, Any], model: str, options: GuardOptions) -> Bound:
    asked = body.get("max_tokens")
    if asked is None and options.provider in _OWN:
        asked = COMPLETIONS_TOKENS_DEFAULT
    output, changes = output_bound(options, model, asked, "max_tokens")
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)) else 1
    choices = prompts * max(_choices(body, "n"), _choices(body, "best_of"))
    return Bound(
        model=model,
        input_tokens_max=found.total(),
        output_tokens_max=output * choices,
        output_hint=output_hint(options, asked, "max_tokens"),
        operation="text_completion",
        service_tier="",
        choices=choices,
        **_asking_for_usage(body, changes),
    )


def _asking_for_usage(body: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """How a stream is made to report its usage: the fields of its :class:`Bound`.

    ``include_usage: False`` is the caller's word that the server knows no ``stream_options``: then it is not sent.
    """
    if not body.get("stream"):
        return {"changes": changes}
    options = dict(body.get("stream_options") or {})
    wanted = options.pop("include_usage", None)
    if wanted is False:
        return {"changes": {**changes, "stream_options": options or None}, "reports_usage": False}
    if not wanted:
        changes = {**changes, "stream_options": {**options, "include_usage": True}}
    return {"changes": changes, "hide_usage": not wanted}


def _choices(body: dict[str, Any], name: str) -> int:
    """How many answers are asked for."""
    return 1 if body.get(name) is None else max(1, whole_number(body[name], name))


def _refuse(found: InputBound, body: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if body.get(name):
            found.refuse(f"{name!r}")


def _bound_tool(found: InputBound, tool: dict[str, Any]) -> None:
    if tool.get("type") not in _CLIENT_TOOLS:
        found.refuse(f"the tool {tool.get('type')!r}, which the provider runs,")


def _bound_parts(found: InputBound, parts: Any) -> None:
    """The parts of a message's content."""
    for part in parts if isinstance(parts, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image_url":
            url = part.get("image_url")
            _bound_image(found, url.get("url") if isinstance(url, dict) else url)
        elif kind in ("input_image", "computer_screenshot"):
            _bound_image(found, part.get("image_url"))
        elif kind == "input_audio":
            found.refuse("audio")
        elif kind in ("file", "input_file"):
            file = part.get("file") if isinstance(part.get("file"), dict) else part
            found.replace(file.get("file_data"), 0)
            found.unseen("a file")
        elif kind not in _TEXT:
            found.unseen(f"a part of type {kind!r}")


def _bound_image(found: InputBound, url: Any) -> None:
    found.replace(url if isinstance(url, str) and url.startswith("data:") else None, IMAGE_TOKENS_MAX)


def _bound_item(found: InputBound, item: Any) -> None:
    """One item of a response's input."""
    if not isinstance(item, dict):
        return
    kind = item.get("type", "message")
    for tool in item.get("tools") or ():  # tools may be added on the way
        _bound_tool(found, tool)
    if kind == "message":
        _bound_parts(found, item.get("content"))
    elif kind in ("function_call_output", "custom_tool_call_output"):
        _bound_parts(found, item.get("output"))
    elif kind == "compaction_trigger":
        found.refuse("compaction")
    elif kind == "item_reference":
        found.unseen("a stored item")
    elif kind == "reasoning" and not item.get("encrypted_content"):
        found.unseen("stored reasoning")
    elif kind == "computer_call_output":
        _bound_parts(found, [item.get("output")])
    elif kind == "image_generation_call":
        found.replace(item.get("result"), IMAGE_TOKENS_MAX)
    # All others are text that the request shows: calls, reasoning, …


def _asked_tier(body: dict[str, Any]) -> str | None:
    tier = body.get("service_tier")
    if tier in (None, "auto"):
        return None
    return "" if tier == "default" else str(tier)


def _hides_output(model: str) -> bool:
    """Reasoning is billed, and not shown."""
    # That it is asked to make no effort is not always heeded: community.openai.com/t/1378362
    return not _SHOWS_ALL.search(model)


def _count_at(counts: dict[str, Any], *path: str) -> int:
    """The count at a path within a usage object; 0 if there is none."""
    found: Any = counts
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return count_of(found) or 0


class _OpenAIEar(Ear):
    """What the formats share: the fields of a usage object, under two pairs of names."""

    _input = "prompt_tokens"
    _output = "completion_tokens"

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        self._tier: object = None

    def read(self, counts: dict[str, Any]) -> Usage | None:
        if self._input not in counts:
            return None
        whole, total = _count_at(counts, self._input), _count_at(counts, "total_tokens")
        output = count_of(counts.get(self._output))
        details = {"details": counts.get(f"{self._input}_details")}
        read = max(_count_at({**counts, **details}, *path) for path in CACHE_READ_FIELDS)
        written = max(_count_at({**counts, **details}, *path) for path in CACHE_WRITE_FIELDS)
        cached = read + written
        separate = any(name in counts for name in SEPARATE_CACHE_FIELDS) and total == whole + (output or 0) + cached
        if cached > whole or separate:
            whole += cached  # counted apart from the input, as Anthropic does
        if not self.credible(whole, output):
            return None
        # Some providers, such as xAI, count reasoning in the total alone:
        # docs.x.ai/docs/key-information/consumption-and-rate-limits
        return Usage(
            input_tokens=whole,
            output_tokens=max(output or 0, total - whole),
            cache_read_tokens=read,
            cache_write_tokens=written,
            service_tier="" if self._tier in (None, "default", "auto") else str(self._tier),
        )


class _ChatEar(_OpenAIEar):
    """Chat completions, and the older completions and embeddings, which report their usage alike."""

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        self._finished: set[object] = set()
        self._last_was_usage = False
        """The last word was a usage, of its own: final at the end, also if no ``finish_reason`` came."""

    def document(self, answer: dict[str, Any]) -> None:
        self._tier = answer.get("service_tier")
        self.final = self.learn(answer.get("usage"))

    def event(self, event: dict[str, Any]) -> None:
        self._tier = event.get("service_tier") or self._tier
        choices = event.get("choices")
        self._finished |= {choice.get("index") for choice in choices or () if choice.get("finish_reason")}
        self.ending = len(self._finished) >= self.bound.choices
        # Some servers report a running usage with each chunk, or one before the first word: none is final until the
        # model has finished.
        if self.learn(event.get("usage")):
            self.final, self._last_was_usage = self.ending, not choices
        elif any(choice.get("delta") or choice.get("text") for choice in choices or ()):
            self._last_was_usage = False

    def pass_by(self, data: bytes) -> None:
        self._last_was_usage = self._last_was_usage and b'"choices"' not in data

    def end(self) -> None:
        self.final = self.final or self._last_was_usage
        super().end()

    def is_usage_only(self, event: dict[str, Any]) -> bool:
        return event.get("choices") == [] and isinstance(event.get("usage"), dict)


class _ResponsesEar(_OpenAIEar):
    _input = "input_tokens"
    _output = "output_tokens"

    def document(self, answer: dict[str, Any]) -> None:
        self._tier = answer.get("service_tier")
        self.final = self.learn(answer.get("usage"))

    def event(self, event: dict[str, Any]) -> None:
        if event.get("type") in ("response.completed", "response.incomplete", "response.failed"):
            self.document(event.get("response") or {})
            self.ended = True
