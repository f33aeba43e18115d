"""Price lookup: configured prices, then the price list, then a fixed cost; a model without a price is refused."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from genai_prices import data_snapshot, types

from ktrdr_budget.errors import InvalidAmount, InvalidArgument, UnknownPrice
from ktrdr_budget.metering.prices import ModelPrice, Prices, load_prices
from ktrdr_budget.metering.usage import Usage
from ktrdr_budget.money import to_units

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
SCRIPTED = ModelPrice("scripted", "ktrdr-scripted-1", "15", "75")


def test_a_configured_price_is_used_if_genai_prices_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    cost = Prices([SCRIPTED]).price("scripted", "ktrdr-scripted-1", Usage(1000, 200), NOW)
    assert (cost.amount, cost.source) == (Decimal("0.03"), "configured")


def test_a_configured_price_takes_precedence_over_the_price_list():
    prices = Prices([ModelPrice("openai", "gpt-4o-mini", "1", "2")])
    assert prices.price("openai", "gpt-4o-mini", Usage(1_000_000), NOW).amount == Decimal("1.00")


def test_each_kind_of_token_is_charged_at_its_configured_price():
    price = ModelPrice("p", "m", "1", "8", cached_input="0.1", cache_write="1.25", request="0.01")
    cost = Prices([price]).price("p", "m", Usage(1000, 100, 500, 300), NOW)
    assert [(line.name, line.count, line.price, line.per) for line in cost.lines] == [
        ("input", 200, Decimal(1), 1_000_000),
        ("cached input", 500, Decimal("0.1"), 1_000_000),
        ("cache write", 300, Decimal("1.25"), 1_000_000),
        ("output", 100, Decimal(8), 1_000_000),
        ("request", 1, Decimal("0.01"), 1),
    ]
    assert cost.nanos == 200 * 1000 + 500 * 100 + 300 * 1250 + 100 * 8000 + 10_000_000
    assert sum(line.amount for line in cost.lines) == cost.amount


def test_cached_tokens_cost_as_much_as_input_tokens_if_no_cache_price_is_configured():
    price = Prices([ModelPrice("p", "m", "3", "8")])
    assert price.price("p", "m", Usage(1000, 0, 500, 300), NOW).nanos == 1000 * 3000


def test_a_cost_is_rounded_up_after_all_parts_are_added():
    prices = Prices([ModelPrice("p", "m", "0.0004", "0.0003")])
    assert prices.price("p", "m", Usage(1, 0), NOW).nanos == 1
    assert prices.price("p", "m", Usage(1, 2), NOW).nanos == 1
    assert prices.price("p", "m", Usage(1, 3), NOW).nanos == 2


def test_a_price_given_as_a_float_causes_no_rounding_error():
    assert Prices([ModelPrice("p", "m", 0.1, 0.2)]).price("p", "m", Usage(3, 0), NOW).nanos == 300


@pytest.mark.parametrize(
    ("model", "expected"),
    [("gpt-9", 4000), ("gpt-9-mini", 3000), ("gpt-9-mini-2026", 2000), ("gpt-8", 1000), ("GPT-9", 4000)],
)
def test_a_model_gets_the_price_of_the_longest_matching_name_or_prefix(model, expected):
    table = [
        ModelPrice("p", "gpt-*", 1, 1),
        ModelPrice("p", "gpt-9-mini-*", 2, 1),
        ModelPrice("p", "gpt-9-mini*", 3, 1),
        ModelPrice("p", "gpt-9", 9, 1),
        ModelPrice("p", "gpt-9", 4, 1),
    ]
    prices = Prices(table)
    assert prices.price("p", model, Usage(1), NOW).nanos == expected


def test_a_configured_price_does_not_apply_to_a_different_provider():
    with pytest.raises(UnknownPrice):
        Prices([SCRIPTED]).price("other", "ktrdr-scripted-1", Usage(1), NOW)


# -- models without a price --------------------------------------------------------------------------------------------

UNPRICED = [
    ("no-provider", "no-model"),
    ("openai", "gpt-99"),
    ("openrouter", "deepseek/deepseek-r1:free"),  # listed without any price
    ("groq", "whisper-large-v3"),  # priced by the hour: its tokens would cost nothing
]


@pytest.mark.parametrize(("provider", "model"), UNPRICED)
def test_a_model_without_a_price_is_refused(provider, model):
    prices = Prices()
    with pytest.raises(UnknownPrice, match=f"{provider}/{model}"):
        prices.price(provider, model, Usage(1000, 10), NOW)
    with pytest.raises(UnknownPrice, match=f"{provider}/{model}"):
        prices.worst_case(provider, model, 1000, 10, NOW)


@pytest.mark.parametrize(("provider", "model"), UNPRICED)
def test_a_fixed_cost_applies_to_a_model_without_a_price(provider, model):
    prices = Prices(fixed_cost="0.02")
    for cost in (prices.price(provider, model, Usage(5), NOW), prices.worst_case(provider, model, 5, 5, NOW)):
        assert (cost.nanos, cost.source) == (to_units("0.02"), "fixed")
        assert [(line.name, line.count, line.price) for line in cost.lines] == [("request", 1, Decimal("0.02"))]


def test_a_fixed_cost_does_not_apply_to_a_model_with_a_price():
    assert Prices(fixed_cost="9").price("openai", "gpt-4o-mini", Usage(1000), NOW).nanos == 150_000


def test_output_tokens_are_refused_if_a_model_has_only_an_input_price():
    prices = Prices()
    assert prices.price("openai", "text-embedding-3-small", Usage(1000), NOW).nanos == 20_000
    with pytest.raises(UnknownPrice):
        prices.worst_case("openai", "text-embedding-3-small", 1000, 1, NOW)


def test_web_searches_without_a_configured_price_are_refused():
    with pytest.raises(UnknownPrice):
        Prices([SCRIPTED]).worst_case("scripted", "ktrdr-scripted-1", 1, 1, NOW, other_max={"web_searches": 1})


@pytest.mark.parametrize("cost", ["0", "-1", "x", float("nan")])
def test_a_fixed_cost_must_be_a_positive_amount(cost):
    with pytest.raises(InvalidAmount):
        Prices(fixed_cost=cost)


def test_if_genai_prices_is_not_installed_the_error_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ktrdr-budget\[llm\]'"):
        Prices(fixed_cost=1).worst_case("openai", "gpt-5", 1, 1, NOW)


def test_after_an_update_of_the_price_list_calls_cost_the_updated_prices():
    prices = Prices()
    assert prices.price("openai", "gpt-5", Usage(1000), NOW).nanos == 1_250_000
    model = types.ModelInfo(
        "gpt-5",
        types.ClauseEquals("gpt-5"),
        prices=types.ModelPrice(input_mtok=Decimal(7), output_mtok=Decimal(1)),
        price_variants=[
            types.PriceVariant({"service_tier": "priority"}, types.ModelPrice(input_mtok=Decimal(9))),
        ],
    )
    provider = types.Provider("openai", "OpenAI", "https://api", models=[model])
    newer = data_snapshot.DataSnapshot([provider], True, timestamp=datetime(2026, 11, 24, 8, 30))
    data_snapshot.set_custom_snapshot(newer)
    try:
        cost = prices.price("openai", "gpt-5", Usage(1000), NOW)
        assert (cost.nanos, cost.source) == (7_000_000, "genai-prices/0.2.3+2026-11-24T08:30")
        assert prices.worst_case("openai", "gpt-5", 1000, 0, NOW).nanos == 9_000_000
        with pytest.raises(UnknownPrice):
            prices.price("openai", "gpt-5-mini", Usage(1000), NOW)
    finally:
        data_snapshot.set_custom_snapshot(None)
    assert prices.price("openai", "gpt-5", Usage(1000), NOW).nanos == 1_250_000


# -- the worst case ----------------------------------------------------------------------------------------------------


def test_the_worst_case_counts_all_input_at_the_price_of_a_one_hour_cache_write():
    assert Prices().worst_case("anthropic", "claude-sonnet-4-6", 1000, 100, NOW).nanos == 1000 * 6000 + 100 * 15_000


def test_the_worst_case_assumes_the_most_expensive_service_tier_unless_the_call_names_a_tier():
    prices = Prices()
    default = prices.worst_case("openai", "gpt-5", 1000, 100, NOW)
    assert default.nanos == 1000 * 2500 + 100 * 20_000
    assert prices.worst_case("openai", "gpt-5", 1000, 100, NOW, service_tier="priority") == default
    standard = prices.worst_case("openai", "gpt-5", 1000, 100, NOW, service_tier="default")
    assert standard.nanos == 1000 * 1250 + 100 * 10_000
    # A full flex tier passes calls on to the standard tier.
    assert prices.worst_case("openai", "gpt-5", 1000, 100, NOW, service_tier="flex") == standard


def test_the_worst_case_uses_the_long_context_price_if_the_maximum_input_is_above_the_threshold():
    prices = Prices()
    assert prices.worst_case("google", "gemini-2.5-pro", 200_000, 1, NOW).nanos == 200_000 * 1250 + 10_000
    assert prices.worst_case("google", "gemini-2.5-pro", 200_001, 1, NOW).nanos == 200_001 * 2500 + 15_000


def test_the_worst_case_includes_the_cost_of_web_searches():
    worst = Prices().worst_case("anthropic", "claude-sonnet-4-6", 1, 0, NOW, other_max={"web_searches": 5})
    assert worst.nanos == 6000 + to_units("0.05")


def test_the_worst_case_counts_input_at_the_highest_configured_price_and_adds_the_request_price():
    price = ModelPrice("p", "m", "1", "8", cached_input="0.1", cache_write="1.25", request="0.01")
    assert Prices([price]).worst_case("p", "m", 1000, 10, NOW).nanos == 1_250_000 + 80_000 + 10_000_000


def test_a_datetime_without_a_timezone_is_rejected():
    with pytest.raises(InvalidArgument, match="aware"):
        Prices().price("openai", "gpt-5", Usage(1), datetime(2026, 11, 23))


# -- the environment ---------------------------------------------------------------------------------------------------


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_prices_are_read_from_the_file_named_in_the_environment(tmp_path):
    file = write(
        tmp_path / "prices.toml",
        """
        [[prices]]
        provider = "acme"
        model = "road-*"
        input = 0.1
        output = "0.30"
        request = 0.000001

        [[prices]]
        provider = "openai"
        model = "gpt-5"
        input = 1
        output = 2
        cached_input = 0.5
        cache_write = 1.5
        """,
    )
    prices = Prices.from_environment({"KTRDR_PRICES_FILE": file, "KTRDR_FIXED_CALL_COST": "0.05"}, [SCRIPTED])
    assert prices.price("acme", "road-runner", Usage(3, 1), NOW).nanos == 300 + 300 + 1000
    assert prices.price("openai", "gpt-5", Usage(10, 1, 2, 3), NOW).nanos == 5000 + 1000 + 4500 + 2000
    assert prices.price("no-provider", "no-model", Usage(1), NOW).amount == Decimal("0.05")
    assert prices.price("scripted", "ktrdr-scripted-1", Usage(1), NOW).nanos == 15_000


def test_if_the_environment_variables_are_blank_only_the_price_list_is_used():
    prices = Prices.from_environment({"KTRDR_PRICES_FILE": " ", "KTRDR_FIXED_CALL_COST": ""})
    with pytest.raises(UnknownPrice):
        prices.price("no-provider", "no-model", Usage(1), NOW)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prices = 1", "tables"),
        ("[[price]]", "tables"),
        ("[[prices]]\nprovider='p'\nmodel='m'\ninput=1", r"\[\[prices\]\] 1 must have provider"),
        ("[[prices]]\nprovider='p'\nmodel='m'\ninput=1\noutput=1\ninputs=1", "it has provider, model, input"),
        ("[[prices]]\nprovider='p'\nmodel='m'\ninput=-1\noutput=1", "price of p/m: -1 is not an amount"),
        ("[[prices]]\nprovider='p'\nmodel='m'\ninput=nan\noutput=1", "NaN is not an amount"),
        ("[[prices]]\nprovider=''\nmodel='m'\ninput=1\noutput=1", "a price needs a non-empty provider"),
        ("[[prices", "cannot read"),
    ],
)
def test_an_invalid_price_file_is_rejected(tmp_path, text, message):
    file = write(tmp_path / "prices.toml", text)
    with pytest.raises(InvalidArgument, match=message):
        load_prices(file)
    with pytest.raises(InvalidArgument, match="^KTRDR_PRICES_FILE: "):
        Prices.from_environment({"KTRDR_PRICES_FILE": file})


def test_if_the_price_file_is_missing_the_error_names_the_file(tmp_path):
    with pytest.raises(InvalidArgument, match=r"nowhere\.toml': No such file"):
        load_prices(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("cost", ["0", "free", "-0.1"])
def test_an_invalid_fixed_cost_in_the_environment_is_rejected(cost):
    with pytest.raises(InvalidAmount, match="^KTRDR_FIXED_CALL_COST: "):
        Prices.from_environment({"KTRDR_FIXED_CALL_COST": cost})
