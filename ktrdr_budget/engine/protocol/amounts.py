"""The meaning of an amount for a hold of several budgets.

A scalar applies to every ``usd`` budget of the hold; the other budgets commit what they have reserved. If the hold has
no ``usd`` budget and only one ``count`` budget, the scalar applies to the ``count`` budget. A mapping has an amount for
each budget. A budget that is not in the mapping gets 0.
"""

from __future__ import annotations

from collections.abc import Mapping

from ktrdr_budget.engine.protocol.codes import COUNT, DOLLARS, FLAGS, CommitMode
from ktrdr_budget.engine.protocol.operations import CommitAmount
from ktrdr_budget.errors import InvalidAmount, InvalidArgument, unknown_budget
from ktrdr_budget.money import AmountIn, to_units

__all__ = ["Amounts", "check_amounts", "commit_amounts", "spread"]

Amounts = AmountIn | Mapping[str, AmountIn]


def check_amounts(amounts: Amounts | None, *, positive: bool = False) -> None:
    """Reject a value that is not an amount in any unit. The budgets of the hold need not be known.

    Raises:
        InvalidAmount: a value is not a non-negative number, or is 0 although ``positive`` is set.
    """
    per_budget = isinstance(amounts, Mapping)
    values: list[AmountIn] = list(amounts.values()) if per_budget else [] if amounts is None else [amounts]  # type: ignore[union-attr,list-item]
    for value in values:
        try:
            to_units(value, "usd", positive=positive)
        except InvalidAmount as error:
            try:
                to_units(value, "count", positive=positive)  # a count may be larger than dollars may
            except InvalidAmount:
                if per_budget:
                    raise
                raise error from None


def spread(amounts: Amounts, flags: Mapping[str, str]) -> dict[str, int]:
    """Convert amounts to whole units, by budget.

    Args:
        flags: for each budget of the hold, the letter of its unit (:data:`~.codes.FLAGS`).

    Raises:
        InvalidAmount: an amount is invalid in the unit of its budget.
        UnknownBudget: a mapping names a budget that the hold does not have.
    """
    if isinstance(amounts, Mapping):
        for name in amounts:
            if name not in flags:
                raise unknown_budget(name, flags, "this hold")
        return {name: to_units(value, FLAGS[flags[name]]) for name, value in amounts.items()}
    dollars = [name for name, flag in flags.items() if flag == DOLLARS]
    if not dollars:
        counts = [name for name, flag in flags.items() if flag == COUNT]
        if len(counts) > 1:
            raise InvalidArgument(f"a scalar amount is ambiguous for {', '.join(counts)}: give a mapping")
        return {name: to_units(amounts, "count") for name in counts}
    units = to_units(amounts, "usd")
    return dict.fromkeys(dollars, units)


def commit_amounts(segments: Mapping[str, tuple[str, int, int]], amount: Amounts | None) -> list[CommitAmount]:
    """The amounts that the budgets of a hold commit.

    Args:
        segments: for each budget, in the order of the hold: the letter of its unit, the reserved and the accrued units.
        amount: the argument of ``commit``. If ``None``, the accrued amounts are committed.
    """
    if amount is None:
        any_accrued = any(accrued for _, _, accrued in segments.values())
        return [
            CommitAmount(CommitMode.RESERVED, reserved)
            if any_accrued and flag == COUNT and not accrued
            else CommitAmount(CommitMode.ACCRUED, accrued)
            for flag, reserved, accrued in segments.values()
        ]
    given = spread(amount, {name: flag for name, (flag, _, _) in segments.items()})
    if isinstance(amount, Mapping):
        return [CommitAmount(CommitMode.EXACT, given.get(name, 0)) for name in segments]
    return [
        CommitAmount(CommitMode.EXACT, given[name]) if name in given else CommitAmount(CommitMode.RESERVED, reserved)
        for name, (_, reserved, _) in segments.items()
    ]
