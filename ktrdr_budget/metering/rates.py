"""What each unit of a model costs, and what a usage costs by that: exact, and rounded up once."""

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


@dataclass(frozen=True, slots=True)
class _Step:
    """What a unit costs in one context tier."""

    start: int
    """In force for calls with more input than that."""
    name: str
    price: Decimal
    per: int
    scaled: int
    """Of one of the unit, in nano-dollars, times the denominator that all prices of a model share: a whole number."""


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
    def _denominator(self) -> int:
        prices = [(rate, price) for rate in self._rates for price in (rate.price, *(tier[1] for tier in rate.tiers))]
        return lcm(*(_nanos(price, rate.unit.per).denominator for rate, price in prices))

    @cached_property
    def _steps(self) -> list[list[_Step]]:
        """Of each rate the prices that come in question, the last tier first."""
        return [
            [
                _Step(start, rate.name, price, rate.unit.per, int(_nanos(price, rate.unit.per) * self._denominator))
                for start, price in reversed([(-1, rate.price), *rate.tiers])
            ]
            for rate in self._rates
        ]

    @cached_property
    def _shown(self) -> list[int]:
        """In which order a cost tells its lines."""
        return sorted(range(len(self._rates)), key=lambda i: _ORDER.get(self._rates[i].name, len(_ORDER)))

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
        for rate, parts in zip(self._rates, self._parts, strict=True):
            count = counts.get(rate.unit.name, 0)
            for part in parts:
                count -= leaves[part]
            if count < 0:
                raise InvalidArgument(f"the parts of {rate.unit.name} are more than {counts.get(rate.unit.name, 0)}")
            leaves.append(count)
        steps = self._steps
        return self._sum([(leaves[i], _step_at(steps[i], usage.input_tokens)) for i in self._shown if leaves[i]])

    def cost_max(self, input_tokens_max: int, output_tokens_max: int, other_max: Mapping[str, int]) -> Cost | None:
        """The most that a call within these bounds can cost; ``None`` if something of it has no price."""
        if not self._prices_all(input_tokens_max, output_tokens_max, other_max):
            return None
        counts = {"requests": 1, **other_max, "input": input_tokens_max, "output": output_tokens_max}
        dearest: dict[str, _Step] = {}
        for i in self._shown:
            unit = self._rates[i].unit
            way = unit.direction or unit.name
            if counts.get(way):
                for step in self._steps[i]:
                    # All of a direction is billed as what is dearest in it.
                    if input_tokens_max > step.start and (way not in dearest or step.scaled > dearest[way].scaled):
                        dearest[way] = step
        return self._sum([(counts[way], step) for way, step in dearest.items()])

    def _sum(self, counted: Sequence[tuple[int, _Step]]) -> Cost:
        total = 0
        for count, step in counted:
            total += count * step.scaled
        nanos = -(-total // self._denominator)  # rounded up
        if nanos >= MAX_UNITS:
            raise InvalidAmount(f"the cost is too large; it must be below {amount_bound()}")
        lines = tuple([CostLine(step.name, count, step.price, step.per) for count, step in counted])
        return Cost(nanos, self.source, lines)

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


def _nanos(price: Decimal, per: int) -> Fraction:
    """Nano-dollars of one unit."""
    return Fraction(price) * NANOS_PER_USD / per


def _step_at(steps: Sequence[_Step], input_tokens: int) -> _Step:
    """The price for a call with so much input."""
    for step in steps:
        if input_tokens > step.start:
            return step
    return steps[-1]
