"""Emulated tools of an operator: Jaeger with spans from a real receiver, Grafana with its own files."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ..helpers.otlp_receiver import OtlpReceiver, Span, trace_of

Answer = Callable[[str], Any]
"""Returns the document for a path; ``None`` for status 404."""


def jaeger(receiver: OtlpReceiver) -> Answer:
    """The part of Jaeger's query API that ``scripts/verify.sh`` uses: services, and traces by service and tags."""

    def answer(path: str) -> Any:
        if path == "/api/services":
            return {"data": sorted({span.resource["service.name"] for span in receiver.spans})}
        query = {name: values[0] for name, values in parse_qs(urlsplit(path).query).items()}
        wanted = json.loads(query["tags"]).items()
        found = {
            span.trace_id
            for span in receiver.spans
            if span.resource["service.name"] == query["service"] and wanted <= span.attributes.items()
        }
        return {"data": [_trace(trace_of(receiver.spans, trace_id)) for trace_id in sorted(found)]}

    return answer


def _trace(spans: list[Span]) -> dict[str, Any]:
    names = {span.resource["service.name"] for span in spans}
    return {
        "traceID": spans[0].trace_id,
        "spans": [_span(span) for span in spans],
        "processes": {f"p{number}": {"serviceName": name, "tags": []} for number, name in enumerate(sorted(names))},
    }


def _span(span: Span) -> dict[str, Any]:
    parents = [{"refType": "CHILD_OF", "traceID": span.trace_id, "spanID": span.parent_id}] if span.parent_id else []
    links = [{"refType": "FOLLOWS_FROM", "traceID": trace, "spanID": linked} for trace, linked in span.links]
    return {
        "traceID": span.trace_id,
        "spanID": span.span_id,
        "operationName": span.name,
        "references": parents + links,
        "tags": [{"key": key, "type": "string", "value": value} for key, value in span.attributes.items()],
    }


def grafana(dashboard: Path) -> Answer:
    """Grafana's health, and a provisioned dashboard."""
    document = json.loads(dashboard.read_text(encoding="utf-8"))
    known = {
        "/api/health": {"database": "ok"},
        f"/api/dashboards/uid/{document['uid']}": {"dashboard": document, "meta": {}},
    }
    return known.get


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """Serve the documents that ``answer`` returns, on a free port; yield the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            document = answer(self.path)
            content = json.dumps(document).encode()
            self.send_response(404 if document is None else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *words: object) -> None:
            """Logs nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
