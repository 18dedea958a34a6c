"""The console: the files of a page for people, and what it asks beside the endpoints.

What is under ``/console`` is the page's own, and changes with it.
"""

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.params import Depends as Dependency
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from dropserve.app.bundles.loader import Examples
from dropserve.app.errors import Forbidden
from dropserve.app.http import problems, responses
from dropserve.app.http.context import Gate
from dropserve.app.http.schemas import UncertaintyRequest
from dropserve.app.http.v2.routes import version_number
from dropserve.app.inference.service import Service

FOLDER = Path(__file__).parents[1] / "console"
HEADERS = {
    # Nothing but files and answers of this service, no script or style inside the page, and no
    # text that becomes HTML: names of models, classes and features are others' words.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    # Asked for anew each time: a page and scripts of two versions would not fit together.
    "cache-control": "no-cache",
}
# Numbers of the examples that the page is given, or one example: written at once, more of them
# would keep others waiting.
MOST_VALUES = 100_000
# The values that the page's controls begin with.
DEFAULTS = {
    name: field.default
    for name, field in UncertaintyRequest.model_fields.items()
    if not field.is_required() and field.default is not None
}
# What the page is told of a model's manifest.
TOLD = {"name", "version", "task", "input", "outputs", "sites", "noise"}


class Files(StaticFiles):
    """The page's files, with headers that keep it to itself."""

    def __init__(self) -> None:
        super().__init__(directory=FOLDER)

    def file_response(self, *args: object, **kwargs: object) -> Response:
        """Answer with a file, or that it has not changed."""
        response = super().file_response(*args, **kwargs)  # type: ignore[arg-type] # as it came
        response.headers.update(HEADERS)
        return response


def router(
    files: Files, service: Service, gate: Gate, guard: Dependency, *, debug: bool
) -> APIRouter:
    """Return the routes of the page and of what it asks.

    Parameters
    ----------
    files
        Of the page.
    service
        Whose models are shown.
    gate
        Knows whether a key may see the passes.
    guard
        Lets in who may ask about a model.
    debug
        Whether passes are shown at all.
    """
    routes = APIRouter(include_in_schema=False)

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        """Show the page."""
        return await files.get_response("index.html", request.scope)

    @routes.get("/console/service")
    async def about() -> Response:
        """Return the served models, a request's defaults, and whether requests need a key."""
        return responses.response(
            {"keys": gate.keys is not None, "defaults": DEFAULTS} | service.state()
        )

    @routes.get("/console/models/{name}/versions/{version}", dependencies=[guard])
    async def describe(name: str, version: str, request: Request) -> Response:
        """Describe a model: its manifest, its examples, and whether passes are shown."""
        engine = service.models.find(name, version_number(version)).engine
        manifest = engine.manifest
        return responses.response(
            manifest.model_dump(mode="json", include=TOLD)
            | {
                "verification": manifest.provenance.verification.model_dump(),
                "examples": told(engine.examples),
                "debug": debug and may_debug(gate, request),
            }
        )

    return routes


def told(examples: Examples) -> list[dict[str, object]]:
    """Choose the examples that the page is told: of large inputs not all."""
    most = max(1, MOST_VALUES // examples.inputs[0].size)
    return [
        {"input": row, "truth": truth}
        for row, truth in zip(examples.inputs[:most], examples.truths[:most], strict=True)
    ]


def may_debug(gate: Gate, request: Request) -> bool:
    """Tell whether who asks may see the passes."""
    try:
        gate.check(request.scope[problems.CALL], dict(request.scope["headers"]), "debug")
    except Forbidden:
        return False
    return True
