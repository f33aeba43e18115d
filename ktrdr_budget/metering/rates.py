"""What each unit of a model costs, and what a usage costs by that: exact, and rounded up once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Context, Decimal
from functools import cached_property

from ktrdr_budget.errors import InvalidAmount, InvalidArgument
from ktrdr_budget.metering.usage import Usage
from ktrdr_budget.money import MAX_UNITS, NANOS_PER_USD, Amount, from_units

__all__ = ["UNITS", "Cost", "CostLine", "Rate", "Rates", "Unit"]

_EXACT = Context(prec=100)
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
    """Something that is billed. A unit with more dimensions is a part of the one that has only some of them."""

    name: str
    per: int
    """How many of it a price is for."""
    dimensions: frozenset[tuple[str, str]]
    direction: str | None = field(init=False, repr=False, compare=False)
    """``input`` or ``output`` for tokens."""

    def __post_init__(self) -> None:
        names = dict(self.dimensions)
        direction = names.get("direction") if names.get("family") == "tokens" else None
        object.__setattr__(self, "direction", direction)

    def contains(self, other: Unit) -> bool:
        """Whether the other one is a part of this."""
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
"""What a configured price speaks of."""


@dataclass(frozen=True, slots=True)
class CostLine:
    """A part of a cost: ``count`` times ``price``, which is for ``per`` of them."""

    name: str
    """``input``, ``cached input``, ``cache write``, ``output``, ``request``, …"""
    count: int
    price: Decimal
    """Dollars."""
    per: int

    @property
    def amount(self) -> Decimal:
        """Dollars, not rounded."""
        return _EXACT.divide(_EXACT.multiply(self.price, Decimal(self.count)), Decimal(self.per))


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call costs, and how that comes about."""

    nanos: int
    """Nano-dollars; rounded up once, from the sum of the lines."""
    source: str
    """Whose price it is: ``genai-prices/0.2.3``, ``configured`` or ``fixed``."""
    lines: tuple[CostLine, ...] = ()

    @property
    def amount(self) -> Amount:
        """Dollars, as ``Decimal``."""
        return from_units(self.nanos)


@dataclass(frozen=True, slots=True)
class Rate:
    """The price of a unit in dollars; from more than ``start`` input tokens on, the price of that tier for all."""

    unit: Unit
    price: Decimal
    tiers: tuple[tuple[int, Decimal], ...] = ()
    """``(start, price)``, ascending."""

    @property
    def name(self) -> str:
        """As in :attr:`CostLine.name`."""
        return _NAMES.get(self.unit.name, self.unit.name.replace("_", " "))

    def price_at(self, input_tokens: int) -> Decimal:
        """The price for a call with so much input."""
        for start, price in reversed(self.tiers):
            if input_tokens > start:
                return price
        return self.price

    def price_max(self, input_tokens_max: int) -> Decimal:
        """The highest price for a call with at most so much input."""
        return max([self.price, *(price for start, price in self.tiers if input_tokens_max > start)])


class Rates:
    """What one model costs.

    Args:
        rates: at most one for each unit.
        source: whose prices these are.
    """

    def __init__(self, rates: Iterable[Rate], source: str) -> None:
        # Parts first: what of a whole is not in a priced part is billed as the whole.
        self._rates = tuple(sorted(rates, key=lambda rate: -len(rate.unit.dimensions)))
        self.source = source

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rates) and (self.source, self._rates) == (other.source, other._rates)

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Rate]:
        """What has a price: input, its parts, output, requests, and the rest."""
        return iter(sorted(self._rates, key=lambda rate: _ORDER.get(rate.name, len(_ORDER))))

    @cached_property
    def _parts(self) -> list[list[int]]:
        rates = self._rates
        return [[i for i, part in enumerate(rates) if whole.unit.contains(part.unit)] for whole in rates]

    @cached_property
    def _named(self) -> frozenset[str]:
        return frozenset(rate.unit.name for rate in self._rates)

    def cost(self, usage: Usage) -> Cost | None:
        """What a usage costs; ``None`` if something of it has no price.

        Raises:
            InvalidArgument: parts of it are more than their whole.
        """
        counts = _counts(usage)
        if not self._prices_all(usage.input_tokens, usage.output_tokens, usage.other):
            return None
        leaves: list[int] = []
        lines: list[CostLine] = []
        for rate, parts in zip(self._rates, self._parts, strict=True):
            count = counts.get(rate.unit.name, 0) - sum([leaves[i] for i in parts])
            if count < 0:
                raise InvalidArgument(f"the parts of {rate.unit.name} are more than {counts.get(rate.unit.name, 0)}")
            leaves.append(count)
            if count:
                lines.append(_line(rate, count, rate.price_at(usage.input_tokens)))
        return _sum(lines, self.source)

    def cost_max(self, input_tokens_max: int, output_tokens_max: int, other_max: Mapping[str, int]) -> Cost | None:
        """The most that a call within these bounds can cost; ``None`` if something of it has no price."""
        if not self._prices_all(input_tokens_max, output_tokens_max, other_max):
            return None
        counts = {"requests": 1, **other_max, "input": input_tokens_max, "output": output_tokens_max}
        dearest: dict[str, tuple[Decimal, Rate]] = {}
        for rate in self._rates:
            way = rate.unit.direction or rate.unit.name
            if counts.get(way):
                price = rate.price_max(input_tokens_max)
                # All of a direction is billed as what is dearest in it.
                if way not in dearest or price > dearest[way][0]:
                    dearest[way] = price, rate
        return _sum([_line(rate, counts[way], price) for way, (price, rate) in dearest.items()], self.source)

    def _prices_all(self, input_tokens: int, output_tokens: int, other: Mapping[str, int]) -> bool:
        named = self._named
        if (input_tokens and "input_tokens" not in named) or (output_tokens and "output_tokens" not in named):
            return False
        # A part of the tokens without a price of its own is billed as the whole.
        return all(name in named or name.endswith("_tokens") for name, count in other.items() if count)


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


def _line(rate: Rate, count: int, price: Decimal) -> CostLine:
    return CostLine(rate.name, count, price, rate.unit.per)


def _sum(lines: Iterable[CostLine], source: str) -> Cost:
    lines = tuple(sorted(lines, key=lambda line: _ORDER.get(line.name, len(_ORDER))))
    dollars = Decimal(0)
    for line in lines:
        dollars = _EXACT.add(dollars, line.amount)
    nanos = int(_EXACT.multiply(dollars, Decimal(NANOS_PER_USD)).to_integral_value(rounding=ROUND_CEILING))
    if nanos >= MAX_UNITS:
        raise InvalidAmount("the cost is too large: it must stay below 2**53 nano-dollars")
    return Cost(nanos, source, lines)
