"""A mistyped variable, or an empty address of the store, is an error at the start.

ghfind #109.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ktrdr_budget import BudgetTracker, environment
from ktrdr_budget.api.auth import Keys
from ktrdr_budget.api.settings import Settings, SettingsError, load_settings
from ktrdr_budget.environment import VARIABLES, check_names, store_url
from ktrdr_budget.errors import InvalidArgument
from ktrdr_budget.metering.defaults import default_async_limiter
from ktrdr_budget.metering.prices import Prices

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("KTRDR_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AGENT_BUDGET_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(environment, "_warned", set())


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [
        ("KTRDR_DURABLITY", "KTRDR_DURABILITY"),
        ("KTRDR_REDIS_URI", "KTRDR_REDIS_URL"),
        ("KTRDR_REDIS_ULR", "KTRDR_REDIS_URL"),
        ("KTRDR_REDISURL", "KTRDR_REDIS_URL"),
        ("KTRDR_TENNANTS", "KTRDR_TENANT"),
        ("KTRDR_MAX_HOLD", "KTRDR_MAX_HOLDS"),
        ("KTRDR_API_KEYS", "KTRDR_API_KEY"),
        ("KTRDR_AGENT_DAILY_BUDGETS", "KTRDR_AGENT_DAILY_BUDGET"),
    ],
)
def test_a_variable_name_within_two_edits_of_a_known_name_is_rejected_with_a_suggestion(mistyped, meant):
    with pytest.raises(InvalidArgument, match=f"^unknown environment variable {mistyped}: did you mean {meant}\\?$"):
        check_names({"KTRDR_TENANT": "quant", mistyped: "secret"})


@pytest.mark.parametrize(
    "name",
    [
        "KTRDR_REDIS_PORT", "KTRDR_REDIS_PORT_6379_TCP", "KTRDR_REDIS_SERVICE_HOST", "KTRDR_AUTH_PORT",
        "KTRDR_API_SERVICE_PORT_HTTP", "KTRDR_API_PORT_8000_TCP_ADDR", "KTRDR_PORT", *VARIABLES, "AGENT_DAILY_BUDGETS",
        "KTRDR_EXTRAS", "KTRDR_REDIS_PASSWORD", "KTRDR_REPLICAS", "OTHER",
    ],
)  # fmt: skip
def test_known_variables_and_kubernetes_service_links_are_accepted_without_a_warning(name, caplog):
    check_names({name: "x"})
    assert not caplog.records


def test_unknown_variables_without_a_similar_known_name_are_logged_in_one_warning(caplog):
    for _ in range(2):
        check_names({"KTRDR_COLOUR": "x", "KTRDR_SOMETHING_ELSE": "secret"})
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == ("unknown environment variables ignored: KTRDR_COLOUR, KTRDR_SOMETHING_ELSE")


def test_every_reader_of_the_environment_rejects_a_mistyped_variable_name(monkeypatch):
    monkeypatch.setenv("KTRDR_DURABLITY", "disk")
    for read in (BudgetTracker, Prices.from_environment, Keys.from_environment, lambda: asyncio.run(default())):
        with pytest.raises(InvalidArgument, match="did you mean KTRDR_DURABILITY"):
            read()
    with pytest.raises(SettingsError, match="did you mean KTRDR_DURABILITY"):
        load_settings()


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_store_url_is_rejected_and_starts_no_embedded_server(monkeypatch, empty, tmp_path):
    assert store_url() is None
    monkeypatch.setenv("KTRDR_REDIS_URL", empty)
    words = "KTRDR_REDIS_URL is set but empty"
    for read in (store_url, BudgetTracker, lambda: asyncio.run(default())):
        with pytest.raises(InvalidArgument, match=words):
            read()
    with pytest.raises(SettingsError, match=words):
        load_settings()
    assert not (tmp_path / "data").exists()


async def default() -> None:
    default_async_limiter()


@pytest.mark.parametrize(
    ("command", "variable", "words"),
    [
        (["serve", "--port", "0"], {"KTRDR_DURABLITY": "disk"}, "did you mean KTRDR_DURABILITY?"),
        (["serve", "--port", "0"], {"KTRDR_REDIS_URL": ""}, "KTRDR_REDIS_URL is set but empty"),
        (["budget", "list"], {"KTRDR_API_ULR": "http://x"}, "did you mean KTRDR_API_URL?"),
        (["budget", "verify"], {"KTRDR_REDIS_URL": ""}, "KTRDR_REDIS_URL is set but empty"),
    ],
)
def test_the_command_line_reports_a_mistyped_or_empty_variable_in_one_line_with_exit_code_2(command, variable, words):
    ended = subprocess.run(
        [sys.executable, "-m", "ktrdr_budget.cli", *command],
        env={**os.environ, **variable}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert words in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_the_table_in_the_readme_lists_all_environment_variables():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if re.match(r"\| `[A-Z_]+` \|", line)]
    named = {name for row in rows for name in re.findall(r"KTRDR_[A-Z_]+", " ".join(re.findall(r"`([^`]+)`", row)))}
    assert named == set(VARIABLES)
    settings = {f"KTRDR_{name.upper()}" for name, field in Settings.model_fields.items() if not field.validation_alias}
    assert settings <= set(VARIABLES)
    read = {
        name
        for path in (ROOT / "ktrdr_budget").rglob("*.py")
        for name in re.findall(r"[\"'](KTRDR_[A-Z_]+)[\"']", path.read_text(encoding="utf-8"))
    }
    assert read <= {*VARIABLES, *environment._OF_TOOLS}
