"""The model repository over HTTP, as Triton has it: what is there, load, unload.

References
----------
https://github.com/triton-inference-server/server, ``docs/protocol/extension_model_repository.md``
"""

from typing import NamedTuple

from fastapi import APIRouter, Request, Response
from fastapi.params import Depends as Dependency

from dropserve.app.errors import InputError, LoadError
from dropserve.app.http import request_body
from dropserve.app.http.schemas import IndexRequest, LoadRequest, VersionState
from dropserve.app.inference.registry import Models
from dropserve.app.processes.ipc import Group

MAX_BODY_BYTES = 2**16


class Load(NamedTuple):
    """Have every worker serve what the models folder holds of a model."""

    name: str


class Unload(NamedTuple):
    """Have every worker serve a model no more."""

    name: str


async def read(request: Request, model: type[request_body.Typed]) -> request_body.Typed:
    """Read a body that may be left out, as clients do."""
    headers = dict(request.scope["headers"])
    content = await request_body.read(headers, request.receive, MAX_BODY_BYTES)
    return request_body.parse({b"content-type": request_body.JSON}, content or b"{}", model)


def router(models: Models, group: Group, guard: Dependency) -> APIRouter:
    """Return the routes of the model repository."""
    routes = APIRouter(prefix="/v2/repository", dependencies=[guard])

    @routes.post("/index", openapi_extra=optional(IndexRequest))
    async def index(request: Request) -> list[VersionState]:
        """List what is in the model repository, and what is served."""
        asked = await read(request, IndexRequest)
        return [
            VersionState(
                name=each.name,
                version=str(each.version),
                state="READY" if each.served else "UNAVAILABLE",
                reason=each.reason if each.served else each.reason or "not loaded",
            )
            for each in await models.index()
            if each.served or not asked.ready
        ]

    @routes.post(
        "/models/{name}/load", response_class=Response, openapi_extra=optional(LoadRequest)
    )
    async def load(name: str, request: Request) -> Response:
        """Serve what the models folder holds of a model now."""
        asked = await read(request, LoadRequest)
        if asked.parameters:
            # Triton would take a model's files from here.
            raise InputError("parameters", "none are allowed: models come from the models folder")
        await group.change(Load(name))
        # Only now: whatever is refused here, the others are to load the rest too.
        if faults := "; ".join(models.faults(name)):
            raise LoadError(faults)
        return Response()

    @routes.post(
        "/models/{name}/unload", response_class=Response, openapi_extra=optional(LoadRequest)
    )
    async def unload(name: str, request: Request) -> Response:
        """Serve a model no more; requests under way are answered."""
        await read(request, LoadRequest)
        await group.change(Unload(name))
        return Response()

    return routes


def optional(model: type[IndexRequest | LoadRequest]) -> dict[str, object]:
    """Document a body that may be left out."""
    return {
        "requestBody": {
            "required": False,
            "content": {"application/json": {"schema": model.model_json_schema()}},
        }
    }
