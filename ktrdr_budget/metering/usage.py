"""What a call consumed, in tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ktrdr_budget.errors import InvalidArgument

__all__ = ["Usage"]

_NOTHING: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call, as the provider counts them. Parts are included in their whole.

    Raises:
        InvalidArgument: a count is not a whole, non-negative number, or the parts are more than their whole.
    """

    input_tokens: int = 0
    """All input, what was read from a cache or written to it included."""
    output_tokens: int = 0
    """All output, reasoning included."""
    cache_read_tokens: int = 0
    """Input that came from a cache."""
    cache_write_tokens: int = 0
    """Input that was written to a cache."""
    cache_write_1h_tokens: int = 0
    """The part of ``cache_write_tokens`` that is kept for an hour, which some providers charge more for."""
    service_tier: str = ""
    """The tier that the provider says it served the call in, if that is not its standard one: ``priority``, ``flex``,
    ``fast``, ``batch``, …"""
    other: Mapping[str, int] = field(default_factory=lambda: _NOTHING, hash=False)
    """What else is billed, by the price list's names: parts such as ``input_audio_tokens`` or ``output_image_tokens``,
    and units such as ``web_searches``."""

    def __post_init__(self) -> None:
        counts = (self.input_tokens, self.output_tokens, self.cache_read_tokens, self.cache_write_tokens)
        for count in (*counts, self.cache_write_1h_tokens, *self.other.values()):
            if type(count) is not int or count < 0:
                raise InvalidArgument(f"usage is counted in whole, non-negative numbers, not {count!r}")
        if self.cache_read_tokens + self.cache_write_tokens > self.input_tokens:
            raise InvalidArgument("cached tokens are a part of the input tokens, and cannot be more than those")
        if self.cache_write_1h_tokens > self.cache_write_tokens:
            raise InvalidArgument(
                "cache_write_1h_tokens are a part of cache_write_tokens, and cannot be more than those"
            )

    @property
    def total_tokens(self) -> int:
        """Input and output."""
        return self.input_tokens + self.output_tokens
