"""Checks of the arguments of ``@budgeted`` and ``hold_budget``, made when the arguments are given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ktrdr_budget.engine.protocol.amounts import check_amounts
from ktrdr_budget.engine.replica.hold import check_on_error
from ktrdr_budget.errors import InvalidArgument, shown, unknown_budget
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.models import check_name, check_on_expiry, check_ttl_ms
from ktrdr_budget.money import to_units
from ktrdr_budget.sync import BudgetLimiter

__all__ = ["LABEL_CHARACTERS_MAX", "Limiter", "check_callable", "check_hold_arguments", "check_limiter_source"]

LABEL_CHARACTERS_MAX = 256
Limiter = AsyncBudgetLimiter | BudgetLimiter


def check_hold_arguments(
    budget: object,
    estimate: object,
    limiter: object,
    *,
    ttl: object,
    on_expiry: object,
    on_error: object,
    operation: object,
    computed: bool = False,
) -> None:
    """Check the arguments of a hold before it is created.

    Args:
        budget: a name, or a mapping of names to estimates.
        estimate: an amount; ``None`` if ``budget`` is a mapping.
        computed: whether ``estimate`` may be a function, which computes the estimate at each call.
        limiter: the limiter, which must have the budgets; this is not checked if ``limiter`` is a function or ``None``.

    Raises:
        InvalidArgument: an argument is invalid.
        UnknownBudget: the limiter has no such budget.
    """
    check_ttl_ms(ttl)
    check_on_expiry(on_expiry)
    check_on_error(on_error)
    if operation is not None and not isinstance(operation, str):
        raise InvalidArgument(f"operation must be a string, not {shown(operation)}")
    if isinstance(operation, str) and not _is_utf8(operation):
        raise InvalidArgument(f"operation must be encodable as UTF-8, not {shown(operation)}")
    for name, amount in _estimates(budget, estimate).items():
        is_function = computed and callable(amount)
        if is_function:
            check_callable(amount, "estimate")
        else:
            check_amounts(amount, positive=True)
        if isinstance(limiter, Limiter):
            if name not in limiter.budgets:
                raise unknown_budget(name, limiter.budgets)
            if not is_function:
                to_units(amount, limiter.budgets[name].unit, positive=True)


def _estimates(budget: object, estimate: Any) -> dict[str, Any]:
    if isinstance(budget, str):
        given = {budget: estimate}
    elif not isinstance(budget, Mapping) or not budget:
        raise InvalidArgument(f"budget must be a name, or a mapping of names to estimates, not {shown(budget)}")
    elif estimate is not None:
        raise InvalidArgument("a mapping contains the estimates; omit `estimate`")
    else:
        given = dict(budget)
        if any(map(callable, given.values())):
            raise InvalidArgument("the estimates of a mapping must be amounts, not functions")
    for name, amount in given.items():
        check_name(name, "budget name")
        if amount is None:
            raise InvalidArgument(f"no estimate given for {name!r}")
    return given


def check_callable(function: object, parameter: str, arguments: Sequence[str] | None = None) -> None:
    """Check that ``function`` is a sync function that accepts these arguments.

    Args:
        parameter: the name of the parameter, for the error.
        arguments: the names of the positional arguments. If ``None``, the arguments are unknown and are not checked.

    Raises:
        InvalidArgument: the function does not accept the arguments, or is a coroutine function.
    """
    expected = f"{parameter} must be a function" + ("" if arguments is None else f" of ({', '.join(arguments)})")
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise InvalidArgument(f"{expected}, not {shown(function)}")
    try:
        if arguments is not None:
            inspect.signature(function).bind(*arguments)
    except TypeError:
        raise InvalidArgument(f"{expected}, not {shown(function)}") from None
    except ValueError:  # some built-in functions have no signature
        pass


def check_limiter_source(limiter: object, arguments: Sequence[str]) -> None:
    """Check that ``limiter`` is a limiter, a function that returns one, or ``None``.

    Raises:
        InvalidArgument: ``limiter`` is none of these, or is a class.
    """
    if limiter is None or isinstance(limiter, Limiter):
        return
    if isinstance(limiter, type) or not callable(limiter):
        raise InvalidArgument(f"limiter must be an AsyncBudgetLimiter or a BudgetLimiter, not {shown(limiter)}")
    check_callable(limiter, "limiter", arguments)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
