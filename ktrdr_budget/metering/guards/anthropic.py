"""The dialect of Anthropic's Messages API, as used by the SDK ``anthropic``.

Sources: the types and docstrings of the SDK, version 2.12; for images,
platform.claude.com/docs/en/build-with-claude/vision.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ktrdr_budget.metering.guards.bounds import (
    Bound,
    GuardOptions,
    InputBound,
    output_bound,
    output_hint,
    refuse_routing,
    text_bytes,
)
from ktrdr_budget.metering.guards.dialect import Route
from ktrdr_budget.metering.guards.usage_parser import UsageParser, count_of
from ktrdr_budget.metering.usage import Usage

__all__ = ["AnthropicDialect"]

IMAGE_TOKENS_MAX = 5_000
"""One token per 28 x 28 pixels; images are scaled down to at most 2,576 pixels, which is 4,784 tokens."""
CLIENT_TOOL_TOKENS_MAX = 1_500
"""Some tools are defined by the provider and run by the caller. This number is a conservative assumption for the
definition of such a tool."""

_MESSAGES = re.compile(r"/v1/messages/?$")
_FREE = re.compile(
    r"/v1/(messages/count_tokens|messages/batches/[^/]+/cancel|files|organizations/.*|skills(/.*)?|user_profiles(/.*)?)/?$"
)
_CLIENT_TOOLS = ("bash_", "text_editor_", "memory_", "computer_2")
_READABLE = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result", "search_result", "tool_reference")
_READABLE_ENDINGS = ("tool_use", "_result", "_output", "_error")
"""Endings of block types: earlier calls of the provider's tools, and the results of these calls. The blocks within a
result are checked separately."""
_UNBOUNDED = ("container", "mcp_servers", "fallback_credit_token", "compaction", "inference_geo")
_SHOWS_ALL = re.compile(r"claude-(2|3|v1|instant|(haiku|opus|sonnet)-4(-[0-5])?(-\d{8})?$)")
"""Models that think only if the request enables thinking. Other models may think without it."""


class AnthropicDialect:
    """See :class:`~.dialect.Dialect`."""

    def route(self, method: str, path: str) -> Route:
        """See :meth:`Dialect.route`. Only messages are metered; other endpoints that may cost money are refused."""
        if method != "POST" or _FREE.search(path):
            return "free"
        return "messages" if _MESSAGES.search(path) else "refused"

    def model(self, path: str, body: dict[str, Any]) -> str:
        """See :meth:`Dialect.model`."""
        return str(body.get("model") or "")

    def bound(self, route: Route, model: str, body: dict[str, Any], size: int, options: GuardOptions) -> Bound:
        """See :meth:`Dialect.bound`."""
        input_bound = InputBound(options, size)
        refuse_routing(input_bound, body)
        for name in _UNBOUNDED:
            if body.get(name) not in (None, [], {}, "global"):
                input_bound.refuse(f"{name!r}")
        if "compact" in str(body.get("context_management") or ""):
            input_bound.refuse("compaction")
        if body.get("thread") is not None:
            input_bound.add_unknown_size("a stored thread")
        for tool in body.get("tools") or []:
            _bound_tool(input_bound, tool)
        for content in (body.get("system"), *(message.get("content") for message in body.get("messages") or [])):
            for block in _blocks(content):
                _bound_block(input_bound, block)
                if block.get("type") == "tool_reference":
                    input_bound.add(_longest_tool(body))
        output, changes = output_bound(options, model, body.get("max_tokens"), "max_tokens")
        return Bound(
            model=model,
            input_tokens_max=input_bound.total(),
            output_tokens_max=output,
            output_hint=output_hint(options, body.get("max_tokens"), "max_tokens"),
            service_tier=_requested_tier(body),
            hidden_output=hides_output(model, body.get("thinking")),
            changes=changes,
        )

    def usage_parser(self, route: Route, bound: Bound) -> UsageParser:
        """See :meth:`Dialect.usage_parser`."""
        return _MessagesUsageParser(bound)


def _bound_tool(input_bound: InputBound, tool: dict[str, Any]) -> None:
    kind = tool.get("type")
    if kind in (None, "custom"):
        return
    if str(kind).startswith(_CLIENT_TOOLS):
        input_bound.add(CLIENT_TOOL_TOKENS_MAX)
    else:
        input_bound.refuse(f"the provider's tool {kind!r}")


def _blocks(content: Any) -> Iterator[dict[str, Any]]:
    """The blocks of a message, including the blocks within tool results and documents."""
    for block in content if isinstance(content, list) else (content,):
        if isinstance(block, dict):
            yield block
            yield from _blocks(block.get("content"))
            yield from _blocks(block.get("tool_references"))
            source = block.get("source")
            if block.get("type") == "document" and isinstance(source, dict) and source.get("type") == "content":
                yield from _blocks(source.get("content"))


def _longest_tool(body: dict[str, Any]) -> int:
    """Return the bound of a reference to a tool: the size of the longest definition of a tool.

    The provider replaces the reference by the definition of that tool.
    """
    return max([text_bytes(json.dumps(tool)) for tool in body.get("tools") or []], default=0)


def _bound_block(input_bound: InputBound, block: dict[str, Any]) -> None:
    kind = str(block.get("type"))
    source = block.get("source")
    if not isinstance(source, dict):
        source = {}
    if kind == "image":
        input_bound.replace(source.get("data") if source.get("type") == "base64" else None, IMAGE_TOKENS_MAX)
    elif kind == "document":
        if source.get("type") not in ("text", "content"):
            input_bound.replace(source.get("data"), 0)
            input_bound.add_unknown_size("a document")
    elif kind == "tool_addition":
        tool = block.get("tool") or {}
        _bound_tool(input_bound, tool.get("definition") or {})  # a referenced tool is checked where it is defined
    elif kind == "container_upload":
        input_bound.refuse("a container")
    elif kind not in _READABLE and not kind.endswith(_READABLE_ENDINGS):
        input_bound.add_unknown_size(f"a block of type {kind!r}")


def _requested_tier(body: dict[str, Any]) -> str | None:
    if body.get("speed") == "fast":
        return "fast"
    return "" if body.get("service_tier") == "standard_only" else None


def hides_output(model: str, thinking: Any) -> bool:
    """Whether a model may think. Thinking is billed, but at most a summary of it is shown."""
    if isinstance(thinking, dict):
        return thinking.get("type") != "disabled"
    return not _SHOWS_ALL.search(model)


class _MessagesUsageParser(UsageParser):
    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        self._output_reported = False
        """Whether a ``message_delta`` event has reported the output. The count in ``message_start`` is not a report."""

    def parse_document(self, document: dict[str, Any]) -> None:
        self.final = self.merge(document.get("usage"))

    def parse_event(self, event: dict[str, Any]) -> None:
        kind = event.get("type")
        if kind == "message_start":
            self.merge((event.get("message") or {}).get("usage"))
        elif kind == "message_delta":
            self._merge_delta(event.get("usage"))
            self.model_finished = self.model_finished or bool((event.get("delta") or {}).get("stop_reason"))
            self.final = self.model_finished and self._output_reported
        elif kind == "message_stop":
            self.ended = True

    def _merge_delta(self, usage: object) -> None:
        if isinstance(usage, dict) and count_of(usage.get("output_tokens")) is not None:
            if not self._output_reported and self._counts.get("output_tokens") == 1:
                del self._counts["output_tokens"]  # the placeholder of `message_start`
            self._output_reported = True
        self.merge(usage)

    def usage_of(self, counts: dict[str, Any]) -> Usage | None:
        def count(name: str) -> int:
            return count_of(counts.get(name)) or 0

        if "input_tokens" not in counts:
            return None
        read, written = count("cache_read_input_tokens"), count("cache_creation_input_tokens")
        all_input = count("input_tokens") + read + written
        if not self.is_credible(all_input, count_of(counts.get("output_tokens"))):
            return None
        by_ttl = counts.get("cache_creation") or {}
        searches = count_of((counts.get("server_tool_use") or {}).get("web_search_requests"))
        tier = "fast" if counts.get("speed") == "fast" else str(counts.get("service_tier") or "")
        return Usage(
            input_tokens=all_input,
            output_tokens=count("output_tokens"),
            cache_read_tokens=read,
            cache_write_tokens=written,
            cache_write_1h_tokens=min(count_of(by_ttl.get("ephemeral_1h_input_tokens")) or 0, written),
            service_tier="" if tier == "standard" else tier,
            other={"web_searches": searches} if searches else {},
        )
