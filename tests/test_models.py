"""Budgets and views."""

from __future__ import annotations

from decimal import Decimal

import pytest

from ktrdr_budget import Budget, BudgetError, InvalidAmount, InvalidArgument
from ktrdr_budget.models import check_name, check_ttl_ms


def test_a_budget_keeps_its_limit_exactly():
    budget = Budget("agent", limit="5.00")
    assert (budget.limit, budget.limit_units) == (Decimal("5.00"), 5_000_000_000)
    assert Budget("agent", 0.1) == Budget("agent", "0.10")
    assert Budget("tokens", "1000", unit="tokens").limit == 1000
    assert Budget("agent", None).limit is None


def test_a_limit_is_rounded_down_to_whole_nano_dollars():
    assert Budget("agent", "0.0000000019").limit == Decimal("0.000000001")


@pytest.mark.parametrize(
    "options",
    [
        {"name": ""},
        {"name": "a b"},
        {"name": "x" * 129},
        {"name": "naïve"},
        {"name": "a\n"},
        {"name": None},
        {"unit": "a,b"},
        {"unit": ""},
        {"period": "year"},
        {"timezone": "Mars/Olympus"},
        {"timezone": "../etc/passwd"},
        {"kind": "rate"},
        {"kind": "slots", "period": "month"},
    ],
)
def test_an_invalid_field_of_a_budget_raises_a_value_error(options):
    with pytest.raises(InvalidArgument) as caught:
        Budget(**{"name": "agent", "limit": 1, **options})
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, BudgetError)


@pytest.mark.parametrize("limit", [-1, "x", True, float("nan"), 2**53])
def test_a_budget_with_an_invalid_limit_is_rejected(limit):
    with pytest.raises(InvalidAmount):
        Budget("agent", limit)


def test_a_slots_budget_counts_whole_units_in_a_single_window():
    budget = Budget("cycles", 2, kind="slots")
    assert (budget.unit, budget.period, budget.limit) == ("slots", "ever", 2)
    with pytest.raises(InvalidAmount):
        Budget("cycles", "1.5", kind="slots")


@pytest.mark.parametrize("name", ["a", "team:quant", "a/b@c.d-e_f", "x" * 128])
def test_names_of_the_documented_form_are_valid(name):
    assert check_name(name, "name") == name


@pytest.mark.parametrize("ttl", [0, 0.5, 86_401, -1, True, None, "60", float("nan"), float("inf")])
def test_an_invalid_ttl_is_rejected(ttl):
    with pytest.raises(InvalidArgument):
        check_ttl_ms(ttl)


def test_a_ttl_in_seconds_is_converted_to_milliseconds():
    assert check_ttl_ms(1) == 1000
    assert check_ttl_ms(2.5) == 2500
    assert check_ttl_ms(86_400) == 86_400_000
