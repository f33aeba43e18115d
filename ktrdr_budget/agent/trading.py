"""Trading positions on past returns, with costs: the equity, and the figures that judge it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from ktrdr_budget.agent.phases import Backtest

__all__ = ["TRADING_COST", "Account", "figures", "max_drawdown", "sharpe_ratio", "trade"]

TRADING_COST = 0.0005
"""Of buying or selling, as a part of what is bought or sold."""
TRADING_DAYS = 252


@dataclass(frozen=True)
class Account:
    """How an account of 1 developed."""

    equity: tuple[float, ...]
    """At the start, then after each day."""
    trades: tuple[float, ...]
    """What each trade did to the equity, as a part of it, costs included: 0.02 is a profit of 2 %."""


def trade(positions: Sequence[float], returns: Sequence[float], cost: float = TRADING_COST) -> Account:
    """Holds each position for the return that follows it. The last one is sold at the end.

    A trade lasts as long as the position stays on its side, whatever its size.

    Args:
        positions: as a part of the equity; negative is short.
        returns: of the instrument, from the close at which the position was taken to the next.
        cost: of buying or selling, as a part of what is bought or sold.
    """
    value, held, opened_at = 1.0, 0.0, 1.0
    equity, trades = [value], []
    for position, market in zip(positions, returns, strict=True):
        if _side(position) == _side(held):
            value *= 1 - cost * abs(position - held)
        else:
            value *= 1 - cost * abs(held)
            if held:
                trades.append(_gain(opened_at, value))
            opened_at = value
            value *= 1 - cost * abs(position)
        value = max(0.0, value * (1 + position * market))
        held = position
        equity.append(value)
    if held:
        equity[-1] = value * (1 - cost * abs(held))
        trades.append(_gain(opened_at, equity[-1]))
    return Account(tuple(equity), tuple(trades))


def figures(account: Account) -> Backtest:
    """What the gate and the assessment look at. Without a trade, the win rate is 0."""
    wins = sum(gain > 0 for gain in account.trades)
    return Backtest(
        win_rate=wins / len(account.trades) if account.trades else 0.0,
        max_drawdown=max_drawdown(account.equity),
        sharpe_ratio=sharpe_ratio([_gain(*days) for days in pairwise(account.equity)]),
        trades=len(account.trades),
    )


def max_drawdown(equity: Sequence[float]) -> float:
    """The deepest fall from a peak, as a part of that peak, 0 to 1."""
    peak, deepest = 0.0, 0.0
    for value in equity:
        peak = max(peak, value)
        deepest = max(deepest, 1 - value / peak if peak else 0.0)
    return deepest


def sharpe_ratio(returns: Sequence[float]) -> float:
    """Mean over standard deviation of daily returns, annualised (252 days), above a riskless rate of 0.

    0 where it is not defined: fewer than two days, or returns that do not differ.
    """
    if len(returns) < 2:
        return 0.0
    mean = fmean(returns)
    variance = math.fsum((value - mean) ** 2 for value in returns) / (len(returns) - 1)
    return mean / math.sqrt(variance) * math.sqrt(TRADING_DAYS) if variance > 1e-18 else 0.0


def _gain(before: float, after: float) -> float:
    return after / before - 1 if before else 0.0


def _side(position: float) -> int:
    return (position > 0) - (position < 0)
