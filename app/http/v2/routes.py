"""Metadata routes of the Open Inference Protocol: server, models, readiness, configuration.

References
----------
https://github.com/kserve/open-inference-protocol, ``specification/protocol/inference_rest.md``
https://github.com/triton-inference-server/server,
``docs/protocol/extension_model_configuration.md``
"""

from fastapi import APIRouter
from fastapi.params import Depends as Dependency

import dropserve
from dropserve.app.http.schemas import (
    ConfiguredTensor,
    ModelConfiguration,
    ModelDescription,
    ModelReadiness,
    ServerDescription,
    TensorDescription,
)
from dropserve.app.http.v2.infer import model_outputs, parse_target
from dropserve.app.inference.service import Service

PLATFORM, BACKEND = "onnxruntime_onnx", "onnxruntime"
EXTENSIONS = [
    *("binary_tensor_data", "model_configuration", "model_repository", "parameters", "statistics"),
]


def router(service: Service, guard: Dependency) -> APIRouter:
    """Return the routes that describe the server and its models."""
    routes = APIRouter(prefix="/v2", dependencies=[guard])

    @routes.get("")
    async def server() -> ServerDescription:
        """Describe the server."""
        return ServerDescription(
            name="dropserve", version=dropserve.__version__, extensions=EXTENSIONS
        )

    def describe(name: str, version: str | None) -> ModelDescription:
        target = parse_target(name, version)
        runner = service.registry.find(target.name, target.version)
        versions = service.registry.versions(target.name)
        expected = runner.manifest.input
        return ModelDescription(
            name=name,
            versions=[str(each) for each in versions],
            platform=PLATFORM,
            inputs=[
                TensorDescription(name=expected.name, datatype="FP32", shape=[-1, *expected.shape])
            ],
            outputs=model_outputs(runner, mc=target.mc),
        )

    def configure(name: str, version: str | None) -> ModelConfiguration:
        described = describe(name, version)
        return ModelConfiguration(
            name=name,
            platform=PLATFORM,
            backend=BACKEND,
            version_policy={"all": {}},
            max_batch_size=service.max_rows,
            input=[configured(tensor) for tensor in described.inputs],
            output=[configured(tensor) for tensor in described.outputs],
            dynamic_batching={},
        )

    def ready(name: str, version: str | None) -> ModelReadiness:
        target = parse_target(name, version)
        service.registry.find(target.name, target.version)
        return ModelReadiness(name=name, ready=True)

    @routes.get("/models/{name}")
    async def model(name: str) -> ModelDescription:
        """Describe the newest version of a model."""
        return describe(name, None)

    @routes.get("/models/{name}/versions/{version}")
    async def model_version(name: str, version: str) -> ModelDescription:
        """Describe a version of a model."""
        return describe(name, version)

    @routes.get("/models/{name}/ready")
    async def model_ready(name: str) -> ModelReadiness:
        """Report that a model is served."""
        return ready(name, None)

    @routes.get("/models/{name}/versions/{version}/ready")
    async def model_version_ready(name: str, version: str) -> ModelReadiness:
        """Report that a version of a model is served."""
        return ready(name, version)

    @routes.get("/models/{name}/config")
    async def model_config(name: str) -> ModelConfiguration:
        """Return the configuration of a model, as Triton has it."""
        return configure(name, None)

    @routes.get("/models/{name}/versions/{version}/config")
    async def model_version_config(name: str, version: str) -> ModelConfiguration:
        """Return the configuration of a version, as Triton has it."""
        return configure(name, version)

    return routes


def configured(tensor: TensorDescription) -> ConfiguredTensor:
    """Return the description of a tensor as Triton has it: without the batch axis."""
    datatype = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
    return ConfiguredTensor(name=tensor.name, data_type=f"TYPE_{datatype}", dims=tensor.shape[1:])
