"""OpenTelemetry tracing of the service: configuration, instrumentation and export.

The standard environment variables configure the tracing, above all ``OTEL_EXPORTER_OTLP_ENDPOINT``. Without an
endpoint, nothing is installed or exported.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ktrdr_budget.telemetry.budget_spans import trace_call
from ktrdr_budget.telemetry.spans import (
    Span,
    current_link,
    current_trace_id,
    operation_of,
    operation_scope,
    span,
    suppressed,
    without_secrets,
)

if TYPE_CHECKING:
    from fastapi import FastAPI
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

__all__ = [
    "Span",
    "configure_tracing",
    "current_link",
    "current_trace_id",
    "flush_tracing",
    "instrument",
    "operation_processor",
    "operation_scope",
    "span",
    "suppressed",
    "trace_call",
]

logger = logging.getLogger("ktrdr_budget")

SERVICE_NAME = "ktrdr-backend"
FLUSH_S = 3.0
QUIET_S = 60.0
EXCLUDED_PATHS = (
    *("livez", "readyz", "metrics"),
    *("docs", "docs/oauth2-redirect", "redoc", r"openapi\.json"),
    *("api/v1/agent/status", "api/v1/agent/budget"),
)
"""The paths of requests that are not traced: probes, scrapes, API documentation, and polls of the agent."""
EXPORTERS = {
    "http/protobuf": ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "ktrdr-budget[tracing]"),
    "grpc": ("opentelemetry.exporter.otlp.proto.grpc.trace_exporter", "opentelemetry-exporter-otlp-proto-grpc"),
}
_LOGGERS_OF_EXPORTERS = (
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.exporter.otlp.proto.grpc.exporter",
)
_configured: _Tracing | None = None


def configure_tracing(service_name: str = SERVICE_NAME) -> bool:
    """Enable tracing if the environment names an endpoint; return whether tracing is enabled.

    Repeated calls have no effect. Redis clients that are created later are traced. If an error occurs, it is logged in
    one line, and the process continues without tracing. If the process already has a tracer provider, that provider is
    kept: :func:`operation_processor` is added to it, and the result is false.

    Args:
        service_name: the name of the service; ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES`` override it.
    """
    global _configured
    if _configured is not None:
        return True
    protocol = _protocol()
    if protocol is None:
        return False
    try:
        if _add_operation_processor():
            return False
        _configured = _Tracing(service_name, protocol)
    except ImportError as error:
        needed = EXPORTERS[protocol][1]
        logger.error("tracing disabled: %s is not installed; install %s", error.name or error, needed)
    except Exception as error:
        logger.error("tracing disabled: %s", without_secrets(f"{type(error).__name__}: {error}"))
    return _configured is not None


def instrument(app: FastAPI) -> None:
    """Trace the app's requests except probes, scrapes and polls. Call it before the app's first request."""
    if _configured is None or getattr(app, "_is_instrumented_by_opentelemetry", False):
        return
    try:
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    except ImportError as error:
        logger.error(
            "tracing of requests disabled: %s is not installed; install ktrdr-budget[tracing]", error.name or error
        )
        return
    FastAPIInstrumentor.instrument_app(
        app,
        excluded_urls=_excluded_urls(),
        exclude_spans=["receive", "send"],
        tracer_provider=_configured.provider,
    )


def flush_tracing(timeout_s: float = FLUSH_S) -> bool:
    """Export the recorded spans, blocking for at most ``timeout_s``; return whether the export succeeded."""
    return _configured is None or _configured.flush(timeout_s)


# -- the environment ---------------------------------------------------------------------------------------------------


def _setting(name: str) -> str:
    """Return a setting of the exporter. The variable for traces overrides the general variable."""
    return (
        os.environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or os.environ.get(f"OTEL_EXPORTER_OTLP_{name}") or ""
    ).strip()


def _protocol() -> str | None:
    """Return the export protocol; ``None`` if tracing is disabled or the protocol is unsupported."""
    if not _setting("ENDPOINT") or os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() or "otlp"
    protocol = _setting("PROTOCOL").lower() or "http/protobuf"
    if exporter == "none":
        return None
    if exporter != "otlp":
        logger.error("tracing disabled: OTEL_TRACES_EXPORTER must be 'otlp' or 'none', not %r", exporter)
        return None
    if protocol not in EXPORTERS:
        logger.error(
            "tracing disabled: OTEL_EXPORTER_OTLP_PROTOCOL must be one of %s, not %r", ", ".join(EXPORTERS), protocol
        )
        return None
    return protocol


def _excluded_urls() -> str:
    own = [f"^[^/]*//[^/]*/{path}/?$" for path in EXCLUDED_PATHS]
    name = "OTEL_PYTHON_FASTAPI_EXCLUDED_URLS"
    others = os.environ.get(name) or os.environ.get("OTEL_PYTHON_EXCLUDED_URLS") or ""
    return ",".join([*own, *([others] if others else [])])


def _resource(service_name: str) -> Resource:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    own: dict[str, Any] = {"service.name": service_name, "service.instance.id": str(uuid.uuid4())}
    with contextlib.suppress(PackageNotFoundError):  # the package is not installed
        own["service.version"] = version("ktrdr-budget")
    return Resource.create({**own, **OTELResourceDetector().detect().attributes})


# -- providers ---------------------------------------------------------------------------------------------------------


class _Tracing:
    """Tracing of this process, from configuration to exit."""

    def __init__(self, service_name: str, protocol: str) -> None:
        from opentelemetry import trace
        from opentelemetry.instrumentation.redis import RedisInstrumentor
        from opentelemetry.sdk.trace import SynchronousMultiSpanProcessor, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

        for name in _LOGGERS_OF_EXPORTERS:
            logging.getLogger(name).addFilter(_Quiet())
        self._exporter = _exporter(protocol)
        processors = SynchronousMultiSpanProcessor()  # type: ignore[no-untyped-call]
        processors.add_span_processor(operation_processor())
        processors.add_span_processor(BatchSpanProcessor(self._exporter))
        resource = _resource(service_name)
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False, active_span_processor=processors)
        # A Redis command starts no trace of its own. So commands of probes, scrapes and background work have no span.
        children_only = TracerProvider(
            sampler=ParentBased(ALWAYS_OFF),
            resource=resource,
            shutdown_on_exit=False,
            active_span_processor=processors,
        )
        self._jobs = _Jobs()
        self._in_time = True
        trace.set_tracer_provider(self.provider)
        if not (redis := RedisInstrumentor()).is_instrumented_by_opentelemetry:
            redis.instrument(tracer_provider=children_only)
        atexit.register(self._end)

    def flush(self, timeout_s: float) -> bool:
        self._in_time = self._jobs.run(self.provider.force_flush, timeout_s)
        return self._in_time

    def _end(self) -> None:
        # A collector that has just timed out gets no second full timeout.
        if not self._jobs.run(self.provider.shutdown, FLUSH_S if self._in_time else 0.1):
            self._exporter.shutdown()  # cancels retries


class _Jobs:
    """A thread that runs jobs with a timeout.

    The thread starts early, because no thread can start during interpreter shutdown.
    """

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ktrdr-tracing", daemon=True)
        self._thread.start()

    def run(self, job: Callable[[], Any], timeout_s: float) -> bool:
        """Run a job; return whether it succeeded within the timeout."""
        if not self._thread.is_alive():  # after a fork
            try:
                self._start()
            except RuntimeError:  # interpreter shutdown
                return False
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._queue.put((job, done))
        try:
            done.result(timeout_s)
        except Exception:
            return False
        return True

    def _work(self) -> None:
        while True:
            job, done = self._queue.get()
            try:
                done.set_result(job())
            except Exception as error:
                done.set_exception(error)


def _exporter(protocol: str) -> SpanExporter:
    from importlib import import_module

    from opentelemetry.sdk.trace.export import SpanExporter

    exporter: SpanExporter = import_module(EXPORTERS[protocol][0]).OTLPSpanExporter()

    class Masked(SpanExporter):
        """Masks secrets in exceptions, which instrumentations record unchanged."""

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            return exporter.export([_masked(span) for span in spans])

        def shutdown(self) -> None:
            exporter.shutdown()

    return Masked()


def _masked(span: ReadableSpan) -> ReadableSpan:
    description = span.status.description
    if not span.events and not description:
        return span
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.trace import Status

    def masked(attributes: Any) -> dict[str, Any]:
        return {
            name: without_secrets(value, 2 * len(value)) if isinstance(value, str) else value
            for name, value in (attributes or {}).items()
        }

    return ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=span.attributes,
        events=[Event(event.name, masked(event.attributes), event.timestamp) for event in span.events],
        links=span.links,
        kind=span.kind,
        status=Status()
        if _is_missing_script(span)
        else Status(span.status.status_code, description and without_secrets(description)),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _is_missing_script(span: ReadableSpan) -> bool:
    """Whether the span is an EVALSHA of a script that the store has not loaded yet. Such a span is no error."""
    return any(str((event.attributes or {}).get("exception.type")).endswith("NoScriptError") for event in span.events)


def operation_processor() -> SpanProcessor:
    """Return a span processor that sets the attributes of the operation on each span that starts.

    Add the processor to a tracer provider of your own; :func:`configure_tracing` does so by itself.
    """
    from opentelemetry.sdk.trace import SpanProcessor

    class OperationProcessor(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            if operation := operation_of(parent_context):
                span.set_attributes(operation)

    return OperationProcessor()


def _add_operation_processor() -> bool:
    """Add :func:`operation_processor` to the process's own tracer provider; return whether the process has one."""
    from opentelemetry import trace

    provider: Any = trace.get_tracer_provider()
    if hasattr(provider, "add_span_processor"):
        provider.add_span_processor(operation_processor())
    return not isinstance(provider, trace.ProxyTracerProvider)


class _Quiet(logging.Filter):
    """A log filter that passes at most one error per minute, with secrets masked.

    Without the filter, every export to an unreachable collector would log an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self._silent_until = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now < self._silent_until:
            return False
        self._silent_until = now + QUIET_S
        record.msg, record.args = without_secrets(record.getMessage(), 300), ()
        return True
