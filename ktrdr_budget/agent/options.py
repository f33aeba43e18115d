"""Options of a research cycle."""

from __future__ import annotations

from dataclasses import dataclass

from ktrdr_budget.errors import InvalidArgument

__all__ = ["CycleOptions", "UnusableOption"]


@dataclass(frozen=True)
class CycleOptions:
    """The options of one cycle."""

    strategy: str | None = None
    """The name of a finished strategy. If it is set, the cycle skips the design, and ``brief`` must not be set."""
    brief: str | None = None
    """Instructions for the design, as free text."""
    model: str | None = None
    """The language model of this cycle. ``None`` selects the agent's model."""
    bypass_gates: bool = False
    """Whether the cycle continues after a failed gate. The results of the gates are recorded in any case."""


class UnusableOption(InvalidArgument):
    """An option is invalid. Nothing was reserved."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        """The name of the option."""
        self.message = message
