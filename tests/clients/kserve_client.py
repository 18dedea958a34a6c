"""KServe's own client: both protocols, JSON and binary tensors."""

import asyncio
import json
import sys

import numpy as np
from httpx import HTTPStatusError
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput


def request(model, rows, *, binary=False, outputs=(), **parameters):
    tensor = InferInput("x", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows, binary_data=binary)
    wanted = [RequestedOutput(name) for name in outputs]
    return InferRequest(
        model, [tensor], request_id="1", parameters=parameters, request_outputs=wanted or None
    )


def arrays(response):
    return {output.name: output.as_numpy().tolist() for output in response.outputs}


async def failure(call):
    try:
        await call
    except HTTPStatusError as error:
        return str(error)


async def main(url, rows):
    x = np.array(rows, np.float32)
    found = {}
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as v2:
        found["live"] = await v2.is_server_live(url)
        found["ready"] = await v2.is_server_ready(url)
        found["model ready"] = await v2.is_model_ready(url, "digits")
        for kind, binary in (("json", False), ("binary", True)):
            asked = request("digits", x, binary=binary)
            found[kind] = arrays(await v2.infer(url, asked, model_name="digits"))
        asked = request("digits.mc", x, passes=20, seed=7, timeout=10_000_000)
        answer = await v2.infer(url, asked, model_name="digits.mc")
        found["mc"] = arrays(answer)
        found["mc model"] = [answer.id, answer.model_name]
        asked = request("digits.mc", x, outputs=["std"], seed=7, passes=20)
        found["std"] = arrays(await v2.infer(url, asked, model_name="digits.mc"))
        # 16 KiB of JSON, which this client accepts compressed.
        many = np.repeat(x, 100, axis=0)
        headers = {}
        answer = await v2.infer(
            url, request("digits", many), model_name="digits", response_headers=headers
        )
        found["many"] = arrays(answer)["probabilities"]
        found["many encoding"] = headers.get("content-encoding")
        asked = request("another", x)
        found["another model"] = await failure(v2.infer(url, asked, model_name="digits"))
    async with InferenceRESTClient(RESTConfig(protocol="v1")) as v1:
        found["v1 ready"] = await v1.is_model_ready(url, "digits")
        found["v1"] = await v1.infer(url, {"instances": rows}, model_name="digits")
        flat = {"instances": x.reshape(len(x), -1).tolist(), "signature_name": "serving_default"}
        found["v1 flat"] = await v1.infer(url, flat, model_name="digits")
        found["v1 unknown"] = await failure(v1.infer(url, flat, model_name="none"))
        found["v1 wrong"] = await failure(v1.infer(url, {"instances": [[1]]}, model_name="digits"))
        found["v1 mc"] = await failure(v1.infer(url, flat, model_name="digits.mc"))
        found["v1 unknown ready"] = await failure(v1.is_model_ready(url, "none"))
    return found


print(json.dumps(asyncio.run(main(sys.argv[1], json.load(sys.stdin)))))
