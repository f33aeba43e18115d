"""Spans of completed, failed and cancelled cycles, exported by the processes of `ktrdr serve`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from ..api.processes import ServiceProcess, serving
from ..helpers.otlp_receiver import OtlpReceiver, Span, children, orphans, trace_of
from ..helpers.waiting import wait_until

pytestmark = pytest.mark.slow

PHASES = ["agent.phase.design", "agent.phase.training", "agent.phase.backtest", "agent.phase.assessment"]


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver
    assert not receiver.errors


def triggered(service: ServiceProcess) -> str:
    """Trigger a cycle; return its id."""
    response = service.post("/api/v1/agent/trigger")
    assert response.status_code == 202, response.text
    return str(response.json()["operation_id"])


def test_all_spans_of_a_trigger_and_of_a_cancellation_have_the_operation_id(server, receiver: OtlpReceiver):
    environment: dict[str, Any] = {"KTRDR_REDIS_URL": server.url, "AGENT_PHASE_SECONDS": 3600, **receiver.environment}
    with serving(**environment) as service:
        operation_id = triggered(service)
        assert service.post("/api/v1/agent/trigger", {"operation_id": "op_refused"}).status_code == 409
        assert service.request("DELETE", f"/api/v1/agent/cancel/{operation_id}").status_code == 200
        cycle_of(receiver, operation_id)
        receiver.wait_named("DELETE /api/v1/agent/cancel/{operation_id:slashed}")
    roots = {span.name: span for span in receiver.spans if not span.parent_id and span.name != "agent.research_cycle"}
    assert set(roots) == {"POST /api/v1/agent/trigger", "DELETE /api/v1/agent/cancel/{operation_id:slashed}"}
    for span in receiver.spans:
        assert span.attributes["operation.id"] in (operation_id, "op_refused"), span
        assert span.attributes["operation.type"] == "agent_research"
    for asked in (operation_id, "op_refused"):
        [request] = [
            span
            for span in receiver.spans
            if span.name == "POST /api/v1/agent/trigger" and span.attributes["operation.id"] == asked
        ]
        below = {span.name for span in trace_of(receiver.spans, request.trace_id)}
        assert {"ktrdr.budget.reserve", "EVALSHA"} <= below


def test_heartbeats_of_a_cycle_have_no_spans(server, receiver: OtlpReceiver):
    environment: dict[str, Any] = {"KTRDR_REDIS_URL": server.url, "AGENT_PHASE_SECONDS": 3600, **receiver.environment}
    with serving(AGENT_CYCLE_TTL=1, **environment) as service:
        operation_id = triggered(service)

        def expires_at() -> str:
            return str(service.get(f"/api/v1/reservations/{operation_id}").json()["expires_at"])

        deadlines = set[str]()
        wait_until(lambda: deadlines.add(expires_at()) or len(deadlines) > 4)
        assert service.request("DELETE", f"/api/v1/agent/cancel/{operation_id}").status_code == 200
        _, cycle = cycle_of(receiver, operation_id)
    assert "ktrdr.budget.heartbeat" not in {span.name for span in receiver.spans}
    called = [span for span in cycle if span.name == "EVALSHA"]
    assert len(called) <= 4, "calls of the cycle itself"


def cycle_of(receiver: OtlpReceiver, operation_id: str) -> tuple[Span, list[Span]]:
    """Check that the trace of an ended cycle is one tree; return its root span and all its spans."""
    spans = receiver.wait_named("agent.research_cycle")
    (root,) = [span for span in spans if span.name == "agent.research_cycle"]
    cycle = trace_of(spans, root.trace_id)
    assert not orphans(cycle)
    assert [span for span in cycle if not span.parent_id] == [root]
    for span in cycle:
        assert span.attributes["operation.id"] == operation_id, span
        assert span.attributes["operation.type"] == "agent_research"
        assert root.start_ns <= span.start_ns <= span.end_ns <= root.end_ns, span
    return root, cycle


def phases(cycle: list[Span], root: Span) -> dict[str, Span]:
    """Return the spans of the phases by name, in the order of the phases."""
    return {span.name: span for span in children(cycle, root) if span.name.startswith("agent.phase.")}


def test_every_worker_process_exports_spans_and_metrics(server, receiver: OtlpReceiver):
    environment: dict[str, Any] = {"KTRDR_REDIS_URL": server.url, "AGENT_PHASE_SECONDS": 0, **receiver.environment}
    with serving(workers=2, **environment) as service:

        def both_have_exported() -> bool:
            service.get("/api/v1/budgets")
            return len({span.resource["service.instance.id"] for span in receiver.spans}) == 2

        wait_until(both_have_exported)
        operation_id = triggered(service)
        root, cycle = cycle_of(receiver, operation_id)
        samples = service.get("/metrics").text.splitlines()
        entries = service.get("/api/v1/budgets/agent/ledger").json()["entries"]
        assert service.stop() == 0
    assert list(phases(cycle, root)) == PHASES
    assert (root.status, root.attributes["outcome"]) == ("unset", "completed")
    assert {span.status for span in cycle} == {"unset"}
    assert {"EVALSHA", "ktrdr.budget.commit"} <= {span.name for span in cycle}
    ((linked, _),) = root.links
    assert next(span.name for span in trace_of(receiver.spans, linked)) == "POST /api/v1/agent/trigger"
    assert linked != root.trace_id
    # Polls, scrapes and background checks of both workers are not traced.
    assert {span.name for span in receiver.spans if not span.parent_id} == {
        "GET /api/v1/budgets",
        "POST /api/v1/agent/trigger",
        "agent.research_cycle",
        "GET /api/v1/budgets/{name:slashed}/ledger",
    }
    assert 'agent_cycles_total{outcome="completed"} 1.0' in samples
    assert 'agent_cycles_total{outcome="failed"} 0.0' in samples
    assert f"agent_budget_spend_total {float(entries[0]['amount'])}" in samples
    assert not [line for line in service.output if line.startswith(("WARNING", "ERROR"))]


def test_if_a_cycle_fails_at_a_gate_the_spans_of_the_cycle_form_a_complete_tree(server, receiver: OtlpReceiver):
    environment: dict[str, Any] = {"KTRDR_REDIS_URL": server.url, "AGENT_PHASE_SECONDS": 0, **receiver.environment}
    with serving(TRAINING_GATE_MIN_ACCURACY="0.99", **environment) as service:
        root, cycle = cycle_of(receiver, triggered(service))
    training = phases(cycle, root)["agent.phase.training"]
    assert list(phases(cycle, root)) == PHASES[:2]
    assert (root.status, root.attributes["outcome"], root.attributes["reason"]) == ("error", "failed", "gate_failed")
    assert training.status == "error"
    assert training.attributes["gate.passed"] is False
    assert training.attributes["gate.reason"] in training.attributes["error"]
    assert [event.name for event in training.events] == ["exception"]
    assert "ktrdr.budget.commit" in {span.name for span in cycle}


def test_the_spans_of_a_cancelled_cycle_form_a_complete_tree(server, receiver: OtlpReceiver):
    environment: dict[str, Any] = {"KTRDR_REDIS_URL": server.url, "AGENT_PHASE_SECONDS": 3600, **receiver.environment}
    with serving(**environment) as service:
        operation_id = triggered(service)
        answer = httpx.delete(f"{service.url}/api/v1/agent/cancel/{operation_id}", timeout=60)
        assert answer.json()["status"] == "cancelled", answer.text
        root, cycle = cycle_of(receiver, operation_id)
    assert (root.status, root.attributes["outcome"]) == ("unset", "cancelled")
    (phase,) = phases(cycle, root).values()
    assert (phase.name, phase.status) == ("agent.phase.design", "unset")
    assert phase.attributes["outcome"] == "cancelled"
    assert {span.status for span in cycle} == {"unset"}
