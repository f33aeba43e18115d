"""The bundled prices and their generator."""

from __future__ import annotations

import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest

from ktrdr_budget.agent import market
from ktrdr_budget.agent.market import PriceSeries, bundled_prices, generate_prices, parse_csv, to_csv
from ktrdr_budget.errors import InvalidArgument

FILE = Path(market.__file__).with_name("data") / "prices.csv"


def test_the_documented_command_reproduces_the_bundled_prices():
    made = subprocess.check_output([sys.executable, "-m", "ktrdr_budget.agent.market"])
    assert made == FILE.read_bytes()
    assert bundled_prices() == generate_prices()


def test_the_bundled_prices_match_the_readme_file():
    prices = bundled_prices()
    assert (len(prices), prices.days[0], prices.days[-1]) == (2520, date(2015, 1, 1), date(2024, 8, 28))
    assert all(day.weekday() < 5 for day in prices.days)
    assert "2,520 daily closes, 2015-01-01 to 2024-08-28" in FILE.with_name("README.md").read_text(encoding="utf-8")


def test_the_same_seed_generates_the_same_prices():
    assert generate_prices(1, 50) == generate_prices(1, 50) != generate_prices(2, 50)
    assert generate_prices(1, 80).closes[:50] == generate_prices(1, 50).closes


def test_a_price_series_written_to_csv_is_read_back_unchanged():
    prices = generate_prices(3, 30)
    assert parse_csv(to_csv(prices)) == prices


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: must be date,close"),
        ("day,price\n", "line 1: must be date,close"),
        ("date,close\n2020-01-01,1\n2020-01-02\n", "line 3: must be a date and a price"),
        ("date,close\n2020-01-01,1,2\n", "line 2: must be a date and a price"),
        ("date,close\n1 January,1\n", "line 2: must be a date and a price"),
        ("date,close\n2020-01-01,one\n", "line 2: must be a date and a price"),
        ("date,close\n2020-01-01,nan\n", "a price must be positive and finite"),
        ("date,close\n2020-01-01,0\n", "a price must be positive and finite"),
        ("date,close\n2020-01-02,1\n2020-01-01,1\n", "the days of a price series must ascend"),
        ("date,close\n2020-01-02,1\n2020-01-02,1\n", "the days of a price series must ascend"),
    ],
)
def test_a_malformed_csv_file_is_rejected(text: str, words: str):
    with pytest.raises(InvalidArgument, match=f"^{words}$"):
        parse_csv(text)


def test_a_price_series_with_more_days_than_prices_is_rejected():
    with pytest.raises(InvalidArgument, match="1 prices for 2 days"):
        PriceSeries((date(2020, 1, 1), date(2020, 1, 1) + timedelta(1)), (1.0,))
