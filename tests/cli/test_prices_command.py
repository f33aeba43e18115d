"""``ktrdr prices show``: the price of a model and its source."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Run = Callable[..., Result]


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_the_prices_show_command_lists_each_price_of_a_model(ktrdr: Run) -> None:
    result = ktrdr("prices", "show", "gemini-2.5-pro")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[:2] == ["Model:   google/gemini-2.5-pro", "Prices:  genai-prices/0.2.3"]
    assert [line.rstrip() for line in result.stdout.splitlines()[3:]] == [
        "PART           PRICE  PER",
        "input          $1.25  million",
        "input          $2.50  million, above 200000 input tokens",
        "cached input  $0.125  million",
        "cached input   $0.25  million, above 200000 input tokens",
        "output        $10.00  million",
        "output        $15.00  million, above 200000 input tokens",
        "web searches  $35.00  thousand",
    ]


def test_the_prices_show_command_with_token_counts_prints_the_cost_parts_and_the_reserved_amount(ktrdr: Run) -> None:
    counts = ("--input", "1000", "--output", "200", "--cached", "300", "--cache-write", "100")
    result = ktrdr("prices", "show", "claude-sonnet-4-5-20250929", *counts)
    assert result.stdout.splitlines() == [
        "Model:   anthropic/claude-sonnet-4-5-20250929",
        "Prices:  genai-prices/0.2.3, listed as claude-sonnet-4-5",
        "",
        "PART          COUNT   PRICE  PER         AMOUNT",
        "input           600   $3.00  million    $0.0018",
        "cached input    300   $0.30  million   $0.00009",
        "cache write     100   $3.75  million  $0.000375",
        "output          200  $15.00  million     $0.003",
        "total                                 $0.005265",
        "",
        "Reserved before the call (maximum cost): $0.009",
    ]


def test_the_option_tier_selects_the_prices_of_a_service_tier(ktrdr: Run) -> None:
    result = ktrdr("prices", "show", "gpt-5", "--tier", "priority", "--input", "1000", "--output", "100")
    assert result.stdout.startswith("Model:   openai/gpt-5, served as priority\n")
    assert rows(result.stdout)[-3] == ["total", "$0.0045"]
    flex = ktrdr("prices", "show", "gpt-5", "--tier", "flex", "--input", "1000", "--output", "100").stdout
    assert rows(flex)[-3] == ["total", "$0.001125"]
    assert flex.endswith(": $0.00225\n")  # a full flex tier falls back to the standard tier


def test_the_prices_show_command_with_json_prints_prices_and_costs_as_decimal_strings(ktrdr: Run) -> None:
    document = json.loads(ktrdr("prices", "show", "gemini-2.5-pro", "--input", "200001", "--json").stdout)
    assert document["prices"][0] == {
        "part": "input",
        "price": "1.25",
        "per": 1_000_000,
        "tiers": [{"above_input_tokens": 200_000, "price": "2.50"}],
    }
    del document["prices"]
    assert document == {
        "provider": "google",
        "model": "gemini-2.5-pro",
        "service_tier": None,
        "source": "genai-prices/0.2.3",
        "listed_as": "gemini-2.5-pro",
        "lines": [{"part": "input", "count": 200_001, "price": "2.50", "per": 1_000_000, "amount": "0.5000025"}],
        "total": "0.5000025",
        "reserved": "0.5000025",
    }
    assert "total" not in json.loads(ktrdr("prices", "show", "gemini-2.5-pro", "--json").stdout)


def test_the_prices_show_command_prints_the_price_of_the_offline_model(ktrdr: Run) -> None:
    result = ktrdr("prices", "show", "ktrdr-scripted-1", "--input", "1000", "--output", "100")
    assert result.stdout.splitlines()[:2] == ["Model:   scripted/ktrdr-scripted-1", "Prices:  configured"]
    assert rows(result.stdout)[-3] == ["total", "$0.0225"]


def test_the_prices_show_command_prints_a_configured_price_or_a_configured_fixed_cost(
    ktrdr: Run, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "prices.toml"
    file.write_text("[[prices]]\nprovider = 'openai'\nmodel = 'gpt-5'\ninput = 0.0000001\noutput = 2\nrequest = 0.01\n")
    environment.setenv("KTRDR_PRICES_FILE", str(file))
    environment.setenv("KTRDR_FIXED_CALL_COST", "0.02")
    result = ktrdr("prices", "show", "gpt-5", "--input", "1")
    assert "Prices:  configured\n" in result.stdout
    assert rows(result.stdout)[4:7] == [
        ["input", "1", "$0.0000001", "million", "$0.0000000000001"],
        ["request", "1", "$0.01", "1", "$0.01"],
        ["total", "$0.010000001"],
    ]
    fixed = ktrdr("prices", "show", "gpt-99", "--provider", "openai")
    assert rows(fixed.stdout)[1:] == [["Prices:", "fixed"], [], ["PART", "PRICE", "PER"], ["request", "$0.02", "1"]]
    assert rows(ktrdr("prices", "show", "gpt-99", "--provider", "openai", "--input", "5").stdout)[-3][-1] == "$0.02"
    assert rows(ktrdr("prices", "show", "nonsense").stdout)[:2] == [["Model:", "any/nonsense"], ["Prices:", "fixed"]]
    assert rows(ktrdr("prices", "show", "nonsense", "--output", "5").stdout)[-3][-1] == "$0.02"


def test_the_prices_show_command_finds_the_provider_of_a_model_from_a_configured_name_prefix(
    ktrdr: Run, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "prices.toml"
    table = "[[prices]]\nprovider = '{}'\nmodel = '{}'\ninput = {}\noutput = 2\n"
    models = [("acme", "acme-*", 1), ("zeta", "acme-large-*", 3), ("other", "acme-small", 5)]
    file.write_text("".join(table.format(*model) for model in models))
    environment.setenv("KTRDR_PRICES_FILE", str(file))
    for model, provider, price in (
        ("acme-9", "acme", "$1.00"),
        ("ACME-large-2", "zeta", "$3.00"),
        ("acme-small", "other", "$5.00"),
        ("acme-*", "acme", "$1.00"),
    ):
        shown = rows(ktrdr("prices", "show", model).stdout)
        assert shown[0] == ["Model:", f"{provider}/{model}"]
        assert shown[4] == ["input", price, "million"]


@pytest.mark.parametrize(
    ("words", "exit_code", "line"),
    [
        (
            ("gpt-99", "--provider", "openai"),
            1,
            "ktrdr: no price for openai/gpt-99: add it to KTRDR_PRICES_FILE, or set KTRDR_FIXED_CALL_COST",
        ),
        (("nonsense",), 1, "ktrdr: unknown provider of model 'nonsense'; give --provider"),
        (("gpt-5", "--input", "1", "--cached", "2"), 2, "ktrdr: cached tokens are a part of the input tokens"),
        (("gpt-5", "--input", "-1"), 2, "ktrdr: Invalid value for '--input'"),
        (("gpt-5", "--input", "many"), 2, "ktrdr: Invalid value for '--input'"),
        ((), 2, "ktrdr: Missing argument 'MODEL'"),
    ],
)
def test_an_error_of_the_prices_show_command_is_reported_in_one_line(
    ktrdr: Run, words: tuple[str, ...], exit_code: int, line: str
) -> None:
    result = ktrdr("prices", "show", *words)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1


def test_a_missing_price_file_is_reported_in_one_line(
    ktrdr: Run, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("KTRDR_PRICES_FILE", str(tmp_path / "nowhere.toml"))
    result = ktrdr("prices", "show", "gpt-5")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("ktrdr: KTRDR_PRICES_FILE: cannot read prices from")


def test_the_error_names_the_package_to_install_if_the_price_list_is_not_installed(
    ktrdr: Run, environment: pytest.MonkeyPatch
) -> None:
    environment.setitem(sys.modules, "genai_prices", None)
    result = ktrdr("prices", "show", "gpt-5")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "pip install 'ktrdr-budget[llm]'" in result.stderr


def test_importing_the_commands_does_not_load_the_price_list() -> None:
    code = "import sys; import ktrdr_budget.cli; print({'genai_prices', 'ktrdr_budget.metering'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
