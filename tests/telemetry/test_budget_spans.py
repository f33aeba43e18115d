"""Spans of the limiter's calls, as children of the caller's span."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import NonRecordingSpan, SpanContext, StatusCode, TraceFlags

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, BudgetLimiter, HoldConflict, StoreUnavailable
from ktrdr_budget.telemetry.budget_spans import trace_call
from ktrdr_budget.telemetry.spans import current_trace_id, operation_scope, span

from ..conftest import free_port
from ..helpers.recorded_spans import Recorded
from ..helpers.waiting import until

BUDGETS = [Budget("agent", limit="1.00"), Budget("cycles", limit=1, unit="cycles", kind="slots")]


@pytest.fixture
async def limiter(server) -> AsyncIterator[AsyncBudgetLimiter]:
    async with AsyncBudgetLimiter(server.url, BUDGETS, observer=trace_call, trace_id=current_trace_id) as limiter:
        yield limiter


def attributes_of(found: ReadableSpan) -> dict[str, Any]:
    """The attributes without their common prefix."""
    assert all(name.startswith("ktrdr.budget.") or name in ("error",) for name in found.attributes)
    return {name.removeprefix("ktrdr.budget."): value for name, value in found.attributes.items()}


async def test_the_span_of_a_limiter_call_is_a_child_of_the_current_span(
    recorded: Recorded, limiter: AsyncBudgetLimiter
):
    with span("caller") as caller:
        began_ns = time.time_ns()
        hold = await limiter.reserve({"agent": "0.15", "cycles": 1}, id="h-1")
        ended_ns = time.time_ns()
    found = recorded["ktrdr.budget.reserve"]
    assert found.parent == recorded["caller"].context
    assert f"{found.context.trace_id:032x}" == caller.trace_id == (await limiter.get(hold.id)).trace_id
    assert found.status.status_code is StatusCode.UNSET
    # The span is written at the end of the call with its start time; the clocks may differ slightly.
    assert began_ns - 1_000_000 <= found.start_time < found.end_time <= ended_ns
    assert attributes_of(found) == {
        "operation": "reserve",
        "outcome": "granted",
        "hold_id": "h-1",
        "names": ("agent", "cycles"),
        "amounts": ("0.15", "1"),
    }


async def test_the_span_of_a_settlement_has_the_outcome_and_the_amounts(
    recorded: Recorded, limiter: AsyncBudgetLimiter
):
    with span("caller"):
        hold = await limiter.reserve({"agent": "0.15"}, id="h-1")
        await hold.commit("0.0000021")
    settled = {"hold_id": "h-1", "names": ("agent",), "overrun": False, "late": False, "deferred": False}
    commit = {"operation": "commit", "outcome": "committed", "amounts": ("0.0000021",)}
    assert attributes_of(recorded["ktrdr.budget.commit"]) == settled | commit
    with span("again"):
        await limiter.commit("h-1", "0.0000021")
        second = await limiter.reserve("agent", "0.15", id="h-2")
        await second.release()
        third = await limiter.reserve("agent", "0.15", id="h-3")
        await third.commit("0.20")
        await limiter.record("agent", "0.01", id="r-1")
    outcomes = [
        (found["operation"], found["outcome"], found["amounts"], found["overrun"], found.get("overruns"))
        for found in map(attributes_of, recorded.spans)
        if "overrun" in found
    ]
    assert outcomes == [
        ("commit", "committed", ("0.0000021",), False, None),
        ("commit", "replayed", ("0.0000021",), False, None),
        ("release", "released", ("0.00",), False, None),
        ("commit", "committed", ("0.20",), True, ("agent",)),
        ("record", "recorded", ("0.01",), False, None),
    ]


async def test_the_span_of_a_denied_reservation_has_the_reason_and_no_error_status(
    recorded: Recorded, limiter: AsyncBudgetLimiter
):
    await limiter.record("agent", "0.90")
    with span("caller"):
        with pytest.raises(BudgetExceeded) as denied:
            await limiter.reserve({"agent": "0.15", "cycles": 1})
    found = recorded["ktrdr.budget.reserve"]
    assert attributes_of(found) == {
        "operation": "reserve",
        "outcome": "denied",
        "reason": "budget_exhausted",
        "denied_by": "agent",
        "requested": "0.15",
        "remaining": "0.10",
        "fits": "0.10",
        "retry_after_s": denied.value.retry_after,
    }
    assert found.status.status_code is StatusCode.UNSET


async def test_the_span_of_a_conflicting_reservation_has_an_error_status(
    recorded: Recorded, limiter: AsyncBudgetLimiter
):
    await limiter.reserve("agent", "0.15", id="h-1")
    with span("caller"):
        with pytest.raises(HoldConflict):
            await limiter.reserve("agent", "0.16", id="h-1")
    found = recorded["ktrdr.budget.reserve"]
    assert (attributes_of(found)["outcome"], attributes_of(found)["reason"]) == ("error", "conflict")
    assert found.status.status_code is StatusCode.ERROR
    assert found.attributes["error"].startswith("HoldConflict: ")


async def test_if_the_store_is_unreachable_the_error_in_the_span_does_not_contain_the_password(recorded: Recorded):
    url = f"redis://:geheim@127.0.0.1:{free_port()}"
    limiter = AsyncBudgetLimiter(url, BUDGETS, timeout=0.05, observer=trace_call)  # the first call times out
    with span("caller"):
        with pytest.raises(StoreUnavailable):
            await limiter.reserve("agent", "0.15")
    await limiter.close()
    found = recorded["ktrdr.budget.reserve"]
    assert (attributes_of(found)["outcome"], attributes_of(found)["reason"]) == ("unavailable", "no_answer")
    assert found.status.status_code is StatusCode.ERROR
    assert found.end_time - found.start_time >= 40_000_000
    assert "geheim" not in found.to_json()


async def test_a_call_without_a_current_trace_creates_no_span(recorded: Recorded, limiter: AsyncBudgetLimiter):
    await limiter.record("agent", "0.10")
    unsampled = NonRecordingSpan(SpanContext(7, 8, is_remote=False, trace_flags=TraceFlags(0)))
    with trace.use_span(unsampled):
        hold = await limiter.reserve("agent", "0.10")
        await hold.release()
    assert not recorded.spans
    assert {entry.trace_id for entry in (await limiter.ledger("agent")).items} == {""}


async def test_calls_sent_in_one_batch_get_separate_spans(recorded: Recorded, limiter: AsyncBudgetLimiter):
    async def call(number: int) -> str:
        with operation_scope(f"op_{number}", "test"), span(f"caller {number}") as caller:
            await limiter.record("agent", "0.01", id=f"r-{number}")
            return caller.trace_id

    traces = await asyncio.gather(*map(call, range(40)))
    written = [found for found in recorded.spans if found.name == "ktrdr.budget.record"]
    by_id = {found.attributes["ktrdr.budget.hold_id"]: found for found in written}
    for number, trace_id in enumerate(traces):
        found = by_id[f"r-{number}"]
        assert found.parent == recorded[f"caller {number}"].context
        assert found.attributes["operation.id"] == f"op_{number}"
        assert f"{found.context.trace_id:032x}" == trace_id
    ledger = {entry.hold_id: entry.trace_id for entry in (await limiter.ledger("agent", limit=100)).items}
    assert ledger == {f"r-{number}": trace_id for number, trace_id in enumerate(traces)}


async def test_heartbeats_have_no_spans(recorded: Recorded, limiter: AsyncBudgetLimiter):
    with span("cycle"):
        async with limiter.hold("agent", "0.10", ttl=1) as hold:
            with span("phase"):
                hold.accrue("0.01")
                reserved_ms = hold.deadline_ms
                await until(lambda: hold.deadline_ms > reserved_ms)
    names = [found.name for found in recorded.spans]
    assert names == ["ktrdr.budget.reserve", "phase", "ktrdr.budget.settle", "cycle"]
    settled = attributes_of(recorded["ktrdr.budget.settle"])
    assert (settled["outcome"], settled["amounts"]) == ("committed", ("0.01",))


def test_the_span_of_each_sync_limiter_call_is_a_child_of_the_current_span(recorded: Recorded, server):
    with BudgetLimiter(server.url, BUDGETS, observer=trace_call) as limiter:
        with span("caller"):
            limiter.reserve("agent", "0.10").commit("0.05")
            limiter.status("agent")
    parents = {found.parent.span_id for found in recorded.spans if found.name.startswith("ktrdr.budget.")}
    assert parents == {recorded["caller"].context.span_id}
    assert {found.name for found in recorded.spans} == {
        "caller",
        *("ktrdr.budget.reserve", "ktrdr.budget.commit", "ktrdr.budget.status"),
    }
