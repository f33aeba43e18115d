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
    text_bytes,
    whole_number,
)
from ktrdr_budget.metering.guards.dialect import Ear, Route
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
_CHAT_UNBOUNDED = ("audio", "web_search_options")
_RESPONSES_UNBOUNDED = ("background", "context_management", "image", "prompt")
"""A stored prompt may bring tools that the provider runs."""
_SEARCHES = re.compile(r"search-preview|search-api|deep-research")
"""Models that search the web unasked, for a price per search."""
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
    stream_options = body.get("stream_options") or {}
    hide = bool(body.get("stream")) and not stream_options.get("include_usage")
    if hide:
        changes = {**changes, "stream_options": {**stream_options, "include_usage": True}}
    return Bound(
        model=model,
        input_tokens_max=found.total(),
        output_tokens_max=(output + predicted) * choices,
        service_tier=_asked_tier(body),
        choices=choices,
        hidden_output=predicted > 0 or _hides_output(model),
        changes=changes,
        hide_usage=hide,
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
    stream_options = body.get("stream_options") or {}
    hide = bool(body.get("stream")) and not stream_options.get("include_usage")
    if hide:
        changes = {**changes, "stream_options": {**stream_options, "include_usage": True}}
    return Bound(
        model=model,
        input_tokens_max=found.total(),
        output_tokens_max=output * choices,
        operation="text_completion",
        service_tier="",
        choices=choices,
        changes=changes,
        hide_usage=hide,
    )


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


def _usage(told: dict[str, Any], names: tuple[str, str], tier: object) -> Usage:
    whole, details = int(told.get(names[0]) or 0), told.get(f"{names[0]}_details") or {}
    # Some providers, such as xAI, count reasoning in the total alone:
    # docs.x.ai/docs/key-information/consumption-and-rate-limits
    output = max(int(told.get(names[1]) or 0), int(told.get("total_tokens") or 0) - whole)
    read = min(int(details.get("cached_tokens") or 0), whole)
    return Usage(
        input_tokens=whole,
        output_tokens=output,
        cache_read_tokens=read,
        cache_write_tokens=min(int(details.get("cache_write_tokens") or 0), whole - read),
        service_tier="" if tier in (None, "default", "auto") else str(tier),
    )


class _ChatEar(Ear):
    """Chat completions, and the older completions and embeddings, which tell their usage alike."""

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        self._tier: object = None
        self._finished: set[object] = set()

    def document(self, answer: dict[str, Any]) -> None:
        self._learn(answer)
        self.final = self.usage is not None

    def event(self, event: dict[str, Any]) -> None:
        self._learn(event)
        choices = event.get("choices")
        self._finished |= {choice.get("index") for choice in choices or () if choice.get("finish_reason")}
        self.ending = len(self._finished) >= self.bound.choices
        # Some servers tell a running usage with each chunk: the last word comes when the model has finished.
        told_now = isinstance(event.get("usage"), dict)
        self.final = self.final or (told_now and (not choices or self.ending))

    def is_usage_only(self, event: dict[str, Any]) -> bool:
        return event.get("choices") == [] and isinstance(event.get("usage"), dict)

    def _learn(self, told: dict[str, Any]) -> None:
        self._tier = told.get("service_tier") or self._tier
        if isinstance(told.get("usage"), dict):
            self.usage = _usage(told["usage"], ("prompt_tokens", "completion_tokens"), self._tier)


class _ResponsesEar(Ear):
    def document(self, answer: dict[str, Any]) -> None:
        if isinstance(answer.get("usage"), dict):
            self.usage = _usage(answer["usage"], ("input_tokens", "output_tokens"), answer.get("service_tier"))
            self.final = True

    def event(self, event: dict[str, Any]) -> None:
        if event.get("type") in ("response.completed", "response.incomplete", "response.failed"):
            self.document(event.get("response") or {})
