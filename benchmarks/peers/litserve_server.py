"""LitServe, with batching on, as its documentation advises for throughput."""

import os
from typing import Any

import litserve as ls
import numpy as np
import onnxruntime


class Digits(ls.LitAPI):
    def setup(self, device: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["ONNX"], options)

    def decode_request(self, request: dict[str, Any]) -> Any:
        return np.array(request["inputs"], np.float32).reshape(8, 8)

    def batch(self, inputs: list[Any]) -> Any:
        return np.stack(inputs)

    def predict(self, x: Any) -> Any:
        (logits,) = self.session.run(None, {self.session.get_inputs()[0].name: x})
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)

    def unbatch(self, output: Any) -> list[Any]:
        return list(output)

    def encode_response(self, output: Any) -> dict[str, Any]:
        return {"probabilities": [output.tolist()]}


if __name__ == "__main__":
    api = Digits(max_batch_size=32, batch_timeout=0.001)
    ls.LitServer(api, accelerator="cpu").run(
        port=int(os.environ["PORT"]), generate_client_file=False, log_level="warning"
    )
