"""OpenAI's Chat Completions, Responses, Completions and Embeddings APIs, as the SDK ``openai`` speaks them.

Sources: the types and docstrings of the SDK, version 3.54; of images, what was billed for one of one tile,
community.openai.com/t/1262691.
"""

from __future__ import annotations

import re
from typing import Any

from ktrdr_budget.metering.guards.bounds import Bound, GuardOptions, InputBound, output_bound, whole_number
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
_CHAT_UNBOUNDED = ("audio", "web_search_options")
_RESPONSES_UNBOUNDED = ("background", "context_management", "image")
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
        return "free" if _FREE.search(path) else "refused"

    def bound(self, route: Route, body: dict[str, Any], size: int, options: GuardOptions) -> Bound:
        """See :meth:`Dialect.bound`."""
        found = InputBound(options, size)
        model = str(body.get("model") or "")
        if route == "embeddings":
            return Bound(model, found.total(), 0, operation="embeddings", service_tier="")
        if route == "responses":
            return _bound_response(found, body, model, options)
        if route == "chat/completions":
            return _bound_chat(found, body, model, options)
        return _bound_completion(found, body, model)

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
    older = body.get("max_tokens")
    asked = older if body.get("max_completion_tokens") is None else body["max_completion_tokens"]
    output, changes = output_bound(options, model, asked, "max_completion_tokens")
    choices = 1 if body.get("n") is None else whole_number(body["n"], "n")
    stream_options = body.get("stream_options") or {}
    hide = bool(body.get("stream")) and not stream_options.get("include_usage")
    if hide:
        changes = {**changes, "stream_options": {**stream_options, "include_usage": True}}
    return Bound(
        model=model,
        input_tokens_max=found.total(),
        output_tokens_max=output * choices,
        service_tier=_asked_tier(body),
        choices=choices,
        hidden_output=_hides_output(model, body.get("reasoning_effort")),
        changes=changes,
        hide_usage=hide,
    )


def _bound_response(found: InputBound, body: dict[str, Any], model: str, options: GuardOptions) -> Bound:
    _refuse(found, body, _RESPONSES_UNBOUNDED)
    for name, what in (
        ("previous_response_id", "an earlier response"),
        ("conversation", "a stored conversation"),
        ("prompt", "a stored prompt"),
    ):
        if body.get(name) is not None:
            found.unseen(what)
    for tool in body.get("tools") or []:
        _bound_tool(found, tool)
    for item in body["input"] if isinstance(body.get("input"), list) else []:
        _bound_item(found, item)
    output, changes = output_bound(options, model, body.get("max_output_tokens"), "max_output_tokens")
    reasoning = body.get("reasoning")
    return Bound(
        model=model,
        input_tokens_max=found.total(),
        output_tokens_max=output,
        service_tier=_asked_tier(body),
        hidden_output=_hides_output(model, reasoning.get("effort") if isinstance(reasoning, dict) else None),
        changes=changes,
    )


def _bound_completion(found: InputBound, body: dict[str, Any], model: str) -> Bound:
    asked = body.get("max_tokens")
    output = COMPLETIONS_TOKENS_DEFAULT if asked is None else whole_number(asked, "max_tokens")
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)) else 1
    made = [1 if body.get(name) is None else whole_number(body[name], name) for name in ("n", "best_of")]
    choices = prompts * max(made)
    stream_options = body.get("stream_options") or {}
    hide = bool(body.get("stream")) and not stream_options.get("include_usage")
    return Bound(
        model=model,
        input_tokens_max=found.total(),
        output_tokens_max=output * choices,
        operation="text_completion",
        service_tier="",
        choices=choices,
        changes={"stream_options": {**stream_options, "include_usage": True}} if hide else {},
        hide_usage=hide,
    )


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
    if kind == "message":
        _bound_parts(found, item.get("content"))
    elif kind in ("function_call_output", "custom_tool_call_output"):
        _bound_parts(found, item.get("output"))
    elif kind == "item_reference":
        found.unseen("a stored item")
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


def _hides_output(model: str, effort: object) -> bool:
    """Reasoning is billed, and not shown."""
    return effort != "none" and not _SHOWS_ALL.search(model)


def _usage(told: dict[str, Any], names: tuple[str, str], tier: object) -> Usage:
    whole, details = int(told.get(names[0]) or 0), told.get(f"{names[0]}_details") or {}
    read = min(int(details.get("cached_tokens") or 0), whole)
    return Usage(
        input_tokens=whole,
        output_tokens=int(told.get(names[1]) or 0),
        cache_read_tokens=read,
        cache_write_tokens=min(int(details.get("cache_write_tokens") or 0), whole - read),
        service_tier="" if tier in (None, "default", "auto") else str(tier),
    )


class _ChatEar(Ear):
    """Chat completions, and the older completions and embeddings, which tell their usage alike."""

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        self._tier: object = None

    def document(self, answer: dict[str, Any]) -> None:
        self._learn(answer)
        self.final = self.usage is not None

    def event(self, event: dict[str, Any]) -> None:
        self._learn(event)
        choices = event.get("choices")
        self.ending = self.ending or any(choice.get("finish_reason") for choice in choices or ())
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
