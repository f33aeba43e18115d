"""Equity, trades and their figures, compared with values computed by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrdr_budget.agent.trading import Account, figures, max_drawdown, sharpe_ratio, trade

sides = st.sampled_from([-1.0, -0.5, 0.0, 0.3, 1.0])
days = st.lists(st.tuples(sides, st.floats(-0.2, 0.2)), max_size=30)


def test_the_equity_after_one_trade_includes_its_costs():
    account = trade([0, 1, 1, 0], [0.5, 0.10, -0.05, 0.5], cost=0.01)
    bought = 0.99 * 1.10
    assert account.equity == pytest.approx((1, 1, bought, bought * 0.95, bought * 0.95 * 0.99))
    assert account.trades == pytest.approx((0.99 * 1.10 * 0.95 * 0.99 - 1,))


def test_the_reversal_of_a_position_ends_the_first_trade_and_begins_a_second_trade():
    account = trade([1, -1], [0.10, 0.10], cost=0.01)
    assert account.trades == pytest.approx((0.99 * 1.10 * 0.99 - 1, 0.99 * 0.90 * 0.99 - 1))
    assert account.equity[-1] == pytest.approx(0.99 * 1.10 * 0.99 * 0.99 * 0.90 * 0.99)


def test_resizing_a_position_incurs_costs_only_for_the_difference_and_begins_no_new_trade():
    account = trade([0.5, 1.0], [0.1, 0.1], cost=0.01)
    assert account.equity == pytest.approx((1, 0.995 * 1.05, 0.995 * 1.05 * 0.995 * 1.1 * 0.99))
    assert len(account.trades) == 1


def test_trading_at_constant_prices_loses_the_trading_costs():
    account = trade([1, 0, 1, 0], [0, 0, 0, 0], cost=0.01)
    assert account.trades == pytest.approx((0.99 * 0.99 - 1,) * 2)
    assert figures(account).win_rate == 0


def test_after_a_loss_of_all_equity_the_account_stays_at_zero():
    account = trade([-1, 1, 1], [2.0, 0.5, 0.5], cost=0)
    assert account.equity == (1, 0, 0, 0)
    assert figures(account).max_drawdown == 1


def test_the_drawdown_is_the_largest_fall_from_an_earlier_peak():
    assert max_drawdown((1.0, 1.2, 0.9, 1.1, 2.0, 1.6, 1.9)) == pytest.approx(0.25)
    assert max_drawdown((1.0, 0.5, 2.0, 1.5)) == pytest.approx(0.5)
    assert max_drawdown((1.0, 1.1, 1.2)) == 0
    assert max_drawdown(()) == 0


def test_the_sharpe_ratio_is_the_annualised_mean_return_divided_by_the_deviation():
    # Mean 0.01; deviation of a sample sqrt((0.01² + 0 + 0.01²) / 2) = 0.01.
    assert sharpe_ratio([0.0, 0.01, 0.02]) == pytest.approx(math.sqrt(252))
    assert sharpe_ratio([0.0, -0.01, -0.02]) == pytest.approx(-math.sqrt(252))
    assert sharpe_ratio([0.01, -0.01]) == 0


def test_the_sharpe_ratio_of_identical_returns_is_0():
    assert sharpe_ratio([]) == sharpe_ratio([0.1]) == sharpe_ratio([0.001] * 50) == 0


def test_the_figures_of_an_account_match_values_computed_by_hand():
    account = Account(equity=(1.0, 1.1, 0.99, 1.2), trades=(0.1, -0.1, 0.0, 0.2))
    found = figures(account)
    assert (found.win_rate, found.trades) == (0.5, 4)
    assert found.max_drawdown == pytest.approx(0.1)
    assert found.sharpe_ratio == pytest.approx(sharpe_ratio([0.1, -0.1, 1.2 / 0.99 - 1]))


def test_without_a_trade_the_win_rate_is_0():
    found = figures(trade([0, 0], [0.1, -0.1], cost=0.01))
    assert (found.win_rate, found.trades, found.max_drawdown, found.sharpe_ratio) == (0, 0, 0, 0)


@given(days=days, cost=st.floats(0, 0.01))
def test_the_product_of_all_trade_gains_equals_the_final_equity(days, cost: float):
    account = trade([side for side, _ in days], [market for _, market in days], cost=cost)
    assert math.prod(1 + gain for gain in account.trades) == pytest.approx(account.equity[-1])
    assert len(account.equity) == len(days) + 1
    assert 0 <= figures(account).win_rate <= 1
    assert 0 <= figures(account).max_drawdown <= 1


@given(days=days)
def test_higher_costs_never_raise_the_equity(days):
    positions, markets = [side for side, _ in days], [market for _, market in days]
    dear, free = trade(positions, markets, cost=0.01).equity, trade(positions, markets, cost=0).equity
    assert all(less <= more + 1e-12 for less, more in zip(dear, free, strict=True))


@given(days=days, more=days)
def test_later_days_do_not_change_earlier_equity(days, more):
    """The last day is an exception, because all positions are sold at the end of that day."""
    short = trade([side for side, _ in days], [market for _, market in days], cost=0.01)
    both = trade([side for side, _ in days + more], [market for _, market in days + more], cost=0.01)
    assert both.equity[: len(days)] == short.equity[: len(days)]
