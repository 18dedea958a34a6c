"""Find the bundles in the models folder and read them.

Every file is checked against its SHA-256, and nothing outside the models folder is read: no link
leads out, and no graph refers to other files (``onnx_guard``).
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from dropserve.app.bundles import onnx_guard
from dropserve.app.errors import StartError
from dropserve.export import bundle
from dropserve.files import FileRefused, read_regular

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
    # False, not an error, for a link that cannot be followed.
    return os.path.isdir(entry)


def read_bundle(place: Path) -> Bundle:
    """Read the bundle at ``place``.

    Raises
    ------
    BundleError
        If it is damaged, changed or of another schema, or reaches outside itself.
    """
    with opened(place) as folder:
        manifest = manifest_in(folder, place)
        predict, stochastic, examples = (read_file(folder, manifest, file) for file in bundle.FILES)
    onnx_guard.check(bundle.PREDICT, predict)
    onnx_guard.check(bundle.STOCHASTIC, stochastic)
    return Bundle(manifest, predict, stochastic, examples)


def read_manifest(place: Path) -> bundle.Manifest:
    """Read the manifest of the bundle at ``place``.

    Raises
    ------
    BundleError
        If it is damaged, of another schema, or outside the models folder.
    """
    with opened(place) as folder:
        return manifest_in(folder, place)


@contextmanager
def opened(place: Path) -> Iterator[int]:
    """Open a directory ``models/NAME/VERSION`` until the block ends; yield its descriptor.

    Links are followed within the models folder, and above it: orchestrators mount it that way. Then
    each directory from the models folder down is opened in the one above, and none may be a link
    any more, so nobody can lead out by swapping one now.

    Raises
    ------
    BundleError
        If links lead out of the models folder, or a directory cannot be opened.
    """
    models = os.path.realpath(place.parent.parent)
    found = Path(os.path.realpath(place))
    if not found.is_relative_to(models):
        raise bundle.BundleError("its directory is a link that leads out of the models folder")
    flags = os.O_RDONLY | os.O_DIRECTORY
    try:
        descriptor = os.open(models, flags)
        for name in found.relative_to(models).parts:
            try:
                inner = os.open(name, flags | os.O_NOFOLLOW, dir_fd=descriptor)
            finally:
                os.close(descriptor)
            descriptor = inner
    except OSError as error:
        raise bundle.BundleError(
            f"its directory cannot be read: {error.strerror or error}"
        ) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def manifest_in(folder: int, place: Path) -> bundle.Manifest:
    """Read the manifest of ``place``, a directory ``models/NAME/VERSION``.

    Parameters
    ----------
    place
        Its name and version must be the manifest's.
    folder
        Its descriptor; see ``opened``.

    Raises
    ------
    BundleError
        If it is missing, damaged, of another schema, or of another name or version.
    """
    text = read(folder, bundle.MANIFEST)
    try:
        schema = json.loads(text, object_pairs_hook=FieldCount())["schema_version"]
    except (ValueError, RecursionError, TypeError, KeyError):
        raise bundle.BundleError(
            f"{bundle.MANIFEST} is no JSON object with a schema_version"
        ) from None
    if schema != bundle.SCHEMA_VERSION:
        raise bundle.BundleError(
            f"{bundle.MANIFEST} is of schema {bundle.quoted(schema)}; "
            f"this version of dropserve reads {bundle.SCHEMA_VERSION}"
        )
    try:
        manifest = bundle.Manifest.model_validate_json(text)
    except ValidationError as error:
        raise bundle.BundleError(f"{bundle.MANIFEST}: {bundle.first_fault(error)}") from None
    if (manifest.name, str(manifest.version)) != (place.parent.name, place.name):
        version = bundle.quoted(manifest.version)
        raise bundle.BundleError(
            f"{bundle.MANIFEST} is of {manifest.name} version {version}, which is not its place"
        )
    if set(manifest.files) != set(bundle.FILES):
        raise bundle.BundleError(f"{bundle.MANIFEST}: files must be {', '.join(bundle.FILES)}")
    return manifest


class FieldCount:
    """Makes the objects of a JSON document, and raises BundleError beyond ``MAX_FIELDS``."""

    def __init__(self) -> None:
        self.fields = 0

    def __call__(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        """Return an object with these fields."""
        self.fields += len(pairs)
        if self.fields > bundle.MAX_FIELDS:
            raise bundle.BundleError(
                f"{bundle.MANIFEST} has more than {bundle.MAX_FIELDS} fields in all"
            )
        return dict(pairs)


def read_file(folder: int, manifest: bundle.Manifest, file: str) -> bytes:
    """Return the content of ``file``, one of ``FILES``, in an open directory.

    Raises
    ------
    BundleError
        If it cannot be read, or its SHA-256 is not the one in the manifest.
    """
    content = read(folder, file)
    measured = hashlib.sha256(content).hexdigest()
    if measured != manifest.files[file]:
        raise bundle.BundleError(
            f"{file} has changed: its SHA-256 is {measured[:12]}..., "
            f"the manifest says {manifest.files[file][:12]}..."
        )
    return content


def read(folder: int, file: str) -> bytes:
    """Return the content of a file in an open directory; raise BundleError if it is refused."""
    try:
        return read_regular(file, bundle.LIMITS[file], folder)
    except FileRefused as error:
        raise bundle.BundleError(f"{file} {error}") from None
