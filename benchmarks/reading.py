"""What does it cost to read a request's rows, as JSON and as a binary tensor? ``make reading``.

From the body, as it came over HTTP, to an array of float32 that has been checked: 1,024 rows of 64.
"""

import json

import numpy as np

from benchmarks import timing
from dropserve.app.http import messages
from dropserve.app.http.schemas import PredictRequest
from dropserve.app.http.v2 import codec
from dropserve.app.inference.rows import read_rows

ROWS, LENGTH = 1024, 64
HEADERS = {b"content-type": b"application/json"}


def main() -> None:
    x = np.random.default_rng(0).normal(size=(ROWS, LENGTH)).astype(np.float32)
    as_json = json.dumps({"inputs": x.tolist()}).encode()
    tensor = {"name": "x", "shape": [ROWS, LENGTH], "datatype": "FP32"}
    listed = json.dumps({"inputs": [tensor | {"data": x.ravel().tolist()}]}).encode()
    size = {"parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor | size]}).encode()
    binary = head + x.tobytes()
    seconds = timing.interleaved(
        {
            "/predict": lambda: read_rows(
                messages.parse_json(HEADERS, as_json, PredictRequest).inputs, (LENGTH,)
            ),
            "Open Inference Protocol, JSON": lambda: codec.parse_request(listed, None),
            "Open Inference Protocol, binary": lambda: codec.parse_request(binary, len(head)),
        }
    )
    fastest = min(seconds.values())
    rows: list[timing.Row] = [
        {"body": name, "kB": len(content) / 1000, "ms": 1000 * took, "times": took / fastest}
        for (name, took), content in zip(seconds.items(), (as_json, listed, binary), strict=True)
    ]
    timing.report(__file__, f"{ROWS} rows of {LENGTH} ({timing.machine()})", rows)


if __name__ == "__main__":
    main()
