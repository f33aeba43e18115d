"""Features and positions: values computed by hand, and the absence of look-ahead."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from ktrdr_budget.agent.market import generate_prices
from ktrdr_budget.agent.strategies import (
    STRATEGIES,
    WARM_UP_DAYS,
    average_distance,
    features,
    momentum,
    positions,
    volatility,
)

CLOSES = generate_prices(5, 200).closes


def go_on() -> None:
    """A pause callback that never stops the computation."""


def middle(name: str) -> dict[str, float]:
    """Parameters in the middle of their ranges."""
    return {
        key: (low + high) // 2 if isinstance(low, int) and isinstance(high, int) else (low + high) / 2
        for key, (low, high) in STRATEGIES[name].ranges.items()
    }


def highest(name: str) -> dict[str, float]:
    """Parameters with the longest windows."""
    return {key: high for key, (_, high) in STRATEGIES[name].ranges.items()}


def test_the_features_match_values_computed_by_hand():
    closes = (100.0, 110.0, 99.0, 108.9)
    assert momentum(closes, 3, 2) == pytest.approx(108.9 / 110 - 1)
    assert average_distance(closes, 3, 3) == pytest.approx(108.9 / ((110 + 99 + 108.9) / 3) - 1)
    assert volatility(closes, 3, 3) == pytest.approx(0.1)
    assert volatility(closes, 2, 1) == pytest.approx(0.1)


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_day_after_the_warm_up_has_a_row_with_every_feature(name: str):
    rows = features(CLOSES, highest(name), go_on)
    windows = [key for key in STRATEGIES[name].ranges if key.endswith("_days")]
    assert len(rows) == len(CLOSES) - WARM_UP_DAYS
    assert {len(row) for row in rows} == {len(windows)}
    assert max(high for key, (_, high) in STRATEGIES[name].ranges.items() if key in windows) <= WARM_UP_DAYS


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("today", [WARM_UP_DAYS, 150, 180])
def test_later_prices_do_not_change_earlier_features_or_positions(name: str, today: int):
    """Prices of later days change neither the features nor the positions of a day."""
    parameters = highest(name)
    known = features(CLOSES, parameters, go_on)[: today - WARM_UP_DAYS + 1]
    chances = [0.5 + 0.1 * math.sin(day) for day in range(len(known))]
    held = positions(STRATEGIES[name], parameters, CLOSES[: today + 1], chances)
    for another in ([1e9] * 100, [0.01] * 100, list(generate_prices(6, 100).closes)):
        changed = (*CLOSES[: today + 1], *another)
        assert features(changed, parameters, go_on)[: len(known)] == known
        later = [*chances, *[0.9] * len(another)]
        assert positions(STRATEGIES[name], parameters, changed, later)[: len(held)] == held


def test_a_changed_price_changes_only_the_features_of_the_same_day():
    changed = (*CLOSES[:-1], CLOSES[-1] * 1.01)
    before, after = (features(closes, middle("momentum"), go_on) for closes in (CLOSES, changed))
    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]


def test_a_long_only_strategy_buys_only_if_the_probability_is_above_the_threshold():
    parameters = middle("trend_following") | {"threshold": 0.52}
    assert positions(STRATEGIES["trend_following"], parameters, CLOSES, [0.53, 0.52, 0.5, 0.1]) == [1, 0, 0, 0]


def test_a_short_position_opens_only_if_the_probability_is_below_the_opposite_threshold():
    parameters = middle("momentum") | {"threshold": 0.52}
    assert positions(STRATEGIES["momentum"], parameters, CLOSES, [0.53, 0.5, 0.48, 0.47]) == [1, 0, 0, -0.5]


def test_volatility_targeting_shrinks_positions_as_volatility_rises():
    strategy, parameters = STRATEGIES["volatility_targeting"], middle("volatility_targeting")
    parameters |= {"volatility_days": 10, "target_volatility": 0.1, "threshold": 0.5}
    calm = [100.0 * (1 + 0.001 * (day % 2)) for day in range(30)]
    wild = [100.0 * (1 + 0.01 * (day % 2)) for day in range(30)]
    assert positions(strategy, parameters, calm, [0.6]) == [1.0]
    yearly = math.sqrt(sum((b / a - 1) ** 2 for a, b in pairwise(wild[-11:])) / 10 * 252)
    assert positions(strategy, parameters, wild, [0.6]) == [round(0.1 / yearly, 1)]
    assert 0 < round(0.1 / yearly, 1) < 1
    assert positions(strategy, parameters, wild, [0.4]) == [0.0]


def test_the_pause_callback_can_stop_the_computation_of_features():
    class Enough(Exception):
        pass

    def stop() -> None:
        raise Enough

    with pytest.raises(Enough):
        features(CLOSES, middle("momentum"), stop)
