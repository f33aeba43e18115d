"""Strategies that the bundled research can try: what each looks at, how it trades, and which parameters it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

__all__ = ["STRATEGIES", "WARM_UP_DAYS", "Strategy", "features", "positions"]

TRADING_DAYS = 252
WARM_UP_DAYS = 120
"""Days before the first one whose features are known, whatever the parameters."""

Closes = Sequence[float]
Number = int | float


@dataclass(frozen=True)
class Strategy:
    """A family of strategies, one for each choice of parameters."""

    name: str
    description: str
    ranges: Mapping[str, tuple[Number, Number]]
    """Lowest and highest value of each parameter; whole numbers where both are."""
    short_size: float = 0.0
    """How much it sells short when prices are expected to fall, as a part of the equity."""

    @property
    def middle(self) -> dict[str, Number]:
        """Each parameter in the middle of its range."""
        return {
            name: (lowest + highest) // 2
            if isinstance(lowest, int) and isinstance(highest, int)
            else (lowest + highest) / 2
            for name, (lowest, highest) in self.ranges.items()
        }

    @property
    def scaled(self) -> bool:
        """Whether it takes smaller positions when prices move much."""
        return "target_volatility" in self.ranges


_LEARNING: dict[str, tuple[Number, Number]] = {
    "learning_rate": (0.05, 0.5),
    "epochs": (40, 120),
    "threshold": (0.5, 0.53),
}

STRATEGIES: Mapping[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy(
            "momentum",
            "follows the recent return, long and, with half of the money, short",
            {"momentum_days": (10, 60), "volatility_days": (10, 60), **_LEARNING},
            short_size=0.5,
        ),
        Strategy(
            "trend_following",
            "follows the distance from a long moving average, long only",
            {"average_days": (30, 120), "volatility_days": (10, 60), **_LEARNING},
        ),
        Strategy(
            "short_term_reversal",
            "looks at the distance from a short moving average within the recent return, long only",
            {"average_days": (3, 10), "momentum_days": (20, 90), **_LEARNING},
        ),
        Strategy(
            "volatility_targeting",
            "follows return and trend, long only, with positions that shrink as prices move more",
            {
                "momentum_days": (10, 60),
                "average_days": (20, 120),
                "volatility_days": (10, 40),
                "target_volatility": (0.08, 0.2),
                **_LEARNING,
            },
        ),
    )
}


# -- features: what was known at the close of a day --------------------------------------------------------------------


def momentum(closes: Closes, day: int, days: int) -> float:
    """The return over the last days."""
    return closes[day] / closes[day - days] - 1


def average_distance(closes: Closes, day: int, days: int) -> float:
    """How far the price is above the average of the last days, as a part of it."""
    return closes[day] / fmean(closes[day - days + 1 : day + 1]) - 1


def volatility(closes: Closes, day: int, days: int) -> float:
    """The standard deviation of the last days' returns around 0."""
    window = closes[day - days : day + 1]
    return math.sqrt(fmean((later / earlier - 1) ** 2 for earlier, later in pairwise(window)))


_FEATURES = {"momentum_days": momentum, "average_days": average_distance, "volatility_days": volatility}


def features(
    closes: Closes, parameters: Mapping[str, Number], pause: Callable[[], None], first: int = WARM_UP_DAYS
) -> list[tuple[float, ...]]:
    """What the strategy of these parameters knows at the close of each day from ``first`` on.

    Args:
        pause: called between days; may raise to stop.
    """
    looks = [(feature, int(parameters[name])) for name, feature in _FEATURES.items() if name in parameters]
    rows = []
    for day in range(first, len(closes)):
        if day % 50 == 0:
            pause()
        rows.append(tuple(feature(closes, day, days) for feature, days in looks))
    return rows


# -- positions: what to hold from the close of a day to the next -------------------------------------------------------


def positions(
    strategy: Strategy, parameters: Mapping[str, Number], closes: Closes, chances: Sequence[float]
) -> list[float]:
    """A position for each day, as a part of the equity: 1 is all of it, negative is short.

    Args:
        chances: of a rise on the day after, for each of the last ``len(chances)`` days of ``closes``.
    """
    threshold = float(parameters["threshold"])
    first = len(closes) - len(chances)
    held = []
    for day, chance in enumerate(chances, first):
        side = 1.0 if chance > threshold else -strategy.short_size if chance < 1 - threshold else 0.0
        held.append(side * _size(parameters, closes, day) if strategy.scaled else side)
    return held


def _size(parameters: Mapping[str, Number], closes: Closes, day: int) -> float:
    yearly = volatility(closes, day, int(parameters["volatility_days"])) * math.sqrt(TRADING_DAYS)
    target = float(parameters["target_volatility"])
    # In tenths, so that it does not trade every day for next to nothing.
    return 1.0 if yearly <= target else round(target / yearly, 1)
