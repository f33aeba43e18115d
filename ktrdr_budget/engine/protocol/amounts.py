"""The meaning of an amount for a hold of several budgets.

A scalar applies to every ``usd`` budget of the hold; counts then commit their reservation. (In a hold without dollars
and with a single count, the scalar applies to that count.) A mapping has an amount per budget; a budget that it omits
gets 0.
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
    """Refuse a value that is no amount in any unit, before the hold's budgets are known.

    Raises:
        InvalidAmount: not a non-negative number, or zero although ``positive``.
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
    """Whole units of each budget that the amounts name; ``flags`` are those of the hold's budgets.

    Raises:
        InvalidAmount: an amount is not usable for its budget.
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
    """The amount that each budget of a hold commits.

    Args:
        segments: per budget its flag, reserved and accrued units, in the hold's order.
        amount: as given to ``commit``; ``None`` commits what was accrued.
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
