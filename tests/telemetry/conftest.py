"""Spans recorded in this process."""

from __future__ import annotations

import pytest

from ktrdr_budget.telemetry import spans

from ..helpers.recorded_spans import Recorded


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """As if this process had a tracer provider."""
    found = Recorded()
    monkeypatch.setattr(spans, "_tracer", found.tracer)
    return found
