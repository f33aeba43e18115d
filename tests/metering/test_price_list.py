"""The public price list: names of models, prices by time and tier, and every price at which a call may be billed."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from genai_prices import data_snapshot, types

from ktrdr_budget.metering.price_list import PriceList

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
RISE = datetime(2026, 12, 1, tzinfo=UTC)


def priced(dollars: object) -> types.ModelPrice:
    return types.ModelPrice(input_mtok=dollars)


def model(name: str, prices: object, variants: object = None) -> types.ModelInfo:
    return types.ModelInfo(name, types.ClauseEquals(name), prices=prices, price_variants=variants, context_window=8000)


@pytest.fixture
def price_list() -> Iterator[PriceList]:
    """A list with the models of one provider."""
    rise = [
        types.ConditionalPrice(prices=priced(Decimal(1))),
        types.ConditionalPrice(constraint=types.StartDateConstraint(RISE.date()), prices=priced(Decimal(2))),
    ]
    tiers = [
        types.PriceVariant({"service_tier": "flex"}, priced(Decimal("0.5"))),
        types.PriceVariant({"service_tier": "priority"}, priced(Decimal(3))),
        types.PriceVariant({"service_tier": "scale"}, priced(Decimal(3))),
    ]
    models = [model("rising", rise), model("tiered", priced(Decimal(1)), tiers), model("float", priced(0.1))]
    provider = types.Provider("acme", "Acme", "https://acme", models=models)
    data_snapshot.set_custom_snapshot(data_snapshot.DataSnapshot([provider], False, timestamp=NOW.replace(tzinfo=None)))
    yield PriceList()
    data_snapshot.set_custom_snapshot(None)


def input_prices(found) -> list[Decimal]:
    return [rate.price for rates in found for rate in rates]


def test_a_model_is_found_by_provider_and_name(price_list):
    assert price_list.find("acme", "tiered") == ("acme", "tiered")
    assert price_list.find("acme", "unlisted") is None
    assert price_list.find("unlisted", "tiered") is None
    assert price_list.context_window("acme", "tiered") == 8000
    assert price_list.context_window("acme", "unlisted") is None


def test_a_call_costs_the_price_valid_at_the_time_of_the_call(price_list):
    before, after = RISE - timedelta(minutes=1), RISE
    assert input_prices([price_list.rates("acme", "rising", at) for at in (before, after, before)]) == [1, 2, 1]


def test_an_unlisted_model_has_no_prices(price_list):
    assert price_list.rates("acme", "unlisted", NOW) is None
    assert price_list.candidates("acme", "unlisted", NOW, None) == []
    assert price_list.candidates("acme", "unlisted", NOW, "flex") == []


def test_without_a_named_service_tier_the_prices_of_all_tiers_are_candidates(price_list):
    assert input_prices(price_list.candidates("acme", "tiered", NOW, None)) == [1, Decimal("0.5"), 3]


def test_with_a_named_service_tier_the_standard_price_is_also_a_candidate(price_list):
    assert input_prices(price_list.candidates("acme", "tiered", NOW, "flex")) == [1, Decimal("0.5")]


def test_a_float_price_is_converted_to_decimal_without_a_rounding_error(price_list):
    assert input_prices([price_list.rates("acme", "float", NOW)]) == [Decimal("0.1")]


def test_prices_are_cached_until_the_price_list_is_updated(price_list):
    first = price_list.rates("acme", "tiered", NOW)
    assert price_list.rates("acme", "tiered", NOW + timedelta(seconds=1)) is first
    assert price_list.candidates("acme", "tiered", NOW, None)[0] is first
    updated = types.Provider("acme", "Acme", "https://acme", models=[model("tiered", priced(Decimal(9)))])
    data_snapshot.set_custom_snapshot(data_snapshot.DataSnapshot([updated], False, timestamp=datetime(2026, 11, 24)))
    assert input_prices([price_list.rates("acme", "tiered", NOW)]) == [9]
    assert input_prices(price_list.candidates("acme", "tiered", NOW, None)) == [9]
