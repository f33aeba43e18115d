"""Properties of every listed model: no cost above the worst case, and no usage free by mistake."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction

import genai_prices
import pytest
from genai_prices import data_snapshot, types
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from ktrdr_budget.errors import UnknownPrice
from ktrdr_budget.metering.prices import ModelPrice, Prices
from ktrdr_budget.metering.rates import EXACT_CONTEXT
from ktrdr_budget.metering.usage import Usage

PRICES = Prices()
SNAPSHOT = data_snapshot.get_snapshot()
MODELS = [(provider.id, model.id) for provider in SNAPSHOT.providers for model in provider.models]
BEGINNING = datetime(2024, 1, 1, tzinfo=UTC)
TOKENS_MAX = 2_000_000
TIERS = ("", "default", "priority", "flex", "fast", "batch", "standard")
REQUESTED_TIERS = (None, *TIERS)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    counts = st.one_of(st.integers(0, 5000), st.integers(0, TOKENS_MAX))
    total = draw(counts)
    read = draw(st.integers(0, total))
    write = draw(st.integers(0, total - read))
    output = draw(counts)
    other = {"input_audio_tokens": draw(st.integers(0, total - read - write)), "output_image_tokens": output // 2}
    return Usage(total, output, read, write, draw(st.integers(0, write)), other=other)


def times() -> st.SearchStrategy[datetime]:
    return st.integers(0, 4 * 365 * 24 * 60).map(lambda minutes: BEGINNING + timedelta(minutes=minutes))


@settings(max_examples=400, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(
    st.sampled_from(MODELS),
    usages(),
    st.integers(0, 10_000),
    st.integers(0, 10_000),
    times(),
    st.sampled_from(REQUESTED_TIERS),
)
@example(("anthropic", "claude-haiku-5-5"), Usage(100_001, 5, 0, 100_001, 100_001), 0, 0, BEGINNING, None)
@example(("openai", "gpt-5"), Usage(10, 10), 0, 0, datetime(2026, 11, 1, tzinfo=UTC), None)
def test_a_usage_within_the_bounds_never_costs_more_than_the_worst_case(
    model, usage, more_in, more_out, at, requested_tier
):
    bounds = usage.input_tokens + more_in, usage.output_tokens + more_out
    try:
        worst = PRICES.worst_case(*model, *bounds, at, service_tier=requested_tier)
    except UnknownPrice:
        assume(False)
    # The provider may choose any tier unless the request names one; a full tier passes calls on to the standard one.
    served = ("", "default", "priority", "flex", "fast") if requested_tier is None else ("", requested_tier)
    if requested_tier is None and model[0] == "anthropic":
        served = ("",)  # its `fast` tier needs a request parameter
    for tier in served:
        used = replace(usage, service_tier=tier)
        assert PRICES.price(*model, used, at).nanos <= worst.nanos
    assert worst.source == f"genai-prices/{genai_prices.__version__}"


@settings(max_examples=300, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(st.sampled_from(MODELS), usages(), times(), st.sampled_from(TIERS))
def test_a_cost_equals_the_cost_computed_by_genai_prices_rounded_up(model, usage, at, tier):
    used = replace(usage, service_tier=tier)
    try:
        cost = PRICES.price(*model, used, at)
    except UnknownPrice:
        assume(False)
    theirs = genai_prices.calc_price(
        genai_prices.Usage(
            input_tokens=used.input_tokens,
            output_tokens=used.output_tokens,
            cache_read_tokens=used.cache_read_tokens,
            cache_write_tokens=used.cache_write_tokens,
            cache_write_1h_tokens=used.cache_write_1h_tokens,
            cache_audio_read_tokens=0,  # genai-prices needs an explicit 0 for non-overlapping parts
            **used.other,
        ),
        model[1],
        provider_id=model[0],
        genai_request_timestamp=at,
        price_context=dict.fromkeys(("service_tier", "speed", "processing"), tier) if tier else None,
    )
    assert cost.nanos == math.ceil(Fraction(theirs.total_price) * 10**9)
    assert sum(Fraction(line.amount) for line in cost.lines) == Fraction(theirs.total_price)


@settings(max_examples=200)
@given(
    usages(),
    st.lists(st.decimals(0, 1000, places=7), min_size=5, max_size=5),
    st.integers(0, 5000),
    st.integers(0, 5000),
)
def test_a_usage_never_costs_more_than_the_worst_case_of_a_configured_price(usage, given_prices, more_in, more_out):
    price = ModelPrice("p", "m", *given_prices)
    prices = Prices([price])
    worst = prices.worst_case("p", "m", usage.input_tokens + more_in, usage.output_tokens + more_out, BEGINNING)
    assert prices.price("p", "m", usage, BEGINNING).nanos <= worst.nanos


@pytest.mark.parametrize("input_tokens", [0, 1])
def test_input_or_output_tokens_are_refused_if_the_listed_model_has_no_price_for_them(input_tokens):
    now = datetime(2026, 11, 23, tzinfo=UTC)
    listed = [names for names in MODELS if PRICES.price_list.find(*names)]  # a few have other names only
    assert len(listed) > 2000
    for provider, model in listed:
        info = SNAPSHOT.find_provider_model(model, None, provider, None)[1]
        priced = vars(info.get_prices(now)).keys()
        usage = Usage(input_tokens, 1 - input_tokens)
        if ("input_mtok" if input_tokens else "output_mtok") in priced:
            PRICES.price(provider, model, usage, now)
        else:
            with pytest.raises(UnknownPrice):
                PRICES.price(provider, model, usage, now)


def test_listed_prices_change_only_at_whole_minutes():
    """Prices are cached per minute."""
    for provider in SNAPSHOT.providers:
        for model in provider.models:
            conditions = [] if isinstance(model.prices, types.ModelPrice) else model.prices
            for condition in conditions:
                if isinstance(condition.constraint, types.TimeOfDateConstraint):
                    ends = (condition.constraint.start_time, condition.constraint.end_time)
                    assert all(end.second == end.microsecond == 0 for end in ends), model.id


def test_the_decimal_precision_is_enough_for_exact_sums_of_prices():
    longest = 10**3 * 2**53 * 10**9
    assert len(str(longest)) * 2 < EXACT_CONTEXT.prec
