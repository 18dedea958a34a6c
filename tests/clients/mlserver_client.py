"""MLServer's codecs and types, around an HTTP client as in its documentation."""

import json
import sys
from urllib.request import Request, urlopen

import numpy as np
from mlserver.codecs import NumpyCodec, NumpyRequestCodec, StringCodec
from mlserver.types import Datatype, InferenceRequest, InferenceResponse, Parameters, RequestOutput


def infer(url, model, request):
    """Send a request as MLServer's types write it: without what is not set, and with it."""
    answers = []
    for text in (
        request.model_dump_json(),
        request.model_dump_json(exclude_unset=False, exclude_none=False),
    ):
        head = {"content-type": "application/json"}
        sent = Request(f"{url}/v2/models/{model}/infer", text.encode(), head)
        with urlopen(sent, timeout=30) as response:
            answers.append(response.read())
    assert answers[0] == answers[1]
    return InferenceResponse.model_validate_json(answers[0])


def arrays(response):
    return {
        output.name: StringCodec.decode_output(output)
        if Datatype(output.datatype) is Datatype.BYTES
        else NumpyCodec.decode_output(output).tolist()
        for output in response.outputs
    }


def main(url, rows):
    x = np.array(rows, np.float32)
    found = {}
    tensor = NumpyCodec.encode_input("x", x)
    found["written"] = tensor.model_dump(mode="json", exclude={"data"}, exclude_none=True)
    found["input"] = arrays(infer(url, "digits", InferenceRequest(inputs=[tensor])))
    whole = NumpyRequestCodec.encode_request(x)
    found["named"] = whole.inputs[0].name
    whole.inputs[0].name = "x"
    whole.parameters.headers = {"x-forwarded-for": "here"}
    found["request"] = arrays(infer(url, "digits", whole))
    whole.parameters = Parameters(content_type="np", headers={"a": 1}, passes=20, seed=7)
    whole.outputs = [
        RequestOutput(name=name, parameters=Parameters(content_type="np"))
        for name in ("std", "prediction_set")
    ]
    found["mc"] = arrays(infer(url, "digits.mc", whole))
    return found


print(json.dumps(main(sys.argv[1], json.load(sys.stdin))))
