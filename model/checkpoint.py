"""The checkpoint, the result of training: a directory of safetensors, JSON and NPZ, no pickle.

weights.safetensors   parameters and buffers of the network
checkpoint.json       network configuration, description of the data, metrics
holdout.npz           the test split, on which the export is verified
plots.png             plots of the training and evaluation
"""

import json
import os
import platform
import shutil
import tempfile
import zipfile
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dropserve.model.datasets import Dataset, Split
from dropserve.model.networks import Model, NetworkConfig
from dropserve.model.training import Trained

SCHEMA_VERSION = 1
PACKAGES = ("torch", "numpy", "scikit-learn")
# Exceptions that reading a damaged file raises.
DAMAGE = (
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


class CheckpointError(Exception):
    """A checkpoint cannot be written or read; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained network with all that its export needs."""

    model: Model
    config: NetworkConfig
    holdout: Dataset  # the test split, in raw features
    feature_ranges: tuple[tuple[float, float], ...]  # D pairs, of the training split; () for images
    input_range: tuple[float, float]  # over all features
    noise_std: tuple[float, ...] | None  # [C], only for a regression with constant noise
    metrics: dict[str, dict[str, float]]  # on the test split, by mode
    seed: int
    packages: dict[str, str]  # versions by name
    # Older checkpoints lack the next two.
    eval_noise_std: tuple[float, ...] | None = None  # [C], as noise_std, around eval mode
    temperature: float | None = None  # folded into the last layer; None if not calibrated


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect training."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def from_training(trained: Trained, config: NetworkConfig, parts: Split, seed: int) -> Checkpoint:
    """Build the checkpoint of a finished training."""
    x = parts.train.x
    columns = x if x.ndim == 2 else x[:, :0].reshape(len(x), 0)
    return Checkpoint(
        model=trained.model,
        config=config,
        holdout=parts.test,
        feature_ranges=tuple(zip(columns.min(0).tolist(), columns.max(0).tolist(), strict=True)),
        input_range=(float(x.min()), float(x.max())),
        noise_std=trained.noise_std,
        metrics=trained.metrics,
        seed=seed,
        packages=package_versions(),
        eval_noise_std=trained.eval_noise_std,
        temperature=trained.temperature,
    )


class Output:
    """A context manager that creates a directory whole or not at all.

    Write files into ``staging``, then call ``commit``. The constructor checks that the place is
    writable, so that hours of training do not end in an error. ``commit`` replaces an older
    checkpoint; a place that holds anything else is refused.

    Raises
    ------
    CheckpointError
        If the place cannot be written, or holds something other than a checkpoint.
    """

    def __init__(self, place: Path) -> None:
        # Follow links, and give "." a name.
        self.place = Path(os.path.realpath(place))
        if self.place.exists() and not is_replaceable(self.place):
            raise CheckpointError(f"{place} is there already and holds no checkpoint; not replaced")
        parent = self.place.parent
        self.made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self.staging = Path(tempfile.mkdtemp(dir=parent, prefix=f".{self.place.name}."))
        except OSError as error:
            raise CheckpointError(f"cannot write to {place}: {error.strerror or error}") from None

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        with suppress(OSError):  # not empty: it holds the checkpoint or another process's files
            for folder in self.made:
                folder.rmdir()

    def commit(self) -> None:
        """Move ``staging`` into place."""
        self.staging.chmod(0o755)
        if self.place.exists():
            old = self.staging.with_name(f"{self.staging.name}.old")
            self.place.rename(old)
            self.staging.rename(self.place)
            shutil.rmtree(old)
        else:
            self.staging.rename(self.place)


def is_replaceable(place: Path) -> bool:
    """Tell whether ``place`` is a checkpoint or an empty directory."""
    return place.is_dir() and ((place / "checkpoint.json").is_file() or not os.listdir(place))


def save(checkpoint: Checkpoint, directory: Path) -> None:
    """Write ``checkpoint`` into ``directory``, which must exist."""
    save_file(checkpoint.model.state_dict(), directory / "weights.safetensors")
    holdout = checkpoint.holdout
    np.savez_compressed(directory / "holdout.npz", x=holdout.x, y=holdout.y)
    document = {
        "schema_version": SCHEMA_VERSION,
        "network": asdict(checkpoint.config),
        "data": {
            "name": holdout.name,
            "task": holdout.task,
            "features": holdout.features,
            "outputs": holdout.outputs,
            "feature_ranges": checkpoint.feature_ranges,
            "input_range": checkpoint.input_range,
        },
        "noise_std": checkpoint.noise_std,
        "eval_noise_std": checkpoint.eval_noise_std,
        "temperature": checkpoint.temperature,
        "metrics": checkpoint.metrics,
        "seed": checkpoint.seed,
        "packages": checkpoint.packages,
    }
    text = json.dumps(document, indent=2, allow_nan=False)
    (directory / "checkpoint.json").write_text(text + "\n", encoding="utf-8")


def load(directory: Path) -> Checkpoint:
    """Read the checkpoint in ``directory``; its network is in eval mode.

    Raises
    ------
    CheckpointError
        If there is none, or if it is damaged or of another schema.
    """
    path = directory / "checkpoint.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no checkpoint (no checkpoint.json)")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema_version"] != SCHEMA_VERSION:
            raise CheckpointError(
                f"{path}: schema {document['schema_version']}, this version reads {SCHEMA_VERSION}"
            )
        network, data = document["network"], document["data"]
        config = NetworkConfig(
            network=network["network"],
            input_shape=tuple(network["input_shape"]),
            outputs=network["outputs"],
            hidden=tuple(network["hidden"]),
            p=network["p"],
            scaling=network["scaling"],
            # Older checkpoints have neither.
            input_p=network.get("input_p", 0.0),
            noise=network.get("noise", "constant"),
        )
        model = Model(config)
        model.load_state_dict(load_file(directory / "weights.safetensors"))
        # Opened here, because numpy does not close a file of its own that turns out not to be NPZ.
        with (
            (directory / "holdout.npz").open("rb") as raw,
            np.load(raw, allow_pickle=False) as file,
        ):
            holdout = Dataset(
                name=data["name"],
                task=data["task"],
                x=file["x"],
                y=file["y"],
                features=tuple(data["features"]),
                outputs=tuple(data["outputs"]),
            )
        noise_std = document["noise_std"]
        eval_noise_std = document.get("eval_noise_std")
        low, high = data["input_range"]
        return Checkpoint(
            model=model.eval(),
            config=config,
            holdout=holdout,
            feature_ranges=tuple((low, high) for low, high in data["feature_ranges"]),
            input_range=(low, high),
            noise_std=None if noise_std is None else tuple(noise_std),
            metrics=document["metrics"],
            seed=document["seed"],
            packages=document["packages"],
            eval_noise_std=None if eval_noise_std is None else tuple(eval_noise_std),
            temperature=document.get("temperature"),
        )
    except DAMAGE as error:
        message = " ".join(str(error).split())
        raise CheckpointError(f"{directory}: damaged checkpoint: {message}") from error
