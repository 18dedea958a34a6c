"""BentoML, with its adaptive batching."""

import os

import bentoml
import numpy as np
import onnxruntime
from numpy.typing import NDArray


@bentoml.service(workers=1)
class Digits:
    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["ONNX"], options)

    @bentoml.api(batchable=True, max_batch_size=32)
    def predict(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        x = np.asarray(inputs, np.float32).reshape(-1, 8, 8)
        (logits,) = self.session.run(None, {self.session.get_inputs()[0].name: x})
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)
