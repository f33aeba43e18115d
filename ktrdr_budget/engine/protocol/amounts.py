"""The meaning of an amount for a hold of several budgets.

A scalar applies to every ``usd`` budget of the hold; the other budgets commit what they have reserved. If the hold has
no ``usd`` budget and only one ``count`` budget, the scalar applies to the ``count`` budget. A mapping has an amount for
each budget. A budget that is not in the mapping gets 0.

The amounts of a hold that was reserved by scope go by unit instead: each budget gets the amount in its unit. A scalar
is an amount in ``usd``. An amount in a unit that the hold does not have is ignored, because the caller need not know
which budgets apply. In a unit without an amount, a commit takes what was accrued, else what was reserved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from ktrdr_budget.engine.protocol.codes import COUNT, DOLLARS, FLAGS, CommitMode
from ktrdr_budget.engine.protocol.operations import CommitAmount
from ktrdr_budget.errors import InvalidAmount, InvalidArgument, unknown_budget
from ktrdr_budget.models import check_unit
from ktrdr_budget.money import USD, AmountIn, to_units

__all__ = ["NO_COUNTS", "Amounts", "check_amounts", "commit_amounts", "spread", "with_counts"]

Amounts = AmountIn | Mapping[str, AmountIn]
NO_COUNTS: Final[Mapping[str, AmountIn]] = MappingProxyType({})


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


def with_counts(amount: Amounts | None, counts: Mapping[str, AmountIn], units: Sequence[str]) -> Amounts | None:
    """Add amounts that were given as keywords, by unit.

    Args:
        units: the units of the hold's budgets; empty if the hold was not reserved by scope.

    Raises:
        InvalidArgument: the hold was not reserved by scope, or an amount is given twice.
    """
    if not counts:
        return amount
    if not units:
        names = ", ".join(counts)
        raise InvalidArgument(f"{names}: only the amounts of a hold that was reserved by scope go by unit")
    given = amount if isinstance(amount, Mapping) else {} if amount is None else {USD: amount}
    if twice := given.keys() & counts.keys():
        raise InvalidArgument(f"{', '.join(sorted(twice))} is given twice")
    return {**given, **counts}


def spread(amounts: Amounts, flags: Mapping[str, str], units: Sequence[str] = ()) -> dict[str, int]:
    """Convert amounts to whole units, by budget.

    Args:
        flags: for each budget of the hold, the letter of its unit (:data:`~.codes.FLAGS`).
        units: for each budget its unit, if the hold was reserved by scope; else empty.

    Raises:
        InvalidAmount: an amount is invalid in the unit of its budget.
        UnknownBudget: a mapping names a budget that the hold does not have.
        InvalidArgument: the hold was reserved by scope, and a mapping has a name that is not a unit.
    """
    if units:
        by_unit = _by_unit(amounts, flags, units)
        return {name: by_unit[unit] for name, unit in zip(flags, units, strict=True) if unit in by_unit}
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
    return dict.fromkeys(dollars, to_units(amounts, USD))


def _by_unit(amounts: Amounts, budgets: Mapping[str, object], units: Sequence[str]) -> dict[str, int]:
    """The whole units of amounts that go by unit."""
    given = amounts if isinstance(amounts, Mapping) else {USD: amounts}
    for name in given:
        if name in budgets and name not in units:
            raise InvalidArgument(
                f"the hold was reserved by scope, so its amounts go by unit ({', '.join(dict.fromkeys(units))}), "
                f"not by budget ({name})"
            )
        check_unit(name)
    return {unit: to_units(value, unit) for unit, value in given.items()}


def commit_amounts(
    segments: Mapping[str, tuple[str, int, int]], amount: Amounts | None, units: Sequence[str] = ()
) -> list[CommitAmount]:
    """The amounts that the budgets of a hold commit.

    Args:
        segments: for each budget, in the order of the hold: the letter of its unit, the reserved and the accrued units.
        amount: the argument of ``commit``. If ``None``, the accrued amounts are committed.
        units: for each budget its unit, if the hold was reserved by scope; else empty.
    """
    if units:
        return _commit_by_unit(segments, {} if amount is None else _by_unit(amount, segments, units), units)
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


def _commit_by_unit(
    segments: Mapping[str, tuple[str, int, int]], given: Mapping[str, int], units: Sequence[str]
) -> list[CommitAmount]:
    """In each unit the given amount; else the amount accrued in it, in any budget; else the reserved amount."""
    accrued_in: dict[str, int] = {}
    for unit, (_, _, accrued) in zip(units, segments.values(), strict=True):
        accrued_in[unit] = max(accrued_in.get(unit, 0), accrued)
    return [
        CommitAmount(CommitMode.EXACT, given[unit]) if unit in given
        else CommitAmount(CommitMode.ACCRUED, accrued_in[unit]) if accrued_in[unit]
        else CommitAmount(CommitMode.RESERVED, reserved)
        for unit, (_, reserved, _) in zip(units, segments.values(), strict=True)
    ]  # fmt: skip
