"""Conversion of amounts."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrdr_budget import InvalidAmount
from ktrdr_budget.money import MAX_UNITS, format_amount, from_units, to_units

UNITS = st.integers(0, MAX_UNITS - 1)


@pytest.mark.parametrize(
    ("amount", "nanos"),
    [
        ("0.15", 150_000_000),
        (0.15, 150_000_000),
        (0.1, 100_000_000),
        (Decimal("0.0000001"), 100),
        (5, 5_000_000_000),
        ("1e-9", 1),
        ("0", 0),
        ("-0", 0),
        ("1E+2", 100_000_000_000),
        (" 1", None),
    ],
)
def test_dollars_are_converted_to_whole_nano_dollars(amount, nanos):
    if nanos is None:
        assert to_units(amount) == 1_000_000_000
    else:
        assert to_units(amount) == nanos


def test_amounts_are_rounded_up_and_limits_are_rounded_down():
    assert to_units("0.0000000001") == 1
    assert to_units("0.0000000001", round_down=True) == 0
    # 0.0016150000000000001 is a typical float sum: it rounds up to one nano more.
    assert to_units("0.0016150000000000001") == 1_615_001


@pytest.mark.parametrize(
    "amount",
    [
        True,
        False,
        None,
        "",
        "abc",
        "1_000",
        "٣",
        "nan",
        float("nan"),
        "inf",
        float("-inf"),
        -1,
        "-0.01",
        b"1",
        [1],
        "1" * 65,
    ],
)
def test_an_invalid_amount_is_rejected(amount):
    with pytest.raises(InvalidAmount, match="is not an amount; use a non-negative decimal such as 0.15$"):
        to_units(amount)


@pytest.mark.parametrize(
    ("amount", "unit", "message"),
    [
        ("abc", "usd", "'abc' is not an amount; use a non-negative decimal such as 0.15"),
        ("-0.5", "usd", "'-0.5' is not an amount; use a non-negative decimal such as 0.15"),
        (Decimal("-0.5"), "usd", "-0.5 is not an amount; use a non-negative decimal such as 0.15"),
        (-1, "tokens", "-1 is not an amount of tokens; use a non-negative whole number such as 3"),
        ("1.5", "tokens", "'1.5' is not an amount of tokens; use a non-negative whole number such as 3"),
        ("9007199.26", "usd", "amount '9007199.26' is too large; it must be below $9,007,199.25"),
        (2**53, "tokens", f"amount {2**53} is too large; it must be below 9,007,199,254,740,992 tokens"),
        (0, "usd", "amount must be more than 0, not 0"),
    ],
)
def test_the_message_for_an_invalid_amount_shows_the_amount_and_says_what_is_valid(amount, unit, message):
    with pytest.raises(InvalidAmount) as refused:
        to_units(amount, unit, positive=True)
    assert str(refused.value) == message


@pytest.mark.parametrize("amount", ["9007199.254740992", 2**53, "1e999999", 1e300])
def test_an_amount_of_2_to_the_53_nano_dollars_or_more_is_too_large(amount):
    with pytest.raises(InvalidAmount, match="too large"):
        to_units(amount)
    assert to_units("9007199.254740991") == MAX_UNITS - 1


def test_the_value_true_is_rejected_even_after_the_number_1_was_converted():
    assert to_units(1) == 1_000_000_000
    with pytest.raises(InvalidAmount):
        to_units(True)


def test_an_amount_of_tokens_must_be_a_whole_number():
    assert to_units("12", "tokens") == 12
    assert to_units(2.0, "tokens") == 2
    for amount in ("1.5", 0.1):
        with pytest.raises(InvalidAmount, match="whole"):
            to_units(amount, "tokens")
    with pytest.raises(InvalidAmount, match="too large"):
        to_units(MAX_UNITS, "tokens")


def test_zero_is_rejected_if_the_amount_must_be_positive():
    with pytest.raises(InvalidAmount, match="more than 0"):
        to_units("0.00", positive=True)


@given(UNITS)
def test_converting_units_to_an_amount_and_back_returns_the_same_units(units):
    assert to_units(from_units(units)) == units
    assert to_units(str(from_units(units))) == units
    assert from_units(units, "tokens") == units


@given(st.decimals(0, 9_000_000, allow_nan=False, places=12))
def test_rounding_up_never_decreases_an_amount_and_rounding_down_never_increases_an_amount(amount):
    assert from_units(to_units(amount)) >= amount >= from_units(to_units(amount, round_down=True))


@pytest.mark.parametrize(
    ("amount", "unit", "text"),
    [
        (Decimal("0.1"), "usd", "$0.10"),
        (Decimal("0.0000016"), "usd", "$0.0000016"),
        (Decimal(-2), "usd", "-$2.00"),
        (Decimal("9007199254.740993"), "usd", "$9007199254.740993"),  # sums may exceed the bound of amounts
        (3, "tokens", "3 tokens"),
        (None, "usd", "unlimited"),
    ],
)
def test_an_amount_is_formatted_with_all_significant_digits_and_the_unit(amount, unit, text):
    assert format_amount(amount, unit) == text
