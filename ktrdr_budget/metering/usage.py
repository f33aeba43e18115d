"""What a call consumed, in tokens."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Usage"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call, as the provider counts them. Parts are included in their whole."""

    input_tokens: int = 0
    """All input, what was read from a cache or written to it included."""
    output_tokens: int = 0
    """All output, reasoning included."""
    cache_read_tokens: int = 0
    """Input that came from a cache."""
    cache_write_tokens: int = 0
    """Input that was written to a cache."""

    @property
    def total_tokens(self) -> int:
        """Input and output."""
        return self.input_tokens + self.output_tokens
