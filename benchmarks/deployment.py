"""How much load does each step of a deployment carry, relative to one worker? ``make deployment``.

The table has two parts:

- *over HTTP*: one worker, and one Ray replica behind Ray's own proxy and behind its HAProxy. All
  processes of a deployment share one core; the load generator (wrk) has another.
- *files*: ``python -m app score`` with 100 passes a row, by threads and by Ray Data, on all cores.
  The time is that of the whole command, Ray's start included.
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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import figures, network, timing
from benchmarks.predict_http import OURS, Server, example_rows, free_port, load, running, servers

CONNECTIONS = 32
PASSES = 100
FILE_ROWS = 200_000
HAPROXY = Path(__file__).resolve().parents[1] / "deploy" / "ray" / "haproxy.env"


def main() -> None:
    args = figures.parser(__file__, __doc__).parse_args()
    if shutil.which("wrk") is None:
        sys.exit("error: wrk is needed for the load (Debian's package wrk)")
    models = network.models()
    inputs = example_rows(models)[:1]
    with tempfile.TemporaryDirectory() as folder:
        found = over_http(models, inputs, Path(folder)) + files(models, Path(folder))
    figures.report(args.result, f"Steps of a deployment ({timing.machine()})", found)


def over_http(models: Path, inputs: list[object], folder: Path) -> list[figures.Row]:
    """Load each deployment with predictions, then with uncertainty requests."""
    found: list[figures.Row] = []
    for route in ("/predict", "/uncertainty"):
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
    """Return a server of one replica, on a Ray cluster that it starts itself."""
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
    """Return the environment of Ray's HAProxy, with files and ports of its own."""
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


def files(models: Path, folder: Path) -> list[figures.Row]:
    """Score a file by threads and by Ray Data."""
    x = np.random.default_rng(0).integers(0, 17, (FILE_ROWS, 64)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    pq.write_table(pa.table({"inputs": column}), folder / "in.parquet")
    found: list[figures.Row] = []
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


def sizing() -> list[figures.Row]:
    """Return what one core carries, by the committed figures of the other benchmarks."""
    http = {
        (row["what"], row["rows"], row.get("connections")): row
        for row in figures.read("predict_http")
    }
    asked = [
        (f"{OURS}", 1, "/predict, 1 row"),
        (f"{OURS}", 64, "/predict, 64 rows"),
        (f"{OURS}, Open Inference Protocol, binary", 64, "/v2/.../infer, 64 rows, binary"),
        (f"{OURS}, /uncertainty, 100 passes", 1, "/uncertainty, 1 row, 100 passes"),
    ]
    found: list[figures.Row] = [
        {"asked": says, "a core answers": f"{http[what, rows, 32]['requests/s']:,.0f} a second"}
        for what, rows, says in asked
    ]
    (line,) = [row for row in figures.read("scaling") if row["axis"] == "passes: line"]
    found.append(
        {
            "asked": "more passes, or rows with passes",
            "a core answers": f"{line['intercept ms']:.2f} ms a query, "
            f"{1000 * float(line['slope ms']):.1f} us a row and pass",
        }
    )
    (idle,) = [
        row
        for row in figures.read("startup_memory")
        if (row["what"], row["server"]) == ("MB idle", "dropserve")
    ]
    (soaked,) = [row for row in figures.read("soak") if row["what"] == "all"]
    memory = f"{idle['median']:.0f} MB idle, {soaked['MB']:.0f} MB after 20 minutes of everything"
    return [*found, {"asked": "memory of a worker", "a core answers": memory}]


if __name__ == "__main__":
    main()
