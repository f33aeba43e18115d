"""Rates: the exact cost of a usage at the prices of one model, and the highest cost within bounds."""

from __future__ import annotations

from decimal import Decimal

import pytest

from ktrdr_budget.errors import InvalidAmount, InvalidArgument
from ktrdr_budget.metering.rates import UNITS, Rate, Rates, Unit
from ktrdr_budget.metering.usage import Usage
from ktrdr_budget.money import MAX_UNITS, from_units

INPUT, CACHE_READ, CACHE_WRITE, OUTPUT, REQUESTS = UNITS
CACHE_WRITE_1H = Unit("cache_write_1h_tokens", 1_000_000, CACHE_WRITE.dimensions | {("duration", "1h")})
SEARCHES = Unit("web_searches", 1000, frozenset({("family", "web_searches")}))


def rates(*pairs: tuple[Unit, object]) -> Rates:
    return Rates([Rate(unit, Decimal(str(price))) for unit, price in pairs], "test")


def counts(cost) -> dict[str, int]:
    return {line.name: line.count for line in cost.lines}


def test_cached_input_tokens_are_charged_only_at_the_cache_price():
    cost = rates((INPUT, 10), (CACHE_WRITE, 12), (CACHE_WRITE_1H, 20), (CACHE_READ, 1)).cost(Usage(100, 0, 50, 30, 10))
    assert counts(cost) == {"input": 20, "cached input": 50, "cache write": 20, "cache write, 1 h": 10}
    assert cost.nanos == 20 * 10_000 + 50 * 1000 + 20 * 12_000 + 10 * 20_000


def test_cached_or_audio_tokens_without_a_price_are_charged_at_the_input_price():
    cost = rates((INPUT, 10)).cost(Usage(100, cache_read_tokens=50, other={"input_audio_tokens": 20}))
    assert counts(cost) == {"input": 100}


@pytest.mark.parametrize("usage", [Usage(1, 1), Usage(1, other={"web_searches": 1})])
def test_a_usage_without_a_price_has_no_cost(usage):
    assert rates((INPUT, 10)).cost(usage) is None
    assert rates((INPUT, 10), (OUTPUT, 1), (SEARCHES, 1)).cost(usage) is not None


def test_counts_of_zero_need_no_price():
    assert rates((INPUT, 10)).cost(Usage(1, 0, other={"web_searches": 0})).nanos == 10_000


def test_a_usage_with_more_audio_tokens_than_input_tokens_is_refused():
    audio = Unit("input_audio_tokens", 1_000_000, INPUT.dimensions | {("modality", "audio")})
    with pytest.raises(InvalidArgument, match="the parts of input_tokens add up to more than 10"):
        rates((INPUT, 10), (audio, 5)).cost(Usage(10, other={"input_audio_tokens": 11}))


@pytest.mark.parametrize(("tokens", "price"), [(1, 1), (100, 1), (101, 2), (200, 2), (201, 3)])
def test_the_number_of_input_tokens_decides_the_price_tier_of_all_input_tokens(tokens, price):
    tiered = Rates([Rate(INPUT, Decimal(1), ((100, Decimal(2)), (200, Decimal(3))))], "test")
    assert tiered.cost(Usage(tokens)).nanos == tokens * price * 1000
    assert tiered.cost_max(tokens, 0, {}).nanos == tokens * price * 1000


def test_the_highest_cost_counts_all_input_at_the_highest_input_price():
    table = rates((INPUT, 10), (CACHE_READ, 1), (CACHE_WRITE, 12), (OUTPUT, 50), (REQUESTS, "0.01"), (SEARCHES, 10))
    cost = table.cost_max(100, 20, {"web_searches": 3})
    assert counts(cost) == {"cache write": 100, "output": 20, "request": 1, "web searches": 3}
    assert cost.nanos == 100 * 12_000 + 20 * 50_000 + 10_000_000 + 3 * 10_000_000


def test_the_highest_cost_is_none_if_output_or_web_searches_have_no_price():
    assert rates((INPUT, 10)).cost_max(100, 1, {}) is None
    assert rates((INPUT, 10)).cost_max(100, 0, {"web_searches": 1}) is None


def test_the_highest_cost_uses_the_price_below_a_threshold_if_the_price_above_the_threshold_is_lower():
    discounted = Rates([Rate(INPUT, Decimal(5), ((100, Decimal(2)),))], "test")
    assert discounted.cost_max(150, 0, {}).nanos == 150 * 5000, "the call may have less input than its bound"


def test_a_cost_is_rounded_up_to_whole_nano_dollars():
    thirds = rates((INPUT, "0.0001"), (OUTPUT, "0.0001"))
    assert thirds.cost(Usage(5, 5)).nanos == 1
    assert thirds.cost(Usage(5, 6)).nanos == 2


def test_a_cost_at_or_above_the_maximum_amount_is_rejected():
    assert rates((REQUESTS, from_units(MAX_UNITS - 1))).cost(Usage()).nanos == MAX_UNITS - 1
    with pytest.raises(InvalidAmount, match="the cost is too large"):
        rates((REQUESTS, from_units(MAX_UNITS))).cost(Usage())


def test_rates_are_always_listed_in_the_same_order():
    table = rates((SEARCHES, 1), (REQUESTS, 1), (CACHE_WRITE_1H, 1), (OUTPUT, 1), (CACHE_READ, 1), (INPUT, 1))
    names = ["input", "cached input", "cache write, 1 h", "output", "request", "web searches"]
    assert [rate.name for rate in table] == names


def test_rates_with_equal_prices_and_an_equal_source_are_equal():
    assert rates((INPUT, 1), (OUTPUT, 2)) == rates((INPUT, 1), (OUTPUT, 2))
    assert rates((INPUT, 1)) != rates((INPUT, 2))
    assert rates((INPUT, 1)) != Rates([Rate(INPUT, Decimal(1))], "another list")
