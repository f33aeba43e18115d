"""Spans, with and without a tracer provider."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from decimal import Decimal

import pytest
from opentelemetry import trace
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.trace import NonRecordingSpan, SpanContext, StatusCode, TraceFlags

from ktrdr_budget import BudgetExceeded, Denial
from ktrdr_budget.telemetry.spans import (
    current_link,
    current_trace_id,
    operation_scope,
    span,
    suppressed,
    without_secrets,
)

from ..helpers.recorded_spans import Recorded

UNSAMPLED = SpanContext(7, 8, is_remote=True, trace_flags=TraceFlags(0))


# -- without a tracer provider -----------------------------------------------------------------------------------------


def test_spans_have_no_effect_without_a_tracer_provider():
    with (
        operation_scope("op_1", "agent_research"),
        suppressed(),
        span("a", {"x": 1}, links=[None], root=True) as current,
    ):
        current.set_attribute("y", 2)
        current.set_attributes({"z": None})
        current.add_event("now", {"x": 1})
        current.record_exception(ValueError("no"))
        current.fail("no")
        assert (current.trace_id, current.context, current.recording) == ("", None, False)
        assert current_trace_id() == ""
        assert current_link() is None


def test_exceptions_propagate_through_spans_without_a_tracer_provider():
    with pytest.raises(ValueError, match="mine"), operation_scope("op_1", "t"), suppressed(), span("a"):
        raise ValueError("mine")


def test_without_a_tracer_provider_spans_do_not_import_the_opentelemetry_sdk():
    code = """
import sys
from ktrdr_budget.telemetry.tracing import *
assert configure_tracing() is False
print([name for name in sys.modules if name.startswith("opentelemetry")])
with operation_scope("op_1", "t"), suppressed(), span("a", links=[current_link()]) as current:
    current.set_attribute("trace", current_trace_id())
instrument(None)
assert flush_tracing()
print([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={})
    assert (done.stdout, done.stderr) == ("[]\n[]\n", "")


# -- with a tracer provider --------------------------------------------------------------------------------------------


def test_a_new_span_is_a_child_of_the_current_span(recorded: Recorded):
    with span("outer", kind="client") as outer:
        with span("inner", {"phase": "designing", "strategy_name": None, "rates": [0.5, 1.0]}) as inner:
            inner.set_attributes({"tokens": 12, "accuracy": None})
            inner.set_attribute("none", None)
            inner.add_event("thought", {"of": "it", "else": None})
            assert inner.trace_id == outer.trace_id == current_trace_id()
            assert inner.recording
    outside, inside = recorded["outer"], recorded["inner"]
    assert outside.parent is None
    assert inside.parent == outside.context
    assert f"{outside.context.trace_id:032x}" == outer.trace_id
    assert outside.kind is trace.SpanKind.CLIENT
    assert dict(inside.attributes) == {"phase": "designing", "rates": (0.5, 1.0), "tokens": 12}
    assert [(event.name, dict(event.attributes)) for event in inside.events] == [("thought", {"of": "it"})]
    assert inside.status.status_code is StatusCode.UNSET
    assert current_trace_id() == ""


@pytest.mark.parametrize("error", [ValueError("went wrong"), ValueError(), KeyboardInterrupt("went wrong")])
def test_a_span_records_an_exception_raised_inside_the_span(recorded: Recorded, error: BaseException):
    with pytest.raises(type(error)), span("outer"), span("failing"):
        raise error
    for name in ("failing", "outer"):
        found = recorded[name]
        words = f"{type(error).__name__}: went wrong" if str(error) else type(error).__name__
        assert found.attributes["error"] == found.status.description == words
        assert found.status.status_code is StatusCode.ERROR
        (event,) = found.events
        assert event.name == "exception"
        assert event.attributes["exception.type"].endswith(type(error).__name__)
        assert event.attributes["exception.message"] == str(error)
        assert "raise error" in event.attributes["exception.stacktrace"]


DENIAL = Denial("agent", "budget_held", *map(Decimal, (5, 1, 4, 0, 0, 1, 0)), retry_after=9)


@pytest.mark.parametrize(
    ("ending", "attributes"),
    [
        (asyncio.CancelledError(), {"outcome": "cancelled"}),
        (BudgetExceeded(DENIAL), {"outcome": "denied", "reason": "budget_held"}),
    ],
)
def test_a_span_that_ends_with_a_cancellation_or_denial_has_no_error_status(
    recorded: Recorded, ending: BaseException, attributes
):
    with pytest.raises(type(ending)), span("ended"):
        raise ending
    assert dict(recorded["ended"].attributes) == attributes
    assert recorded["ended"].status.status_code is StatusCode.UNSET
    assert not recorded["ended"].events


def test_a_span_can_replace_the_message_of_a_recorded_exception(recorded: Recorded):
    with span("a") as current:
        try:
            raise ValueError("a secret") from KeyError("another secret")
        except ValueError as error:
            current.record_exception(error, "ours")
    (event,) = recorded["a"].events
    assert (event.attributes["exception.type"], event.attributes["exception.message"]) == ("ValueError", "ours")
    assert "test_a_span_can_replace_the_message_of_a_recorded_exception" in event.attributes["exception.stacktrace"]
    assert "secret" not in event.attributes["exception.stacktrace"]


def test_recording_an_exception_does_not_mark_the_span_as_failed(recorded: Recorded):
    with span("a") as current:
        current.record_exception(ValueError("survived"))
    with span("b") as current:
        current.fail("gate failed: accuracy 0.05 < 0.1")
    assert recorded["a"].status.status_code is StatusCode.UNSET
    assert recorded["a"].events[0].attributes["exception.message"] == "survived"
    assert recorded["b"].attributes["error"] == recorded["b"].status.description == "gate failed: accuracy 0.05 < 0.1"
    assert not recorded["b"].events


def test_the_span_of_a_closed_generator_has_no_error_status(recorded: Recorded):
    def numbers():
        with span("counting"):
            yield 1

    generator = numbers()
    next(generator)
    generator.close()
    assert recorded["counting"].status.status_code is StatusCode.UNSET


def test_secrets_are_masked_in_spans(recorded: Recorded):
    with pytest.raises(ConnectionError), span("failing"):
        raise ConnectionError("redis://user:geheim@store:6379 refused Bearer geheim-key-123 and sk-geheim-key")
    assert "geheim" not in str(recorded["failing"].to_json())


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("redis://:pass@store:6379/0 is away", "redis://***@store:6379/0 is away"),
        ("rediss://me:pa:ss@store and http://a:b@c/d", "rediss://***@store and http://***@c/d"),
        ("Authorization: Bearer abcdefgh.ij", "Authorization: Bearer ***"),
        ("key sk-ant-api03-Abc_123 is unknown", "key *** is unknown"),
        ("see https://example.org/a@b and mail me@example.org", "see https://example.org/a@b and mail me@example.org"),
        ("{'authorization': 'Basic YWxhZGRpbjpvcGVu'}", "{'authorization': 'Basic ***'}"),
        ("a risk-adjusted strategy with basic parameters", "a risk-adjusted strategy with basic parameters"),
        ("x" * 2000, "x" * 999 + "…"),
    ],
)
def test_secrets_are_masked_in_text(text: str, masked: str):
    assert without_secrets(text) == masked


# -- roots and links ---------------------------------------------------------------------------------------------------


def test_a_root_span_starts_a_new_trace_with_links_to_other_spans(recorded: Recorded):
    with span("trigger") as trigger:
        link = current_link()
        with span("cycle", root=True, links=[link, trigger, None]) as cycle:
            assert cycle.trace_id == current_trace_id() != trigger.trace_id
            with span("phase"):
                pass
        assert current_trace_id() == trigger.trace_id
    assert recorded["cycle"].parent is None
    assert [linked.context for linked in recorded["cycle"].links] == [recorded["trigger"].context] * 2
    assert recorded["phase"].parent == recorded["cycle"].context


def test_an_unsampled_trace_has_no_id_and_no_link(recorded: Recorded):
    with trace.use_span(NonRecordingSpan(UNSAMPLED)):
        assert current_trace_id() == ""
        assert current_link() is None
        with span("below", {"a": 1}) as below:
            assert (below.trace_id, below.context, below.recording) == ("", None, False)
            below.record_exception(ValueError("unseen"))
    assert not recorded.spans


# -- operations --------------------------------------------------------------------------------------------------------


async def test_every_span_within_an_operation_has_the_attributes_of_the_operation(recorded: Recorded):
    async def work():
        with span("in a task"):
            pass

    operation = {"operation.id": "op_1", "operation.type": "agent_research"}
    with span("before"), operation_scope("op_1", "agent_research"):
        with span("own", {"a": 1}):
            await asyncio.create_task(work())
            await asyncio.to_thread(lambda: recorded.other_tracer.start_span("in a thread").end())
        with span("root", root=True), recorded.other_tracer.start_as_current_span("of an instrumentation"):
            pass
        with operation_scope("op_2", "other"), span("of another"):
            pass
    with span("after"):
        pass
    assert dict(recorded["own"].attributes) == {"a": 1, **operation}
    for name in ("in a task", "in a thread", "root", "of an instrumentation"):
        assert dict(recorded[name].attributes) == operation, name
    assert dict(recorded["of another"].attributes) == {"operation.id": "op_2", "operation.type": "other"}
    assert not recorded["before"].attributes
    assert not recorded["after"].attributes


def test_no_span_is_recorded_while_spans_are_suppressed(recorded: Recorded):
    with span("outer"):
        with suppressed(), span("unseen") as unseen:
            assert (unseen.trace_id, current_trace_id()) == ("", "")
            assert not is_instrumentation_enabled()
        with span("seen"):
            assert is_instrumentation_enabled()
    assert {found.name for found in recorded.spans} == {"seen", "outer"}
    assert recorded["seen"].parent == recorded["outer"].context
