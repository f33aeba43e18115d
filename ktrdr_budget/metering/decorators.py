"""``@budgeted("agent", estimate="0.15")``: run a function only if its estimate fits a budget."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, TypeVar, cast

from ktrdr_budget.engine.protocol.amounts import Amounts, check_amounts
from ktrdr_budget.engine.replica import hold as holds
from ktrdr_budget.engine.replica.hold import HoldBase, OnError
from ktrdr_budget.errors import InvalidArgument
from ktrdr_budget.limiter import AsyncBudgetLimiter, AsyncHold
from ktrdr_budget.metering.defaults import default_async_limiter, default_limiter, set_default_limiter
from ktrdr_budget.metering.hold_arguments import (
    LABEL_CHARACTERS_MAX,
    Limiter,
    check_callable,
    check_hold_arguments,
    check_limiter_source,
)
from ktrdr_budget.models import TTL_DEFAULT_S, OnExpiry
from ktrdr_budget.money import AmountIn
from ktrdr_budget.sync import BudgetLimiter, Hold

__all__ = ["budgeted", "current_hold", "set_default_limiter"]

Function = TypeVar("Function", bound=Callable[..., Any])


def budgeted(
    budget: str | Mapping[str, AmountIn],
    estimate: AmountIn | Callable[..., AmountIn] | None = None,
    *,
    cost: Callable[[Any], Amounts] | None = None,
    limiter: Limiter | Callable[[], Limiter] | None = None,
    ttl: float = TTL_DEFAULT_S,
    on_expiry: OnExpiry = "charge",
    on_error: OnError = "release",
    operation: str | None = None,
) -> Callable[[Function], Function]:
    """Reserve an estimate before a sync or async function runs, and commit the function's cost after it.

    The cost is the first of these:

    - the value of ``cost(result)``, if ``cost`` is set;
    - the accrued amount, if the function accrued any by metered or guarded calls, or by
      ``current_hold().accrue("0.03")``;
    - the estimate.

    If the function raises, the accrued amount is committed. If nothing was accrued, the hold is released. With
    ``on_error="charge"``, the hold is left to expire instead.

    Args:
        budget: the name of one budget, or a mapping of budget names to estimates.
        estimate: dollars or a count, or a function that computes the estimate from the arguments of the decorated
            function. Omit ``estimate`` if ``budget`` is a mapping.
        cost: a function that computes the cost, an amount or a mapping, from the decorated function's result.
        limiter: an :class:`AsyncBudgetLimiter` for async functions, a :class:`BudgetLimiter` for sync functions, or a
            function that returns such a limiter. By default, the limiter of :func:`set_default_limiter` is used; if
            none is set, a limiter is created from the environment.
        operation: a label for the ledger; by default the function's name.
        ttl, on_expiry, on_error: as for ``limiter.hold(...)``.

    Raises:
        InvalidArgument: at definition: an argument is invalid, or the function is a generator.
        UnknownBudget: at definition: the limiter has no such budget.
        BudgetExceeded: at a call: the estimate does not fit; the function has not run.
    """
    check_limiter_source(limiter, [])
    check_hold_arguments(
        budget,
        estimate,
        limiter,
        ttl=ttl,
        on_expiry=on_expiry,
        on_error=on_error,
        operation=operation,
        computed=True,
    )
    if cost is not None:
        check_callable(cost, "cost", ["result"])

    def compute_estimate(arguments: tuple[Any, ...], named: dict[str, Any]) -> AmountIn | None:
        return estimate(*arguments, **named) if callable(estimate) else estimate

    def decorate(function: Function) -> Function:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise InvalidArgument(f"{_name(function)} is a generator: use limiter.hold(...) inside it")
        label = _name(function) if operation is None else operation
        label = label[:LABEL_CHARACTERS_MAX]
        options: dict[str, Any] = {"ttl": ttl, "on_expiry": on_expiry, "on_error": on_error, "operation": label}
        is_async = inspect.iscoroutinefunction(function)
        if isinstance(limiter, (AsyncBudgetLimiter, BudgetLimiter)):
            _check_kind(limiter, is_async, function)

        if is_async:

            @wraps(function)
            async def run_async(*arguments: Any, **named: Any) -> Any:
                chosen = _chosen(limiter, is_async, function)
                async with chosen.hold(budget, compute_estimate(arguments, named), **options) as hold:
                    result = await function(*arguments, **named)
                    if cost is not None and (amounts := _cost_to_commit(cost, result, hold)) is not None:
                        await hold.commit(amounts)
                    return result

            return cast(Function, run_async)

        @wraps(function)
        def run(*arguments: Any, **named: Any) -> Any:
            chosen = _chosen(limiter, is_async, function)
            with chosen.hold(budget, compute_estimate(arguments, named), **options) as hold:
                result = function(*arguments, **named)
                if cost is not None and (amounts := _cost_to_commit(cost, result, hold)) is not None:
                    hold.commit(amounts)
                return result

        return cast(Function, run)

    return decorate


def current_hold() -> AsyncHold | Hold:
    """Return the innermost hold around the calling code.

    The hold was opened by ``limiter.hold(...)``, ``@budgeted`` or ``hold_budget``.

    Raises:
        InvalidArgument: no hold is open here.
    """
    hold = holds.current_hold.get()
    if not isinstance(hold, (AsyncHold, Hold)):
        raise InvalidArgument("no hold is open here")
    return hold


def _name(function: Callable[..., Any]) -> str:
    """The qualified name of a function.

    For a ``functools.partial``, this is the name of the wrapped function; for another callable object, of its class.
    """
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _cost_to_commit(cost: Callable[[Any], Amounts], result: Any, hold: HoldBase) -> Amounts | None:
    """Compute the cost of a result. Return the amount to commit, or ``None`` if nothing is to be committed yet.

    If calls inside the hold, such as streams, are still in progress, the cost is only accrued. If the function ``cost``
    raises an error, the estimate is accrued, because the work is done.
    """
    try:
        amounts = cost(result)
        check_amounts(amounts)
    except BaseException:
        hold.accrue_units_to(hold.reserved_units)
        raise
    if hold.busy:
        hold.accrue_to(amounts)
        return None
    return amounts


def _chosen(limiter: Limiter | Callable[[], Limiter] | None, is_async: bool, function: Callable[..., Any]) -> Any:
    if limiter is None:
        return default_async_limiter() if is_async else default_limiter()
    if isinstance(limiter, (AsyncBudgetLimiter, BudgetLimiter)):
        return limiter
    return _check_kind(limiter(), is_async, function)


def _check_kind(limiter: object, is_async: bool, function: Callable[..., Any]) -> object:
    wanted = AsyncBudgetLimiter if is_async else BudgetLimiter
    if not isinstance(limiter, wanted):
        kind, article = ("an async", "an") if is_async else ("a sync", "a")
        raise InvalidArgument(
            f"{_name(function)} is {kind} function; its limiter must be {article} {wanted.__name__}, not {limiter!r}"
        )
    return limiter
