"""The meaning of an amount for a hold of several budgets: scalars, mappings, and no amount."""

from __future__ import annotations

from decimal import Decimal

import pytest

from ktrdr_budget import InvalidAmount, InvalidArgument, UnknownBudget
from ktrdr_budget.engine.protocol.amounts import check_amounts, commit_amounts, spread, with_counts
from ktrdr_budget.engine.protocol.codes import CommitMode
from ktrdr_budget.engine.protocol.operations import CommitAmount

FLAGS = {"agent": "u", "team": "u", "tokens": "n", "jobs": "s"}
CENT = 10_000_000
"""One cent in nano-dollars, the whole units of dollar budgets."""


# -- before the budgets are known --------------------------------------------------------------------------------------


@pytest.mark.parametrize("amounts", [None, 0, "0.15", {}, {"agent": "0.15", "tokens": 3}, 2**53 - 1])
def test_an_amount_that_is_valid_in_some_unit_passes_the_check(amounts):
    check_amounts(amounts)


@pytest.mark.parametrize("amounts", ["x", -1, True, "nan", 2**53, {"agent": "0.15", "tokens": -1}])
def test_an_amount_that_is_valid_in_no_unit_fails_the_check(amounts):
    with pytest.raises(InvalidAmount):
        check_amounts(amounts)


def test_an_amount_of_zero_fails_the_check_only_if_amounts_must_be_positive():
    check_amounts({"agent": 0})
    for amounts in (0, {"agent": 1, "team": 0}):
        with pytest.raises(InvalidAmount, match="must be more than 0"):
            check_amounts(amounts, positive=True)


# -- amounts per budget ------------------------------------------------------------------------------------------------


def test_a_scalar_amount_applies_to_dollar_budgets_but_not_to_count_budgets():
    assert spread("0.01", FLAGS) == {"agent": CENT, "team": CENT}


@pytest.mark.parametrize(
    ("flags", "units"), [({"tokens": "n"}, {"tokens": 3}), ({"tokens": "n", "jobs": "s"}, {"tokens": 3})]
)
def test_a_scalar_amount_applies_to_the_only_count_budget_of_a_hold_without_a_dollar_budget(flags, units):
    assert spread(3, flags) == units


def test_a_scalar_amount_for_several_count_budgets_is_refused_as_ambiguous():
    with pytest.raises(InvalidArgument, match=r"ambiguous for tokens, calls: give a mapping"):
        spread(3, {"tokens": "n", "calls": "n"})


def test_each_amount_of_a_mapping_is_converted_to_the_unit_of_its_budget():
    assert spread({"tokens": 3, "agent": Decimal("0.01"), "jobs": 1}, FLAGS) == {"tokens": 3, "agent": CENT, "jobs": 1}
    with pytest.raises(InvalidAmount, match="whole number"):
        spread({"tokens": "0.5"}, FLAGS)


def test_a_mapping_with_a_budget_that_the_hold_lacks_is_refused():
    with pytest.raises(UnknownBudget, match="this hold has: agent, team, tokens, jobs"):
        spread({"agent": 1, "agnet": 1}, FLAGS)


# -- what a commit records ---------------------------------------------------------------------------------------------

EXACT, RESERVED, ACCRUED = CommitMode.EXACT, CommitMode.RESERVED, CommitMode.ACCRUED


def committed(amount: object, **segments: tuple[str, int, int]) -> dict[str, CommitAmount]:
    return dict(zip(segments, commit_amounts(segments, amount), strict=True))


def test_a_scalar_commit_spends_the_given_dollars_and_the_reserved_counts():
    assert committed("0.01", tokens=("n", 100, 40), agent=("u", 5 * CENT, 0)) == {
        "tokens": CommitAmount(RESERVED, 100),
        "agent": CommitAmount(EXACT, CENT),
    }


def test_a_commit_with_a_mapping_spends_nothing_in_budgets_missing_from_the_mapping():
    assert committed({"agent": "0.01"}, tokens=("n", 100, 40), agent=("u", 5 * CENT, 0)) == {
        "tokens": CommitAmount(EXACT, 0),
        "agent": CommitAmount(EXACT, CENT),
    }


def test_a_commit_without_an_amount_commits_the_accrued_amounts():
    assert committed(None, agent=("u", 5 * CENT, CENT), tokens=("n", 100, 40)) == {
        "agent": CommitAmount(ACCRUED, CENT),
        "tokens": CommitAmount(ACCRUED, 40),
    }


def test_a_count_budget_commits_its_reserved_amount_if_only_other_budgets_have_accruals():
    segments = {"agent": ("u", 5 * CENT, CENT), "team": ("u", 5 * CENT, 0), "tokens": ("n", 100, 0)}
    assert committed(None, **segments) == {
        "agent": CommitAmount(ACCRUED, CENT),
        "team": CommitAmount(ACCRUED, 0),
        "tokens": CommitAmount(RESERVED, 100),
    }


def test_a_commit_without_an_amount_commits_nothing_if_nothing_was_accrued():
    assert committed(None, tokens=("n", 100, 0)) == {"tokens": CommitAmount(ACCRUED, 0)}


# -- a hold that was reserved by scope: amounts by unit ----------------------------------------------------------------

SCOPED = {"user": "u", "team": "u", "tokens:user": "n", "jobs": "s"}
UNITS = ("usd", "usd", "tokens", "slots")


def test_each_budget_of_a_scoped_hold_gets_the_amount_of_its_unit():
    assert spread("0.01", SCOPED, UNITS) == {"user": CENT, "team": CENT}
    assert spread({"usd": "0.01", "tokens": 3}, SCOPED, UNITS) == {"user": CENT, "team": CENT, "tokens:user": 3}
    with pytest.raises(InvalidAmount, match="not an amount of tokens; use a non-negative whole number"):
        spread({"tokens": "0.5"}, SCOPED, UNITS)


def test_a_scalar_amount_for_a_scoped_hold_is_in_dollars_even_if_the_hold_has_only_counts():
    assert spread("0.01", {"tokens:user": "n"}, ("tokens",)) == {}


def test_an_amount_in_a_unit_that_a_scoped_hold_lacks_is_checked_and_ignored():
    assert spread({"usd": "0.01", "requests": 1}, SCOPED, UNITS) == {"user": CENT, "team": CENT}
    with pytest.raises(InvalidAmount):
        spread({"requests": -1}, SCOPED, UNITS)


@pytest.mark.parametrize("name", ["tokens:user", "team", "user:bob", "", 5])
def test_a_mapping_for_a_scoped_hold_with_a_name_of_a_budget_is_refused(name):
    with pytest.raises(InvalidArgument, match="its amounts go by unit \\(usd, tokens, slots\\)|unit must match"):
        spread({"usd": "0.01", name: 1}, SCOPED, UNITS)


def test_keywords_are_added_to_a_scalar_or_a_mapping_by_unit():
    assert with_counts("0.01", {"tokens": 3}, UNITS) == {"usd": "0.01", "tokens": 3}
    assert with_counts({"usd": "0.01"}, {"tokens": 3}, UNITS) == {"usd": "0.01", "tokens": 3}
    assert with_counts(None, {"tokens": 3}, UNITS) == {"tokens": 3}
    assert with_counts(None, {}, UNITS) is None
    assert with_counts("0.01", {}, ()) == "0.01"


@pytest.mark.parametrize(
    ("amount", "counts", "units"),
    [("0.01", {"usd": 1}, UNITS), ({"tokens": 3}, {"tokens": 3}, UNITS), ("0.01", {"tokens": 3}, ())],
)
def test_keywords_are_refused_if_a_unit_is_given_twice_or_the_hold_was_not_reserved_by_scope(amount, counts, units):
    with pytest.raises(InvalidArgument, match="is given twice|reserved by scope"):
        with_counts(amount, counts, units)


@pytest.mark.parametrize(
    ("amount", "accrued", "modes"),
    [
        (None, {}, [RESERVED, RESERVED, RESERVED, RESERVED]),
        (None, {"tokens:user": 40}, [RESERVED, RESERVED, ACCRUED, RESERVED]),
        ("0.01", {}, [EXACT, EXACT, RESERVED, RESERVED]),
        ("0.01", {"user": CENT, "tokens:user": 40}, [EXACT, EXACT, ACCRUED, RESERVED]),
        ({"tokens": 9}, {"user": CENT}, [ACCRUED, ACCRUED, EXACT, RESERVED]),
        ({"requests": 1}, {}, [RESERVED, RESERVED, RESERVED, RESERVED]),
    ],
)
def test_a_scoped_hold_commits_in_each_unit_the_given_else_the_accrued_else_the_reserved_amount(amount, accrued, modes):
    reserved = {"user": 5 * CENT, "team": 5 * CENT, "tokens:user": 100, "jobs": 1}
    segments = {name: (flag, reserved[name], accrued.get(name, 0)) for name, flag in SCOPED.items()}
    amounts = commit_amounts(segments, amount, UNITS)
    given = {"usd": CENT, "tokens": 9}
    most = {"usd": accrued.get("user", 0), "tokens": accrued.get("tokens:user", 0)}
    assert amounts == [
        CommitAmount(mode, {EXACT: given.get(unit), ACCRUED: most.get(unit), RESERVED: reserved[name]}[mode])
        for mode, unit, name in zip(modes, UNITS, SCOPED, strict=True)
    ]
