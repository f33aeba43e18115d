"""Usage: the billed counts of one call, where each total includes its parts."""

from __future__ import annotations

import pytest

from ktrdr_budget.errors import InvalidArgument
from ktrdr_budget.metering.usage import Usage


def test_all_counts_of_a_usage_are_zero_by_default():
    assert Usage() == Usage(0, 0, 0, 0, 0, service_tier="", other={})


def test_the_total_of_a_usage_includes_cached_tokens_only_once():
    usage = Usage(1000, 200, cache_read_tokens=600, cache_write_tokens=400, other={"output_image_tokens": 100})
    assert usage.total_tokens == 1200


@pytest.mark.parametrize(
    "counts",
    [
        {"input_tokens": -1},
        {"output_tokens": 1.0},
        {"output_tokens": True},
        {"input_tokens": 10, "cache_read_tokens": 6, "cache_write_tokens": 5},
        {"input_tokens": 10, "cache_write_tokens": 5, "cache_write_1h_tokens": 6},
        {"other": {"web_searches": -1}},
    ],
)
def test_a_usage_with_an_invalid_count_or_a_part_above_the_total_is_rejected(counts):
    with pytest.raises(InvalidArgument):
        Usage(**counts)


def test_the_cached_tokens_of_a_usage_can_equal_the_input_tokens():
    usage = Usage(10, cache_read_tokens=4, cache_write_tokens=6, cache_write_1h_tokens=6)
    assert usage.cache_read_tokens + usage.cache_write_tokens == usage.input_tokens


def test_a_usage_with_web_searches_can_be_a_dictionary_key():
    assert {Usage(1, other={"web_searches": 1}): "a"}[Usage(1, other={"web_searches": 1})] == "a"
