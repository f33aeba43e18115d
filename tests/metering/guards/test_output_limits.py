"""Published output limits: a model has the limit of its exact name, with or without a date."""

from __future__ import annotations

import pytest

from ktrdr_budget.metering.guards.output_limits import published_output_maximum
from ktrdr_budget.metering.price_list import PriceList

PUBLISHED = [
    ("openai", "gpt-4.1", 32_768),
    ("azure", "gpt-4.1-nano-2025-04-14", 32_768),
    ("openai", "gpt-4o-2024-08-06", 16_384),
    ("openai", "ft:gpt-4o-mini-2024-07-18:own::x", 16_384),
    ("openai", "gpt-5-mini", 128_000),
    ("openai", "gpt-5-pro", 272_000),
    ("openai", "o4-mini", 100_000),
    ("anthropic", "claude-haiku-4-5-20251001", 64_000),
    ("anthropic", "claude-opus-4-1", 32_000),
    ("anthropic", "claude-3-5-sonnet-latest", 8_192),
    ("anthropic", "claude-sonnet-5", 128_000),
]


@pytest.mark.parametrize(("provider", "model", "tokens"), PUBLISHED)
def test_a_model_name_with_or_without_a_date_has_the_published_output_maximum(
    provider: str, model: str, tokens: int
) -> None:
    assert published_output_maximum(provider, model) == tokens


@pytest.mark.parametrize(
    "model", ["gpt-4.1-turbo", "gpt-5.5", "gpt-4o-audio-preview", "my-gpt-4o", "claude-sonnet-4-7"]
)
def test_a_model_name_similar_to_a_published_name_has_no_output_maximum(model: str) -> None:
    assert {published_output_maximum(provider, model) for provider in ("openai", "anthropic")} == {None}


def test_a_published_output_maximum_applies_only_to_the_provider_of_the_model() -> None:
    assert published_output_maximum("deepseek", "gpt-4o") is None
    assert published_output_maximum("openai", "claude-opus-4-1") is None


@pytest.mark.parametrize(("provider", "model", "tokens"), PUBLISHED)
def test_a_published_output_maximum_is_below_the_context_window_of_the_model(
    provider: str, model: str, tokens: int
) -> None:
    window = PriceList().context_window(provider, model)
    assert window is None or tokens < window
