"""Budgets and views."""

from __future__ import annotations

import pickle
from datetime import timedelta
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


# -- templates and lines with several windows --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("agent", ()),
        ("user:{user}", ("user",)),
        ("{a}", ("a",)),
        ("x{team_2}/y{user}z", ("team_2", "user")),
        ("{b}/{a}/{c}/rpm", ("b", "a", "c")),
    ],
)
def test_a_name_with_placeholders_is_a_template_with_these_fields_in_order(name, fields):
    budget = Budget(name, 1)
    assert (budget.fields, budget.is_template, budget.applies_to_scopes) == (fields, bool(fields), bool(fields))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{a}{b}", "must have a '/' between them"),
        ("{a}:{b}", "must have a '/' between them"),
        ("x/{a}:{b}/y", "must have a '/' between them"),
        ("{a}/{a}", "occurs once"),
        ("{A}", "with placeholders such as"),
        ("{}", "with placeholders such as"),
        ("{0}", "with placeholders such as"),
        ("{a", "with placeholders such as"),
        ("a}", "budget name must match"),
        ("{{a}}", "with placeholders such as"),
        ("{a!r}", "with placeholders such as"),
        ("{" + "a" * 33 + "}", "with placeholders such as"),
        ("a b{a}", "with placeholders such as"),
        ("{a}\n", "with placeholders such as"),
        ("x" * 126 + "{a}", "budget name must match"),
    ],
)
def test_a_name_with_invalid_placeholders_is_rejected(name, words):
    with pytest.raises(InvalidArgument, match=words):
        Budget(name, 1)


def test_a_line_with_several_windows_defines_one_budget_for_each_period():
    line = Budget("team:{team}", {"day": "5.00", "month": None}, timezone="Europe/Rome", when={"model": "a"})
    options = {"timezone": "Europe/Rome", "when": {"model": ["a"]}}
    assert line.windows == (
        Budget("team:{team}/day", 5, period="day", **options),
        Budget("team:{team}/month", None, period="month", **options),
    )
    assert line.has_windows
    assert line.limit == {"day": Decimal("5.00"), "month": None}
    assert line.limit_units is None


def test_a_budget_with_one_limit_is_its_own_window():
    budget = Budget("agent", 1)
    assert budget.windows == (budget,)
    assert not budget.has_windows


@pytest.mark.parametrize(
    ("limit", "options"),
    [
        ({}, {}),
        ({"fortnight": 1}, {}),
        ({7: 1}, {}),
        ({"day": "lots"}, {}),
        ({"day": {"day": 1}}, {}),
        ({"day": 1}, {"period": "month"}),
        ({"day": 1}, {"kind": "slots"}),
        ({"month": 1}, {"name": "x" * 123}),
        ([("day", 1)], {}),
    ],
)
def test_an_invalid_mapping_of_periods_to_limits_is_rejected(limit, options):
    with pytest.raises(InvalidArgument):
        Budget(**{"name": "agent", "limit": limit, **options})


def test_a_budget_with_when_applies_to_scopes_even_without_patterns():
    assert Budget("everything", 1, when={}).applies_to_scopes
    assert not Budget("everything", 1).applies_to_scopes
    assert Budget("a", 1, when={"model": "gpt-5"}) == Budget("a", 1, when={"model": ["gpt-5"]})


@pytest.mark.parametrize(
    "when",
    [
        "model",
        ["model"],
        {"Model": "a"},
        {7: "a"},
        *({"model": each} for each in ("", [], 7, ["a", 7], None, "a b", "é", b"a", {"a": "b"})),
    ],
)
def test_an_invalid_condition_is_rejected(when):
    with pytest.raises(InvalidArgument):
        Budget("a", 1, when=when)


def test_a_retention_is_a_duration_or_a_text_of_hours_or_days():
    assert Budget("a", 1, retention="48h").retention == timedelta(days=2)
    assert Budget("a", 1, retention="35d") == Budget("a", 1, retention=timedelta(days=35))
    assert Budget("a", 1).retention is None


@pytest.mark.parametrize("retention", ["47h", "1d", "3651d", "48", "48 h", "-3d", "2w", "", 48, timedelta(hours=47)])
def test_an_invalid_retention_is_rejected(retention):
    with pytest.raises(InvalidArgument, match="retention must be"):
        Budget("a", 1, retention=retention)


def test_a_definition_is_hashable_and_survives_pickling():
    budget = Budget("team:{team}", {"day": 5}, when={"model": ["gpt-5", "o*"]}, retention="48h")
    assert pickle.loads(pickle.dumps(budget)) == budget
    assert {budget: 1}[Budget("team:{team}", {"day": "5.00"}, when={"model": ("gpt-5", "o*")}, retention="2d")] == 1


def test_later_changes_of_the_mappings_given_do_not_change_the_budget():
    limit, when = {"day": 5}, {"model": ["gpt-5"]}
    budget = Budget("a", limit, when=when)
    limit["day"] = 7
    when["model"].append("o3")
    assert budget == Budget("a", {"day": 5}, when={"model": "gpt-5"})
