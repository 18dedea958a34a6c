"""Continue a client's trace (W3C Trace Context), and export spans if there is a collector.

Spans need the extra ``otel`` and a collector's address in OpenTelemetry's variable
OTEL_EXPORTER_OTLP_ENDPOINT (or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT). Its other variables apply, too.
"""

import logging
import os
import re
import time
from typing import TYPE_CHECKING

from dropserve.app.observability.record import RequestRecord, Trace

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
SERVICE_NAME = "dropserve"
# https://www.w3.org/TR/trace-context/#traceparent-header: later versions may add fields.
TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)

log = logging.getLogger(__name__)


def parse_traceparent(traceparent: bytes) -> Trace | None:
    """Parse the header ``traceparent``; None if it does not follow the standard."""
    found = TRACEPARENT.fullmatch(traceparent)
    if found is None or (traceparent.startswith(b"00") and found[4]):
        return None
    return Trace(found[1].decode(), found[2].decode(), found[3].decode())


class Spans:
    """Exports a span for each request, with child spans for its time in the queue and in runs."""

    def __init__(self, provider: "TracerProvider") -> None:
        self.provider = provider
        self.tracer = provider.get_tracer(SERVICE_NAME)

    def write(self, record: RequestRecord, seconds: float) -> None:
        """Export the spans of a request whose response has just gone out, after ``seconds``."""
        from opentelemetry.trace import (
            NonRecordingSpan,
            SpanContext,
            SpanKind,
            TraceFlags,
            set_span_in_context,
        )

        context = None
        if record.trace:
            trace, parent, flags = (int(part, 16) for part in record.trace)
            client = SpanContext(trace, parent, is_remote=True, trace_flags=TraceFlags(flags))
            context = set_span_in_context(NonRecordingSpan(client))
        end = time.time_ns()
        start = end - round(seconds * 1e9)
        span = self.tracer.start_span(
            f"{record.method} {record.route}",
            context,
            SpanKind.SERVER,
            {
                "http.request.method": record.method,
                "http.route": record.route,
                "http.response.status_code": record.status,
                "dropserve.request_id": record.id,
                "dropserve.model": record.model,
                "dropserve.version": record.version,
                "dropserve.rows": record.rows,
                "dropserve.passes": record.passes,
            },
            start_time=start,
        )
        inner = set_span_in_context(span)
        # Each may be the sum of several intervals, so only its length is right.
        queued, ran = round(record.queue_seconds * 1e9), round(record.run_seconds * 1e9)
        for name, begin, length in (("queue", start, queued), ("run", start + queued, ran)):
            if length:
                self.tracer.start_span(name, inner, start_time=begin).end(begin + length)
        span.end(end)

    def close(self) -> None:
        """Send the remaining spans."""
        self.provider.shutdown()


def open_spans() -> Spans | None:
    """Return the exporter of spans, or None if no collector is set."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning("no spans are written: %s; the extra 'otel' installs what is needed", error)
        return None
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", SERVICE_NAME)})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Spans(provider)
