"""What a trigger may ask of a research cycle."""

from __future__ import annotations

from dataclasses import dataclass

from ktrdr_budget.errors import InvalidArgument

__all__ = ["CycleOptions", "UnusableOption"]


@dataclass(frozen=True)
class CycleOptions:
    """The options of one cycle."""

    strategy: str | None = None
    """A strategy that is designed already: the cycle begins with its training. Excludes a brief."""
    brief: str | None = None
    """What the design shall follow, in words."""
    model: str | None = None
    """The language model of this cycle; ``None``: the agent's."""
    bypass_gates: bool = False
    """Gates are evaluated and recorded, and stop nothing."""


class UnusableOption(InvalidArgument):
    """An option cannot be followed; nothing was reserved."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        """Its name."""
        self.message = message
