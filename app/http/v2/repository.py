"""Triton's model repository extension: list, load and unload models.

References
----------
https://github.com/triton-inference-server/server, ``docs/protocol/extension_model_repository.md``
"""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request, Response
from fastapi.params import Depends as Dependency

from dropserve.app.errors import InputError, LoadError
from dropserve.app.http.bodies import JSON, Parsed, parse_json, read_body
from dropserve.app.http.schemas import IndexRequest, LoadRequest, VersionState
from dropserve.app.inference.registry import Registry

MAX_BODY_BYTES, MOST_LISTS = 2**16, 1000


async def read_optional(request: Request, schema: type[Parsed]) -> Parsed:
    """Read and parse a body that clients may leave out."""
    headers = dict(request.scope["headers"])
    content = await read_body(headers, request.receive, MAX_BODY_BYTES)
    return parse_json({b"content-type": JSON}, content or b"{}", schema, lambda: MOST_LISTS)


def router(
    registry: Registry,
    *,
    load: Callable[[str], Awaitable[None]],
    unload: Callable[[str], Awaitable[None]],
    guard: Dependency,
) -> APIRouter:
    """Return the routes of the model repository.

    Parameters
    ----------
    registry
        The models of this process.
    load, unload
        Have all workers load or unload a model.
    guard
        Admits requests that may change models.
    """
    routes = APIRouter(prefix="/v2/repository", dependencies=[guard])

    @routes.post("/index", openapi_extra=optional(IndexRequest))
    async def index(request: Request) -> list[VersionState]:
        """List the versions in the models folder, and whether they are served."""
        asked = await read_optional(request, IndexRequest)
        return [
            VersionState(
                name=each.name,
                version=str(each.version),
                state="READY" if each.served else "UNAVAILABLE",
                reason=each.reason if each.served else each.reason or "not loaded",
            )
            for each in await registry.index()
            if each.served or not asked.ready
        ]

    @routes.post(
        "/models/{name}/load", response_class=Response, openapi_extra=optional(LoadRequest)
    )
    async def load_model(name: str, request: Request) -> Response:
        """Serve the versions of a model that the models folder holds."""
        asked = await read_optional(request, LoadRequest)
        if asked.parameters:
            # In Triton's protocol the parameters can hold a model's files.
            raise InputError("parameters", "none are allowed: models come from the models folder")
        await load(name)
        # Raised only now, so that the other workers, too, load the accepted versions.
        if faults := "; ".join(registry.faults(name)):
            raise LoadError(faults)
        return Response()

    @routes.post(
        "/models/{name}/unload", response_class=Response, openapi_extra=optional(LoadRequest)
    )
    async def unload_model(name: str, request: Request) -> Response:
        """Stop serving a model; requests under way are answered."""
        await read_optional(request, LoadRequest)
        await unload(name)
        return Response()

    return routes


def optional(model: type[IndexRequest | LoadRequest]) -> dict[str, object]:
    """Document an optional body."""
    return {
        "requestBody": {
            "required": False,
            "content": {"application/json": {"schema": model.model_json_schema()}},
        }
    }
