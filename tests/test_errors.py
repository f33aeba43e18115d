"""The errors of the package: their tree, their fields, and their messages."""

from __future__ import annotations

import pickle
import re
from decimal import Decimal

import pytest

from ktrdr_budget import errors
from ktrdr_budget.errors import (
    BudgetError,
    BudgetExceeded,
    HoldConflict,
    InvalidAmount,
    StoreError,
    StoreUnavailable,
    TooManyHolds,
    UnknownBudget,
    UnknownPrice,
    shown,
    unknown_budget,
)
from ktrdr_budget.models import Denial

DENIAL = Denial(
    "team", "budget_held",
    limit=Decimal("5.00"), spent=Decimal("4.80"), held=Decimal("0.15"), unconfirmed=Decimal("0.04"),
    remaining=Decimal("0.01"), requested=Decimal("0.16"), fits=Decimal("0.02"), retry_after=60,
)  # fmt: skip
HUGE = 10**5000  # more digits than Python formats
TREE = re.findall(r"^ {4}([│ ├└─]*)(\w+)(?: |$)", errors.__doc__ or "", re.MULTILINE)
"""Each line of the tree in the docstring of the module: the characters that draw the tree, and the error's name."""


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("repr fails")


# -- the tree ----------------------------------------------------------------------------------------------------------


def test_the_docstring_of_the_module_shows_each_error_below_its_base_class():
    path = ["Exception"]
    for prefix, name in TREE:
        path[1 + len(prefix) // 4 :] = [name]
        assert getattr(errors, name).__bases__[0].__name__ == path[-2]


def test_the_docstring_of_the_module_shows_all_errors():
    own = {value.__name__ for value in vars(errors).values() if getattr(value, "__module__", "") == errors.__name__}
    assert {name for _, name in TREE} == {name for name in own if name[0].isupper()}


@pytest.mark.parametrize(
    ("error", "builtin"), [(InvalidAmount, ValueError), (UnknownBudget, LookupError), (UnknownPrice, LookupError)]
)
def test_errors_about_arguments_are_subclasses_of_value_error_or_lookup_error(error, builtin):
    assert issubclass(error, BudgetError)
    assert issubclass(error, builtin)


# -- fields ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    ["budget", "reason", "limit", "spent", "held", "unconfirmed", "remaining", "requested", "fits", "retry_after"],
)
def test_budget_exceeded_has_each_figure_of_the_denial_as_a_field(field):
    assert getattr(BudgetExceeded(DENIAL), field) == getattr(DENIAL, field)


def test_if_a_denial_has_an_explanation_the_message_ends_with_the_explanation():
    denied = BudgetExceeded(DENIAL)
    assert str(denied) == "team: budget_held ($0.01 remaining, need $0.16)"
    denied.explanation = "a call of model x costs at most $0.16"
    assert str(denied) == "team: budget_held ($0.01 remaining, need $0.16); a call of model x costs at most $0.16"


def test_the_field_reached_is_true_for_an_error_reply_and_false_if_no_reply_arrived():
    assert not StoreUnavailable("no reply").reached
    refused = StoreError("OOM", fault="login")
    assert (refused.reached, refused.ambiguous, refused.fault) == (True, False, "login")


@pytest.mark.parametrize(
    "error",
    [
        BudgetExceeded(DENIAL),
        HoldConflict("conflict", state="released", released_by_operator=True),
        TooManyHolds("full", retry_after=9),
        StoreError("OOM", ambiguous=True, fault="protocol"),
        errors.DefinitionConflict("other", registered="usd", configured="tokens"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_pickled_and_unpickled_error_has_the_same_message_and_fields(error):
    received = pickle.loads(pickle.dumps(error))
    assert type(received) is type(error)
    assert (str(received), vars(received)) == (str(error), vars(error))


# -- messages ----------------------------------------------------------------------------------------------------------
def test_long_values_in_error_messages_are_shortened():
    assert shown("a" * 500) == "'" + "a" * 76 + "..."
    assert shown(HUGE) == "<int>"
    assert shown(Unshowable()) == "<Unshowable>"
    assert shown(Decimal("0.10")) == "0.10", "as it was written in JSON"


def test_if_many_budgets_exist_the_error_for_an_unknown_budget_lists_only_the_closest_names():
    names = [f"user:{number:05}" for number in range(20_000)] + ["team:quant", "x" * 128]
    message = str(unknown_budget("team:quantt", names))
    assert message == "unknown budget 'team:quantt'; this limiter has 20,002, the closest: team:quant"
    assert str(unknown_budget("nothing like it", names)) == "unknown budget 'nothing like it'; this limiter has 20,002"
    assert len(str(unknown_budget("user:1", names))) < 300
    assert len(str(unknown_budget("x" * 128, ["x" * 127 + str(number) for number in range(9)]))) < 900
    assert str(unknown_budget("agent", [])) == "unknown budget 'agent'; this limiter has none"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a1", "b2", "c3", "d4", "e5"], "this hold has: a1, b2, c3, d4, e5"),
        (["a1", "b2", "c3", "d4", "e5", "f6"], "this hold has 6, the closest: a1"),
    ],
)
def test_the_error_for_an_unknown_budget_lists_all_names_if_there_are_at_most_five(names, words):
    assert str(unknown_budget("a", names, "this hold")) == f"unknown budget 'a'; {words}"
