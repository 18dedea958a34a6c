"""How soon is the service ready, and how much memory does it take? ``make startup-memory``.

The table compares it with the same network in torch, served by a FastAPI application in the style
of FastAPI's tutorial. Both run as one process with one thread for arithmetic. A server is ready
when ``GET /health/ready`` returns 200. Memory is the resident memory of the process: idle; after
300 predictions of one row and 30 uncertainty requests of 16 rows x 100 passes, one after another;
and its peak until then.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import figures, network, timing

STARTS = 3
PREDICTIONS, UNCERTAINTIES = 300, 30
ROWS, PASSES = 16, 100
START_SECONDS = 60
# Enough for the threads that start with the service to settle.
IDLE_SECONDS = 1.0
OURS = "dropserve"
PORT = ("--port", "0")
SERVERS = {
    OURS: ("app", *PORT, "--device", "cpu", "--models"),
    "FastAPI and torch": ("uvicorn", *PORT, "--factory", "benchmarks.startup_memory:torch_app"),
}


class Request(BaseModel):
    """Rows, and the number of passes to run of each."""

    inputs: list[list[float]]
    passes: int = PASSES


def torch_app() -> FastAPI:
    """Return the FastAPI application that serves the network from torch."""
    weights = load_file(network.run() / "weights.safetensors")
    model = torch_model(weights)
    app = FastAPI()

    def outputs(inputs: list[list[float]]) -> Tensor:
        x = (torch.tensor(inputs) - weights["mean"]) / weights["std"]
        probabilities: Tensor = model(x).softmax(-1)
        return probabilities

    @app.get("/health/ready")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/predict")
    def predict(request: Request) -> dict[str, object]:
        model.eval()
        with torch.inference_mode():
            return {"probabilities": outputs(request.inputs).tolist()}

    @app.post("/uncertainty")
    def uncertainty(request: Request) -> dict[str, object]:
        model.train()
        with torch.inference_mode():
            samples = torch.stack([outputs(request.inputs) for _ in range(request.passes)])
            mean = samples.mean(0)
            predictive = -torch.xlogy(mean, mean).sum(-1)
            expected = -torch.xlogy(samples, samples).sum(-1).mean(0)
            return {
                "mean": mean.tolist(),
                "std": samples.std(0).tolist(),
                "predictive_entropy": predictive.tolist(),
                "mutual_information": (predictive - expected).tolist(),
            }

    return app


def torch_model(weights: dict[str, Tensor]) -> nn.Module:
    """Build the network from torch's own layers: importing ours would load scikit-learn, too."""
    layers: list[nn.Module] = []
    for name in ("network.linears.0", "network.linears.1", "network.output"):
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": bias})
        layers += [linear, nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers[:-2])


def main() -> None:
    args = figures.parser(__file__, __doc__).parse_args()
    models = network.models()
    commands = dict(SERVERS)
    commands[OURS] += (str(models),)
    inputs = rows(models)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(STARTS):
        for name, command in commands.items():
            found[name].append(measure(command, inputs))
    table: list[figures.Row] = []
    for what in found[OURS][0]:
        values = {name: [start[what] for start in starts] for name, starts in found.items()}
        ours = statistics.median(values[OURS])
        table += [
            {
                "what": what,
                "server": name,
                "median": statistics.median(each),
                "least": min(each),
                "most": max(each),
                "x dropserve": statistics.median(each) / ours,
            }
            for name, each in values.items()
        ]
    figures.report(args.result, f"Median of {STARTS} starts ({timing.machine()})", table)


def rows(models: Path) -> list[list[float]]:
    """Return flat rows of the model's examples, as many as an uncertainty request has."""
    examples = json.loads((models / "digits" / "1" / "examples.json").read_text())
    flat = [[value for line in example["input"] for value in line] for example in examples]
    return [flat[place % len(flat)] for place in range(ROWS)]


def measure(command: tuple[str, ...], inputs: list[list[float]]) -> dict[str, float]:
    """Start a server and load it; return its figures by name."""
    start = time.perf_counter()
    with served(command) as (process, connection):
        ready = time.perf_counter() - start
        time.sleep(IDLE_SECONDS)
        idle = memory(process, "VmRSS")
        for place in range(PREDICTIONS):
            ask(connection, "/predict", {"inputs": [inputs[place % len(inputs)]]})
        for _ in range(UNCERTAINTIES):
            ask(connection, "/uncertainty", {"inputs": inputs, "passes": PASSES})
        return {
            "s to ready": ready,
            "MB idle": idle,
            "MB after load": memory(process, "VmRSS"),
            "MB at most": memory(process, "VmHWM"),
        }


@contextmanager
def served(
    command: tuple[str, ...],
) -> Iterator[tuple[subprocess.Popen[bytes], HTTPConnection]]:
    """Run a server until the block ends; yield its process and a connection once it is ready."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            port = wait_for_port(process, log.fileno())
            connection = HTTPConnection("127.0.0.1", port, timeout=START_SECONDS)
            ask(connection, "/health/ready")
            yield process, connection
            connection.close()
        finally:
            process.terminate()
            process.wait(timeout=START_SECONDS)


def wait_for_port(process: subprocess.Popen[bytes], log: int) -> int:
    """Return the port on which a starting server logs that it listens."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        text = os.pread(log, 1 << 20, 0).decode()
        if found := re.search(r" on http://127\.0\.0\.1:(\d+)\s", text):
            return int(found[1])
        time.sleep(0.005)
    raise RuntimeError(f"no server: {os.pread(log, 1 << 20, 0).decode()}")


def ask(connection: HTTPConnection, path: str, body: object = None) -> None:
    """Send a request, and read the response.

    Raises
    ------
    RuntimeError
        If its status is not 200.
    """
    content = None if body is None else json.dumps(body)
    headers = {"content-type": "application/json"}
    connection.request("GET" if body is None else "POST", path, content, headers)
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{path}: {answer.status} {text[:500].decode()}")


def memory(process: subprocess.Popen[bytes], field: str) -> float:
    """Return the resident memory of a process in MB: current (VmRSS) or peak (VmHWM)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
