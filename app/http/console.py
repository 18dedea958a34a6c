"""The console: the files of a page for people, and the routes that only this page uses.

Everything under ``/console`` belongs to the page and changes with it.
"""

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.params import Depends as Dependency
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from dropserve.app.errors import Forbidden
from dropserve.app.http.bodies import starlette_response
from dropserve.app.http.context import Context
from dropserve.app.http.problems import RECORD
from dropserve.app.http.schemas import UncertaintyRequest
from dropserve.app.http.v2.infer import parse_version
from dropserve.app.inference.examples import Examples
from dropserve.app.inference.service import Service

FOLDER = Path(__file__).parents[1] / "console"
HEADERS = {
    # Only files and responses of this service, no script or style inside the page, and no text that
    # becomes HTML: names of models, classes and features come from others.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    # Revalidated each time: a page and scripts of two versions would not fit together.
    "cache-control": "no-cache",
}
# Limit on the numbers in the examples sent to the page, which gets at least one example: writing
# more would delay other requests.
MOST_VALUES = 100_000
# Initial values of the controls of the page.
DEFAULTS = {
    name: field.default
    for name, field in UncertaintyRequest.model_fields.items()
    if not field.is_required() and field.default is not None
}
# Fields of a manifest that the page gets.
FIELDS = {"name", "version", "task", "input", "outputs", "sites", "noise"}


class Files(StaticFiles):
    """The files of the page, with headers that isolate it."""

    def __init__(self) -> None:
        super().__init__(directory=FOLDER)

    def file_response(self, *args: object, **kwargs: object) -> Response:
        """Return a file, or status 304 if it has not changed."""
        response = super().file_response(*args, **kwargs)  # type: ignore[arg-type] # passed on
        response.headers.update(HEADERS)
        return response


def router(
    files: Files, service: Service, context: Context, guard: Dependency, *, debug: bool
) -> APIRouter:
    """Return the routes of the page.

    Parameters
    ----------
    files
        The files of the page.
    service
        The service whose models are shown.
    context
        Checks whether a key may see the passes.
    guard
        Admits requests about a model.
    debug
        Whether passes are shown at all.
    """
    routes = APIRouter(include_in_schema=False)

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        """Return the page."""
        return await files.get_response("index.html", request.scope)

    @routes.get("/console/service")
    async def about() -> Response:
        """Return the served models, the defaults of a request, and whether requests need a key."""
        return starlette_response(
            {"keys": context.keys is not None, "defaults": DEFAULTS} | service.status()
        )

    @routes.get("/console/models/{name}/versions/{version}", dependencies=[guard])
    async def describe(name: str, version: str, request: Request) -> Response:
        """Return a model's manifest and examples, and whether passes are shown."""
        engine = service.registry.find(name, parse_version(version)).engine
        manifest = engine.manifest
        return starlette_response(
            manifest.model_dump(mode="json", include=FIELDS)
            | {
                "verification": manifest.provenance.verification.model_dump(),
                "examples": shown(engine.examples),
                "debug": debug and may_debug(context, request),
            }
        )

    return routes


def shown(examples: Examples) -> list[dict[str, object]]:
    """Return the examples for the page: fewer if inputs are large."""
    most = max(1, MOST_VALUES // examples.inputs[0].size)
    return [
        {"input": row, "truth": truth}
        for row, truth in zip(examples.inputs[:most], examples.truths[:most], strict=True)
    ]


def may_debug(context: Context, request: Request) -> bool:
    """Tell whether the key of a request may see the passes."""
    try:
        context.check(request.scope[RECORD], dict(request.scope["headers"]), "debug")
    except Forbidden:
        return False
    return True
