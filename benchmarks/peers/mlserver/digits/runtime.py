"""A custom MLServer runtime, with its adaptive batching."""

import os

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Digits(MLModel):
    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["ONNX"], options)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        x = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32).reshape(-1, 8, 8)
        (logits,) = self.session.run(None, {self.session.get_inputs()[0].name: x})
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        answer = powers / powers.sum(axis=-1, keepdims=True)
        output = NumpyCodec.encode_output("probabilities", answer)
        return InferenceResponse(model_name=self.name, id=payload.id, outputs=[output])
