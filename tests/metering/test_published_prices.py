"""Costs compared with the prices that providers publish.

The figures below were copied from the named pages, not from the price list, and the sums are computed independently.
The pages were read on 2026-11-23 in stored copies. The copies of Anthropic's, OpenAI's and xAI's pages are of 2026.
The copy of DeepSeek's page is of September 2025; the DeepSeek prices below ended on 2025-09-05. Google's page was read
in the transcript of 2026-10-07 at https://github.com/api-evangelist/deepmind (plans/deepmind-plans-pricing.yml). Its
prices of cached input, and the output price of Gemini 2.5 Pro, are from a quotation of the same page at
https://discuss.ai.google.dev/t/107349.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from ktrdr_budget.metering.prices import Prices
from ktrdr_budget.metering.usage import Usage
from ktrdr_budget.money import to_units

READ = datetime(2026, 11, 23, 12, tzinfo=UTC)
CLAUDE = "https://platform.claude.com/docs/en/about-claude/pricing"
PRIORITY = "https://openai.com/api-priority-processing/"
OPENAI = "https://developers.openai.com/api/docs/pricing"
GEMINI = "https://ai.google.dev/gemini-api/docs/pricing"
DEEPSEEK = "https://api-docs.deepseek.com/quick_start/pricing"
XAI = "https://docs.x.ai/developers/models/grok-4.20-0309"
PROMOTION_END = datetime(2027, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Published:
    """Published prices, in dollars per million tokens."""

    page: str
    provider: str
    model: str
    input: str
    output: str
    cached: str
    """Empty if the copy of the page shows no price of cached input."""
    write: str = ""
    write_1h: str = ""
    tier: str = ""
    long_from: int = 0
    """The prices apply to calls with more than this number of input tokens."""
    at: datetime = READ

    def __str__(self) -> str:
        return " ".join(filter(None, (self.model, self.tier, self.long_from and "long", f"{self.at:%Y-%m-%dT%H}")))


TABLE = [
    # Anthropic: input, output, cache hits, 5-minute and 1-hour cache writes
    Published(CLAUDE, "anthropic", "claude-fable-5-1", "10", "50", "0.25", "12.50", "20"),
    Published(CLAUDE, "anthropic", "claude-opus-5", "5", "25", "0.50", "6.25", "10"),
    Published(CLAUDE, "anthropic", "claude-opus-4-1", "15", "75", "1.50", "18.75", "30"),
    Published(CLAUDE, "anthropic", "claude-sonnet-4-6", "3", "15", "0.30", "3.75", "6"),
    Published(CLAUDE, "anthropic", "claude-sonnet-4-5-20250929", "3", "15", "0.30", "3.75", "6"),
    Published(CLAUDE, "anthropic", "claude-haiku-4-5", "1", "5", "0.10", "1.25", "2"),
    Published(CLAUDE, "anthropic", "claude-haiku-5-5", "0.10", "0.50", "0.01", "0.125", "0.20"),
    Published(CLAUDE, "anthropic", "claude-haiku-5-5", "0.50", "2.50", "0.05", "0.625", "1", long_from=100_000),
    Published(CLAUDE, "anthropic", "claude-3-haiku-20240307", "0.25", "1.25", "0.03", "0.30", "0.50"),
    # OpenAI: standard, then priority processing
    Published(OPENAI, "openai", "gpt-5", "1.25", "10", "0.125"),
    Published(OPENAI, "openai", "gpt-5-mini", "0.25", "2", "0.025"),
    Published(OPENAI, "openai", "gpt-4.1", "2", "8", "0.50"),
    Published(OPENAI, "openai", "gpt-4o-mini", "0.15", "0.60", "0.075"),
    Published(OPENAI, "openai", "gpt-5.4", "2.50", "15", "0.25"),
    Published(OPENAI, "openai", "gpt-5.4", "5", "22.50", "0.50", long_from=272_000),
    Published(PRIORITY, "openai", "gpt-5", "2.50", "20", "0.25", tier="priority"),
    Published(PRIORITY, "openai", "gpt-5-mini", "0.45", "3.60", "0.045", tier="priority"),
    Published(PRIORITY, "openai", "gpt-4.1", "3.50", "14", "0.875", tier="priority"),
    Published(PRIORITY, "openai", "gpt-5.4", "5", "30", "0.50", tier="priority"),
    # Google: more for all tokens of a prompt above 200,000
    Published(GEMINI, "google", "gemini-2.5-pro", "1.25", "10", "0.125"),
    Published(GEMINI, "google", "gemini-2.5-pro", "2.50", "15", "0.25", long_from=200_000),
    Published(GEMINI, "google", "gemini-3.1-pro-preview", "2", "12", "0.20"),
    Published(GEMINI, "google", "gemini-3.1-pro-preview", "4", "18", "0.40", long_from=200_000),
    # Google: through 2026-12-31, and then
    Published(GEMINI, "google", "gemini-3.8-flash", "0.75", "3.75", "", at=PROMOTION_END - timedelta(minutes=1)),
    Published(GEMINI, "google", "gemini-3.8-flash", "1.50", "7.50", "", at=PROMOTION_END),
    # xAI: more from 200,000 tokens on, that number included
    Published(XAI, "x-ai", "grok-4.20-0309-reasoning", "1.25", "2.50", "0.20"),
    Published(XAI, "x-ai", "grok-4.20-0309-reasoning", "2.50", "5", "0.40", long_from=199_999),
    # DeepSeek: cheaper at night, until 2025-09-05
    Published(DEEPSEEK, "deepseek", "deepseek-chat", "0.27", "1.10", "0.07", at=datetime(2025, 8, 1, 12, tzinfo=UTC)),
    Published(DEEPSEEK, "deepseek", "deepseek-chat", "0.135", "0.55", "0.035", at=datetime(2025, 8, 1, 20, tzinfo=UTC)),
    Published(
        DEEPSEEK, "deepseek", "deepseek-reasoner", "0.55", "2.19", "0.14", at=datetime(2025, 8, 1, 12, tzinfo=UTC)
    ),
]


@pytest.fixture(scope="module")
def prices() -> Prices:
    return Prices()


def nanos_of(row: Published, usage: Usage) -> int:
    """The cost in nano-dollars, computed here: each count times its price, rounded up once."""
    writes_1h = usage.cache_write_1h_tokens
    parts = [
        (usage.cache_read_tokens, row.cached or row.input),
        (usage.cache_write_tokens - writes_1h, row.write or row.input),
        (writes_1h, row.write_1h or row.write or row.input),
        (usage.input_tokens - usage.cache_read_tokens - usage.cache_write_tokens, row.input),
        (usage.output_tokens, row.output),
    ]
    thousandths = sum(count * int(Decimal(price) * 1_000_000) for count, price in parts)  # of a nano-dollar
    return -(-thousandths // 1000)


@pytest.mark.parametrize("row", TABLE, ids=str)
@pytest.mark.parametrize(("cached", "written", "written_1h", "output"), [(0, 0, 0, 1), (7, 501, 100, 333)])
def test_the_cost_of_a_call_matches_the_published_prices(prices, row, cached, written, written_1h, output):
    cached = cached if row.cached else 0
    usage = Usage((row.long_from or 599) + 1, output, cached, written, written_1h, service_tier=row.tier)
    cost = prices.price(row.provider, row.model, usage, row.at)
    assert cost.nanos == nanos_of(row, usage)
    assert cost.source == "genai-prices/0.2.3"


def test_the_table_of_published_prices_has_at_least_12_models_of_4_providers():
    assert len({row.model for row in TABLE}) >= 12
    assert len({row.provider for row in TABLE}) >= 4
    assert {bool(row.write_1h) for row in TABLE} == {bool(row.tier) for row in TABLE} == {True, False}
    assert sum(bool(row.long_from) for row in TABLE) >= 3


def test_the_installed_price_list_is_genai_prices_0_2_3():
    assert importlib.metadata.version("genai-prices") == "0.2.3"


def test_all_tokens_cost_the_long_context_price_if_the_input_is_above_the_threshold(prices):
    at_threshold = prices.price("google", "gemini-2.5-pro", Usage(200_000, 1000), READ)
    above = prices.price("google", "gemini-2.5-pro", Usage(200_001, 1000), READ)
    assert at_threshold.nanos == to_units("0.26")
    assert above.nanos == to_units("0.5150025")


def test_an_anthropic_batch_call_costs_half_the_standard_price(prices):
    usage = Usage(10_000, 1000, 2000, 3000)
    batch = Usage(10_000, 1000, 2000, 3000, service_tier="batch")
    whole = prices.price("anthropic", "claude-opus-4-5", usage, READ)
    assert prices.price("anthropic", "claude-opus-4-5", batch, READ).nanos * 2 == whole.nanos


def test_a_call_in_an_unlisted_service_tier_costs_the_standard_price(prices):
    standard = prices.price("anthropic", "claude-opus-4-5", Usage(10, 10), READ)
    assert prices.price("anthropic", "claude-opus-4-5", Usage(10, 10, service_tier="standard"), READ) == standard


def test_web_searches_are_billed_in_addition_to_tokens(prices):
    cost = prices.price("anthropic", "claude-sonnet-4-6", Usage(1000, 0, other={"web_searches": 3}), READ)
    assert cost.nanos == to_units("0.033")
    assert [(line.name, line.count, line.amount) for line in cost.lines] == [
        ("input", 1000, Decimal("0.003")),
        ("web searches", 3, Decimal("0.03")),
    ]


def test_audio_input_tokens_cost_the_audio_price(prices):
    cost = prices.price("google", "gemini-2.5-flash", Usage(1000, 0, other={"input_audio_tokens": 400}), READ)
    assert cost.nanos == 600 * 300 + 400 * 1000
