"""The settings of the service: command-line options that are environment variables, too."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dropserve.app.observability.record import MAX_TIMEOUT_MS

Count = Literal["auto"] | Annotated[int, Field(ge=1, le=1024)]


class Settings(BaseSettings):
    """Serve the bundles of a folder over HTTP.

    Each option --NAME is also an environment variable DROPSERVE_NAME.
    """

    model_config = SettingsConfigDict(
        env_prefix="DROPSERVE_",
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_exit_on_error=False,
    )

    models: Path = Field(Path("models"), description="folder of all bundles")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    device: Literal["auto", "cpu", "cuda", "tensorrt"] = Field(
        "auto", description="where graphs run; auto: cuda where it works, else cpu"
    )
    workers: Count = Field(
        1, description="processes that share the port; auto: one for every --threads CPUs"
    )
    threads: Count = Field(
        1, description="CPUs that one run of a graph takes; auto: those of a worker"
    )
    debug: bool = Field(False, description="answer POST /debug/mc")
    max_body_bytes: int = Field(4 * 2**20, ge=1, description="longest request body")
    max_rows: int = Field(4096, ge=1, description="most rows of a request")
    max_passes: int = Field(10_000, ge=1, description="most passes of a row")
    max_row_passes: int = Field(1_000_000, ge=1, description="most rows x passes of a request")
    max_head_bytes: int = Field(32 * 2**10, ge=1024, description="longest head of a request")
    max_connections: int = Field(1024, ge=1, description="most open connections of a worker")
    queue_rows: int = Field(
        4_000_000, ge=1, description="most rows x passes of all requests of a worker"
    )
    timeout_ms: int = Field(
        30_000,
        ge=1,
        le=MAX_TIMEOUT_MS,
        description="how long a response may take, unless X-Request-Timeout-Ms is set",
    )
    receive_seconds: float = Field(
        20, gt=0, allow_inf_nan=False, description="how long a request may take to arrive"
    )
    send_seconds: float = Field(
        20,
        gt=0,
        allow_inf_nan=False,
        description="how long a client may take to read 64 KiB of a response",
    )
    keep_alive_seconds: float = Field(
        5,
        gt=0,
        allow_inf_nan=False,
        description="how long an idle connection is kept (longer than a balancer keeps its own)",
    )
    max_unread_bytes: int = Field(
        128 * 2**20,
        ge=1,
        description="most bytes of long responses of a worker that clients have yet to read",
    )
    load_seconds: float = Field(
        600, gt=0, allow_inf_nan=False, description="how long loading a version may take"
    )
    stuck_seconds: float = Field(
        30,
        gt=0,
        allow_inf_nan=False,
        description="how long one of several workers may not respond before it is replaced",
    )
    api_keys_file: Path | None = Field(
        None, description="file of API keys (dropserve key new makes them)"
    )
    open: bool = Field(False, description="allow other than a loopback address without API keys")
    hosts: str = Field(
        "",
        description="names that clients without an API key may call the service by, besides "
        "loopback names and addresses, separated by commas; *: any",
    )
    cors_origins: str = Field(
        "", description="origins whose pages may send requests, separated by commas; *: all"
    )
    drain_delay_seconds: float = Field(
        0,
        ge=0,
        allow_inf_nan=False,
        description="how long requests are still accepted after the signal to stop",
    )
    drain_seconds: float = Field(
        25, ge=0, allow_inf_nan=False, description="how long accepted requests may then take"
    )

    @field_validator("api_keys_file", mode="before")
    @classmethod
    def none_if_empty(cls, value: object) -> object:
        """Treat an empty variable as unset; compose files write unset ones that way."""
        return None if value == "" else value

    def origins(self) -> tuple[str, ...]:
        """Return the origins whose pages may send requests."""
        return listed(self.cors_origins)

    def names(self) -> tuple[str, ...]:
        """Return the names that clients without an API key may call the service by."""
        return (self.host, *listed(self.hosts))


def listed(text: str) -> tuple[str, ...]:
    """Return the parts of a text between commas."""
    return tuple(filter(None, map(str.strip, text.split(","))))
