"""Triton's model repository extension: list, load and unload models.

References
----------
https://github.com/triton-inference-server/server, ``docs/protocol/extension_model_repository.md``
"""

import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, TypedDict

from fastapi import APIRouter, Request, Response
from fastapi.params import Depends as Dependency

from dropserve.app.errors import InputError, LoadError
from dropserve.app.http.bodies import JSON, Parsed, parse_json, read_body
from dropserve.app.http.problems import RECORD
from dropserve.app.http.schemas import GoesOn, IndexRequest, LoadRequest, VersionState
from dropserve.app.inference.registry import Registry, VersionStatus
from dropserve.app.observability.record import RequestRecord

MAX_BODY_BYTES, MOST_LISTS = 2**16, 1000

# Changes a model, by its name, in all workers; returns whether that is done within some seconds.
Change = Callable[[str, float], Awaitable[bool]]


async def read_optional(request: Request, schema: type[Parsed]) -> Parsed:
    """Read and parse a body that clients may leave out."""
    headers = dict(request.scope["headers"])
    content = await read_body(headers, request.receive, MAX_BODY_BYTES)
    return parse_json({b"content-type": JSON}, content or b"{}", schema, lambda: MOST_LISTS)


def router(
    registry: Registry,
    *,
    load: Change,
    unload: Change,
    index: Callable[[], Awaitable[list[VersionStatus]]],
    guard: Dependency,
) -> APIRouter:
    """Return the routes of the model repository.

    Parameters
    ----------
    registry
        The models of this process.
    load, unload
        Have all workers load or unload a model.
    index
        Lists all versions.
    guard
        Admits requests that may change models.
    """
    routes = APIRouter(prefix="/v2/repository", dependencies=[guard])

    @routes.post("/index", openapi_extra=optional(IndexRequest))
    async def list_versions(request: Request) -> list[VersionState]:
        """List the versions in the models folder, and whether they are served."""
        asked = await read_optional(request, IndexRequest)
        return [state_of(each) for each in await index() if each.served or not asked.ready]

    @routes.post("/models/{name}/load", **CHANGE)
    async def load_model(name: str, request: Request) -> Response:
        """Serve the versions of a model that the models folder holds."""
        asked = await read_optional(request, LoadRequest)
        if asked.parameters:
            # In Triton's protocol the parameters can hold a model's files.
            raise InputError("parameters", "none are allowed: models come from the models folder")
        if not await load(name, time_left(request)):
            return goes_on("loading goes on; POST /v2/repository/index shows its outcome")
        # Raised only now, so that the other workers, too, load the accepted versions.
        if faults := "; ".join(registry.faults(name)):
            raise LoadError(faults)
        return Response()

    @routes.post("/models/{name}/unload", **CHANGE)
    async def unload_model(name: str, request: Request) -> Response:
        """Stop serving a model; requests under way are answered."""
        await read_optional(request, LoadRequest)
        if not await unload(name, time_left(request)):
            return goes_on("unloading waits for other changes; POST /v2/repository/index shows it")
        return Response()

    return routes


def state_of(status: VersionStatus) -> VersionState:
    """Write the status of a version."""
    name, version = status.name, str(status.version)
    if status.served:
        return VersionState(name=name, version=version, state="READY", reason=status.reason)
    if status.loading:
        return VersionState(name=name, version=version, state="LOADING", reason="")
    reason = status.reason or "not loaded"
    return VersionState(name=name, version=version, state="UNAVAILABLE", reason=reason)


def time_left(request: Request) -> float:
    """Return the seconds in which a response must be out."""
    record: RequestRecord = request.scope[RECORD]
    return max(0.0, record.start + record.time_limit - time.monotonic())


def goes_on(what: str) -> Response:
    """Answer a request before its change is made."""
    content = GoesOn(error=what).model_dump_json()
    return Response(content, HTTPStatus.ACCEPTED, media_type="application/json")


def optional(model: type[IndexRequest | LoadRequest]) -> dict[str, object]:
    """Document an optional body."""
    return {
        "requestBody": {
            "required": False,
            "content": {"application/json": {"schema": model.model_json_schema()}},
        }
    }


class ChangeRoute(TypedDict):
    """How FastAPI documents the routes that load and unload."""

    response_class: type[Response]
    responses: dict[int | str, dict[str, Any]]
    openapi_extra: dict[str, Any]


CHANGE = ChangeRoute(
    response_class=Response,
    responses={202: {"model": GoesOn, "description": "It takes longer than the request may."}},
    openapi_extra=optional(LoadRequest),
)
