"""Carry on a client's trace (W3C Trace Context), and write spans where somebody collects them.

Spans need the extra ``otel`` and the address of a collector in OpenTelemetry's own variable
OTEL_EXPORTER_OTLP_ENDPOINT (or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT); its others hold, too.
"""

import logging
import os
import re
import time
from typing import TYPE_CHECKING

from dropserve.app.observability.record import Call, Trace

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
SERVICE_NAME = "dropserve"
# https://www.w3.org/TR/trace-context/#traceparent-header: later versions may add fields.
TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)

log = logging.getLogger(__name__)


def read(traceparent: bytes) -> Trace | None:
    """Read the header ``traceparent``; None if it is not as the standard has it."""
    found = TRACEPARENT.fullmatch(traceparent)
    if found is None or (traceparent.startswith(b"00") and found[4]):
        return None
    return Trace(found[1].decode(), found[2].decode(), found[3].decode())


class Spans:
    """Writes a span for each request, with one for the wait for its runs and one for these."""

    def __init__(self, provider: "TracerProvider") -> None:
        self.provider = provider
        self.tracer = provider.get_tracer(SERVICE_NAME)

    def write(self, call: Call, status: int, seconds: float) -> None:
        """Write the spans of a request that was answered just now, after ``seconds``."""
        from opentelemetry.trace import (
            NonRecordingSpan,
            SpanContext,
            SpanKind,
            TraceFlags,
            set_span_in_context,
        )

        context = None
        if call.trace:
            trace, parent, flags = (int(part, 16) for part in call.trace)
            caused = SpanContext(trace, parent, is_remote=True, trace_flags=TraceFlags(flags))
            context = set_span_in_context(NonRecordingSpan(caused))
        end = time.time_ns()
        start = end - round(seconds * 1e9)
        span = self.tracer.start_span(
            f"{call.method} {call.route}",
            context,
            SpanKind.SERVER,
            {
                "http.request.method": call.method,
                "http.route": call.route,
                "http.response.status_code": status,
                "dropserve.request_id": call.id,
                "dropserve.model": call.model,
                "dropserve.version": call.version,
                "dropserve.rows": call.rows,
                "dropserve.passes": call.passes,
            },
            start_time=start,
        )
        inner = set_span_in_context(span)
        # Each is the sum of what may have been several, so only their lengths are right.
        queued, ran = round(call.queued * 1e9), round(call.ran * 1e9)
        for name, begin, length in (("queue", start, queued), ("run", start + queued, ran)):
            if length:
                self.tracer.start_span(name, inner, start_time=begin).end(begin + length)
        span.end(end)

    def close(self) -> None:
        """Send what was not sent yet."""
        self.provider.shutdown()


def spans() -> Spans | None:
    """Return what writes spans, where an address is set to send them to."""
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
