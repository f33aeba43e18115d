"""The example programs run without a key against the local provider."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.local_provider import LocalProvider, Scene

from ..helpers.guarded import bill_nanos
from ..helpers.keyspace import ledger_entries, ledger_key, sums

ROOT = Path(__file__).parents[2]


@pytest.fixture
def provider() -> Iterator[LocalProvider]:
    with LocalProvider() as running:
        yield running


@pytest.fixture
def environment(provider: LocalProvider, server: Any) -> dict[str, str]:
    """The environment of an example program."""
    return {
        "ANTHROPIC_BASE_URL": provider.anthropic_url,
        "OPENAI_BASE_URL": provider.openai_url,
        "ANTHROPIC_API_KEY": "local",
        "OPENAI_API_KEY": "local",
        "KTRDR_REDIS_URL": server.url,
        "PYTHONWARNINGS": "error",
    }


@pytest.fixture
def run(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(module: str, *arguments: str, typed: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", f"examples.{module}", *arguments]
        known = {**os.environ, **environment, **more}
        return subprocess.run(words, cwd=ROOT, env=known, input=typed, capture_output=True, text=True, timeout=60)

    return run


def test_the_chat_program_answers_and_prints_the_spend(run: Any, provider: LocalProvider, server: Any) -> None:
    provider.script(Scene(text="A promise."), Scene(text="Yes."))
    done = run("chat_loop", typed="What is a budget?\nReally?\n\n")
    assert done.returncode == 0, done.stderr
    assert "A promise." in done.stdout and "Yes." in done.stdout
    assert len(provider.requests[1]["messages"]) == 3
    with server.client() as store:
        spent = sums(store, "chat")["spent"]
    assert spent == bill_nanos(provider.ledger)
    assert f"${spent / 1e9:.6f} spent today" in done.stdout


def test_the_chat_program_ends_when_the_budget_denies_a_question(run: Any, provider: LocalProvider) -> None:
    done = run("chat_loop", typed="What is a budget?\n", CHAT_LIMIT="0.001")
    assert done.returncode == 0, done.stderr
    assert "does not fit the budget: exceeds_limit" in done.stdout
    assert provider.requests == []


def test_the_agent_makes_all_its_calls_within_one_hold(run: Any, provider: LocalProvider, server: Any) -> None:
    done = run("agent_with_tools", "How did BTC do?")
    assert done.returncode == 0, done.stderr
    assert "uses closing_prices(example)" in done.stdout
    assert len(provider.requests) == 2
    with server.client() as store:
        figures = sums(store)
        entries = ledger_entries(store, ledger_key(store))
    assert figures["spent"] == bill_nanos(provider.ledger) and figures["held"] == 0
    assert len(entries) == 1 and "agent_with_tools" in entries[0].operation
    assert f"held $0.15, cost ${figures['spent'] / 1e9:.6f}" in done.stdout


def test_the_agent_stops_when_its_hold_is_denied(run: Any, provider: LocalProvider) -> None:
    done = run("agent_with_tools", AGENT_DAILY_BUDGET="0.10")
    assert done.returncode == 1
    assert "No budget: agent: exceeds_limit ($0.10 remaining, need $0.15)" in done.stdout
    assert provider.requests == []


def test_the_service_answers_until_the_budget_is_exhausted(
    environment: dict[str, str], provider: LocalProvider, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastapi.testclient import TestClient

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AGENT_DAILY_BUDGET", "0.03")
    from examples.fastapi_app import app

    with TestClient(app) as client, server.client() as store:
        answered = client.post("/ask", json={"text": "What is a budget?"})
        assert answered.status_code == 200 and answered.json()["answer"].startswith("word")
        assert sums(store)["spent"] == bill_nanos(provider.ledger) > 0
        store.hset(next(store.scan_iter("*:w:agent:*")), "spent", 25_000_000)
        refused = client.post("/ask", json={"text": "And another?"})
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) > 0
        assert refused.headers["content-type"] == "application/problem+json"
        assert client.get("/budget").json()["remaining"].startswith("0.005")
        assert len(provider.requests) == 1


def test_the_readme_lists_every_example() -> None:
    readme = (ROOT / "examples" / "README.md").read_text()
    for path in sorted((ROOT / "examples").glob("*.py")):
        if path.name != "__init__.py":
            assert f"`{path.name}`" in readme, path.name
