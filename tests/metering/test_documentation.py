"""The examples of docs/metering.md produce the documented results."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from ktrdr_budget import AsyncBudgetLimiter, Budget, tracker
from ktrdr_budget.cli import main as command
from ktrdr_budget.metering.decorators import set_default_limiter
from ktrdr_budget.metering.meter import Meter
from ktrdr_budget.metering.prices import ModelPrice, Prices, load_prices
from ktrdr_budget.metering.usage import Usage
from ktrdr_budget.tracker import get_budget_tracker

TEXT = (Path(__file__).parents[2] / "docs" / "metering.md").read_text(encoding="utf-8")
BUDGETS = [Budget("agent", "5.00")]


def blocks(heading: str, language: str) -> list[str]:
    """The code blocks of one section, without its subsections."""
    (section,) = re.findall(rf"^#+ {heading}$(.*?)(?=^#+ |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    code_blocks = re.findall(r"^```(\w+)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return [body for name, body in code_blocks if name == language]


def example(heading: str) -> dict[str, Any]:
    (code,) = blocks(heading, "python")
    names: dict[str, Any] = {}
    exec(compile(code, f"docs/metering.md: {heading}", "exec"), names)
    return names


def test_the_documented_example_of_computing_a_cost_runs(capsys: pytest.CaptureFixture[str]):
    example("Compute a cost")
    assert capsys.readouterr().out.splitlines()[:3] == [
        "0.005265 genai-prices/0.2.3",
        "input 600 3 0.0018",
        "cached input 300 0.3 0.00009",
    ]


def test_the_documented_example_of_the_prices_command_runs(monkeypatch: pytest.MonkeyPatch):
    for name in ("KTRDR_PRICES_FILE", "KTRDR_FIXED_CALL_COST"):
        monkeypatch.delenv(name, raising=False)
    (session,) = blocks("Look up a price", "console")
    line, _, shown = session.partition("\n")
    assert line.startswith("$ ktrdr ")
    assert CliRunner().invoke(command, line.split()[2:]).stdout == shown


def test_the_documented_example_of_a_price_file_is_valid(tmp_path: Path):
    (text,) = blocks("Set your own prices", "toml")
    file = tmp_path / "prices.toml"
    file.write_text(text, encoding="utf-8")
    prices = Prices(load_prices(file))
    now = datetime.now(UTC)
    assert prices.price("deepseek", "deepseek-chat", Usage(1000, 100, 500), now).nanos == 280_000 + 35_000 + 168_000
    assert (
        prices.price("acme", "road-runner", Usage(1000, 100, 0, 200), now).nanos == 800_000 + 250_000 + 400_000 + 10**7
    )


async def test_the_documented_example_of_a_metered_call_runs(server, capsys: pytest.CaptureFixture[str]):
    await example("Any other client")["main"](server.url)
    assert capsys.readouterr().out == "0.00178\n"


async def test_the_documented_example_of_a_call_inside_a_hold_runs(server, capsys: pytest.CaptureFixture[str]):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        meter = Meter(limiter, pricer=Prices([ModelPrice("acme", "road-runner", "1", "4")]))
        await example("Inside a hold")["research"](limiter, meter)
        assert str((await limiter.status("agent")).spent) == "0.00534"
    assert capsys.readouterr().out == "0.00534\n"


def test_the_documented_example_of_decorated_functions_runs(server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KTRDR_REDIS_URL", server.url)
    monkeypatch.setattr(tracker, "_tracker", None)
    names = example("Functions")
    assert asyncio.run(names["research"]("rain")) == "all about rain"
    assert names["scan"](10) == {"dollars": 0.08}
    assert get_budget_tracker().get_today_spend() == 0.11
    get_budget_tracker().close()


async def test_the_documented_example_of_fastapi_routes_runs(server):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        set_default_limiter(limiter)
        try:
            transport = httpx.ASGITransport(example("FastAPI routes")["app"])
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as visitor:
                assert (await visitor.post("/research/rain")).json() == "rain"
                assert (await visitor.post("/scan")).json() == "done"
        finally:
            set_default_limiter(None)
        assert str((await limiter.status("agent")).spent) == "0.158"
