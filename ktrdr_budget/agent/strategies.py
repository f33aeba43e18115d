"""The strategies of the bundled research: features, positions and parameter ranges."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

__all__ = ["STRATEGIES", "WARM_UP_DAYS", "Strategy", "features", "positions"]

TRADING_DAYS = 252
WARM_UP_DAYS = 120
"""The number of days before the first day with features. It is sufficient for any parameters."""

Closes = Sequence[float]
Number = int | float


@dataclass(frozen=True)
class Strategy:
    """A family of strategies. Values of the parameters select one strategy of the family."""

    name: str
    description: str
    ranges: Mapping[str, tuple[Number, Number]]
    """The minimum and the maximum of each parameter. If both are integers, the parameter is an integer."""
    short_size: float = 0.0
    """Size of a short position, as a fraction of the equity."""

    @property
    def middle(self) -> dict[str, Number]:
        """The middle of each parameter's range."""
        return {
            name: (lowest + highest) // 2
            if isinstance(lowest, int) and isinstance(highest, int)
            else (lowest + highest) / 2
            for name, (lowest, highest) in self.ranges.items()
        }

    @property
    def scaled(self) -> bool:
        """Whether positions shrink as volatility rises."""
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


# -- features: data known at the close of a day ------------------------------------------------------------------------


def momentum(closes: Closes, day: int, days: int) -> float:
    """The return over the last ``days``, as a fraction of the first price."""
    return closes[day] / closes[day - days] - 1


def average_distance(closes: Closes, day: int, days: int) -> float:
    """Distance of the price from its moving average, as a fraction of the average."""
    return closes[day] / fmean(closes[day - days + 1 : day + 1]) - 1


def volatility(closes: Closes, day: int, days: int) -> float:
    """Standard deviation around 0 of the daily returns over the last ``days``."""
    window = closes[day - days : day + 1]
    return math.sqrt(fmean((later / earlier - 1) ** 2 for earlier, later in pairwise(window)))


_FEATURES = {"momentum_days": momentum, "average_days": average_distance, "volatility_days": volatility}


def features(
    closes: Closes, parameters: Mapping[str, Number], pause: Callable[[], None], first: int = WARM_UP_DAYS
) -> list[tuple[float, ...]]:
    """Return the features of each day from ``first`` on, for the given parameters.

    Args:
        pause: a function that is called between days. To stop, the function raises.
    """
    looks = [(feature, int(parameters[name])) for name, feature in _FEATURES.items() if name in parameters]
    rows = []
    for day in range(first, len(closes)):
        if day % 50 == 0:
            pause()
        rows.append(tuple(feature(closes, day, days) for feature, days in looks))
    return rows


# -- positions: from the close of a day to the next close --------------------------------------------------------------


def positions(
    strategy: Strategy, parameters: Mapping[str, Number], closes: Closes, chances: Sequence[float]
) -> list[float]:
    """Return a position for each day, as a fraction of the equity. 1 is fully invested; a negative position is short.

    Args:
        chances: probabilities of a rise on the next day, for the last ``len(chances)`` days of ``closes``.
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
    # In tenths, so that small changes cause no trades.
    return 1.0 if yearly <= target else round(target / yearly, 1)
