"""Parse the usage in a provider's response, given as decoded JSON."""

from __future__ import annotations

from typing import Any

from ktrdr_budget.metering.guards.bounds import Bound
from ktrdr_budget.metering.usage import Usage

__all__ = ["UsageParser", "count_of"]


class UsageParser:
    """Base class of the parsers, one per response format. Each attempt of a call has its own parser.

    Within a stream, the highest count of each field is kept. A later event with a lower count, or without the field,
    changes nothing.
    """

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.usage: Usage | None = None
        """The usage reported so far; ``None`` if none was reported, or if the reported usage is not credible."""
        self.final = False
        """Whether the usage was reported after the model had finished."""
        self.model_finished = False
        """Whether the model has finished. The usage may still follow."""
        self.ended = False
        """Whether the provider has ended the response, so that no further usage will follow."""
        self.error_type = ""
        """The provider's name of an error reported within a stream; empty without an error."""
        self._counts: dict[str, Any] = {}

    def parse_document(self, document: dict[str, Any]) -> None:
        """Parse a complete response."""
        raise NotImplementedError

    def parse_event(self, event: dict[str, Any]) -> None:
        """Parse one event of a stream. The event may report usage, the end, or an error."""
        raise NotImplementedError

    def skip(self, data: bytes) -> None:
        """Process raw events that contain output only. The base class ignores them."""

    def end(self) -> None:
        """Record that the response has ended."""
        self.ended = True

    def is_usage_only(self, event: dict[str, Any]) -> bool:
        """Whether an event contains usage and nothing else."""
        return False

    def merge(self, reported: object) -> bool:
        """Merge ``reported`` into the usage so far. Return whether ``reported`` is a non-empty object."""
        if not isinstance(reported, dict) or not reported:
            return False
        merge_counts(self._counts, reported)
        self.usage = self.usage_of(self._counts)
        return True

    def usage_of(self, counts: dict[str, Any]) -> Usage | None:
        """Convert the provider's counts to a usage; ``None`` if the counts are not credible."""
        raise NotImplementedError

    def is_credible(self, input_tokens: int, output_tokens: int | None) -> bool:
        """Whether a call can have these counts.

        Every call has input. Only a call without output, such as embeddings, may omit the count of output tokens.

        Args:
            input_tokens: all input, including cached input.
            output_tokens: ``None`` if the provider did not report the count.
        """
        return input_tokens > 0 and (output_tokens is not None or self.bound.output_tokens_max == 0)


def merge_counts(known: dict[str, Any], reported: dict[str, Any]) -> None:
    """Merge ``reported`` into ``known``. Of two counts, keep the higher; of two strings, keep the later."""
    for name, value in reported.items():
        if isinstance(value, dict):
            inner = known.setdefault(name, {})
            if isinstance(inner, dict):
                merge_counts(inner, value)
        elif isinstance(value, str):
            known[name] = value
        elif (count := count_of(value)) is not None:
            known[name] = max(count, count_of(known.get(name)) or 0)


def count_of(value: object) -> int | None:
    """A token count from JSON; ``None`` for anything else, such as null, a string, or a negative number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and value >= 0 else None
