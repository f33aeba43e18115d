"""Unit prices of a model, and the cost of a usage: exact arithmetic, rounded up once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Context, Decimal
from fractions import Fraction
from functools import cached_property
from math import lcm

from ktrdr_budget.errors import InvalidAmount, InvalidArgument
from ktrdr_budget.metering.usage import Usage
from ktrdr_budget.money import MAX_UNITS, NANOS_PER_USD, Amount, amount_bound, from_units

__all__ = ["UNITS", "Cost", "CostLine", "Rate", "Rates", "Unit"]

EXACT_CONTEXT = Context(prec=100)
"""A context with more decimal digits than any product of a price and a count has."""
_NAMES = {
    "input_tokens": "input",
    "cache_read_tokens": "cached input",
    "cache_write_tokens": "cache write",
    "cache_write_1h_tokens": "cache write, 1 h",
    "output_tokens": "output",
    "requests": "request",
}
_ORDER = {name: place for place, name in enumerate(_NAMES.values())}
_TOKENS_PER_PRICE = 1_000_000


@dataclass(frozen=True, slots=True)
class Unit:
    """A billed unit, such as input tokens.

    A unit is a part of another unit if it has all dimensions of that unit, and further dimensions. For example, cache
    reads are a part of the input.
    """

    name: str
    per: int
    """The number of units to which a price refers: a million for tokens."""
    dimensions: frozenset[tuple[str, str]]
    direction: str | None = field(init=False, repr=False, compare=False)
    """The direction of tokens: ``input`` or ``output``. For other units: ``None``."""

    def __post_init__(self) -> None:
        names = dict(self.dimensions)
        direction = names.get("direction") if names.get("family") == "tokens" else None
        object.__setattr__(self, "direction", direction)

    def contains(self, other: Unit) -> bool:
        """Whether the other unit is a part of this one."""
        return self.dimensions < other.dimensions


_INPUT = {("family", "tokens"), ("direction", "input")}
_OUTPUT = {("family", "tokens"), ("direction", "output")}
UNITS = (
    Unit("input_tokens", _TOKENS_PER_PRICE, frozenset(_INPUT)),
    Unit("cache_read_tokens", _TOKENS_PER_PRICE, frozenset({*_INPUT, ("token_type", "cache_read")})),
    Unit("cache_write_tokens", _TOKENS_PER_PRICE, frozenset({*_INPUT, ("token_type", "cache_write")})),
    Unit("output_tokens", _TOKENS_PER_PRICE, frozenset(_OUTPUT)),
    Unit("requests", 1, frozenset({("family", "requests")})),
)
"""The units that have a price in :class:`ModelPrice`."""


@dataclass(frozen=True, slots=True)
class CostLine:
    """One line of a cost: ``count`` units. ``per`` units cost ``price`` dollars."""

    name: str
    """``input``, ``cached input``, ``cache write``, ``output``, ``request``, …"""
    count: int
    price: Decimal
    """The price of ``per`` units, in dollars."""
    per: int

    @property
    def amount(self) -> Decimal:
        """Dollars, unrounded."""
        return EXACT_CONTEXT.divide(EXACT_CONTEXT.multiply(self.price, Decimal(self.count)), Decimal(self.per))


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a call, with its breakdown."""

    nanos: int
    """Nano-dollars: the sum of the lines, rounded up once."""
    source: str
    """The source of the price: ``genai-prices/0.2.3``, ``configured`` or ``fixed``."""
    lines: tuple[CostLine, ...] = ()

    @property
    def amount(self) -> Amount:
        """Dollars, as ``Decimal``."""
        return from_units(self.nanos)


@dataclass(frozen=True, slots=True)
class Rate:
    """The price of a unit in dollars. A call with more input tokens than a tier's ``start`` pays that tier's price."""

    unit: Unit
    price: Decimal
    tiers: tuple[tuple[int, Decimal], ...] = ()
    """``(start, price)``, ascending."""

    @property
    def name(self) -> str:
        """The name used in :attr:`CostLine.name`."""
        return _NAMES.get(self.unit.name, self.unit.name.replace("_", " "))


@dataclass(frozen=True, slots=True)
class _TierPrice:
    """The price of a unit in one tier of input lengths."""

    start: int
    """The tier applies to calls with more input tokens than this."""
    name: str
    price: Decimal
    per: int
    scaled: int
    """Nano-dollars per unit, scaled to a whole number by the common denominator of all prices of the model."""


class Rates:
    """The prices of one model.

    Args:
        rates: at most one per unit.
        source: as in :attr:`Cost.source`.
    """

    def __init__(self, rates: Iterable[Rate], source: str) -> None:
        # Parts precede their whole: the parts are subtracted from a whole before the whole's price applies.
        self._rates = tuple(sorted(rates, key=lambda rate: -len(rate.unit.dimensions)))
        self.source = source

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rates) and (self.source, self._rates) == (other.source, other._rates)

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Rate]:
        """The rates in display order: input, its parts, output, requests, others."""
        return iter(sorted(self._rates, key=lambda rate: _ORDER.get(rate.name, len(_ORDER))))

    @cached_property
    def _denominator(self) -> int:
        prices = [(rate, price) for rate in self._rates for price in (rate.price, *(tier[1] for tier in rate.tiers))]
        return lcm(*(_nanos(price, rate.unit.per).denominator for rate, price in prices))

    @cached_property
    def _tier_prices(self) -> list[list[_TierPrice]]:
        """The prices of each rate, highest tier first."""
        return [
            [
                _TierPrice(
                    start, rate.name, price, rate.unit.per, int(_nanos(price, rate.unit.per) * self._denominator)
                )
                for start, price in reversed([(-1, rate.price), *rate.tiers])
            ]
            for rate in self._rates
        ]

    @cached_property
    def _display_order(self) -> list[int]:
        """Indices of the rates, in the order of a cost's lines."""
        return sorted(range(len(self._rates)), key=lambda i: _ORDER.get(self._rates[i].name, len(_ORDER)))

    @cached_property
    def _parts(self) -> list[list[int]]:
        """For each rate, the indices of its parts."""
        rates = self._rates
        return [[i for i, part in enumerate(rates) if whole.unit.contains(part.unit)] for whole in rates]

    @cached_property
    def _priced_units(self) -> frozenset[str]:
        return frozenset(rate.unit.name for rate in self._rates)

    def cost(self, usage: Usage) -> Cost | None:
        """The cost of a usage; ``None`` if a unit that was used has no price.

        Raises:
            InvalidArgument: the parts of a unit add up to more than the unit.
        """
        counts = _counts(usage)
        if not self._prices_all(usage.input_tokens, usage.output_tokens, usage.other):
            return None
        own_counts: list[int] = []  # of each unit, without its parts
        for rate, parts in zip(self._rates, self._parts, strict=True):
            total = counts.get(rate.unit.name, 0)
            own_count = total - sum(own_counts[part] for part in parts)
            if own_count < 0:
                raise InvalidArgument(f"the parts of {rate.unit.name} add up to more than {total}")
            own_counts.append(own_count)
        prices = self._tier_prices
        return self._sum(
            [(own_counts[i], _price_at(prices[i], usage.input_tokens)) for i in self._display_order if own_counts[i]]
        )

    def cost_max(self, input_tokens_max: int, output_tokens_max: int, other_max: Mapping[str, int]) -> Cost | None:
        """The highest cost of a call within these bounds; ``None`` if a unit that may be used has no price."""
        if not self._prices_all(input_tokens_max, output_tokens_max, other_max):
            return None
        counts = {"requests": 1, **other_max, "input": input_tokens_max, "output": output_tokens_max}
        dearest: dict[str, _TierPrice] = {}
        for i in self._display_order:
            unit = self._rates[i].unit
            key = unit.direction or unit.name  # all input (or output) at the dearest price of that direction
            if counts.get(key):
                for price in self._tier_prices[i]:
                    if input_tokens_max > price.start and (key not in dearest or price.scaled > dearest[key].scaled):
                        dearest[key] = price
        return self._sum([(counts[key], price) for key, price in dearest.items()])

    def _sum(self, counted: Sequence[tuple[int, _TierPrice]]) -> Cost:
        total = 0
        for count, price in counted:
            total += count * price.scaled
        nanos = -(-total // self._denominator)  # rounded up
        if nanos >= MAX_UNITS:
            raise InvalidAmount(f"the cost is too large; it must be below {amount_bound()}")
        lines = tuple([CostLine(price.name, count, price.price, price.per) for count, price in counted])
        return Cost(nanos, self.source, lines)

    def _prices_all(self, input_tokens: int, output_tokens: int, other: Mapping[str, int]) -> bool:
        priced = self._priced_units
        if (input_tokens and "input_tokens" not in priced) or (output_tokens and "output_tokens" not in priced):
            return False
        # A part of the tokens without its own price is billed at the price of the whole.
        return all(name in priced or name.endswith("_tokens") for name, count in other.items() if count)


def _counts(usage: Usage) -> dict[str, int]:
    return {
        "requests": 1,
        **usage.other,
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cache_read_tokens": usage.cache_read_tokens,
        "cache_write_tokens": usage.cache_write_tokens,
        "cache_write_1h_tokens": usage.cache_write_1h_tokens,
    }


def _nanos(price: Decimal, per: int) -> Fraction:
    """Nano-dollars per unit."""
    return Fraction(price) * NANOS_PER_USD / per


def _price_at(prices: Sequence[_TierPrice], input_tokens: int) -> _TierPrice:
    """The price for a call with this many input tokens."""
    for price in prices:
        if input_tokens > price.start:
            return price
    return prices[-1]
