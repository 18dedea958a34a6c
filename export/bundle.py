"""The bundle, a directory ``models/NAME/VERSION`` with an exported model: read, write, manifest.

    manifest.json     inputs, outputs, dropout sites, provenance and checksums
    predict.onnx      eval mode
    stochastic.onnx   train mode of the dropout sites, masks as inputs
    examples.json     a few real inputs with their true labels or values

Bundles are the contract between training and serving. The service imports this module, so it
imports neither torch nor onnx.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PREDICT = "predict.onnx"
STOCHASTIC = "stochastic.onnx"
EXAMPLES = "examples.json"
# Input of stochastic.onnx: the row that each pass belongs to.
ROWS = "rows"
FILES = (PREDICT, STOCHASTIC, EXAMPLES)

MAX_MANIFEST_BYTES = 16 * 2**20
# Limit of protobuf, and so of ONNX.
MAX_FILE_BYTES = 2**31 - 1

NAME_RULE = "letters, digits, '_', '-' and '.', at most 64, the first a letter or digit"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
# The Open Inference Protocol serves NAME's uncertainty under this name.
RESERVED_SUFFIX = ".mc"


class BundleError(Exception):
    """A bundle cannot be written or read; the message says which and why."""


class Record(BaseModel):
    """Base class of the manifest and its parts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Input(Record):
    """The input of one row."""

    name: str
    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(description="Without the batch axis.")
    dtype: Literal["float32"] = "float32"
    features: tuple[str, ...] = Field(description="Names in order; empty for images.")
    feature_ranges: tuple[tuple[float, float], ...] = Field(
        description="Minimum and maximum of each feature in the training split; empty for images."
    )
    range: tuple[float, float] = Field(description="Minimum and maximum over all features.")


class Outputs(Record):
    """The output for one row."""

    name: str
    labels: tuple[str, ...] = Field(description="C class labels, or names of the targets.")
    units: tuple[str, ...] | None = Field(description="Units of the targets, where known.")


class DropoutSite(Record):
    """A place in the network where dropout acts."""

    name: str
    p: float = Field(ge=0, lt=1)
    scaling: Literal["double", "classic", "inverted"]
    mask_input: str = Field(description="Name of the mask's input in stochastic.onnx.")
    mask_shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(description="Mask of one pass.")
    folded: bool = Field(
        description="Whether the eval factor is folded into weights of predict.onnx; if not, a Mul "
        "node applies it."
    )


class Verification(Record):
    """Measurements taken before the bundle was published.

    An error is the largest difference over the tested rows, relative to the largest value of the
    same output; for float16, relative to the largest distance from the mean of that output.
    """

    predict_error: float = Field(description="Error of predict.onnx, compared with eval mode.")
    predict_rows: int
    stochastic_error: float = Field(
        description="Error of stochastic.onnx, compared with train mode with the same masks."
    )
    stochastic_passes: int
    expectation_gap: float = Field(
        description="Mean of many passes minus eval mode, in standard errors of that mean: root "
        "mean square over rows and outputs. About 1 where there is no gap."
    )
    expectation_gap_largest: float = Field(
        description="Largest size of the gap over rows and outputs."
    )
    expectation_gap_passes: int


class Provenance(Record):
    """The origin of a bundle."""

    data: str
    seed: int
    packages: dict[str, str]
    metrics: dict[str, dict[str, float]] = Field(
        description="Metrics on the held-out split, of eval mode and of 100 passes."
    )
    verification: Verification
    temperature: float | None = Field(
        default=None,
        gt=0,
        description="Calibration temperature that divides the logits, folded into both graphs; "
        "null without calibration.",
    )


class Manifest(Record):
    """The manifest of a bundle."""

    schema_version: Literal[1] = 1
    name: str = Field(pattern=NAME_PATTERN)
    version: int = Field(ge=1)
    task: Literal["classification", "regression"]
    input: Input
    outputs: Outputs
    preprocessing: str
    precision: Literal["float32", "float16"] = Field(
        default="float32",
        description="Type in which the graphs compute; provenance.verification holds the error.",
    )
    values_per_row: int = Field(
        ge=1,
        description="Numbers that predict.onnx computes for each row, which bounds the memory of "
        "a run.",
    )
    values_per_pass: int = Field(
        ge=1, description="Numbers that stochastic.onnx computes for each pass."
    )
    sites: tuple[DropoutSite, ...]
    noise: Literal["constant", "input"] = Field(
        default="constant",
        description="Noise of the targets of a regression: constant, or a function of the input. "
        "With input, the graphs return [., 2C]: C values, then the logarithms of their noise's "
        "standard deviations.",
    )
    noise_std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        description="Standard deviation of the targets around the passes, [C]: tau^(-1/2). Null "
        "for a classification, and where the noise depends on the input."
    )
    provenance: Provenance
    files: dict[str, str] = Field(description="SHA-256 of every other file.")
    conformal_scores: tuple[tuple[Annotated[float, Field(ge=0)], ...], ...] | None = Field(
        default=None,
        description="Nonconformity scores of held-out rows, ascending: one list for all classes, "
        "or one for each target; see export/conformal.py.",
    )

    @property
    def width(self) -> int:
        """Numbers that a graph returns for each row or pass: C, or 2C with ``noise`` ``input``."""
        return len(self.outputs.labels) * (2 if self.noise == "input" else 1)

    @model_validator(mode="after")
    def check_noise(self) -> Self:
        """Refuse a regression that lacks the noise of a target, and a classification with noise."""
        if self.task == "classification" and self.noise != "constant":
            raise ValueError("noise must be 'constant' for a classification")
        own = self.task == "regression" and self.noise == "constant"
        targets = len(self.outputs.labels) if own else 0
        if len(self.noise_std or ()) != targets:
            where = " whose noise depends on the input" if self.noise == "input" else ""
            raise ValueError(f"noise_std must hold {targets} values for a {self.task}{where}")
        return self

    @model_validator(mode="after")
    def check_conformal_scores(self) -> Self:
        """Refuse scores that are not ascending, or do not cover each target."""
        lists = len(self.outputs.labels) if self.task == "regression" else 1
        if self.conformal_scores is not None and (
            len(self.conformal_scores) != lists
            or any(not scores or list(scores) != sorted(scores) for scores in self.conformal_scores)
        ):
            raise ValueError(f"conformal_scores must be {lists} ascending lists")
        return self


def check_name(name: str) -> None:
    """Raise BundleError unless ``name`` is a valid model name."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise BundleError(f"a model's name must be {NAME_RULE}, not {name!r}")
    if name.endswith(RESERVED_SUFFIX):
        raise BundleError(f"a model's name must not end in {RESERVED_SUFFIX!r}: {name!r}")


def versions(model: Path) -> list[int]:
    """Return the version numbers in ``models/NAME``, ascending."""
    return sorted(
        int(entry.name)
        for entry in model.iterdir()
        if re.fullmatch(r"[1-9][0-9]{0,8}", entry.name) and entry.is_dir()
    )


def publish(
    models: Path,
    name: str,
    files: Mapping[str, bytes],
    manifest: Callable[[int, dict[str, str]], Manifest],
) -> Path:
    """Write the next version of a model and return its directory.

    The bundle is written to a staging directory and renamed into place: a version exists whole or
    not at all, and existing versions never change. A killed export leaves at most a staging
    directory, whose name begins with a dot and which nothing reads.

    Parameters
    ----------
    models
        Folder of all models; created if missing.
    name
        Name of the model.
    files
        Content of each of ``FILES``.
    manifest
        Builds the manifest from the version and the SHA-256 of each file.

    Raises
    ------
    BundleError
        If the name is not allowed or the folder cannot be written.
    """
    check_name(name)
    sums = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    model = models / name
    try:
        models.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=models, prefix=f".staging-{name}-"))
    except FileExistsError:
        raise BundleError(f"cannot write to {models}: it is no folder") from None
    except OSError as error:
        raise BundleError(f"cannot write to {model}: {error.strerror or error}") from None
    try:
        for file, content in files.items():
            (staging / file).write_bytes(content)
        staging.chmod(0o755)
        model.mkdir(exist_ok=True)
        while True:
            version = max(versions(model), default=0) + 1
            document = manifest(version, sums).model_dump_json(indent=2)
            (staging / MANIFEST).write_text(document + "\n", encoding="utf-8")
            place = model / str(version)
            try:
                staging.rename(place)
            except OSError:
                # Another export may have published this version in the meantime.
                if not place.exists():
                    raise
            else:
                return place
    except OSError as error:
        raise BundleError(f"cannot write to {model}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # not empty, or not made
            model.rmdir()


def read_manifest(place: Path) -> Manifest:
    """Read the manifest in ``place``, a directory ``models/NAME/VERSION``.

    Raises
    ------
    BundleError
        If it is missing, damaged, of another schema, or of another name or version.
    """
    text = read_regular(place / MANIFEST, MAX_MANIFEST_BYTES)
    try:
        document = json.loads(text)
        schema = document["schema_version"]
    except (ValueError, RecursionError, TypeError, KeyError):
        raise BundleError(f"{MANIFEST} is no JSON object with a schema_version") from None
    if schema != SCHEMA_VERSION:
        raise BundleError(
            f"{MANIFEST} is of schema {schema!r}; this version of dropserve reads {SCHEMA_VERSION}"
        )
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise BundleError(f"{MANIFEST}: {where}: {first['msg']}") from None
    if (manifest.name, str(manifest.version)) != (place.parent.name, place.name):
        raise BundleError(
            f"{MANIFEST} is of {manifest.name} version {manifest.version}, which is not its place"
        )
    if set(manifest.files) != set(FILES):
        raise BundleError(f"{MANIFEST}: files must be {', '.join(FILES)}")
    return manifest


def read_file(place: Path, manifest: Manifest, file: str) -> bytes:
    """Return the content of ``file``, one of ``FILES``.

    Raises
    ------
    BundleError
        If it cannot be read, or its SHA-256 is not the one in the manifest.
    """
    content = read_regular(place / file, MAX_FILE_BYTES)
    measured = hashlib.sha256(content).hexdigest()
    if measured != manifest.files[file]:
        raise BundleError(
            f"{file} has changed: its SHA-256 is {measured[:12]}..., "
            f"the manifest says {manifest.files[file][:12]}..."
        )
    return content


def read_regular(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes.

    Raises
    ------
    BundleError
        If the path is a link or not a regular file, or the file is larger or cannot be read.
    """
    try:
        # Check before opening: a link could lead out of the bundle, and opening a named pipe blocks
        # until something writes to it.
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            raise BundleError(f"{path.name} is a link, not a file")
        if not stat.S_ISREG(found.st_mode):
            raise BundleError(f"{path.name} is not a regular file")
        if found.st_size > limit:
            raise BundleError(f"{path.name} is larger than {limit} bytes")
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path.name} cannot be read: {error.strerror or error}") from None
