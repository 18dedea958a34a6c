"""The bundle, a directory ``models/NAME/VERSION`` with an exported model: its manifest and files.

    manifest.json     inputs, outputs, dropout sites, provenance and checksums
    predict.onnx      eval mode
    stochastic.onnx   train mode of the dropout sites, masks as inputs
    examples.json     a few real inputs with their true labels or values

Bundles are the contract between training and serving. The service imports this module, so it
imports neither torch nor onnx.
"""

import hashlib
import math
import os
import re
import shutil
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

# Limit of protobuf, and so of ONNX.
MAX_GRAPH_BYTES = 2**31 - 1
# Largest size of each file, in bytes. Reading the examples takes up to 30 times their size.
LIMITS = {
    MANIFEST: 16 * 2**20,
    PREDICT: MAX_GRAPH_BYTES,
    STOCHASTIC: MAX_GRAPH_BYTES,
    EXAMPLES: 8 * 2**20,
}
# Most fields of all objects in the manifest: pydantic takes a kilobyte for each faulty one.
MAX_FIELDS = 20_000
# Every example is run when a bundle is loaded.
MAX_EXAMPLES = 100
# Most numbers in one row, and in the masks of one pass; most axes of either.
MAX_NUMBERS, MAX_AXES = 2**24, 16
# Most characters of a name, label or unit; of text that a message quotes; of a message.
MAX_TEXT, MAX_QUOTED, MAX_MESSAGE = 1000, 100, 1000

NAME_RULE = "letters, digits, '_', '-' and '.', at most 64, the first a letter or digit"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
# The Open Inference Protocol serves NAME's uncertainty under this name.
RESERVED_SUFFIX = ".mc"


class BundleError(Exception):
    """A bundle cannot be written or read; the message says which and why.

    A bundle's own text may be part of the message, so it is made one line of at most
    ``MAX_MESSAGE`` printable characters.
    """

    def __init__(self, message: str) -> None:
        escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message[:MAX_MESSAGE])
        super().__init__(shortened(escaped, MAX_MESSAGE))


def shortened(text: str, limit: int) -> str:
    """Return a text of at most ``limit`` characters."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def quoted(value: object) -> str:
    """Quote a text or a number of a bundle, or name the type of anything else, for a message."""
    quotation = repr(value) if isinstance(value, str | int) else type(value).__name__
    return shortened(quotation, MAX_QUOTED)


class Record(BaseModel):
    """Base class of the manifest and its parts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# Of a long list, the first fault is enough.
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Texts = Annotated[tuple[Text, ...], Field(fail_fast=True)]
Length = Annotated[int, Field(ge=1, le=MAX_NUMBERS)]
Shape = Annotated[tuple[Length, ...], Field(max_length=MAX_AXES, fail_fast=True)]
Noise = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(fail_fast=True)]
Scores = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(fail_fast=True)]


class Input(Record):
    """The input of one row."""

    name: Text
    shape: Shape = Field(min_length=1, description="Without the batch axis.")
    dtype: Literal["float32"] = "float32"
    features: Texts = Field(description="Names in order; empty for images.")
    feature_ranges: Annotated[tuple[tuple[float, float], ...], Field(fail_fast=True)] = Field(
        description="Minimum and maximum of each feature in the training split; empty for images."
    )
    range: tuple[float, float] = Field(description="Minimum and maximum over all features.")


class Outputs(Record):
    """The output for one row."""

    name: Text
    labels: Texts = Field(min_length=1, description="C class labels, or names of the targets.")
    units: Texts | None = Field(description="Units of the targets, where known.")


class DropoutSite(Record):
    """A place in the network where dropout acts."""

    name: Text
    p: float = Field(ge=0, lt=1)
    scaling: Literal["double", "classic", "inverted"]
    mask_input: Text = Field(description="Name of the mask's input in stochastic.onnx.")
    mask_shape: Shape = Field(description="Mask of one pass.")
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
    sites: Annotated[tuple[DropoutSite, ...], Field(fail_fast=True)]
    noise: Literal["constant", "input"] = Field(
        default="constant",
        description="Noise of the targets of a regression: constant, or a function of the input. "
        "With input, the graphs return [., 2C]: C values, then the logarithms of their noise's "
        "standard deviations.",
    )
    noise_std: Noise | None = Field(
        description="Standard deviation of the targets around the passes, [C]: tau^(-1/2). Null "
        "for a classification, and where the noise depends on the input."
    )
    provenance: Provenance
    files: dict[str, str] = Field(description="SHA-256 of every other file.")
    conformal_scores: Annotated[tuple[Scores, ...], Field(fail_fast=True)] | None = Field(
        default=None,
        description="Nonconformity scores of held-out rows, ascending: one list for all classes, "
        "or one for each target; see export/conformal.py.",
    )

    @property
    def row_numbers(self) -> int:
        """Numbers of one row."""
        return math.prod(self.input.shape)

    @property
    def mask_numbers(self) -> int:
        """Numbers of the masks of one pass."""
        return sum(math.prod(site.mask_shape) for site in self.sites)

    @property
    def width(self) -> int:
        """Numbers that a graph returns for each row or pass: C, or 2C with ``noise`` ``input``."""
        return len(self.outputs.labels) * (2 if self.noise == "input" else 1)

    @model_validator(mode="after")
    def check_names(self) -> Self:
        """Refuse two sites, or two inputs of a graph, of the same name."""
        names = [site.name for site in self.sites]
        inputs = [self.input.name, ROWS, *(site.mask_input for site in self.sites)]
        for what, found in (("sites", names), ("inputs of stochastic.onnx", inputs)):
            if len(set(found)) < len(found):
                raise ValueError(f"two {what} have the same name")
        return self

    @model_validator(mode="after")
    def check_sizes(self) -> Self:
        """Refuse a row, or masks of a pass, of more than ``MAX_NUMBERS`` numbers."""
        for what, numbers in (("a row", self.row_numbers), ("the masks", self.mask_numbers)):
            if numbers > MAX_NUMBERS:
                raise ValueError(f"{what} must hold at most {MAX_NUMBERS} numbers")
        return self

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
        """Refuse scores that are not ascending, or not the same number for each target."""
        lists = len(self.outputs.labels) if self.task == "regression" else 1
        if self.conformal_scores is not None and (
            len(self.conformal_scores) != lists
            or any(not scores or list(scores) != sorted(scores) for scores in self.conformal_scores)
            or len(set(map(len, self.conformal_scores))) > 1
        ):
            raise ValueError(f"conformal_scores must be {lists} ascending lists of one length")
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
        # os.path.isdir: False, not an error, for a link that cannot be followed.
        if re.fullmatch(r"[1-9][0-9]{0,8}", entry.name) and os.path.isdir(entry)
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
        If the name or the content is not allowed, or the folder cannot be written.
    """
    check_name(name)
    for file, content in files.items():
        check_size(file, len(content))
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
            document = manifest(version, sums).model_dump_json(indent=2) + "\n"
            check_size(MANIFEST, len(document.encode()))
            (staging / MANIFEST).write_text(document, encoding="utf-8")
            place = model / str(version)
            try:
                staging.rename(place)
            except OSError:
                # Another export may have published this version in the meantime.
                if not place.exists():
                    raise
            else:
                return place
    except ValidationError as error:
        raise BundleError(f"{MANIFEST}: {first_fault(error)}") from None
    except OSError as error:
        raise BundleError(f"cannot write to {model}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # not empty, or not made
            model.rmdir()


def check_size(file: str, size: int) -> None:
    """Raise BundleError if a file of this size would not be read."""
    if size > LIMITS[file]:
        raise BundleError(f"{file} would be larger than {LIMITS[file]} bytes")


def first_fault(error: ValidationError) -> str:
    """Describe the first fault of a manifest: where it is, and what is wrong."""
    first = error.errors(include_input=False)[0]
    where = shortened(".".join(map(str, first["loc"])) or "content", MAX_QUOTED)
    return f"{where}: {first['msg']}"
