"""Simulated trading with costs, and the figures of its result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from ktrdr_budget.agent.phases import Backtest

__all__ = ["TRADING_COST", "Account", "figures", "max_drawdown", "sharpe_ratio", "trade"]

TRADING_COST = 0.0005
"""Cost of a purchase or sale, as a fraction of its value."""
TRADING_DAYS = 252


@dataclass(frozen=True)
class Account:
    """The equity and the trades of an account whose equity starts at 1."""

    equity: tuple[float, ...]
    """Equity at the start, then after each day."""
    trades: tuple[float, ...]
    """Gain of each trade as a fraction of the equity, after costs: 0.02 is a profit of 2 %."""


def trade(positions: Sequence[float], returns: Sequence[float], cost: float = TRADING_COST) -> Account:
    """Trade the positions: each position earns the return of the following day. The last position is sold at the end.

    A trade lasts while the position keeps its sign. The size of the position may change meanwhile.

    Args:
        positions: fractions of the equity. A negative position is short.
        returns: returns of the instrument from the close of each position to the next close.
        cost: cost of a purchase or sale, as a fraction of its value.
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
    """Compute the figures that the gate and the assessment use. If there was no trade, the win rate is 0."""
    wins = sum(gain > 0 for gain in account.trades)
    return Backtest(
        win_rate=wins / len(account.trades) if account.trades else 0.0,
        max_drawdown=max_drawdown(account.equity),
        sharpe_ratio=sharpe_ratio([_gain(*days) for days in pairwise(account.equity)]),
        trades=len(account.trades),
    )


def max_drawdown(equity: Sequence[float]) -> float:
    """Largest fall from a peak, as a fraction of that peak, 0 to 1."""
    peak, deepest = 0.0, 0.0
    for value in equity:
        peak = max(peak, value)
        deepest = max(deepest, 1 - value / peak if peak else 0.0)
    return deepest


def sharpe_ratio(returns: Sequence[float]) -> float:
    """Annualised Sharpe ratio (252 days) of daily returns, with a risk-free rate of 0.

    The result is 0 if the ratio is undefined: there are fewer than two days, or all returns are identical.
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
