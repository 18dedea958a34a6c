"""The service on a Ray cluster: ``serve run deploy.ray.app:app``.

Ray starts the replicas, spreads them over the nodes, scales them and hands them requests. Each is
what one worker process of the service is, with the same HTTP interface; ``DROPSERVE_...`` variables
set it up where this is run, but for what is Ray's: listening, connections, processes.
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

# Requests that a replica should have at a time: what keeps one core busy, and no more.
TARGET_REQUESTS = 16
EVERYWHERE = "0.0.0.0"


class Options(BaseModel):
    """What ``serve run deploy.ray.app:app NAME=VALUE ...`` may say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(8, ge=1)
    num_cpus: float = Field(1, ge=0, description="Of a replica.")
    num_gpus: float = Field(0, ge=0, description="Of a replica; a part of one may be shared.")


class Replica(Worker):
    """A worker of the service whose requests come from Ray's proxies."""

    def __init__(self, settings: Settings, threads: int) -> None:
        super().__init__(settings, load_engines(settings.models, settings.device, threads))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        # By being a coroutine function it tells uvicorn, which Ray asks, of the interface.
        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_unnamed(message: Message) -> None:
                if message["type"] == "http.response.start":
                    # Ray has given the request its id, and sends that itself.
                    headers = message.get("headers", ())
                    message["headers"] = [each for each in headers if each[0] != b"x-request-id"]
                await send(message)

            await self.application(scope, receive, send_unnamed)

        return application

    def check_health(self) -> None:
        """Raise if a model does not run any more; Ray then starts another replica."""
        for versions in self.service.registry.served.values():
            for runner in versions.values():
                row = np.zeros((1, *runner.manifest.input.shape), np.float32)
                runner.engine.predict(row)

    async def handle(self, message: object) -> object:
        """Do what all workers are asked to do, but for what one replica would do alone."""
        if isinstance(message, Load | Unload):
            raise LoadError("on Ray the models change when the application is deployed again")
        return await super().handle(message)


def app(options: Options) -> serve.Application:
    """Set up the replicas.

    Raises
    ------
    StartError
        If there are no keys, and it is not said that all may ask.
    """
    settings = CliApp.run(Settings, cli_args=[])
    # Where Ray listens nobody tells us; for some ways to start it that is all addresses.
    update: dict[str, object] = {"host": EVERYWHERE}
    # A replica has another working directory.
    for name in ("models", "api_keys_file"):
        if path := getattr(settings, name):
            update[name] = path.resolve()
    if settings.device == "auto":
        # What was meant for a GPU should not run on a CPU unnoticed, and what was not should not
        # take one that Ray has given to others.
        update["device"] = "cuda" if options.num_gpus else "cpu"
    settings = settings.model_copy(update=update)
    # To say what is missing here, too, and not only in the log of a replica.
    read_keys(settings)
    threads = max(1, int(options.num_cpus)) if settings.threads == "auto" else settings.threads
    deployment = serve.deployment(
        name="dropserve",
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": TARGET_REQUESTS,
        },
        # The replica itself refuses what it has no room for, and says when to ask again.
        max_ongoing_requests=settings.max_connections,
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )
    application: serve.Application = deployment(serve.ingress()(Replica)).bind(settings, threads)
    return application
