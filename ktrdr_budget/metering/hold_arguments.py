"""The arguments of ``@budgeted`` and ``hold_budget``, checked where they are written and not at the first call."""

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
    """Refuse what a hold could not be made of.

    Args:
        budget: a name, or a mapping of names to estimates.
        estimate: an amount; ``None`` for a mapping.
        computed: it may be a function, called at each call.
        limiter: its budgets are looked at if it is one, and not a function.

    Raises:
        InvalidArgument: an argument is not usable.
        UnknownBudget: the limiter was not given such a budget.
    """
    check_ttl_ms(ttl)
    check_on_expiry(on_expiry)
    check_on_error(on_error)
    if operation is not None and not isinstance(operation, str):
        raise InvalidArgument(f"operation must be a text, not {shown(operation)}")
    if isinstance(operation, str) and not _is_utf8(operation):
        raise InvalidArgument(f"operation must be a text that UTF-8 can encode, not {shown(operation)}")
    for name, amount in _estimates(budget, estimate).items():
        unknown_yet = computed and callable(amount)
        if unknown_yet:
            check_callable(amount, "estimate")
        else:
            check_amounts(amount, positive=True)
        if isinstance(limiter, Limiter):
            if name not in limiter.budgets:
                raise unknown_budget(name, limiter.budgets)
            if not unknown_yet:
                to_units(amount, limiter.budgets[name].unit, positive=True)


def _estimates(budget: object, estimate: Any) -> dict[str, Any]:
    if isinstance(budget, str):
        given = {budget: estimate}
    elif not isinstance(budget, Mapping) or not budget:
        raise InvalidArgument(f"budget must be a name, or a mapping of names to estimates, not {shown(budget)}")
    elif estimate is not None:
        raise InvalidArgument("the estimates are in the mapping; give no other")
    else:
        given = dict(budget)
        if any(map(callable, given.values())):
            raise InvalidArgument("the estimates of a mapping must be amounts, not functions")
    for name, amount in given.items():
        check_name(name, "budget name")
        if amount is None:
            raise InvalidArgument(f"no estimate given for {name!r}")
    return given


def check_callable(function: object, what: str, arguments: Sequence[str] | None = None) -> None:
    """Refuse what is no plain function of so many arguments.

    Args:
        arguments: the names of what it is called with; ``None`` if that is not known.

    Raises:
        InvalidArgument: it cannot be called so, or is a coroutine function, which nothing here awaits.
    """
    wanted = f"{what} must be a function" + ("" if arguments is None else f" of ({', '.join(arguments)})")
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise InvalidArgument(f"{wanted}, not {shown(function)}")
    try:
        if arguments is not None:
            inspect.signature(function).bind(*arguments)
    except TypeError:
        raise InvalidArgument(f"{wanted}, not {shown(function)}") from None
    except ValueError:  # some built-in functions have no signature
        pass


def check_limiter_source(limiter: object, arguments: Sequence[str]) -> None:
    """Refuse what is neither a limiter, nor a function that returns one, nor ``None``.

    Raises:
        InvalidArgument: see :func:`check_callable`; a class is no such function, either.
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
