"""Arguments of ``@budgeted`` and ``hold_budget``: a mistake is an error at the definition, not at the first call."""

from __future__ import annotations

from typing import Any

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter, UnknownBudget
from ktrdr_budget.errors import InvalidAmount, InvalidArgument
from ktrdr_budget.metering.hold_arguments import check_callable, check_hold_arguments, check_limiter_source

BUDGETS = [Budget("agent", "5.00"), Budget("tokens", 1000, unit="tokens")]


def check(budget: Any = "agent", estimate: Any = None, limiter: Any = None, **options: Any) -> None:
    defaults = {"ttl": 900.0, "on_expiry": "charge", "on_error": "release", "operation": None}
    check_hold_arguments(budget, estimate, limiter, **{**defaults, **options})


@pytest.mark.parametrize(
    ("budget", "estimate", "options"),
    [
        ("agent", "0.15", {}),
        ({"agent": "0.15", "tokens": 100}, None, {}),
        ("agent", "0.15", {"ttl": 1, "on_expiry": "accrued", "on_error": "charge", "operation": "chat"}),
        ("agent", lambda pages: pages, {"computed": True}),
    ],
)
def test_valid_arguments_are_accepted(budget, estimate, options):
    check(budget, estimate, AsyncBudgetLimiter("redis://store", BUDGETS), **options)


@pytest.mark.parametrize(
    ("budget", "estimate", "options", "message"),
    [
        ("agent", None, {}, "no estimate given for 'agent'"),
        ({"agent": None}, None, {}, "no estimate given for 'agent'"),
        ({"agent": 1}, 1, {}, "a mapping contains the estimates"),
        ({"agent": lambda: 1}, None, {"computed": True}, "the estimates of a mapping must be amounts, not functions"),
        ({}, None, {}, "budget must be a name, or a mapping of names to estimates"),
        (7, 1, {}, "budget must be a name, or a mapping of names to estimates, not 7"),
        ("a b", 1, {}, "budget name"),
        ("agent", 1, {"operation": 7}, "operation must be a string, not 7"),
        ("agent", 1, {"operation": "\ud800"}, "operation must be encodable as UTF-8"),
        ("agent", 1, {"ttl": 0}, "ttl"),
        ("agent", 1, {"on_expiry": "ignore"}, "on_expiry"),
        ("agent", 1, {"on_error": "ignore"}, "on_error"),
    ],
)
def test_the_error_message_names_the_invalid_argument(budget, estimate, options, message):
    with pytest.raises(InvalidArgument, match=message):
        check(budget, estimate, **options)


def test_a_function_is_rejected_as_the_estimate_unless_functions_are_allowed():
    with pytest.raises(InvalidAmount):
        check("agent", lambda: "0.15")


def test_a_budget_unknown_to_the_limiter_and_a_fraction_of_a_token_are_rejected():
    limiter = AsyncBudgetLimiter("redis://store", BUDGETS)
    with pytest.raises(UnknownBudget):
        check("nothing", lambda: 1, limiter, computed=True)
    with pytest.raises(InvalidAmount):
        check("tokens", "0.5", limiter)
    check("tokens", "0.5")  # without a limiter, the unit is not known yet


def test_a_function_with_the_wrong_number_of_parameters_is_rejected():
    check_callable(lambda result: result, "cost", ["result"])
    with pytest.raises(InvalidArgument, match=r"^cost must be a function of \(result\), not"):
        check_callable(lambda: 1, "cost", ["result"])
    check_callable(lambda a, b: a, "estimate")  # its arguments are those of the decorated function
    check_callable(max, "cost", ["result"])  # a built-in function without a signature


@pytest.mark.parametrize("function", ["0.15", None])
def test_a_value_that_is_not_a_function_is_rejected(function):
    with pytest.raises(InvalidArgument, match="^estimate must be a function, not"):
        check_callable(function, "estimate")


def test_a_coroutine_function_is_rejected_as_the_cost_function():
    async def cost(result): ...

    with pytest.raises(InvalidArgument, match="must be a function"):
        check_callable(cost, "cost", ["result"])


@pytest.mark.parametrize("source", [None, AsyncBudgetLimiter("redis://store", BUDGETS), lambda request: None])
def test_the_limiter_argument_can_be_none_or_a_limiter_or_a_function(source):
    check_limiter_source(source, ["request"])


@pytest.mark.parametrize("source", ["redis://store", BudgetLimiter, lambda: None])
def test_an_invalid_limiter_argument_is_rejected(source):
    with pytest.raises(InvalidArgument, match="^limiter must be"):
        check_limiter_source(source, ["request"])
