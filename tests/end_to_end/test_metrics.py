"""Observability: metrics, the log, traces."""

import math
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import children, events, service, wait_for

Examples = Callable[[str], list[Any]]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def scrape(client: httpx.Client) -> Samples:
    """Read the metrics as Prometheus does."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    """Add up the samples of a metric that have these labels."""
    return sum(
        number
        for (of, having), number in samples.items()
        if of == name and labels.items() <= dict(having).items()
    )


def traffic(client: httpx.Client, rows: list[Any]) -> None:
    """Send the requests whose counts are known."""
    for number in range(1, 4):
        body = {"model": "digits", "inputs": rows[:number]}
        assert client.post("/predict", json=body).status_code == 200
    query: dict[str, Any] = {"model": "digits", "inputs": rows[:2], "passes": 50}
    assert client.post("/uncertainty", json=query).status_code == 200
    assert client.post("/uncertainty", json=query | {"passes": 0}).status_code == 422
    assert client.post("/predict", json={"model": "none", "inputs": []}).status_code == 404
    assert client.get("/nothing").status_code == 404


def check(samples: Samples) -> None:
    """Check the counts of that traffic."""
    requests = "dropserve_requests_total"
    digits = {"model": "digits", "version": "1"}
    assert value(samples, requests, route="/predict", status="200", **digits) == 3
    assert value(samples, requests, route="/uncertainty", status="200", **digits) == 1
    assert value(samples, requests, route="/uncertainty", status="422") == 1
    assert value(samples, requests, route="/predict", status="404", model="") == 1
    assert value(samples, requests, route="other", status="404") == 1
    assert value(samples, "dropserve_rows_total", **digits) == 1 + 2 + 3 + 2
    assert value(samples, "dropserve_passes_total", **digits) == 2 * 50
    assert value(samples, "dropserve_rejected_total", reason="invalid") == 3
    sizes = "dropserve_batch_size"
    assert value(samples, f"{sizes}_sum", graph="predict", **digits) == 1 + 2 + 3
    assert value(samples, f"{sizes}_sum", graph="stochastic", **digits) == 100
    seconds = "dropserve_request_seconds"
    spent = {}
    for stage in ("queue", "run", "total"):
        of = {"route": "/predict", "stage": stage, **digits}
        assert value(samples, f"{seconds}_count", **of) == 3
        assert value(samples, f"{seconds}_bucket", le="+Inf", **of) == 3
        spent[stage] = value(samples, f"{seconds}_sum", **of)
    assert 0 < spent["run"] < spent["queue"] + spent["run"] < spent["total"]
    assert value(samples, "dropserve_queue_rows") == 0


def test_metrics_count_requests_rows_passes_runs_and_refusals(
    built: Path, examples: Examples
) -> None:
    with service(built / "models") as client:
        traffic(client, examples("digits"))
        samples = scrape(client)
        check(samples)
        models = {path.name for path in (built / "models").iterdir()}
        for model in models:
            loaded = {"model": model, "outcome": "loaded"}
            assert value(samples, "dropserve_model_loads_total", **loaded) == 1
            info = {"device": "cpu", "provider": "CPUExecutionProvider", "model": model}
            assert value(samples, "dropserve_model_info", **info) == 1
        pid = client.headers["x-test-pid"]
        assert 50e6 < value(samples, "process_resident_memory_bytes", pid=pid) < 1e9
        assert value(samples, "process_cpu_seconds_total", pid=pid) > 0


def test_with_a_tolerance_the_passes_that_were_run_are_counted(
    built: Path, examples: Examples
) -> None:
    with service(built / "models") as client:
        body = {"model": "digits", "inputs": examples("digits")[:2], "tolerance": 0.02}
        answer = client.post("/uncertainty", json=body | {"passes": 5000}).json()
        assert answer["converged"]
        samples = scrape(client)
    digits = {"model": "digits", "version": "1"}
    assert value(samples, "dropserve_passes_total", **digits) == 2 * answer["passes"] < 10_000


def test_metrics_of_several_workers_are_added_up_also_when_one_has_died(
    built: Path, examples: Examples
) -> None:
    with service(built / "models", DROPSERVE_WORKERS="2") as client:
        wait_for(lambda: value(scrape(client), "dropserve_workers") == 2)
        # New connections, which any worker may accept.
        for number in range(20):
            body = {"model": "digits", "inputs": examples("digits")[:1]}
            answer = httpx.post(f"{client.base_url}/predict", json=body)
            assert answer.status_code == 200, number
        # These, too: the worker that answers has asked the other for its counts.
        for _ in range(4):
            with httpx.Client(base_url=client.base_url, timeout=30) as another:
                assert value(scrape(another), "dropserve_requests_total", route="/predict") == 20
        pid = int(client.headers["x-test-pid"])
        first = min(children(pid))
        samples = scrape(client)
        assert {dict(labels)["pid"] for name, labels in samples if "resident" in name} == {
            str(child) for child in children(pid)
        }
        os.kill(first, 9)

        def replaced() -> bool:
            with httpx.Client(base_url=client.base_url, timeout=30) as another:
                samples = scrape(another)
            return (
                value(samples, "dropserve_workers") == 2
                and value(samples, "dropserve_worker_deaths_total") == 1
            )

        wait_for(replaced)
        with httpx.Client(base_url=client.base_url, timeout=30) as another:
            assert value(scrape(another), "dropserve_requests_total", route="/predict") == 20


def test_each_request_is_a_line_in_the_log_with_its_times(
    built: Path, examples: Examples, capfd: pytest.CaptureFixture[str]
) -> None:
    with service(built / "models") as client:
        body = {"model": "digits", "inputs": examples("digits")[:3], "passes": 20}
        trace = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        asked = client.post("/uncertainty", json=body, headers={"x-request-id": "order-66"} | trace)
        assert asked.headers["x-request-id"] == "order-66"
        drawn = client.post("/predict", json={"model": "digits", "inputs": []})
        assert re.fullmatch("[0-9a-f]{32}", drawn.headers["x-request-id"])
        another = client.get("/health/live").headers["x-request-id"]
        assert another != drawn.headers["x-request-id"]
    log = {each["request_id"]: each for each in events(capfd.readouterr().out) if "route" in each}
    line = log["order-66"]
    assert {name: line[name] for name in ("route", "model", "version", "rows", "passes")} == {
        "route": "/uncertainty",
        "model": "digits",
        "version": 1,
        "rows": 3,
        "passes": 20,
    }
    assert (line["status"], line["trace_id"], line["parent_span_id"]) == (200, TRACE, PARENT)
    assert 0 <= line["queue_ms"] + line["run_ms"] <= line["total_ms"] < 10_000
    assert log[drawn.headers["x-request-id"]]["status"] == 422
    assert log[another]["route"] == "/health/live"


def test_a_body_that_is_not_valid_http_is_logged_with_the_id_and_status_of_its_response(
    built: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    head = (
        b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"x-request-id: broken\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    with service(built / "models") as client:
        address = "127.0.0.1", client.base_url.port or 80
        with socket.create_connection(address, timeout=10) as sent:
            sent.sendall(head + b"1\r\n{\r\n")
            # The endpoint has the head by the time that another connection has a response.
            assert client.get("/health/live").status_code == 200
            sent.sendall(b"no length\r\n")
            response = b"".join(iter(lambda: sent.recv(65536), b""))
    assert response.startswith(b"HTTP/1.1 400 ")
    assert b"x-request-id: broken" in response
    lines = [each for each in events(capfd.readouterr().out) if each.get("request_id") == "broken"]
    assert [(each["route"], each["status"]) for each in lines] == [("/predict", 400)]


NO_TRACES = [
    "",
    "00",
    f"00-{TRACE}-{PARENT}",
    f"00-{TRACE}-{PARENT}-01-more",
    f"ff-{TRACE}-{PARENT}-01",
    f"00-{'0' * 32}-{PARENT}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE.upper()}-{PARENT}-01",
    "x" * 5000,
]


def test_an_invalid_traceparent_is_not_propagated(
    built: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = [f"00-{TRACE}-{PARENT}-01", f"01-{TRACE}-{PARENT}-00-of a later version"]
    with service(built / "models") as client:
        for traceparent in NO_TRACES + good:
            answer = client.get("/health/live", headers={"traceparent": traceparent})
            assert answer.status_code == 200
    lines = [each for each in events(capfd.readouterr().out) if each.get("route")]
    assert ["trace_id" in line for line in lines] == [False] * len(NO_TRACES) + [True] * 2


def test_a_malformed_request_is_counted_and_logged_under_its_id(
    built: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with service(built / "models", DROPSERVE_MAX_HEAD_BYTES="1024") as client:
        long = client.get("/health/live", headers={"x-long": "x" * 2000})
        assert long.status_code == 431
        with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as other:
            other.sendall(b"no HTTP\r\n\r\n")
            assert other.recv(4096).startswith(b"HTTP/1.1 400 ")
        assert value(scrape(client), "dropserve_rejected_total", reason="head") == 2
    lines = {each.get("request_id"): each for each in events(capfd.readouterr().out)}
    assert lines[long.headers["x-request-id"]]["status"] == 431


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """Collect spans as OpenTelemetry's collector does, over HTTP."""
    spans: list[Any] = []

    class Collect(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"]))
            for resource in ExportTraceServiceRequest.FromString(content).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collect) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", spans
        finally:
            server.shutdown()
            thread.join()


def test_spans_of_requests_reach_a_collector_in_the_clients_trace(
    built: Path, examples: Examples
) -> None:
    with collector() as (url, spans):
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
        }
        with service(built / "models", **environment) as client:
            body = {"model": "digits", "inputs": examples("digits")[:2]}
            trace = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            assert client.post("/uncertainty", json=body, headers=trace).status_code == 200
            assert client.get("/health/live").status_code == 200
    # The service has sent the rest before it ended.
    by_name = {span.name: span for span in spans}
    assert by_name.keys() >= {"POST /uncertainty", "queue", "run", "GET /health/live"}
    request, run = by_name["POST /uncertainty"], by_name["run"]
    assert request.trace_id.hex() == TRACE
    assert request.parent_span_id.hex() == PARENT
    assert run.parent_span_id == request.span_id
    assert request.start_time_unix_nano <= run.start_time_unix_nano
    assert run.end_time_unix_nano <= request.end_time_unix_nano
    said = {each.key: each.value for each in request.attributes}
    assert said["dropserve.model"].string_value == "digits"
    assert said["http.response.status_code"].int_value == 200
    assert by_name["GET /health/live"].trace_id != request.trace_id


def test_a_missing_collector_costs_no_request(built: Path, examples: Examples) -> None:
    body = {"model": "digits", "inputs": examples("digits")[:1]}
    with service(
        built / "models",
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9",
        OTEL_EXPORTER_OTLP_TIMEOUT="1",
    ) as client:
        assert client.post("/predict", json=body).status_code == 200


def test_each_of_many_simultaneous_requests_is_counted(built: Path, examples: Examples) -> None:
    body = {"model": "digits", "inputs": examples("digits")[:1]}
    with service(built / "models") as client:
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: client.post("/predict", json=body), range(200)))
        assert {answer.status_code for answer in answers} == {200}
        assert value(scrape(client), "dropserve_requests_total", route="/predict") == 200
        names = {answer.headers["x-request-id"] for answer in answers}
        assert len(names) == 200
        assert not any(map(math.isnan, scrape(client).values()))


def test_a_full_disk_for_the_log_costs_no_response(built: Path, examples: Examples) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "--models", str(built / "models"), "--port", str(port)],
            env=os.environ | {"DROPSERVE_DEVICE": "cpu"},
            stderr=full,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            wait_for(lambda: answers(client))
            body = {"model": "digits", "inputs": examples("digits")[:1]}
            for _ in range(5):
                assert client.post("/predict", json=body).status_code == 200
            requests = {"route": "/predict", "status": "200"}
            assert value(scrape(client), "dropserve_requests_total", **requests) == 5
    finally:
        process.terminate()
        assert process.wait(timeout=30) == 0


def answers(client: httpx.Client) -> bool:
    """Tell whether a service has started."""
    try:
        return client.get("/health/ready").status_code == 200
    except httpx.ConnectError:
        return False
