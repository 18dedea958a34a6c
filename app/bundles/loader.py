"""Find the bundles in the models folder and read them.

Every file is checked against its SHA-256, and nothing outside the models folder is read: no link
leads out, and no graph refers to other files (``onnx_guard``).
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dropserve.app.bundles import onnx_guard
from dropserve.app.errors import StartError
from dropserve.export import bundle

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bundle:
    """The content of a bundle; ``examples`` is JSON."""

    manifest: bundle.Manifest
    predict: bytes
    stochastic: bytes
    examples: bytes


def bundle_folders(models: Path) -> Iterator[Path]:
    """Iterate over the folders ``models/NAME/VERSION``, by name and version.

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
    """Tell whether an entry of the models folder can hold a model."""
    try:
        bundle.check_name(entry.name)
    except bundle.BundleError:
        return False
    return entry.is_dir()


def read_bundle(place: Path) -> Bundle:
    """Read the bundle at ``place``.

    Raises
    ------
    BundleError
        If it is damaged, changed or of a newer schema, or reaches outside itself.
    """
    manifest = read_manifest(place)
    predict, stochastic, examples = (
        bundle.read_file(place, manifest, file) for file in bundle.FILES
    )
    onnx_guard.check(bundle.PREDICT, predict)
    onnx_guard.check(bundle.STOCHASTIC, stochastic)
    return Bundle(manifest, predict, stochastic, examples)


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

    The models folder itself may be reached by links: orchestrators mount it that way.
    """
    models = os.path.realpath(place.parent.parent)
    if not Path(os.path.realpath(place)).is_relative_to(models):
        raise bundle.BundleError("its directory is a link that leads out of the models folder")
