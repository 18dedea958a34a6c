"""FastAPI in the style of its tutorial: a pydantic body, a plain function, one run a request."""

import os

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(os.environ["ONNX"], options)
app = FastAPI()


class Digits(BaseModel):
    inputs: list[list[float]]


@app.post("/predict")
def predict(digits: Digits) -> dict[str, list[list[float]]]:
    x = np.array(digits.inputs, np.float32).reshape(-1, 8, 8)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x})
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return {"probabilities": (powers / powers.sum(axis=-1, keepdims=True)).tolist()}


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PORT"]), access_log=False, log_level="warning")
