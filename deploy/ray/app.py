"""The service on a Ray cluster: ``serve run deploy.ray.app:app``.

Ray starts the replicas, spreads them over the nodes, scales them and routes requests to them. A
replica is one worker of the service, with the same HTTP interface. ``DROPSERVE_...`` variables of
the command configure it, except for Ray's part: listening, connections and processes.
"""

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliApp
from ray import serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dropserve.app.errors import LoadError
from dropserve.app.inference.registry import load_engines
from dropserve.app.processes.worker import Load, Unload, Worker, read_keys
from dropserve.app.settings import Settings

# Concurrent requests per replica at which Ray scales: enough to keep one core busy.
TARGET_REQUESTS = 16
EVERYWHERE = "0.0.0.0"


class Options(BaseModel):
    """Options of ``serve run deploy.ray.app:app NAME=VALUE ...``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(8, ge=1)
    num_cpus: float = Field(1, ge=0, description="CPUs of a replica.")
    num_gpus: float = Field(0, ge=0, description="GPUs of a replica; a fraction shares one.")


class Replica(Worker):
    """A worker of the service whose requests come from Ray's proxies."""

    def __init__(self, settings: Settings, threads: int) -> None:
        engines = load_engines(
            settings.models, settings.device, threads, load_seconds=settings.load_seconds
        )
        super().__init__(settings, engines)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        # Ray has uvicorn detect the interface, and a coroutine function tells it ASGI 3.
        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_unnamed(message: Message) -> None:
                if message["type"] == "http.response.start":
                    # Ray assigns the request's id and sends this header itself.
                    headers = message.get("headers", ())
                    message["headers"] = [each for each in headers if each[0] != b"x-request-id"]
                await send(message)

            await self.application(scope, receive, send_unnamed)

        return application

    def check_health(self) -> None:
        """Raise if a model no longer runs; Ray then starts another replica."""
        for versions in self.service.registry.served.values():
            for runner in versions.values():
                row = np.zeros((1, *runner.manifest.input.shape), np.float32)
                runner.engine.predict(row)

    async def handle(self, message: object) -> object:
        """Handle messages to all workers, except changes that would reach only one replica."""
        if isinstance(message, Load | Unload):
            raise LoadError("on Ray the models change when the application is deployed again")
        return await super().handle(message)


def app(options: Options) -> serve.Application:
    """Set up the replicas.

    Raises
    ------
    StartError
        If there are no keys, and the service is not declared open.
    """
    settings = CliApp.run(Settings, cli_args=[])
    # Ray does not tell which address it listens on; it can be all of them.
    update: dict[str, object] = {"host": EVERYWHERE}
    # A replica has another working directory.
    for name in ("models", "api_keys_file"):
        if path := getattr(settings, name):
            update[name] = path.resolve()
    if settings.device == "auto":
        # A deployment meant for a GPU must not run on a CPU unnoticed, and one without a GPU must
        # not take the GPU that Ray has given to others.
        update["device"] = "cuda" if options.num_gpus else "cpu"
    settings = settings.model_copy(update=update)
    # Report missing keys here too, not only in a replica's log.
    read_keys(settings, starting=True)
    threads = max(1, int(options.num_cpus)) if settings.threads == "auto" else settings.threads
    deployment = serve.deployment(
        name="dropserve",
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": TARGET_REQUESTS,
        },
        # Under overload the replica itself refuses requests, with a Retry-After.
        max_ongoing_requests=settings.max_connections,
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )
    application: serve.Application = deployment(serve.ingress()(Replica)).bind(settings, threads)
    return application
