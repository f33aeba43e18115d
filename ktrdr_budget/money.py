"""Amounts at the edge: dollars as ``Decimal`` outside, whole nano-dollars inside.

1 USD = 10**9 nanos, the price of one token at $0.001 per million, so that every price list computes exactly. Counts
(``tokens``, ``requests``, …) are whole numbers on both sides. Lua's numbers are doubles: sums stay exact below 2**53,
which is why an amount of 2**53 units or more (about $9.0 million) is refused.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, InvalidOperation
from functools import lru_cache

from ktrdr_budget.errors import InvalidAmount, shown

__all__ = ["MAX_UNITS", "NANOS_PER_USD", "Amount", "AmountIn", "format_amount", "from_units", "to_units"]

NANOS_PER_USD = 10**9
MAX_UNITS = 2**53
"""First value that is refused: amounts and limits lie below it."""

USD = "usd"
_SCALE = Decimal(NANOS_PER_USD)
_WIDE = Context(prec=60)

Amount = Decimal | int
"""What comes out: ``Decimal`` dollars, or an ``int`` count."""
AmountIn = Decimal | str | int | float
"""What goes in; a float is read through its ``repr``, so 0.1 means 0.1."""


def to_units(amount: AmountIn, unit: str = "usd", *, round_down: bool = False, positive: bool = False) -> int:
    """The amount in whole internal units: nano-dollars for ``usd``, the count itself for any other unit.

    Money below a nano-dollar rounds up (limits, with ``round_down``, down), so that a cap never gains by rounding.

    Raises:
        InvalidAmount: not a number, not finite, negative, zero although ``positive``, a fraction of a count, too large.
    """
    try:
        # A bool is an int to Python, and True == 1 to the cache: it is refused before either can mistake it.
        if isinstance(amount, bool):
            raise InvalidAmount(f"amount must be a number, not {shown(amount)}")
        units = _to_units(amount, unit, round_down)
    except TypeError:
        raise InvalidAmount(f"amount must be a Decimal, str, int or float, not {type(amount).__name__}") from None
    if positive and units == 0:
        raise InvalidAmount(f"amount must be more than 0, not {shown(amount)}")
    return units


@lru_cache(maxsize=4096, typed=True)
def _to_units(amount: AmountIn, unit: str, round_down: bool) -> int:
    value = _decimal(amount)
    if not value.is_finite():
        raise InvalidAmount(f"amount must be finite, not {shown(amount)}")
    if value < 0:
        raise InvalidAmount(f"amount must not be negative: {shown(amount)}")
    # Compared before any arithmetic, so that "1e999999" costs nothing.
    if value >= (MAX_UNITS if unit != USD else Decimal(MAX_UNITS) / _SCALE):
        raise InvalidAmount(f"amount is too large: {shown(amount)} (must be below 2**53 units)")
    if unit != USD:
        if value != value.to_integral_value():
            raise InvalidAmount(f"amount of {unit!r} must be a whole number, not {shown(amount)}")
        return int(value)
    rounding = ROUND_FLOOR if round_down else ROUND_CEILING
    units = int(_WIDE.multiply(value, _SCALE).to_integral_value(rounding=rounding))
    if units >= MAX_UNITS:
        raise InvalidAmount(f"amount is too large: {shown(amount)} (must be below 2**53 units)")
    return units


def _decimal(amount: object) -> Decimal:
    if isinstance(amount, Decimal):
        return amount
    if isinstance(amount, str):
        # Decimal() also takes underscores and non-ASCII digits; an amount on a wire is plainer than that.
        if not amount.isascii() or "_" in amount or len(amount) > 64:
            raise InvalidAmount(f"amount is not a number: {amount[:64]!r}")
        try:
            return Decimal(amount)
        except InvalidOperation:
            raise InvalidAmount(f"amount is not a number: {shown(amount)}") from None
    if isinstance(amount, int):
        return Decimal(amount)
    if isinstance(amount, float):
        return Decimal(float.__repr__(amount))  # a subclass, such as that of NumPy, may show itself otherwise
    raise InvalidAmount(f"amount must be a Decimal, str, int or float, not {type(amount).__name__}")


@lru_cache(maxsize=4096)
def from_units(units: int, unit: str = "usd") -> Amount:
    """The amount for the outside: ``Decimal`` dollars (two decimals, more if they matter), or an ``int`` count."""
    if unit != USD:
        return units
    whole, nanos = divmod(abs(units), NANOS_PER_USD)
    decimals = f"{nanos:09d}".rstrip("0").ljust(2, "0")
    return Decimal(f"{'-' if units < 0 else ''}{whole}.{decimals}")


def format_amount(amount: Amount | None, unit: str = "usd") -> str:
    """The amount for a person: ``$0.15``, ``$0.0000016``, ``3 tokens``, or ``unlimited`` for ``None``."""
    if amount is None:
        return "unlimited"
    if unit != USD:
        return f"{amount} {unit}"
    nanos = _WIDE.multiply(Decimal(amount), _SCALE).to_integral_value(rounding=ROUND_CEILING)
    return f"{'-' if nanos < 0 else ''}${from_units(abs(int(nanos))):f}"
