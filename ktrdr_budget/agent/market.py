"""Prices for the bundled research: daily closes of a fictitious instrument.

The series is a generated random walk, so no vendor has rights to the data. Prices rise for some time, then fall; and
they are calm for some time, then volatile. The changes are random, but rare enough for a regression to find a weak
signal. The generator gives the same prices on every machine::

    python -m ktrdr_budget.agent.market > prices.csv
"""

from __future__ import annotations

import csv
import io
import math
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from importlib import resources
from itertools import islice

from ktrdr_budget.errors import InvalidArgument

__all__ = ["PriceSeries", "bundled_prices", "generate_prices", "parse_csv", "to_csv"]

SEED = 24
DAYS = 2520
FIRST_DAY = date(2015, 1, 1)
FIRST_CLOSE = 100.0
DRIFTS = (0.0020, -0.0015)
"""Mean daily return in a rising and in a falling regime."""
VOLATILITIES = (0.007, 0.014)
"""Standard deviation of daily returns in a calm and in a volatile regime."""
TURN_CHANCE = 1 / 60
"""Probability per day that a regime (rising or falling, calm or volatile) ends."""


@dataclass(frozen=True)
class PriceSeries:
    """Closing prices, one per trading day, oldest first.

    Raises:
        InvalidArgument: days and prices differ in number, days do not ascend, or a price is not positive and finite.
    """

    days: tuple[date, ...]
    closes: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.days) != len(self.closes):
            raise InvalidArgument(
                f"a price series needs one price per day, not {len(self.closes)} prices for {len(self.days)} days"
            )
        if any(later <= earlier for earlier, later in zip(self.days, self.days[1:], strict=False)):
            raise InvalidArgument("the days of a price series must ascend")
        if not all(math.isfinite(close) and close > 0 for close in self.closes):
            raise InvalidArgument("a price must be positive and finite")

    def __len__(self) -> int:
        return len(self.closes)


def bundled_prices() -> PriceSeries:
    """The price series that ships with the package."""
    return parse_csv(resources.files("ktrdr_budget.agent").joinpath("data/prices.csv").read_text(encoding="utf-8"))


def generate_prices(seed: int = SEED, days: int = DAYS) -> PriceSeries:
    """Generate a price series. With the default arguments, the result is the bundled series."""
    chance = random.Random(seed)  # noqa: S311 - reproducible prices, not a secret
    drift, volatility, close = 0, 0, FIRST_CLOSE
    closes = []
    for _ in range(days):
        drift ^= chance.random() < TURN_CHANCE
        volatility ^= chance.random() < TURN_CHANCE
        # The sum of twelve uniform numbers, less 6, is nearly normal and, unlike a logarithm, exact on every machine.
        noise = math.fsum(chance.random() for _ in range(12)) - 6
        close = round(close * (1 + DRIFTS[drift] + VOLATILITIES[volatility] * noise), 2)
        closes.append(close)
    return PriceSeries(tuple(islice(_weekdays(FIRST_DAY), days)), tuple(closes))


def to_csv(prices: PriceSeries) -> str:
    """Format a series as CSV: the header ``date,close``, then one line per day."""
    lines = (f"{day.isoformat()},{close:.2f}\n" for day, close in zip(prices.days, prices.closes, strict=True))
    return "date,close\n" + "".join(lines)


def parse_csv(text: str) -> PriceSeries:
    """Parse the format of :func:`to_csv`.

    Raises:
        InvalidArgument: the text has another format. The message names the line.
    """
    rows = csv.reader(io.StringIO(text))
    if next(rows, None) != ["date", "close"]:
        raise InvalidArgument("line 1: must be date,close")
    return _series(_parsed(rows))


def _parsed(rows: Iterable[list[str]]) -> Iterator[tuple[date, float]]:
    for number, row in enumerate(rows, 2):
        try:
            day, close = row
            yield date.fromisoformat(day), float(close)
        except ValueError:
            raise InvalidArgument(f"line {number}: must be a date and a price") from None


def _series(pairs: Iterable[tuple[date, float]]) -> PriceSeries:
    read = list(pairs)
    return PriceSeries(tuple(day for day, _ in read), tuple(close for _, close in read))


def _weekdays(day: date) -> Iterator[date]:
    while True:
        if day.weekday() < 5:
            yield day
        day += timedelta(days=1)


if __name__ == "__main__":
    sys.stdout.write(to_csv(generate_prices()))
