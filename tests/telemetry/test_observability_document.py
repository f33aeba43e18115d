"""docs/observability.md: its tables match the metrics, and its example runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.telemetry.agent_metrics import AgentMetrics
from ktrdr_budget.telemetry.audit import Audit
from ktrdr_budget.telemetry.metrics import LimiterMetrics

DOCUMENT = (Path(__file__).parents[2] / "docs" / "observability.md").read_text(encoding="utf-8")


def documented() -> set[str]:
    """The names in the first column of the metric tables, where ``_held`` is short for ``ktrdr_budget_held``."""
    rows = re.findall(r"^\| (`(?:agent|ktrdr_budget)_.*?) \|", DOCUMENT, re.MULTILINE)
    names = re.findall(r"`(\w+)`", " ".join(rows))
    return {f"ktrdr_budget{name}" if name.startswith("_") else name for name in names}


async def test_the_tables_in_the_document_list_exactly_the_exported_metrics(server):
    metrics = LimiterMetrics()
    AgentMetrics(metrics.registry)
    metrics.add(Audit())
    async with AsyncBudgetLimiter(server.url, [Budget("agent", "5.00")], observer=metrics.observe) as limiter:
        metrics.watch(limiter)
        text = (await metrics.render())[0].decode()
    shown = {
        family.name + ("_total" if family.type == "counter" else "") for family in text_string_to_metric_families(text)
    }
    assert documented() == shown


def test_the_documented_example_of_an_application_runs(server):
    examples = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    (example,) = [text for text in examples if "operation_processor" in text]
    code = f"""
from opentelemetry.sdk.trace import TracerProvider
provider, url = TracerProvider(), {server.url!r}
{example}
from opentelemetry import trace
trace.set_tracer_provider(provider)
import asyncio
from ktrdr_budget.telemetry.outcomes import combined
from ktrdr_budget.telemetry.spans import operation_scope, span, suppressed

async def main():
    async with limiter:
        with span("cycle") as current:
            await limiter.record("agent", "0.10")
        (entry,) = (await limiter.ledger("agent")).items
        print(entry.trace_id == current.trace_id != "")

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("True\n", "")
