"""Find the bundles in the models folder and read them, every file checked against its SHA-256."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.errors import StartError
from export import bundle

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read whole."""

    manifest: bundle.Manifest
    predict: bytes
    stochastic: bytes


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
        If it is damaged, changed or of a newer schema.
    """
    manifest = bundle.read(place)
    predict, stochastic, _ = (bundle.read_file(place, manifest, file) for file in bundle.FILES)
    return Bundle(manifest, predict, stochastic)
