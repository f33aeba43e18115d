"""Prices of one call: its worst case, its cost, and an estimate if the provider did not report the input."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from ktrdr_budget.metering.call_pricing import CallPricing
from ktrdr_budget.metering.rates import Cost
from ktrdr_budget.metering.usage import Usage

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


class Pricer:
    """Charges one nano-dollar a token, and records the arguments of each worst case."""

    def __init__(self) -> None:
        self.worst_cases: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    def price(self, provider: str, model: str, usage: Usage, at: datetime) -> Cost:
        if self.error is not None:
            raise self.error
        return Cost(usage.total_tokens, "test")

    def worst_case(
        self, provider: str, model: str, input_max: int, output_max: int, at: datetime, **options: Any
    ) -> Cost:
        if self.error is not None:
            raise self.error
        self.worst_cases.append((provider, model, input_max, output_max, at, options))
        return Cost(input_max + output_max, "test")


@pytest.fixture
def pricer() -> Pricer:
    return Pricer()


def pricing(pricer: Any, service_tier: str | None = None, **other_max: int) -> CallPricing:
    return CallPricing(
        pricer,
        "acme",
        "road",
        NOW,
        input_tokens_max=1000,
        output_tokens_max=100,
        service_tier=service_tier,
        other_max=other_max,
    )


def test_the_worst_case_is_the_cost_of_the_maximum_input_and_output_tokens(pricer):
    assert pricing(pricer).worst_case == Cost(1100, "test")
    assert pricer.worst_cases == [("acme", "road", 1000, 100, NOW, {})], "a simple pricer needs no options"


def test_the_pricer_gets_the_service_tier_and_the_web_searches_of_the_request(pricer):
    pricing(pricer, "flex", web_searches=5)
    assert pricer.worst_cases[0][-1] == {"service_tier": "flex", "other_max": {"web_searches": 5}}


def test_if_the_pricer_raises_an_error_a_usage_has_no_cost(pricer, caplog):
    call = pricing(pricer)
    assert call.cost(Usage(10, 5)) == Cost(15, "test")
    pricer.error = ValueError("no rate")
    assert call.cost(Usage(10, 5)) is None
    assert caplog.messages == ["pricing failed for acme/road, charging the worst case: no rate"]


def test_if_the_input_was_not_reported_the_maximum_input_is_charged(pricer):
    call = pricing(pricer)
    reported = Usage(0, 7, other={"input_audio_tokens": 3, "web_searches": 2})
    usage, cost = call.with_input_bound(reported)
    assert usage == Usage(1000, 7, other={"web_searches": 2})
    assert cost == Cost(1007, "test")
    assert pricer.worst_cases[-1][-1] == {"other_max": {"web_searches": 2}}


@pytest.mark.parametrize(
    ("requested", "reported", "tier"), [("flex", "", "flex"), ("flex", "default", "default"), (None, "fast", "fast")]
)
def test_the_reported_service_tier_takes_precedence_over_the_requested_tier(pricer, requested, reported, tier):
    pricing(pricer, requested).with_input_bound(Usage(0, 7, service_tier=reported))
    assert pricer.worst_cases[-1][-1] == {"service_tier": tier}


def test_if_an_estimate_cannot_be_priced_the_worst_case_is_charged(pricer):
    call = pricing(pricer)
    pricer.error = ValueError("no rate")
    assert call.with_input_bound(Usage(0, 7)) == (Usage(1000, 7), call.worst_case)
