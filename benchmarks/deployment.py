"""What does each step of a deployment carry, beside one worker? ``make deployment``.

- *over HTTP*: one worker, and one replica on Ray behind Ray's own proxy and behind its HAProxy, all
  that each consists of on the same core; the load (wrk) has another.
- *files*: ``python -m app score`` with 100 passes a row, in threads and by Ray Data, on all cores;
  from beginning to end, Ray's start included.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import network, timing
from benchmarks.predict_http import OURS, Server, example_rows, free_port, load, running, servers

CONNECTIONS = 32
PASSES = 100
FILE_ROWS = 200_000
HAPROXY = Path(__file__).resolve().parents[1] / "deploy" / "ray" / "haproxy.env"


def main() -> None:
    if shutil.which("wrk") is None:
        sys.exit("error: wrk is needed for the load (Debian's package wrk)")
    models = network.models()
    inputs = example_rows(models)[:1]
    with tempfile.TemporaryDirectory() as folder:
        found = over_http(models, inputs, Path(folder)) + files(models, Path(folder))
    timing.report(__file__, f"Steps of a deployment ({timing.machine()})", found)


def over_http(models: Path, inputs: list[object], folder: Path) -> list[timing.Row]:
    """Ask each server for predictions, then for passes."""
    found: list[timing.Row] = []
    for route in ("/predict", "/uncertainty"):
        # Pinned to one core they do not need a cluster, and it does not need to be told.
        asked = {
            "one worker": Server(servers(models)[OURS].command, route),
            "Ray, its proxy": ray_server(models, folder, route, {}),
            "Ray, HAProxy": ray_server(models, folder, route, haproxy(folder)),
        }
        what = f"{route}, 1 row" + (f", {PASSES} passes" if route == "/uncertainty" else "")
        first = 0.0
        for name, server in asked.items():
            with running(server, Path(), inputs) as port:
                result = load(server, port, inputs, CONNECTIONS)
            rate = result["requests/s"]
            assert isinstance(rate, float)
            first = first or rate
            ratio = {"share of the first": rate / first}
            found.append({"what": what, "step": name, **result, **ratio})
    return found


def ray_server(models: Path, folder: Path, route: str, environment: dict[str, str]) -> Server:
    """Return one replica on a Ray cluster of its own, which is started with it."""
    port = free_port()
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "default",
                "route_prefix": "/",
                "import_path": "deploy.ray.app:app",
                "args": {"min_replicas": 1, "max_replicas": 1},
            }
        ],
    }
    file = folder / f"{port}.yaml"
    file.write_text(json.dumps(config))
    command = [str(Path(sys.executable).with_name("serve")), "run", str(file)]
    named = {"DROPSERVE_MODELS": str(models.resolve()), "DROPSERVE_DEVICE": "cpu"}
    named["DROPSERVE_OPEN"] = "1"
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(Path.cwd())}
    return Server(command, route, port=port, environment=named | quiet | environment)


def haproxy(folder: Path) -> dict[str, str]:
    """Return what sets up HAProxy, with files and ports that no other on this machine has."""
    lines = shlex.split(HAPROXY.read_text(), comments=True)
    return dict(line.split("=", 1) for line in lines) | {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    }


def files(models: Path, folder: Path) -> list[timing.Row]:
    """Score a file in both ways."""
    x = np.random.default_rng(0).integers(0, 17, (FILE_ROWS, 64)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    pq.write_table(pa.table({"inputs": column}), folder / "in.parquet")
    found: list[timing.Row] = []
    first = 0.0
    for name, options in (("threads", []), ("Ray Data", ["--ray"])):
        asked = ["--passes", str(PASSES), "--models", str(models), "--device", "cpu", *options]
        command = [sys.executable, "-m", "app", "score"]
        begun = time.perf_counter()
        subprocess.run(
            [*command, str(folder / "in.parquet"), str(folder / "out.parquet"), *asked],
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        rate = FILE_ROWS / (time.perf_counter() - begun)
        first = first or rate
        what = f"score, {PASSES} passes"
        ratio = {"share of the first": rate / first}
        found.append({"what": what, "step": name, "rows/s": rate, **ratio})
    return found


def sizing() -> list[timing.Row]:
    """Say what one core carries, by what the other benchmarks found last."""
    http = {(row["what"], row["rows"], row.get("connections")): row for row in read("predict_http")}
    asked = [
        (f"{OURS}", 1, "/predict, 1 row"),
        (f"{OURS}", 64, "/predict, 64 rows"),
        (f"{OURS}, Open Inference Protocol, binary", 64, "/v2/.../infer, 64 rows, binary"),
        (f"{OURS}, /uncertainty, 100 passes", 1, "/uncertainty, 1 row, 100 passes"),
    ]
    found: list[timing.Row] = [
        {"asked": says, "a core answers": f"{http[what, rows, 32]['requests/s']:,.0f} a second"}
        for what, rows, says in asked
    ]
    (line,) = [row for row in read("scaling") if row["axis"] == "passes: line"]
    found.append(
        {
            "asked": "more passes, or rows with passes",
            "a core answers": f"{line['intercept ms']:.2f} ms a query, "
            f"{1000 * float(line['slope ms']):.1f} us a row and pass",
        }
    )
    (idle,) = [
        row
        for row in read("startup_memory")
        if (row["what"], row["server"]) == ("MB idle", "dropserve")
    ]
    (soaked,) = [row for row in read("soak") if row["what"] == "all"]
    memory = f"{idle['median']:.0f} MB idle, {soaked['MB']:.0f} MB after 20 minutes of everything"
    return [*found, {"asked": "memory of a worker", "a core answers": memory}]


def read(benchmark: str) -> list[dict[str, Any]]:
    """Return what a benchmark has found last."""
    found: list[dict[str, Any]] = json.loads(
        Path(__file__).with_name(f"{benchmark}.json").read_text()
    )
    return found


if __name__ == "__main__":
    main()
