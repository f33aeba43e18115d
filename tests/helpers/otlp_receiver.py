"""A receiver of OTLP over HTTP that decodes and keeps spans."""

from __future__ import annotations

import gzip
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from .waiting import WITHIN_S


@dataclass(frozen=True)
class Event:
    """An event within a span, such as an ``exception``."""

    name: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Span:
    """A received span; ids are hexadecimal, times in nanoseconds since the epoch."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    """Empty for the root of a trace."""
    kind: str
    """``internal``, ``server``, ``client``, …"""
    start_ns: int
    end_ns: int
    status: str
    """``unset``, ``ok`` or ``error``."""
    status_message: str
    scope: str
    """The instrumentation scope."""
    attributes: dict[str, Any] = field(repr=False)
    events: list[Event] = field(repr=False)
    links: list[tuple[str, str]] = field(repr=False)
    """Trace id and span id of each link."""
    resource: dict[str, Any] = field(repr=False)


class OtlpReceiver:
    """``with OtlpReceiver() as receiver: …`` listens on a free port; ``receiver.spans`` are those that have arrived.

    ``status`` is the status of its responses, and ``delay_s`` delays them.
    """

    def __init__(self) -> None:
        self.status = 200
        self.delay_s = 0.0
        self.requests = 0
        self.errors: list[str] = []
        """Errors in received requests."""
        self._spans: list[Span] = []
        self._arrived = threading.Condition()
        self._ending = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.receiver = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def endpoint(self) -> str:
        """The value of ``OTEL_EXPORTER_OTLP_ENDPOINT``."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for a process that exports here, with a short delay."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}

    @property
    def spans(self) -> list[Span]:
        """The spans received so far."""
        with self._arrived:
            return list(self._spans)

    def named(self, name: str) -> list[Span]:
        """The spans with this name."""
        return [span for span in self.spans if span.name == name]

    def wait(self, condition: Callable[[list[Span]], Any], within_s: float = WITHIN_S) -> list[Span]:
        """Wait until the received spans satisfy a condition; return them."""
        ends = time.monotonic() + within_s
        with self._arrived:
            while not condition(list(self._spans)):
                assert self._arrived.wait(ends - time.monotonic()), [span.name for span in self._spans]
            return list(self._spans)

    def wait_named(self, *names: str, within_s: float = WITHIN_S) -> list[Span]:
        """Wait until a span of each name has arrived; return all spans."""
        return self.wait(lambda spans: set(names) <= {span.name for span in spans}, within_s)

    def clear(self) -> None:
        """Forget the received spans."""
        with self._arrived:
            self._spans.clear()

    def __enter__(self) -> OtlpReceiver:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take(self, path: str, encoding: str, body: bytes) -> tuple[int, bytes]:
        """Process one request."""
        self.requests += 1
        self._ending.wait(self.delay_s)
        if self.status != 200:
            return self.status, b""
        try:
            assert path == "/v1/traces", path
            decode = {"gzip": gzip.decompress, "deflate": zlib.decompress, "": bytes}[encoding]
            spans = decoded(decode(body))
        except Exception as error:
            self.errors.append(repr(error))
            return 400, b""
        with self._arrived:
            self._spans += spans
            self._arrived.notify_all()
        return 200, ExportTraceServiceResponse().SerializeToString()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    receiver: OtlpReceiver

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore disconnected clients."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        status, response = self.server.receiver.take(self.path, self.headers.get("content-encoding", ""), body)
        self.send_response(status)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(response)))
        self.end_headers()
        self.wfile.write(response)

    def log_message(self, *words: object) -> None:
        """Log nothing."""


# -- decoding ----------------------------------------------------------------------------------------------------------


def decoded(body: bytes) -> list[Span]:
    """Decode the spans of an export request."""
    request = ExportTraceServiceRequest.FromString(body)
    return [
        _span(span, scoped.scope.name, _attributes(of_resource.resource.attributes))
        for of_resource in request.resource_spans
        for scoped in of_resource.scope_spans
        for span in scoped.spans
    ]


def _span(span: trace_pb2.Span, scope: str, resource: dict[str, Any]) -> Span:
    return Span(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        status=trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_").lower(),
        status_message=span.status.message,
        scope=scope,
        attributes=_attributes(span.attributes),
        events=[Event(event.name, _attributes(event.attributes)) for event in span.events],
        links=[(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        resource=resource,
    )


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    return None if kind is None else getattr(value, kind)


# -- trees -------------------------------------------------------------------------------------------------------------


def trace_of(spans: Iterable[Span], trace_id: str) -> list[Span]:
    """Return the spans of a trace, in the order of their start."""
    return sorted((span for span in spans if span.trace_id == trace_id), key=lambda span: span.start_ns)


def orphans(spans: Iterable[Span]) -> list[Span]:
    """Return the spans whose parent is not among them."""
    spans = list(spans)
    known = {(span.trace_id, span.span_id) for span in spans}
    return [span for span in spans if span.parent_id and (span.trace_id, span.parent_id) not in known]


def children(spans: Iterable[Span], parent: Span) -> list[Span]:
    """Return the children of a span, in the order of their start."""
    found = [span for span in spans if (span.trace_id, span.parent_id) == (parent.trace_id, parent.span_id)]
    return sorted(found, key=lambda span: span.start_ns)
