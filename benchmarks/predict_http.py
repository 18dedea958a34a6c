"""How many predictions does one core serve over HTTP, and how fast? ``make predict-http``.

The table gives rates and latencies of dropserve and of other servers of the same ONNX file:
FastAPI in the style of its tutorial and, with ``--peers`` (``make bench-peers``), LitServe,
BentoML, MLServer, Ray Serve and Triton. A bare ASGI echo is the limit. The server has one core, the
load generator (wrk) another. Each server must return the same probabilities as dropserve before it
is timed. ``/uncertainty`` is compared with a loop of train-mode passes in torch, in process.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import figures, network, timing

SECONDS = 4
CONNECTIONS = (32, 1)
ROWS = (1, 64, 1024)
START_SECONDS = 60
PEERS = Path("build/peers").resolve()
LOG = network.FOLDER / "server.log"
HERE = Path(__file__).resolve().parent
OURS, FLOOR = "dropserve", "ASGI echo"
PROTOCOL = "/v2/models/digits/infer"


@dataclass(frozen=True)
class Server:
    """How to start a server, and how to send it requests."""

    command: list[str]
    route: str = "/predict"
    v2: bool = False  # speaks the Open Inference Protocol
    binary: bool = False  # takes and returns binary tensors
    answers: bool = True  # returns probabilities
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int | None = None  # set where the port is fixed before the start


def main() -> None:
    command = figures.parser(__file__, __doc__)
    command.add_argument("--peers", action="store_true", help="time the other servers, too")
    args = command.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("error: wrk is needed for the load (Debian's package wrk)")
    models = network.models()
    onnx = (models / "digits" / "1" / "predict.onnx").resolve()
    inputs = example_rows(models)
    found: list[figures.Row] = []
    expected = None
    for name, server in (servers(models) | (peers() if args.peers else {})).items():
        with running(server, onnx, inputs[:1]) as port:
            if server.answers:
                answer = np.ravel(probabilities(ask(server, port, inputs[:1])))
                expected = answer if expected is None else expected
                np.testing.assert_allclose(answer, expected, atol=1e-4, err_msg=name)
            for rows in ROWS if name in (OURS, FLOOR, "FastAPI tutorial") else (1,):
                for connections in CONNECTIONS:
                    result = load(server, port, inputs[:rows], connections)
                    found.append({"what": name, "rows": rows, "connections": connections, **result})
        if name == OURS:
            with running(server, onnx, inputs[:1]) as port:
                for binary in (False, True):
                    asked = Server(server.command, PROTOCOL, v2=True, binary=binary)
                    title = f"dropserve, Open Inference Protocol, {'binary' if binary else 'JSON'}"
                    for rows in ROWS:
                        for connections in CONNECTIONS:
                            result = load(asked, port, inputs[:rows], connections)
                            found.append(
                                {"what": title, "rows": rows, "connections": connections, **result}
                            )
                asked = Server(server.command, "/uncertainty")
                for connections in CONNECTIONS:
                    result = load(asked, port, inputs[:1], connections)
                    title = "dropserve, /uncertainty, 100 passes"
                    found.append({"what": title, "rows": 1, "connections": connections, **result})
    found.append(torch_loop(inputs[:1]))
    figures.report(args.result, f"One core each ({timing.machine()})", with_ratios(found))


def servers(models: Path) -> dict[str, Server]:
    """Return dropserve, and the servers that need no environment of their own."""
    python = sys.executable
    ours = [python, "-m", "app", "--models", str(models), "--device", "cpu", "--port", "PORT"]
    return {
        OURS: Server(ours),
        FLOOR: Server([python, str(HERE / "peers" / "echo.py")], answers=False),
        "FastAPI tutorial": Server([python, str(HERE / "peers" / "fastapi_tutorial.py")]),
    }


def peers() -> dict[str, Server]:
    """Return the servers that ``make bench-peers`` installs."""
    here = HERE / "peers"
    triton, packages = triton_files()
    return {
        "LitServe": Server([str(PEERS / "litserve/bin/python"), str(here / "litserve_server.py")]),
        "BentoML": Server(
            [
                str(PEERS / "bentoml/bin/bentoml"),
                *["serve", "benchmarks.peers.bentoml_service:Digits", "--port", "PORT"],
            ]
        ),
        "MLServer": Server(
            [str(PEERS / "mlserver/bin/mlserver"), "start", str(here / "mlserver")],
            route=PROTOCOL,
            v2=True,
            environment={
                "MLSERVER_HTTP_PORT": "PORT",
                "MLSERVER_GRPC_PORT": str(free_port()),
                "MLSERVER_METRICS_PORT": str(free_port()),
                # In one process, since there is one core.
                "MLSERVER_PARALLEL_WORKERS": "0",
            },
        ),
        "Ray Serve": Server([str(PEERS / "rayserve/bin/python"), str(here / "rayserve_app.py")]),
        "Triton, python backend": Server(
            [
                str(triton / "bin/tritonserver"),
                *["--model-repository", str(here / "triton")],
                *["--backend-directory", str(PEERS / "triton/backends")],
                *["--http-port", "PORT", "--allow-grpc=false", "--allow-metrics=false"],
            ],
            route=PROTOCOL,
            v2=True,
            environment={
                "PATH": f"{PEERS / 'triton/bin'}:{os.environ['PATH']}",
                "PYTHONPATH": str(packages),
                "LD_LIBRARY_PATH": str((packages / "nvidia_pytriton.libs").resolve()),
            },
        ),
    }


def triton_files() -> tuple[Path, Path]:
    """Return the folders of tritonserver and of its environment's packages.

    Triton wants its python backend and the stub for our version of Python in one folder; the
    package has them in two, so they are copied.
    """
    packages = (PEERS / "triton" / "lib").resolve()
    (packages,) = packages.glob("python*/site-packages")
    triton = packages / "pytriton" / "tritonserver"
    backend = PEERS / "triton" / "backends" / "python"
    if not backend.exists():
        shutil.copytree(triton / "backends" / "python", backend)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
        shutil.copy(stub, backend)
    return triton, packages


@contextmanager
def running(server: Server, onnx: Path, inputs: list[Any]) -> Iterator[int]:
    """Run a server on the first core until the block ends; yield its port."""
    port = server.port or free_port()
    named = {"ONNX": str(onnx), "PORT": str(port), "OMP_NUM_THREADS": "1"}
    given = {
        key: str(port) if value == "PORT" else value for key, value in server.environment.items()
    }
    first_core = min(os.sched_getaffinity(0))
    with LOG.open("w") as log:
        process = subprocess.Popen(
            ["taskset", "-c", str(first_core)]
            + [str(port) if word == "PORT" else word for word in server.command],
            env=os.environ | named | given,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_until_it_answers(server, port, inputs, process)
        yield port
    finally:
        stop(process)


def wait_until_it_answers(
    server: Server, port: int, inputs: list[Any], process: subprocess.Popen[bytes]
) -> None:
    """Send requests until one gets a response."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            ask(server, port, inputs)
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"error: {server.command[0]} does not answer ({error}); see {LOG}")
            time.sleep(0.2)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a server and the processes that it has started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        for _ in range(50):
            if process.poll() is not None:
                break
            time.sleep(0.1)


def ask(server: Server, port: int, inputs: list[Any]) -> Any:
    """Send one request; return the JSON of the response.

    Raises
    ------
    OSError
        If the server cannot be reached or returns an error status.
    """
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{server.route}",
        body(server, inputs),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def body(server: Server, inputs: list[Any]) -> bytes:
    """Return the body of a request in the server's protocol."""
    if not server.v2:
        return json.dumps({"inputs": inputs}).encode()
    tensor = {"name": "x", "shape": [len(inputs), len(inputs[0])], "datatype": "FP32"}
    if server.binary:
        return json_head(tensor, inputs) + np.asarray(inputs, "<f4").tobytes()
    return json.dumps({"inputs": [tensor | {"data": np.ravel(inputs).tolist()}]}).encode()


def json_head(tensor: dict[str, Any], inputs: list[Any]) -> bytes:
    """Return the JSON before a binary tensor, which requests a binary response."""
    parameters = {"binary_data_size": 4 * np.size(inputs)}
    wanted = {"name": "probabilities", "parameters": {"binary_data": True}}
    document = {"inputs": [tensor | {"parameters": parameters}], "outputs": [wanted]}
    return json.dumps(document).encode()


def probabilities(answer: Any) -> Any:
    """Return the probabilities in a response."""
    if isinstance(answer, dict) and "outputs" in answer:
        return answer["outputs"][0]["data"]
    return answer["probabilities"] if isinstance(answer, dict) else answer


def load(server: Server, port: int, inputs: list[Any], connections: int) -> figures.Row:
    """Send the same request over and over from the last core; return rate and latencies."""
    file = network.FOLDER / "body.json"
    content = body(server, inputs)
    file.write_bytes(content)
    length = str(len(content) - 4 * np.size(inputs)) if server.binary else ""
    wrk = ["wrk", "--threads", "1", "--connections", str(connections)]
    wrk += ["--duration", f"{SECONDS}s", "--timeout", "10s", "--script", str(HERE / "post.lua")]
    last_core = str(max(os.sched_getaffinity(0)))
    done = subprocess.run(
        ["taskset", "-c", last_core, *wrk, f"http://127.0.0.1:{port}{server.route}"],
        env=os.environ | {"BODY": str(file), "JSON_LENGTH": length},
        capture_output=True,
        text=True,
        check=True,
    )
    match = re.search("RESULT (.*)", done.stdout)
    assert match, done.stdout
    result = json.loads(match[1])
    return {
        "requests/s": result["requests"] / result["microseconds"] * 1e6,
        "p50 ms": result["p50"] / 1000,
        "p99 ms": result["p99"] / 1000,
        "failed": result["failed"],
    }


def torch_loop(inputs: list[Any]) -> dict[str, Any]:
    """Time a loop of 100 train-mode passes of a row, in a separate process."""
    code = (
        "import sys, json, torch; from benchmarks import mc_passes, network, timing;"
        "from dropserve.model import checkpoint; torch.set_num_threads(1);"
        "model = checkpoint.load(network.run()).model;"
        "x = torch.tensor(json.loads(sys.argv[1])).reshape(1, 8, 8);"
        "print(timing.interleaved({'': lambda: mc_passes.torch_loop(model, x)})[''])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(inputs)], capture_output=True, text=True, check=True
    )
    milliseconds = 1000 * float(done.stdout)
    return {"what": "torch loop in process, 100 passes", "rows": 1, "p50 ms": milliseconds}


def with_ratios(found: list[figures.Row]) -> list[figures.Row]:
    """Add each rate's ratio to those of the echo and dropserve, at equal rows and connections."""
    rates = {
        (row["what"], row["rows"], row.get("connections")): row.get("requests/s") for row in found
    }

    def ratio(row: figures.Row, other: str) -> float | None:
        mine = row.get("requests/s")
        theirs = rates.get((other, row["rows"], row.get("connections")))
        if not isinstance(mine, float) or not isinstance(theirs, float):
            return None
        return mine / theirs

    return [
        dict(row) | {"share of the echo": ratio(row, FLOOR), "share of dropserve": ratio(row, OURS)}
        for row in found
    ]


def example_rows(models: Path) -> list[Any]:
    """Return flat rows: the model's examples, repeated, plus 0.37 so that none is whole."""
    examples = json.loads((models / "digits" / "1" / "examples.json").read_text())
    rows = [(np.ravel(each["input"]) + 0.37).round(2).tolist() for each in examples]
    return [rows[place % len(rows)] for place in range(max(ROWS))]


def free_port() -> int:
    """Return a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
