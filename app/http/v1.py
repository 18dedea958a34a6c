"""KServe's first protocol: predictions of rows, and which models are served.

It knows no parameters, so there is no Monte Carlo answer in it.

References
----------
https://kserve.github.io/website/docs/concepts/architecture/data-plane/v1-protocol
"""

import re
from collections.abc import Callable
from http import HTTPStatus

from fastapi import APIRouter
from fastapi.params import Depends as Dependency
from starlette.exceptions import HTTPException

from dropserve.app.errors import InputError, UnknownModel
from dropserve.app.http.bodies import Request, Response, json_response, parse_json
from dropserve.app.http.schemas import ModelList, ModelReadiness, PredictionRequest
from dropserve.app.inference.answers import Answer
from dropserve.app.inference.query import PredictQuery
from dropserve.app.inference.service import Service
from dropserve.app.observability.record import RequestRecord
from dropserve.export.bundle import RESERVED_SUFFIX as MC

VERB = ":predict"
ROUTE = "/v1/models/{name}" + VERB
PATH = re.compile(f"/v1/models/([^/]+){VERB}")


def parse(most_lists: Callable[[], int], request: Request) -> PredictQuery:
    """Parse a request for predictions; ``most_lists`` as for ``parse_json``."""
    found = PATH.fullmatch(request.path)
    assert found
    name = check_name(found[1])
    asked = parse_json(request.headers, request.body, PredictionRequest, most_lists)
    return PredictQuery(asked.instances, name)


async def answer(service: Service, query: PredictQuery, record: RequestRecord) -> Answer:
    """Answer with ``Service.predict``, whose rows have another name here."""
    try:
        return await service.predict(query, record)
    except InputError as error:
        path = error.path.replace("inputs", "instances", 1)
        raise InputError(path, error.message) from None


def write(answer: Answer) -> Response:
    """Write an answer of ``Service.predict``."""
    rows = answer["probabilities" if "probabilities" in answer else "values"]
    return json_response({"predictions": rows})


def check_name(name: str) -> str:
    """Return the name of a model; raise UnknownModel if it is that of a Monte Carlo answer."""
    if name.endswith(MC):
        raise UnknownModel(
            f"this protocol answers predictions alone; POST /v2/models/{name[:100]}/infer and "
            "POST /uncertainty answer their uncertainty"
        )
    return name


def router(service: Service, guard: Dependency) -> APIRouter:
    """Return the routes that say which models are served."""
    routes = APIRouter(prefix="/v1", dependencies=[guard])

    @routes.get("/models")
    async def models() -> ModelList:
        """List the served models."""
        return ModelList(models=sorted(service.registry.served))

    @routes.get("/models/{name}")
    async def model(name: str) -> ModelReadiness:
        """Report that a model is served."""
        if name.endswith(VERB):
            # No name of a model has a colon: this is the path of the predictions.
            raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, headers={"allow": "POST"})
        service.registry.find(check_name(name), None)
        return ModelReadiness(name=name, ready=True)

    return routes
