"""The guard's example in docs/metering.md does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from examples.local_provider import LocalProvider, Scene

from ...helpers.guarded import bill_nanos
from ...helpers.keyspace import sums

TEXT = (Path(__file__).parents[3] / "docs" / "metering.md").read_text(encoding="utf-8")


async def test_the_two_lines_of_the_guide_guard_a_client(
    provider: LocalProvider, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = re.findall(r"^## Guards\n\n```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE)[0]
    names: dict[str, Any] = {}
    exec(code, names)
    monkeypatch.setenv("ANTHROPIC_BASE_URL", provider.anthropic_url)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "local")
    provider.script(Scene(text="Good morning to you."))
    assert await names["greet"](server.url) == "Good morning to you."
    with server.client() as store:
        assert sums(store)["spent"] == bill_nanos(provider.ledger) > 0


def test_the_guide_tells_the_figures_of_the_code() -> None:
    from ktrdr_budget.metering.guards import anthropic, bounds, openai, taps, wires

    for figure in (bounds.HIDDEN_INPUT_TOKENS, anthropic.IMAGE_TOKENS_MAX, openai.IMAGE_TOKENS_MAX):
        assert f"{figure:,}" in TEXT
    assert f"for at most {wires.DRAIN_S * 1000:.0f} ms and {wires.DRAIN_BYTES_MAX // 2**20} MiB" in TEXT
    assert f"kept for at most {taps.PATIENCE_S * 1000:.0f} ms" in TEXT
