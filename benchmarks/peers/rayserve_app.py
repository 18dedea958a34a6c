"""Ray Serve: one replica, requests batched by its decorator."""

import os
import signal
from typing import Any

import numpy as np
import onnxruntime
import ray
from ray import serve
from starlette.requests import Request


@serve.deployment(max_ongoing_requests=100)
class Digits:
    def __init__(self, onnx: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(onnx, options)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.001)
    async def run(self, rows: list[Any]) -> list[Any]:
        x = np.array(rows, np.float32).reshape(-1, 8, 8)
        (logits,) = self.session.run(None, {self.session.get_inputs()[0].name: x})
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return list(powers / powers.sum(axis=-1, keepdims=True))

    async def __call__(self, request: Request) -> dict[str, Any]:
        document = await request.json()
        return {"probabilities": [(await self.run(document["inputs"][0])).tolist()]}


if __name__ == "__main__":
    ray.init(num_cpus=1, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["PORT"])})
    serve.run(Digits.bind(os.environ["ONNX"]), route_prefix="/predict")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
