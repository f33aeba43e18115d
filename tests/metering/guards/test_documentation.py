"""The guard example of docs/metering.md works, and the figures in the document equal those in the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from examples.local_provider import LocalProvider, Scene

from ...helpers.guarded import bill_nanos
from ...helpers.keyspace import sums

TEXT = (Path(__file__).parents[3] / "docs" / "metering.md").read_text(encoding="utf-8")


async def test_the_documented_example_guards_a_client(
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


def test_the_figures_in_the_documentation_equal_the_constants_in_the_code() -> None:
    from ktrdr_budget.metering.guards import anthropic, bounds, metered_streams, network_tap, openai

    for figure in (bounds.HIDDEN_INPUT_TOKENS, anthropic.IMAGE_TOKENS_MAX, openai.IMAGE_TOKENS_MAX):
        assert f"{figure:,}" in TEXT
    assert f"at most {network_tap.DRAIN_S * 1000:.0f} ms and {network_tap.DRAIN_BYTES_MAX // 2**20} MiB" in TEXT
    assert f"waits at most {metered_streams.CANCELLED_WAIT_S * 1000:.0f} ms" in TEXT
