"""Find the bundles in the models folder and read them.

Every file is checked against its SHA-256, and nothing outside the models folder is read: no link
leads out, and no graph (``graph_check``).
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from dropserve.app.bundles import onnx_guard
from dropserve.app.errors import InputError, StartError
from dropserve.app.inference.rows import rows_from_lists
from dropserve.export import bundle

log = logging.getLogger(__name__)


class Examples(NamedTuple):
    """Real rows of input, and what they are."""

    inputs: NDArray[np.float32]  # [E, *shape]
    truths: list[object]  # a label each, or values; None where it is not known


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read whole."""

    manifest: bundle.Manifest
    predict: bytes
    stochastic: bytes
    examples: Examples


def places(models: Path) -> Iterator[Path]:
    """List ``models/NAME/VERSION``, by name and version.

    Raises
    ------
    StartError
        If the folder cannot be read.
    """
    try:
        names = sorted(entry for entry in models.iterdir() if is_model(entry))
    except OSError as error:
        raise StartError(
            f"the models folder {str(models)!r} cannot be read: {error.strerror or error}"
        ) from None
    for name in names:
        try:
            versions = bundle.versions(name)
        except OSError as error:
            log.error("refused %s: %s", name.name, error.strerror or error)
            continue
        for version in versions:
            yield name / str(version)


def is_model(entry: Path) -> bool:
    """Tell whether an entry of the models folder can be a model's."""
    try:
        bundle.check_name(entry.name)
    except bundle.BundleError:
        return False
    return entry.is_dir()


def read(place: Path) -> Bundle:
    """Read the bundle at ``place``.

    Raises
    ------
    BundleError
        If it is damaged, changed or of a newer schema, or reaches outside itself.
    """
    manifest = read_manifest(place)
    predict, stochastic, text = (bundle.read_file(place, manifest, file) for file in bundle.FILES)
    onnx_guard.check(bundle.PREDICT, predict)
    onnx_guard.check(bundle.STOCHASTIC, stochastic)
    return Bundle(manifest, predict, stochastic, read_examples(text, manifest))


def read_examples(text: bytes, manifest: bundle.Manifest) -> Examples:
    """Read a bundle's examples.

    Raises
    ------
    BundleError
        If there are none, or they are no rows of the model's input.
    """
    try:
        examples = orjson.loads(text)
        inputs = [example["input"] for example in examples]
        truths = [example.get("truth") for example in examples]
    except (orjson.JSONDecodeError, TypeError, KeyError, AttributeError):
        raise bundle.BundleError(f"{bundle.EXAMPLES} is no list of inputs") from None
    if not inputs:
        raise bundle.BundleError(f"{bundle.EXAMPLES} is empty")
    try:
        rows = rows_from_lists(inputs, manifest.input.shape, len(inputs))
    except InputError as error:
        raise bundle.BundleError(f"{bundle.EXAMPLES}: {error}") from None
    return Examples(rows, truths)


def read_manifest(place: Path) -> bundle.Manifest:
    """Read the manifest of the bundle at ``place``.

    Raises
    ------
    BundleError
        If it is damaged, of a newer schema, or outside the models folder.
    """
    check_inside(place)
    return bundle.read_manifest(place)


def check_inside(place: Path) -> None:
    """Raise BundleError if links lead from ``models/NAME/VERSION`` out of the models folder.

    Where the models folder itself lies does not matter: orchestrators mount it by links.
    """
    models = os.path.realpath(place.parent.parent)
    if not Path(os.path.realpath(place)).is_relative_to(models):
        raise bundle.BundleError("its directory is a link that leads out of the models folder")
