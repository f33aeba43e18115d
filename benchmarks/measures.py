"""Measures: figures of several rounds, their median and spread, and the target for the median."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Measure", "Settings", "Target", "at_least", "at_most"]


@dataclass(frozen=True, slots=True)
class Settings:
    """The thoroughness of a run."""

    quick: bool = False
    store: Literal["valkey", "redis"] = "valkey"
    rounds_max: int | None = None

    def rounds(self, full: int, quick: int = 3) -> int:
        """The number of rounds."""
        rounds = quick if self.quick else full
        return rounds if self.rounds_max is None else min(rounds, self.rounds_max)

    def size(self, full: int, quick: int) -> int:
        """The number of calls, holds or entries."""
        return quick if self.quick else full


@dataclass(frozen=True, slots=True)
class Target:
    """The figure that a median should reach."""

    side: Literal["at least", "at most"]
    figure: float

    def met_by(self, value: float) -> bool:
        """Whether the value reaches the target."""
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
    """The name for programs. It never changes."""
    title: str
    """The title in the report."""
    unit: str
    """``x`` (a ratio), ``µs``, ``ms``, ``s`` or ``B``."""
    rounds: tuple[float, ...]
    """The figure of each round."""
    target: Target
    detail: str = field(default="", kw_only=True)
    """Remarks, such as the times from which a ratio was computed."""

    @property
    def value(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds)

    @property
    def met(self) -> bool:
        """Whether the median reaches the target."""
        return self.target.met_by(self.value)
