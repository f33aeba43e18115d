"""Spans recorded in this process, without a global tracer provider."""

from __future__ import annotations

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ktrdr_budget.telemetry.tracing import operation_processor


class Recorded:
    """The spans of :attr:`tracer`, which replaces the tracer of the package, and of :attr:`other_tracer`."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(operation_processor())
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = provider.get_tracer("ktrdr_budget")
        self.other_tracer = provider.get_tracer("other")

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        """Ended spans, in the order of their end."""
        return self._exporter.get_finished_spans()

    def __getitem__(self, name: str) -> ReadableSpan:
        """The only span with this name."""
        (found,) = [span for span in self.spans if span.name == name]
        return found
