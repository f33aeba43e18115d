"""Formats of amounts, tables and lines."""

from __future__ import annotations

import io
import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrdr_budget.cli.output import Table, amount_text, duration, fields, json_text, one_line, write
from ktrdr_budget.money import MAX_UNITS, from_units

NANOS = st.integers(min_value=-(2 * MAX_UNITS), max_value=2 * MAX_UNITS)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("0.00", "$0.00"),
        ("0.15", "$0.15"),
        ("5", "$5.00"),
        ("0.1499", "$0.1499"),
        ("4.999999999", "$4.999999999"),
        ("0.000000001", "$0.000000001"),
        ("-0.08", "-$0.08"),
        ("1E+2", "$100.00"),
        ("9007199.254740993", "$9007199.254740993"),
        (3, "3"),
        (0, "0"),
        (None, "unlimited"),
    ],
)
def test_a_decimal_string_is_shown_as_dollars_and_a_whole_number_as_a_count(
    value: str | int | None, shown: str
) -> None:
    assert amount_text(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(Decimal("0.0016150000000000001"), "$0.001615"), (5, "$5.00"), (0, "$0.00")]
)
def test_rounding_errors_of_a_float_amount_are_not_shown(value: Decimal | int, shown: str) -> None:
    assert amount_text(value, is_money=True) == shown


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "abc", "", True, 1.5, [], {}, b"1"])
def test_an_invalid_amount_is_rejected(value: object) -> None:
    with pytest.raises((ValueError, TypeError, ArithmeticError)):
        amount_text(value)


@given(NANOS)
def test_amounts_are_shown_exactly(nanos: int) -> None:
    shown = amount_text(str(from_units(nanos)))
    assert Decimal(shown.replace("$", "")) * 10**9 == nanos
    assert len(shown.partition(".")[2]) >= 2


@given(st.lists(NANOS.map(abs), min_size=1, max_size=4))
def test_shown_amounts_add_up_to_the_shown_sum(parts: list[int]) -> None:
    shown = [Decimal(amount_text(str(from_units(part))).removeprefix("$")) for part in parts]
    assert amount_text(str(sum(shown))) == amount_text(str(from_units(sum(parts))))


def test_columns_are_aligned_and_become_wider_for_longer_cells_on_a_later_page(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = Table("NAME", ">AMOUNT", "NOTE")
    table.write([["a", "$1.00", ""], ["longer", "$10.00", "x"]])
    table.write([])
    table.write([["much longer", "$1000000.00", "y"]])
    assert capsys.readouterr().out == (
        "NAME    AMOUNT  NOTE\n"
        "a        $1.00\n"
        "longer  $10.00  x\n"
        "much longer  $1000000.00  y\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (7, "7 s"),
        (60, "1 min"),
        (125, "2 min 5 s"),
        (3600, "1 h"),
        (3605, "1 h"),
        (63_124, "17 h 32 min"),
        (86_400, "1 d"),
        (273_600, "3 d 4 h"),
    ],
)
def test_a_duration_is_shown_in_its_two_largest_units(seconds: int, shown: str) -> None:
    assert duration(seconds) == shown


def test_json_output_shows_fractions_as_plain_decimal_numbers() -> None:
    document = {"a": [Decimal("1E-9"), Decimal("4.85")], "b": "1E-9", "c": 3, "d": 'x "\0" y', "e": None}
    text = json_text(document)
    assert text.startswith('{"a": [0.000000001, 4.85], "b": "1E-9", "c": 3, ')
    assert json.loads(text) == {**document, "a": [1e-9, 4.85]}


def test_a_table_rejects_a_row_with_the_wrong_number_of_cells() -> None:
    with pytest.raises(ValueError, match="zip"):
        Table("A", "B").write([["1"]])


def test_values_of_labelled_fields_are_aligned_in_one_column() -> None:
    assert fields([("A", "1"), ("Longer", "")]) == "A:       1\nLonger:"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\n b\t c", "a b c"),
        ("\x1b[31mred\x07", "?[31mred?"),
        ("\u202eoverride", "?override"),
        ("x" * 500, "x" * 399 + "…"),
    ],
)
def test_control_characters_in_external_text_are_replaced(text: str, line: str) -> None:
    assert one_line(text) == line


def test_characters_outside_the_output_encoding_are_escaped() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    write("naïve █", stream)
    assert raw.getvalue() == b"na\\xefve \\u2588\n"
