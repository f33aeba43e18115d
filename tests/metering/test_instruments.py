"""Spans and metrics of calls, by the GenAI conventions of OpenTelemetry."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.trace import SpanKind, StatusCode, get_current_span

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, BudgetLimiter
from ktrdr_budget.metering import instruments
from ktrdr_budget.metering.meter import Meter
from ktrdr_budget.metering.prices import ModelPrice, Prices
from ktrdr_budget.metering.usage import Usage
from ktrdr_budget.telemetry import spans
from ktrdr_budget.telemetry.spans import operation_scope, span

from ..helpers.waiting import until

BUDGETS = [Budget("agent", "1.00"), Budget("team", "9.00"), Budget("calls", 1000, unit="requests")]
PRICES = Prices([ModelPrice("acme", "road", "10", "50", cache_write="12.5")])
CALL = {"provider": "acme", "model": "road", "input_tokens_max": 1000, "output_tokens_max": 1000}
NAMES = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "acme", "gen_ai.request.model": "road"}


class ProviderError(Exception):
    """An HTTP error, in the shape that the SDKs raise."""

    status_code = 529


@pytest.fixture
def reader(monkeypatch):
    metric_reader = InMemoryMetricReader()
    provider = MeterProvider([metric_reader], shutdown_on_exit=False)
    monkeypatch.setattr(instruments, "_instruments", instruments.make_instruments(provider.get_meter("ktrdr_budget")))
    yield metric_reader
    provider.shutdown()


@pytest.fixture
async def meter(server):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        yield Meter(limiter, ["agent", "team", "calls"], PRICES)


def metrics(reader) -> dict:
    data = reader.get_metrics_data()
    if data is None:
        return {}
    return {m.name: m for r in data.resource_metrics for scope in r.scope_metrics for m in scope.metrics}


async def test_the_span_of_a_call_has_attributes_for_usage_and_cost_and_budgets(recorded, meter):
    with operation_scope("op_1", "agent_research"), span("phase"):
        async with meter.call(**CALL) as call:
            assert get_current_span().name == "chat road"
            call.finish(Usage(1000, 20, 300, 100))
    chat_span = recorded["chat road"]
    assert (chat_span.kind, chat_span.status.status_code) == (SpanKind.CLIENT, StatusCode.UNSET)
    assert chat_span.parent.span_id == recorded["phase"].context.span_id
    assert chat_span.attributes == {
        **NAMES,
        gen_ai.GEN_AI_USAGE_INPUT_TOKENS: 1000,
        gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS: 20,
        gen_ai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: 300,
        gen_ai.GEN_AI_USAGE_CACHE_CREATION_INPUT_TOKENS: 100,
        "ktrdr.budget.names": ("agent", "team", "calls"),
        "ktrdr.budget.reserved": 0.0625,
        "ktrdr.budget.cost": 0.01125,
        "ktrdr.budget.estimated": False,
        "ktrdr.budget.price_source": "configured",
        "operation.id": "op_1",
        "operation.type": "agent_research",
    }


async def test_span_attributes_match_the_opentelemetry_conventions():
    assert instruments.OPERATION == gen_ai.GEN_AI_OPERATION_NAME
    assert instruments.PROVIDER == gen_ai.GEN_AI_PROVIDER_NAME
    assert instruments.REQUEST_MODEL == gen_ai.GEN_AI_REQUEST_MODEL
    assert instruments.TYPE_OF_TOKENS == gen_ai.GEN_AI_TOKEN_TYPE
    assert instruments.ERROR_TYPE == ERROR_TYPE


def test_provider_names_match_the_opentelemetry_conventions(recorded):
    known = {provider.value for provider in gen_ai.GenAiProviderNameValues}
    for ours, theirs in (
        ("azure", "azure.ai.openai"),
        ("x-ai", "x_ai"),
        ("openai", "openai"),
        ("google", "gcp.gen_ai"),
    ):
        instruments.CallInstruments("chat", ours, "m", [], current=False).denied(ValueError())
        assert recorded.spans[-1].attributes[gen_ai.GEN_AI_PROVIDER_NAME] == theirs in known


async def test_the_metrics_of_a_call_match_the_opentelemetry_conventions(reader, meter):
    for _ in range(2):
        async with meter.call(**CALL) as call:
            call.finish(Usage(1000, 20))
    measured = metrics(reader)
    assert set(measured) == {
        gen_ai_metrics.GEN_AI_CLIENT_TOKEN_USAGE,
        gen_ai_metrics.GEN_AI_CLIENT_OPERATION_DURATION,
        "ktrdr.budget.cost",
    }
    usage = measured["gen_ai.client.token.usage"]
    assert usage.unit == "{token}"
    points = {point.attributes["gen_ai.token.type"]: point for point in usage.data.data_points}
    assert (points["input"].sum, points["input"].count, points["output"].sum) == (2000, 2, 40)
    assert points["input"].attributes == {**NAMES, "gen_ai.token.type": "input"}
    assert points["input"].explicit_bounds == tuple(4**power for power in range(14))
    duration = measured["gen_ai.client.operation.duration"]
    (point,) = duration.data.data_points
    assert (duration.unit, point.count, dict(point.attributes)) == ("s", 2, NAMES)
    assert point.explicit_bounds == tuple(0.01 * 2**power for power in range(14))
    spend = {
        point.attributes["ktrdr.budget.name"]: point.value for point in measured["ktrdr.budget.cost"].data.data_points
    }
    assert spend == {"agent": pytest.approx(0.022), "team": pytest.approx(0.022)}


async def test_a_span_records_the_type_but_not_the_message_of_an_error(recorded, reader, meter):
    with pytest.raises(ProviderError):
        async with meter.call(**CALL) as call:
            call.rejected()
            raise ProviderError("invalid prompt: my secret prompt")
    chat_span = recorded["chat road"]
    assert (chat_span.attributes["error.type"], chat_span.status.status_code) == ("529", StatusCode.ERROR)
    assert "secret" not in chat_span.to_json()
    (point,) = metrics(reader)["gen_ai.client.operation.duration"].data.data_points
    assert point.attributes["error.type"] == "529"
    assert "ktrdr.budget.cost" not in metrics(reader)


async def test_the_span_of_a_failed_stream_marks_the_cost_as_an_estimate(recorded, meter):
    with pytest.raises(ConnectionResetError):
        async with meter.call(**CALL) as call:
            call.report(Usage(0, 20))
            raise ConnectionResetError
    attributes = recorded["chat road"].attributes
    assert (attributes["ktrdr.budget.estimated"], attributes["error.type"]) == (True, "ConnectionResetError")
    assert (attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"]) == (1000, 20)
    assert attributes["ktrdr.budget.cost"] == 0.0135


async def test_a_denied_call_has_a_span_but_no_metrics(recorded, reader, meter):
    with pytest.raises(BudgetExceeded):
        await meter.call(**CALL | {"output_tokens_max": 10**6}).__aenter__()
    chat_span = recorded["chat road"]
    assert (chat_span.attributes["outcome"], chat_span.attributes["reason"]) == ("denied", "exceeds_limit")
    assert chat_span.status.status_code is StatusCode.UNSET, "a denial is an outcome"
    assert metrics(reader) == {}
    assert not get_current_span().get_span_context().is_valid


async def test_a_cancelled_call_has_the_outcome_cancelled(recorded, meter):
    with pytest.raises(asyncio.CancelledError):
        async with meter.call(**CALL) as call:
            call.report(Usage(1000, 20))
            raise asyncio.CancelledError
    chat_span = recorded["chat road"]
    assert (chat_span.attributes["outcome"], chat_span.status.status_code) == ("cancelled", StatusCode.UNSET)
    assert chat_span.attributes["ktrdr.budget.cost"] == 0.011


# -- generators closed by another task or thread -----------------------------------------------------------------------


async def _words(meter):
    """A generator with a metered call, like a streaming endpoint."""
    async with meter.call(**CALL) as call:
        call.report(Usage(1000, 20))
        yield "it "
        yield "rains"


def _sync_words(meter):
    with meter.call(**CALL) as call:
        call.report(Usage(1000, 20))
        yield "it "
        yield "rains"


async def test_closing_a_generator_in_a_different_task_causes_no_error_in_the_log_or_the_span(
    recorded, reader, meter, server, caplog
):
    """Reported in openlit #1369 and opentelemetry-python #2606."""
    words = _words(meter)
    await asyncio.create_task(anext(words))
    await asyncio.create_task(words.aclose())
    assert caplog.records == []
    chat_span = recorded["chat road"]
    assert chat_span.status.status_code is StatusCode.UNSET
    assert (chat_span.attributes["outcome"], chat_span.events) == ("cancelled", ())
    assert ERROR_TYPE not in chat_span.attributes
    (point,) = metrics(reader)["gen_ai.client.operation.duration"].data.data_points
    assert ERROR_TYPE not in point.attributes
    assert (await meter.limiter.status("agent")).spent == Decimal("0.011")
    assert not get_current_span().get_span_context().is_valid


async def test_garbage_collection_of_a_generator_causes_no_error_in_the_log_or_the_span(recorded, meter, caplog):
    words = _words(meter)
    await asyncio.create_task(anext(words))
    del words
    gc.collect()  # the event loop closes it, in a task of its own
    await until(lambda: recorded.spans)
    assert caplog.records == []
    assert recorded["chat road"].status.status_code is StatusCode.UNSET


def test_closing_a_generator_in_a_different_thread_causes_no_error_in_the_log_or_the_span(recorded, server, caplog):
    with BudgetLimiter(server.url, BUDGETS) as limiter, ThreadPoolExecutor(1) as pool:
        words = _sync_words(Meter(limiter, pricer=PRICES))
        assert pool.submit(next, words).result() == "it "
        words.close()
        assert limiter.status("agent").spent == Decimal("0.011")
    assert caplog.records == []
    assert recorded["chat road"].status.status_code is StatusCode.UNSET


async def test_a_span_has_no_error_status_if_the_generator_is_closed_in_a_different_task(recorded, caplog):
    async def inside(block):
        with block:
            yield

    for block in (span("phase"), operation_scope("op_1", "agent_research"), spans.suppressed()):
        generator = inside(block)
        await asyncio.create_task(anext(generator))
        await asyncio.create_task(generator.aclose())
    assert caplog.records == []
    assert recorded["phase"].status.status_code is StatusCode.UNSET


async def test_a_span_has_an_error_status_if_an_error_is_thrown_into_the_generator(recorded, meter):
    words = _words(meter)
    await anext(words)
    with pytest.raises(ProviderError):
        await words.athrow(ProviderError())
    assert recorded["chat road"].status.status_code is StatusCode.ERROR


async def test_the_charged_tokens_callback_receives_the_tokens_of_each_call(meter):
    counted: list[int] = []
    with pytest.raises(ConnectionResetError):
        token = instruments.charged_tokens.set(counted.append)
        try:
            async with meter.call(**CALL) as call:
                call.finish(Usage(1000, 20))
            async with meter.call(**CALL) as call:
                call.rejected()
            async with meter.call(**CALL) as call:
                call.report(Usage(0, 20))
                raise ConnectionResetError
        finally:
            instruments.charged_tokens.reset(token)
    assert counted == [1020, 0, 1020]


async def test_the_charged_tokens_callback_receives_the_reported_tokens_of_a_call_with_a_fixed_cost(server):
    counted: list[int] = []
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        token = instruments.charged_tokens.set(counted.append)
        async with Meter(limiter, pricer=Prices(fixed_cost="0.01")).call(**CALL) as call:
            call.finish(Usage(1000, 20))
        instruments.charged_tokens.reset(token)
    assert counted == [1020]


async def test_a_call_that_is_not_the_current_span_can_end_in_a_different_task(recorded, meter, caplog):
    call = meter.call(**CALL, current=False)
    with span("request"):
        await call.__aenter__()
        assert get_current_span().name == "request"

    async def end() -> None:
        call.finish(Usage(1000, 20))
        await call.__aexit__(None, None, None)

    await asyncio.create_task(end())
    assert recorded["chat road"].parent.span_id == recorded["request"].context.span_id
    assert recorded["chat road"].attributes["ktrdr.budget.cost"] == 0.011
    assert not caplog.records


def test_a_sync_call_has_a_span(recorded, server):
    with BudgetLimiter(server.url, BUDGETS) as limiter:
        with Meter(limiter, pricer=PRICES).call(**CALL, operation="embeddings") as call:
            call.finish(Usage(10))
    assert recorded["embeddings road"].attributes["ktrdr.budget.cost"] == 0.0001


def test_metering_works_without_the_opentelemetry_sdk(server):
    code = f"""
import sys
sys.modules["opentelemetry.sdk"] = sys.modules["genai_prices"] = None
from ktrdr_budget import Budget, BudgetLimiter
from ktrdr_budget.metering.meter import Meter
from ktrdr_budget.metering.prices import ModelPrice, Prices
from ktrdr_budget.metering.usage import Usage
with BudgetLimiter({server.url!r}, [Budget("agent", 1)]) as limiter:
    meter = Meter(limiter, pricer=Prices([ModelPrice("p", "m", 1, 1)]))
    with meter.call(provider="p", model="m", input_tokens_max=1, output_tokens_max=1) as call:
        call.finish(Usage(1, 1))
    print(limiter.status("agent").spent)
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "0.000002\n"


def test_metrics_are_recorded_after_the_process_sets_a_meter_provider(server):
    code = f"""
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from ktrdr_budget import Budget, BudgetLimiter
from ktrdr_budget.metering.meter import Meter
from ktrdr_budget.metering.prices import ModelPrice, Prices
from ktrdr_budget.metering.usage import Usage
reader = InMemoryMetricReader()
with BudgetLimiter({server.url!r}, [Budget("agent", 1)]) as limiter:
    meter = Meter(limiter, pricer=Prices([ModelPrice("p", "m", 1, 1)]))
    for provider in (None, MeterProvider([reader])):
        if provider is not None:
            metrics.set_meter_provider(provider)
        with meter.call(provider="p", model="m", input_tokens_max=1, output_tokens_max=1) as call:
            call.finish(Usage(1, 1))
found = [m for r in reader.get_metrics_data().resource_metrics for s in r.scope_metrics for m in s.metrics]
print(len(found), [m.data.data_points[0].value for m in found if m.name == "ktrdr.budget.cost"])
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "3 [2e-06]\n"
