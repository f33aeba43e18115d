"""Exported spans, decoded by a real receiver; each test has its own process, as tracing is global."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktrdr_budget import BudgetLimiter
from ktrdr_budget.models import Budget
from ktrdr_budget.telemetry.tracing import _Quiet

from ..conftest import free_port
from ..helpers.otlp_receiver import OtlpReceiver, Span, children, orphans, trace_of
from ..helpers.waiting import WITHIN_S

APP = Path(__file__).parents[1] / "workers" / "traced_app.py"


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver
    assert not receiver.errors


def run(*words: str, environment: dict[str, str], within_s: float = WITHIN_S) -> tuple[str, str]:
    """Run a process in this environment; return its stdout and stderr."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", *words],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=within_s,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def ask(url: str, receiver: OtlpReceiver, *requests: str, **environment: str) -> list[Any]:
    """Send requests to a traced app; return the replies after its spans have arrived."""
    output, complaints = run(str(APP), url, *requests, environment={**receiver.environment, **environment})
    assert complaints == ""
    traced, *answers = json.loads(output)
    assert traced is True
    return answers


def code(text: str, environment: dict[str, str]) -> tuple[str, str]:
    return run("-c", textwrap.dedent(text), environment=environment)


# -- traced requests ---------------------------------------------------------------------------------------------------


def test_requests_are_traced_but_probes_and_polls_are_not(server, receiver: OtlpReceiver):
    quiet = ["livez", "readyz", "metrics", "docs", "docs/oauth2-redirect", "redoc", "openapi.json"]
    quiet += ["api/v1/agent/status", "api/v1/agent/budget", "livez/"]
    answer, *others = ask(server.url, receiver, "POST /spend/0.10", *(f"GET /{path}" for path in quiet))
    assert others == [{"trace_id": ""}] * len(quiet)
    assert {span.trace_id for span in receiver.spans} == {answer["trace_id"]}
    (request,) = [span for span in receiver.spans if not span.parent_id]
    assert (request.name, request.kind) == ("POST /{path:path}", "server")
    assert request.attributes["http.status_code"] == 200
    below = {span.name: span for span in receiver.spans if span is not request}
    assert {span.parent_id for span in below.values()} == {request.span_id}
    assert below["ktrdr.budget.record"].attributes["ktrdr.budget.amounts"] == ["0.10"]
    assert below["EVALSHA"].kind == "client"
    assert below["EVALSHA"].attributes["db.system"] == "redis"
    assert set(below) <= {"ktrdr.budget.record", "EVALSHA", "EVAL"}
    assert {span.resource["service.name"] for span in receiver.spans} == {"ktrdr-backend"}
    assert request.resource["service.version"]
    assert len(request.resource["service.instance.id"]) == 36
    with BudgetLimiter(server.url, [Budget("agent", "5.00")]) as limiter:
        assert [entry.trace_id for entry in limiter.ledger("agent").items] == [request.trace_id]


def test_requests_to_paths_similar_to_probe_paths_are_traced(server, receiver: OtlpReceiver):
    paths = ["api/v1/budgets/metrics", "api/v1/budgets/x/livez", "api/v1/agent/status2", "metrics2"]
    answers = ask(server.url, receiver, *(f"GET /{path}" for path in paths))
    assert len({answer["trace_id"] for answer in answers} - {""}) == len(paths)
    assert len(receiver.named("GET /{path:path}")) == len(paths)


def test_the_spans_of_each_cycle_form_a_separate_and_complete_tree(server, receiver: OtlpReceiver):
    spends = [f"&POST /spend/0.{number}" for number in range(10, 22)]
    answers = ask(server.url, receiver, "POST /cycle/op_1", "&POST /cycle/op_2", "&POST /cycle/op_3", *spends)
    assert not orphans(receiver.spans)
    triggers = {answer["trace_id"] for answer in answers[:3]}
    roots = receiver.named("agent.research_cycle")
    assert {root.attributes["operation.id"] for root in roots} == {"op_1", "op_2", "op_3"}
    for root in roots:
        _check_cycle(root, receiver.spans)
        ((linked_trace, linked_span),) = root.links
        assert linked_trace in triggers
        assert linked_span in {span.span_id for span in receiver.spans if span.trace_id == linked_trace}
    outside = [span for span in receiver.spans if span.trace_id not in {root.trace_id for root in roots}]
    assert not [span for span in outside if "operation.id" in span.attributes]
    assert len({span.trace_id for span in outside}) == 15


def _check_cycle(root: Span, spans: list[Span]) -> None:
    cycle = trace_of(spans, root.trace_id)
    assert cycle[0] == root
    assert not root.parent_id
    assert root.attributes["outcome"] == "completed"
    assert {(span.attributes["operation.id"], span.attributes["operation.type"]) for span in cycle} == {
        (root.attributes["operation.id"], "agent_research")
    }
    assert all(root.start_ns <= span.start_ns <= span.end_ns for span in cycle)
    below = [span.name for span in children(cycle, root)]
    assert {"ktrdr.budget.reserve", "agent.phase.design", "ktrdr.budget.status", "ktrdr.budget.settle"} <= set(below)
    (phase,) = [span for span in cycle if span.name == "agent.phase.design"]
    assert (phase.attributes["phase"], phase.attributes["tokens"]) == ("designing", 120)
    assert "strategy_name" not in phase.attributes
    assert "ktrdr.budget.extend" in {span.name for span in children(cycle, phase)}


def test_the_recorded_error_message_of_a_failed_request_contains_no_secrets(server, receiver: OtlpReceiver):
    assert ask(server.url, receiver, "GET /fails", "GET /quiet") == [500, {"trace_id": ""}]
    failing, request = receiver.named("failing")[0], receiver.named("GET /{path:path}")[0]
    for span in (failing, request):
        assert span.status == "error"
        (event,) = span.events
        assert event.name == "exception"
        assert event.attributes["exception.type"] == "ValueError"
        assert event.attributes["exception.message"] == "redis://***@store:6379 is away"
    assert failing.attributes["error"] == failing.status_message == "ValueError: redis://***@store:6379 is away"
    assert failing.parent_id == request.span_id
    assert not [span for span in receiver.spans if "geheim" in f"{span.attributes}{span.events}{span.status_message}"]
    # Only the request is recorded; the suppressed span is not.
    assert [span.name for span in receiver.spans if span.trace_id != failing.trace_id] == ["GET /{path:path}"]


# -- the environment ---------------------------------------------------------------------------------------------------


def test_tracing_respects_the_standard_opentelemetry_variables(server, receiver: OtlpReceiver):
    environment = {
        "OTEL_SERVICE_NAME": "mine",
        "OTEL_RESOURCE_ATTRIBUTES": "service.instance.id=one,team=blue",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{receiver.endpoint}/v1/traces",
        "OTEL_PYTHON_FASTAPI_EXCLUDED_URLS": "/spend/0.2,/spend/0.3",
    }
    ask(server.url, receiver, *(f"POST /spend/0.{number}0" for number in (1, 2, 3)), **environment)
    assert len({span.trace_id for span in receiver.spans}) == 1
    resource = receiver.spans[0].resource
    assert (resource["service.name"], resource["service.instance.id"], resource["team"]) == ("mine", "one", "blue")


def test_unsampled_traces_have_no_ids(server, receiver: OtlpReceiver):
    answers = ask(server.url, receiver, "POST /spend/0.10", "POST /cycle/op_1", OTEL_TRACES_SAMPLER="always_off")
    assert answers == [{"trace_id": ""}] * 2
    assert not receiver.spans


def test_an_invalid_tracing_configuration_is_reported_in_one_line():
    output, complaints = code(
        """
        import logging, os, sys
        logging.basicConfig(level="INFO", format="%(levelname)s %(message)s", stream=sys.stdout)
        from ktrdr_budget.telemetry.tracing import configure_tracing

        def configure(**environment):
            os.environ.update(environment)
            assert configure_tracing() is False
            for name in environment:
                del os.environ[name]

        configure()
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
        configure(OTEL_SDK_DISABLED="True")
        configure(OTEL_TRACES_EXPORTER="none")
        assert "opentelemetry" not in sys.modules
        configure(OTEL_TRACES_EXPORTER="zipkin")
        configure(OTEL_EXPORTER_OTLP_PROTOCOL="http/json")
        sys.modules["opentelemetry.exporter.otlp.proto.grpc.trace_exporter"] = None
        configure(OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="grpc")
        sys.modules["opentelemetry.instrumentation.redis"] = None
        configure()
        from opentelemetry import trace
        assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
        """,
        {},
    )
    assert complaints == ""
    assert output.splitlines() == [
        "ERROR tracing disabled: OTEL_TRACES_EXPORTER must be 'otlp' or 'none', not 'zipkin'",
        "ERROR tracing disabled: OTEL_EXPORTER_OTLP_PROTOCOL must be one of http/protobuf, grpc, not 'http/json'",
        "ERROR tracing disabled: opentelemetry.exporter.otlp.proto.grpc.trace_exporter is not installed;"
        " install opentelemetry-exporter-otlp-proto-grpc",
        "ERROR tracing disabled: opentelemetry.instrumentation.redis is not installed; install ktrdr-budget[tracing]",
    ]


def test_spans_of_an_existing_tracer_provider_get_operation_attributes():
    output, _ = code(
        """
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        from ktrdr_budget.telemetry.tracing import configure_tracing, operation_scope, span

        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
        assert configure_tracing() is False
        assert trace.get_tracer_provider() is provider
        with operation_scope("op_1", "t"), span("own"), trace.get_tracer("x").start_as_current_span("other"):
            pass
        print([(span.name, dict(span.attributes)) for span in exporter.get_finished_spans()])
        """,
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"},
    )
    operation = {"operation.id": "op_1", "operation.type": "t"}
    assert output.strip() == str([("other", operation), ("own", operation)])


def test_without_an_endpoint_no_tracer_provider_is_installed(server):
    output, complaints = code(
        """
        import asyncio, sys
        from ktrdr_budget.api import Settings, create_app

        def loaded(*packages):
            return sorted(name for name in sys.modules if name.startswith(packages))

        # FastAPI and redis-py import parts of it themselves.
        ours = "opentelemetry.sdk.trace", "opentelemetry.exporter", "opentelemetry.instrumentation", "requests"
        app = create_app(Settings())
        assert not loaded("opentelemetry.sdk", *ours), loaded("opentelemetry.sdk", *ours)

        async def run():
            async with app.router.lifespan_context(app):
                await app.state.limiter.record("agent", "0.10")

        asyncio.run(run())
        assert not loaded(*ours), loaded(*ours)
        import redis.asyncio
        from opentelemetry import trace
        assert not hasattr(redis.asyncio.Redis.execute_command, "__wrapped__")
        assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
        """,
        {"KTRDR_REDIS_URL": server.url},
    )
    assert (output, complaints) == ("", "")


# -- unreachable collectors --------------------------------------------------------------------------------------------

AWAY = """
    import sys, time
    from ktrdr_budget.telemetry.tracing import configure_tracing, flush_tracing, span
    assert configure_tracing()
    began = time.monotonic()
    for number in range(5000):
        with span("busy", {"number": number}):
            pass
    busy_s = time.monotonic() - began
    began = time.monotonic()
    in_time = flush_tracing(0.3)
    flush_s = time.monotonic() - began
    print(f"{busy_s} {in_time} {flush_s} {time.time()}")
"""


@pytest.mark.parametrize("how", ["refuses", "hangs", "fails"])
def test_an_unreachable_collector_delays_no_call(receiver: OtlpReceiver, how: str):
    endpoint = f"http://127.0.0.1:{free_port()}" if how == "refuses" else receiver.endpoint
    if how == "hangs":
        receiver.delay_s = 60.0
    if how == "fails":
        receiver.status = 503
    patient = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_TIMEOUT": "60"}
    output, complaints = code(AWAY, {**receiver.environment, **patient})
    gone_s = time.time()
    busy_s, in_time, flush_s, done_s = output.split()
    assert in_time == "False"
    # Far below the timeout of one export attempt, also on a busy machine: usually 0.2 s, 0.3 s and 0.3 s.
    assert float(busy_s) < 15
    assert 0.25 < float(flush_s) < 10
    assert gone_s - float(done_s) < 15
    # One of the exporter, and one of the full queue, which is repeated once in twenty seconds.
    assert len(set(complaints.splitlines())) <= 2


def test_the_last_spans_are_exported_at_exit(receiver: OtlpReceiver):
    code(
        """
        from ktrdr_budget.telemetry.tracing import configure_tracing, span
        assert configure_tracing() and configure_tracing()
        with span("last"):
            pass
        """,
        {**receiver.environment, "OTEL_BSP_SCHEDULE_DELAY": "60000"},
    )
    assert [span.name for span in receiver.spans] == ["last"]


def test_a_forked_child_exports_its_own_spans(receiver: OtlpReceiver):
    code(
        """
        import os
        from ktrdr_budget.telemetry.tracing import configure_tracing, flush_tracing, span
        assert configure_tracing()
        with span("of the parent"):
            child = os.fork()
            if child == 0:
                with span("of the child"):
                    pass
                assert flush_tracing()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        """,
        {**receiver.environment, "OTEL_BSP_SCHEDULE_DELAY": "60000"},
    )
    assert [span.name for span in receiver.spans] == ["of the child", "of the parent"]
    assert not orphans(receiver.spans)


def test_an_exporter_logs_at_most_one_line_per_minute_and_masks_secrets():
    quiet = _Quiet()

    def record() -> logging.LogRecord:
        url = "http://me:geheim@collector:4318"
        return logging.LogRecord("exporter", logging.ERROR, __file__, 1, "no connection to %s", (url,), None)

    first = record()
    assert quiet.filter(first)
    assert first.getMessage() == "no connection to http://***@collector:4318"
    assert not quiet.filter(record())
