"""What does it cost to read a request's rows, as JSON and as a binary tensor? ``make reading``.

The table gives, for each format, the time from the bytes of an HTTP body to a validated float32
array of 1,024 rows of 64 features.
"""

import json

import numpy as np

from benchmarks import figures, timing
from dropserve.app.http import bodies
from dropserve.app.http.schemas import PredictRequest
from dropserve.app.http.v2 import codec
from dropserve.app.inference.rows import read_rows

ROWS, LENGTH = 1024, 64
HEADERS = {b"content-type": b"application/json"}
MOST_LISTS = 2 * ROWS


def main() -> None:
    args = figures.parser(__file__, __doc__).parse_args()
    x = np.random.default_rng(0).normal(size=(ROWS, LENGTH)).astype(np.float32)
    as_json = json.dumps({"inputs": x.tolist()}).encode()
    tensor = {"name": "x", "shape": [ROWS, LENGTH], "datatype": "FP32"}
    listed = json.dumps({"inputs": [tensor | {"data": x.ravel().tolist()}]}).encode()
    size = {"parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor | size]}).encode()
    binary = head + x.tobytes()

    def most() -> int:
        return MOST_LISTS

    seconds = timing.interleaved(
        {
            "/predict": lambda: read_rows(
                bodies.parse_json(HEADERS, as_json, PredictRequest, most).inputs, (LENGTH,)
            ),
            "Open Inference Protocol, JSON": lambda: codec.parse_request(listed, None, most),
            "Open Inference Protocol, binary": lambda: codec.parse_request(binary, len(head), most),
        }
    )
    fastest = min(seconds.values())
    rows: list[figures.Row] = [
        {"body": name, "kB": len(content) / 1000, "ms": 1000 * took, "times": took / fastest}
        for (name, took), content in zip(seconds.items(), (as_json, listed, binary), strict=True)
    ]
    figures.report(args.result, f"{ROWS} rows of {LENGTH} ({timing.machine()})", rows)


if __name__ == "__main__":
    main()
