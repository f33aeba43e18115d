"""Upper bounds of a request's input and output tokens, computed from its body.

Input: these providers use byte-level tokenizers, which produce at most one token per byte of UTF-8 text. The serialised
request contains all text that the provider reads (messages, names, schemas, roles), so its length in bytes is an upper
bound. A constant covers the tokens that a provider adds itself, such as instructions for tools. Images are billed by
their size in pixels, so an image counts as the tokens of the largest image, not as its bytes. Files, stored
conversations and tools that the provider runs cannot be bounded from the request.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from ktrdr_budget.errors import InvalidArgument, UnmeteredCall
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
"""Fields of a request that may cause an answer by another model than the priced one, or work billed in addition to
tokens. Gateways accept these fields at every endpoint."""
HIDDEN_INPUT_TOKENS = 1024
"""Upper bound of the tokens that a provider adds to a request. The highest published number is 530, for the use of
tools (docs.anthropic.com/en/docs/tool-use-pricing-and-tokens)."""


@dataclass(frozen=True, slots=True)
class GuardOptions:
    """The options of one guarded client; see :func:`~ktrdr_budget.guard`.

    Raises:
        InvalidArgument: an option is invalid.
    """

    meter: Meter
    provider: str
    max_output_tokens: int | None = None
    max_input_tokens: int | None = None
    unseen_output_tokens: int = 256
    allow_unmetered: bool = False

    def __post_init__(self) -> None:
        for name in ("max_output_tokens", "max_input_tokens"):
            count = getattr(self, name)
            if count is not None and (type(count) is not int or count < 1):
                raise InvalidArgument(f"{name} must be a whole number above 0, not {count!r}")
        if not isinstance(self.provider, str) or not self.provider:
            raise InvalidArgument(f"provider must be a name of the price list, not {self.provider!r}")
        if type(self.allow_unmetered) is not bool:
            raise InvalidArgument(f"allow_unmetered must be True or False, not {self.allow_unmetered!r}")
        if type(self.unseen_output_tokens) is not int or self.unseen_output_tokens < 0:
            raise InvalidArgument(
                f"unseen_output_tokens must be a whole number of at least 0, not {self.unseen_output_tokens!r}"
            )


@dataclass(slots=True)
class Bound:
    """The upper bound of one request's usage, and its other billing parameters."""

    model: str
    input_tokens_max: int
    output_tokens_max: int
    operation: str = "chat"
    service_tier: str | None = None
    choices: int = 1
    """The number of answers that the request asks for."""
    hidden_output: bool = False
    """Whether the model may produce tokens, such as reasoning, that a stream does not contain."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields to set in the request, so that the bound holds and a stream reports usage. A value of ``None`` removes the
    field."""
    output_hint: str = ""
    """Where the output bound comes from, and how to lower it; a part of messages."""
    hide_usage: bool = False
    """Whether to hide the chunk that reports usage from the caller, because the caller did not request that chunk."""
    reports_usage: bool = True
    """Whether the provider reports usage; false if the caller disabled the usage report of a stream."""

    def covers(self, other: Bound) -> bool:
        """Whether a reservation for this bound also covers a request with the other bound."""
        return replace(self, changes={}) == replace(other, changes={})


def known_output_maximum(options: GuardOptions, model: str) -> int | None:
    """Return the published output limit of a model, or else its listed context window; ``None`` if neither is known.

    The output cannot exceed the context window.
    """
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


def output_bound(options: GuardOptions, model: str, limit: object, parameter: str) -> tuple[int, dict[str, Any]]:
    """Return the bound of one answer's output, and the field to add to the request if the request sets no limit.

    Args:
        limit: the output limit in the request; ``None`` without one.
        parameter: the name of that limit.

    Raises:
        UnmeteredCall: no output limit is known.
        UnknownPrice: no output limit is known, and the model has no price.
    """
    if limit is not None:
        return whole_number(limit, parameter), {}
    if options.max_output_tokens is not None:
        return options.max_output_tokens, {parameter: options.max_output_tokens}
    known = known_output_maximum(options, model)
    if known is not None:
        return known, {}
    now = datetime.now(UTC)
    price = options.meter.pricer.worst_case(options.provider, model, 1, 1, now)
    if price.source == FIXED and "tokens" not in options.meter.units.values():
        return 0, {}  # the cost does not depend on the output
    raise UnmeteredCall(f"no output limit is known for {model!r}: set {parameter}, or guard(max_output_tokens=...)")


def output_hint(options: GuardOptions, limit: object, parameter: str) -> str:
    """Describe where the result of :func:`output_bound` comes from, and how to lower it."""
    if limit is None and options.max_output_tokens is None:
        return f"the model's maximum; lower it with {parameter}"
    return f"lower it with {parameter}"


def whole_number(value: object, name: str) -> int:
    """Check a count in the request, and return it.

    Raises:
        UnmeteredCall: the value is not a whole, non-negative number.
    """
    if type(value) is not int or value < 0:
        raise UnmeteredCall(f"{name} must be a whole, non-negative number, not {value!r}")
    return value


class InputBound:
    """Computes the bound of a request's input.

    Args:
        size: bytes of the serialised request.
    """

    def __init__(self, options: GuardOptions, size: int) -> None:
        self._options = options
        self._tokens = size + HIDDEN_INPUT_TOKENS
        self._unknown_sizes: list[str] = []

    def replace(self, data: object, tokens: int) -> None:
        """Count ``tokens`` instead of the bytes of ``data``, because the data is not billed as text."""
        self._tokens += tokens - (len(data) if isinstance(data, str) else 0)

    def add(self, tokens: int) -> None:
        """Add tokens of input that is not in the request."""
        self._tokens += tokens

    def add_unknown_size(self, description: str) -> None:
        """Note that the request has input of unknown size; :meth:`total` then needs a bound for that input."""
        self._unknown_sizes.append(description)

    def refuse(self, feature: str) -> None:
        """Refuse a feature whose cost has no bound. If the guard allows unmetered calls, this has no effect.

        Raises:
            UnmeteredCall: the guard does not allow unmetered calls.
        """
        if not self._options.allow_unmetered:
            raise UnmeteredCall(f"the cost of {feature} cannot be bounded: guard(allow_unmetered=True) lets it through")

    def total(self) -> int:
        """The bound in tokens.

        Raises:
            UnmeteredCall: the request has input of unknown size, for which the guard has no ``max_input_tokens``.
        """
        if not self._unknown_sizes:
            return self._tokens
        if self._options.max_input_tokens is not None:
            return self._tokens + self._options.max_input_tokens
        if self._options.allow_unmetered:
            return self._tokens
        raise UnmeteredCall(f"the size of {', '.join(self._unknown_sizes)} is unknown: set guard(max_input_tokens=...)")


def refuse_routing(input_bound: InputBound, body: dict[str, Any]) -> None:
    """Refuse a request that another model may answer, or that may cause work billed in addition to tokens.

    Raises:
        UnmeteredCall: the guard does not allow unmetered calls.
    """
    for name in ROUTING_FIELDS:
        if body.get(name):
            input_bound.refuse(f"{name!r}")


def text_size(content: bytes, body: dict[str, Any]) -> int:
    """Return the bytes of a serialised request, as tokenizers read them: after Unicode normalisation.

    Claude's tokenizer expands some characters (NFKC: ``\ufdfa`` becomes 18), see
    github.com/anthropics/anthropic-tokenizer-typescript.
    """
    if content.isascii() and b"\\u" not in content:
        return len(content)
    text = unicodedata.normalize("NFKC", json.dumps(body, ensure_ascii=False))
    return max(len(content), text_bytes(text))


def text_bytes(value: Any) -> int:
    """Bytes of all strings within a value: an upper bound of their tokens."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict):
        return sum(map(text_bytes, value.values()))
    if isinstance(value, list):
        return sum(map(text_bytes, value))
    return 0
