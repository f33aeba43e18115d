"""Options of a research cycle."""

from __future__ import annotations

from dataclasses import dataclass

from ktrdr_budget.errors import InvalidArgument

__all__ = ["CycleOptions", "UnusableOption"]


@dataclass(frozen=True)
class CycleOptions:
    """The options of one cycle."""

    strategy: str | None = None
    """Name of a finished strategy: the cycle begins with its training. Excludes a brief."""
    brief: str | None = None
    """Instructions for the design, as free text."""
    model: str | None = None
    """The language model of this cycle; ``None`` for the agent's."""
    bypass_gates: bool = False
    """Gates are evaluated and recorded, but do not end the cycle."""


class UnusableOption(InvalidArgument):
    """An option is invalid; nothing was reserved."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        """The name of the option."""
        self.message = message
