"""The tokens and other billed units of one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ktrdr_budget.errors import InvalidArgument

__all__ = ["Usage"]

_NOTHING: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call, as counted by the provider. Each total includes its parts.

    Raises:
        InvalidArgument: a count is not a whole, non-negative number, or parts exceed their total.
    """

    input_tokens: int = 0
    """All input, including cache reads and cache writes."""
    output_tokens: int = 0
    """All output, including reasoning."""
    cache_read_tokens: int = 0
    """Input read from a cache."""
    cache_write_tokens: int = 0
    """Input written to a cache."""
    cache_write_1h_tokens: int = 0
    """The part of ``cache_write_tokens`` that is cached for an hour; some providers charge more for it."""
    service_tier: str = ""
    """The tier that served the call, as reported by the provider: ``priority``, ``flex``, ``fast``, ``batch``, …; empty
    for the standard tier."""
    other: Mapping[str, int] = field(default_factory=lambda: _NOTHING, hash=False)
    """Other billed counts, by the price list's names: parts such as ``input_audio_tokens`` or ``output_image_tokens``,
    and units such as ``web_searches``."""

    def __post_init__(self) -> None:
        counts = (self.input_tokens, self.output_tokens, self.cache_read_tokens, self.cache_write_tokens)
        for count in (*counts, self.cache_write_1h_tokens, *self.other.values()):
            if type(count) is not int or count < 0:
                raise InvalidArgument(f"usage counts must be whole, non-negative numbers, not {count!r}")
        if self.cache_read_tokens + self.cache_write_tokens > self.input_tokens:
            raise InvalidArgument("cached tokens are a part of the input tokens and cannot exceed them")
        if self.cache_write_1h_tokens > self.cache_write_tokens:
            raise InvalidArgument("cache_write_1h_tokens is a part of cache_write_tokens and cannot exceed it")

    @property
    def total_tokens(self) -> int:
        """The sum of input and output."""
        return self.input_tokens + self.output_tokens
