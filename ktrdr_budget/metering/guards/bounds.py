"""What a request may cost at most, read from its body: bounds of its input and output, and what cannot be bounded.

Input: a tokenizer of bytes (as all of these providers use) makes no more tokens than the text that it reads has bytes
of UTF-8, and the serialised request holds all of the text, names, schemas and frames that the provider reads, so its
length is a bound. What a provider adds by itself (the frame of a conversation, instructions for tools) is bounded by a
constant.
Images are billed by their size in pixels, so the most that one can cost takes the place of its bytes. Files, stored
conversations and tools that the provider runs have no bound that can be seen from here.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from ktrdr_budget.errors import UnmeteredCall
from ktrdr_budget.metering.guards.output_limits import published_output_maximum
from ktrdr_budget.metering.meter import Meter
from ktrdr_budget.metering.prices import FIXED, Prices

__all__ = [
    "Bound",
    "GuardOptions",
    "InputBound",
    "output_bound",
    "output_hint",
    "refuse_routing",
    "text_bytes",
    "text_size",
    "whole_number",
]

ROUTING_FIELDS = (
    *("models", "plugins", "route", "preset", "fallbacks"),  # OpenRouter, LiteLLM, Anthropic
    "web_search_options",  # OpenAI, OpenRouter, Perplexity
    *("search_parameters", "deferred"),  # xAI
    *("enable_search", "search_options"),  # Qwen
    *("search_settings", "compound_custom"),  # Groq
    "multi_agent",  # OpenAI
)
"""Fields by which a request may reach other models than the one that is priced, or work that is billed besides tokens.
Gateways know them at every endpoint."""
HIDDEN_INPUT_TOKENS = 1024
"""What a provider adds to a request by itself. The most that is published is 530, for the use of tools
(docs.anthropic.com/en/docs/tool-use-pricing-and-tokens)."""


@dataclass(frozen=True, slots=True)
class GuardOptions:
    """How one client is guarded."""

    meter: Meter
    provider: str
    max_output_tokens: int | None = None
    max_input_tokens: int | None = None
    unseen_output_tokens: int = 256
    allow_unmetered: bool = False


@dataclass(slots=True)
class Bound:
    """What one request can use at most, and what else must be known to charge for it."""

    model: str
    input_tokens_max: int
    output_tokens_max: int
    operation: str = "chat"
    service_tier: str | None = None
    choices: int = 1
    """How many answers are made."""
    hidden_output: bool = False
    """The model may make tokens, such as of reasoning, that a stream does not show."""
    changes: dict[str, Any] = field(default_factory=dict)
    """What the request must say besides, for the bound or the report to hold; ``None`` leaves a field out."""
    output_hint: str = ""
    """Where the bound of the output comes from, and how to lower it, for a person."""
    hide_usage: bool = False
    """The caller did not ask for the chunk that reports the usage."""
    reports_usage: bool = True
    """False if the caller forbade to ask a stream for its usage: none is awaited."""

    def covers(self, other: Bound) -> bool:
        """Whether a reservation for this is enough for the other."""
        return replace(self, changes={}) == replace(other, changes={})


def known_maximum(options: GuardOptions, model: str) -> int | None:
    """The most tokens that a model answers, as published; or what it can handle at all, if the price list knows that:
    its output cannot be more."""
    published = published_output_maximum(options.provider, model)
    if published is not None:
        return published
    pricer = options.meter.pricer
    if not isinstance(pricer, Prices):
        return None
    try:
        return pricer.price_list.context_window(options.provider, model)
    except ModuleNotFoundError:
        return None


def output_bound(options: GuardOptions, model: str, asked: object, parameter: str) -> tuple[int, dict[str, Any]]:
    """The bound of one answer's output, and what to add to a request that does not tell it.

    Raises:
        UnmeteredCall: there is none.
        UnknownPrice: there is no price for the model, either.
    """
    if asked is not None:
        return whole_number(asked, parameter), {}
    if options.max_output_tokens is not None:
        return options.max_output_tokens, {parameter: options.max_output_tokens}
    known = known_maximum(options, model)
    if known is not None:
        return known, {}
    now = datetime.now(UTC)
    price = options.meter.pricer.worst_case(options.provider, model, 1, 1, now)
    if price.source == FIXED and "tokens" not in options.meter.units.values():
        return 0, {}  # however much it answers, it costs the same
    raise UnmeteredCall(f"no output limit is known for {model!r}: give {parameter}, or guard(max_output_tokens=...)")


def output_hint(options: GuardOptions, asked: object, parameter: str) -> str:
    """Where :func:`output_bound` found its bound, and how to lower it, for a person."""
    if asked is None and options.max_output_tokens is None:
        return f"the model's maximum; lower it with {parameter}"
    return f"lower it with {parameter}"


def whole_number(value: object, name: str) -> int:
    """A count that the caller gave.

    Raises:
        UnmeteredCall: it is none.
    """
    if type(value) is not int or value < 0:
        raise UnmeteredCall(f"{name} must be a whole number to be a bound, not {value!r}")
    return value


class InputBound:
    """Adds up the bound of a request's input.

    Args:
        size: bytes of the serialised request.
    """

    def __init__(self, options: GuardOptions, size: int) -> None:
        self._options = options
        self._tokens = size + HIDDEN_INPUT_TOKENS
        self._unseen: list[str] = []

    def replace(self, data: object, tokens: int) -> None:
        """Data in the request that is not read as text, and what it costs instead."""
        self._tokens += tokens - (len(data) if isinstance(data, str) else 0)

    def add(self, tokens: int) -> None:
        """Tokens that the provider adds."""
        self._tokens += tokens

    def unseen(self, what: str) -> None:
        """Input whose size the request does not tell."""
        self._unseen.append(what)

    def refuse(self, what: str) -> None:
        """Something whose cost has no bound.

        Raises:
            UnmeteredCall: unless such calls are allowed.
        """
        if not self._options.allow_unmetered:
            raise UnmeteredCall(f"what {what} costs cannot be bounded: guard(allow_unmetered=True) lets it through")

    def total(self) -> int:
        """The bound.

        Raises:
            UnmeteredCall: there is none.
        """
        if not self._unseen:
            return self._tokens
        if self._options.max_input_tokens is not None:
            return self._tokens + self._options.max_input_tokens
        if self._options.allow_unmetered:
            return self._tokens
        raise UnmeteredCall(f"the size of {', '.join(self._unseen)} cannot be seen: give guard(max_input_tokens=...)")


def refuse_routing(found: InputBound, body: dict[str, Any]) -> None:
    """Refuse what may be answered by other models, or with paid work of the provider.

    Raises:
        UnmeteredCall: unless such calls are allowed.
    """
    for name in ROUTING_FIELDS:
        if body.get(name):
            found.refuse(f"{name!r}")


def text_size(content: bytes, body: dict[str, Any]) -> int:
    """Bytes of a serialised request, as a tokenizer may read them.

    Claude's makes some characters out of one (NFKC: ``\ufdfa`` becomes 18), see
    github.com/anthropics/anthropic-tokenizer-typescript.
    """
    if content.isascii() and b"\\u" not in content:
        return len(content)
    text = unicodedata.normalize("NFKC", json.dumps(body, ensure_ascii=False))
    return max(len(content), text_bytes(text))


def text_bytes(value: Any) -> int:
    """Bytes of all text within a value: no fewer than the tokens that it was made of."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict):
        return sum(map(text_bytes, value.values()))
    if isinstance(value, list):
        return sum(map(text_bytes, value))
    return 0
