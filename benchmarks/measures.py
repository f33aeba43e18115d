"""What a measure is: figures of several rounds, their median and spread, and the target that they are held against."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Measure", "Settings", "Target", "at_least", "at_most"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How thorough a run is."""

    quick: bool = False
    store: Literal["valkey", "redis"] = "valkey"
    rounds_max: int | None = None

    def rounds(self, full: int, quick: int = 3) -> int:
        """How many rounds to take a median of."""
        rounds = quick if self.quick else full
        return rounds if self.rounds_max is None else min(rounds, self.rounds_max)

    def size(self, full: int, quick: int) -> int:
        """How many calls, holds or entries."""
        return quick if self.quick else full


@dataclass(frozen=True, slots=True)
class Target:
    """What a median should reach."""

    side: Literal["at least", "at most"]
    figure: float

    def met_by(self, value: float) -> bool:
        """Whether a figure reaches it."""
        return value >= self.figure if self.side == "at least" else value <= self.figure

    def __str__(self) -> str:
        return f"{'≥' if self.side == 'at least' else '≤'} {self.figure:g}"


def at_least(figure: float) -> Target:
    """More is better."""
    return Target("at least", figure)


def at_most(figure: float) -> Target:
    """Less is better."""
    return Target("at most", figure)


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of the report."""

    name: str
    """Stable, for programs."""
    title: str
    """What it is, for people."""
    unit: str
    """``x`` (a ratio), ``µs``, ``ms``, ``s`` or ``B``."""
    rounds: tuple[float, ...]
    """The figure of each round."""
    target: Target
    detail: str = field(default="", kw_only=True)
    """What the figure was made of."""

    @property
    def value(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds)

    @property
    def met(self) -> bool:
        """Whether the median reaches the target."""
        return self.target.met_by(self.value)
