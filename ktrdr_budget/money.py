"""Conversion of amounts: ``Decimal`` dollars in the interface, integer nano-dollars inside.

1 USD is 10**9 nanos, so that prices down to $0.001 per million tokens are exact. Counts (``tokens``, ``requests``, …)
are integers on both sides. Lua's numbers are doubles, with exact sums below 2**53, so an amount of 2**53 units or more
(about $9.0 million) is rejected.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, InvalidOperation
from functools import lru_cache

from ktrdr_budget.errors import InvalidAmount, shown

__all__ = ["MAX_UNITS", "NANOS_PER_USD", "Amount", "AmountIn", "format_amount", "from_units", "to_units"]
__all__ += ["amount_bound", "not_an_amount"]

NANOS_PER_USD = 10**9
MAX_UNITS = 2**53
"""Upper bound, exclusive, of amounts and limits."""

USD = "usd"
COUNT = "count"
"""The unit of a count if it is unknown what is counted."""
_SCALE = Decimal(NANOS_PER_USD)
_WIDE = Context(prec=60)

Amount = Decimal | int
"""Type of amounts that the package returns: ``Decimal`` dollars, or an ``int`` count."""
AmountIn = Decimal | str | int | float
"""Type of amounts that callers pass. A float means the number that its ``repr`` shows, so 0.1 is exactly 0.1."""


def to_units(amount: AmountIn, unit: str = "usd", *, round_down: bool = False, positive: bool = False) -> int:
    """Convert an amount to internal units: nano-dollars for ``usd``, the count itself for any other unit.

    A fraction of a nano-dollar is rounded: down in a limit, up in a cost. So rounding never raises a cap.

    Args:
        round_down: round down, as for limits. If false, round up, as for costs.
        positive: reject zero.

    Raises:
        InvalidAmount: the amount is not a finite number, is negative, is a fraction of a count, is too large, or is 0
            although ``positive`` is set.
    """
    try:
        units = _to_units(amount, unit, round_down)
    except TypeError:  # unhashable
        raise not_an_amount(amount, unit) from None
    if positive and units == 0:
        raise InvalidAmount(f"amount must be more than 0, not {shown(amount)}")
    return units


@lru_cache(maxsize=4096, typed=True)  # typed, because True is no amount although it equals 1
def _to_units(amount: AmountIn, unit: str, round_down: bool) -> int:
    value = _decimal(amount)
    if value is None or not value.is_finite() or value < 0:
        raise not_an_amount(amount, unit)
    # Compared before any arithmetic, so that "1e999999" costs no time.
    if value >= (MAX_UNITS if unit != USD else Decimal(MAX_UNITS) / _SCALE):
        raise _too_large(amount, unit)
    if unit != USD:
        if value != value.to_integral_value():
            raise not_an_amount(amount, unit, whole=True)
        return int(value)
    rounding = ROUND_FLOOR if round_down else ROUND_CEILING
    units = int(_WIDE.multiply(value, _SCALE).to_integral_value(rounding=rounding))
    if units >= MAX_UNITS:
        raise _too_large(amount, unit)
    return units


def _decimal(amount: object) -> Decimal | None:
    if isinstance(amount, Decimal):
        return amount
    if isinstance(amount, str):
        # Decimal() also accepts underscores and non-ASCII digits.
        if not amount.isascii() or "_" in amount or len(amount) > 64:
            return None
        try:
            return Decimal(amount)
        except InvalidOperation:
            return None
    if isinstance(amount, int) and not isinstance(amount, bool):
        return Decimal(amount)
    if isinstance(amount, float):
        return Decimal(float.__repr__(amount))  # a subclass, such as NumPy's, may have another repr
    return None


# -- errors ------------------------------------------------------------------------------------------------------------


def not_an_amount(value: object, unit: str = USD, *, whole: bool = False) -> InvalidAmount:
    """Create the error for an invalid amount.

    Args:
        whole: whether the amount is invalid because it is a fraction of a count.
    """
    if unit in (USD, COUNT) and not whole:
        return InvalidAmount(f"{shown(value)} is not an amount; use a non-negative decimal such as 0.15")
    of = "" if unit == COUNT else f" of {unit}"
    return InvalidAmount(f"{shown(value)} is not an amount{of}; use a non-negative whole number such as 3")


def amount_bound(unit: str = USD, bound: int = MAX_UNITS) -> str:
    """Format the upper bound of amounts: ``$9,007,199.25``, ``9,007,199,254,740,992 tokens``."""
    if unit == USD:
        return f"${Decimal(bound) / NANOS_PER_USD:,.2f}"
    return f"{bound:,}" + ("" if unit == COUNT else f" {unit}")


def _too_large(amount: object, unit: str) -> InvalidAmount:
    return InvalidAmount(f"amount {shown(amount)} is too large; it must be below {amount_bound(unit)}")


@lru_cache(maxsize=4096)
def from_units(units: int, unit: str = "usd") -> Amount:
    """Convert internal units to ``Decimal`` dollars with at least two decimals, or to an ``int`` count."""
    if unit != USD:
        return units
    whole, nanos = divmod(abs(units), NANOS_PER_USD)
    decimals = f"{nanos:09d}".rstrip("0").ljust(2, "0")
    return Decimal(f"{'-' if units < 0 else ''}{whole}.{decimals}")


def format_amount(amount: Amount | None, unit: str = "usd") -> str:
    """Format an amount: ``$0.15``, ``$0.0000016``, ``3 tokens``, or ``unlimited`` for ``None``."""
    if amount is None:
        return "unlimited"
    if unit != USD:
        return f"{amount} {unit}"
    nanos = _WIDE.multiply(Decimal(amount), _SCALE).to_integral_value(rounding=ROUND_CEILING)
    return f"{'-' if nanos < 0 else ''}${from_units(abs(int(nanos))):f}"
