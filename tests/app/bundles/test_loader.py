"""Bundles that were changed, damaged or swapped are refused while they are read."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dropserve.app.bundles import loader
from dropserve.export import bundle
from dropserve.export.bundle import BundleError
from tests.export.test_bundle import FILES, publish


def read_all(place: Path) -> None:
    """Read every file of a bundle as the service does."""
    with loader.opened(place) as folder:
        read = loader.manifest_in(folder, place)
        for file in bundle.FILES:
            loader.read_file(folder, read, file)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(0, 6), st.integers(0, 7), st.sampled_from(bundle.FILES))
def test_a_file_with_one_bit_changed_is_refused(byte: int, bit: int, file: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = publish(Path(folder))
        content = bytearray(FILES[file])
        byte %= len(content)
        content[byte] ^= 1 << bit
        (place / file).write_bytes(content)
        with pytest.raises(BundleError, match=f"^{file} has changed: its SHA-256 is "):
            read_all(place)


every_file = pytest.mark.parametrize("file", [bundle.MANIFEST, *bundle.FILES])


@every_file
def test_a_link_in_place_of_a_file_is_refused(tmp_path: Path, file: str) -> None:
    place = publish(tmp_path)
    outside = tmp_path / "outside"
    (place / file).rename(outside)
    (place / file).symlink_to(outside)
    with pytest.raises(BundleError, match=rf"^{file} is a link, not a file$"):
        read_all(place)


@every_file
def test_a_pipe_or_directory_in_place_of_a_file_is_refused_at_once(
    tmp_path: Path, file: str
) -> None:
    place = publish(tmp_path)
    (place / file).unlink()
    # Opening a named pipe would block until something writes to it.
    os.mkfifo(place / file)
    with pytest.raises(BundleError, match=rf"^{file} is not a regular file$"):
        read_all(place)
    (place / file).unlink()
    (place / file).mkdir()
    with pytest.raises(BundleError, match=rf"^{file} is not a regular file$"):
        read_all(place)


@every_file
def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, file: str) -> None:
    place = publish(tmp_path)
    limit = bundle.LIMITS[file]
    os.truncate(place / file, limit + 1)
    with pytest.raises(BundleError, match=rf"^{file} is larger than {limit} bytes$"):
        read_all(place)


def test_a_file_that_becomes_a_link_just_before_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = publish(tmp_path)
    outside = tmp_path / "outside"
    outside.write_bytes((place / bundle.PREDICT).read_bytes())
    really = os.open

    def swap(path: str | Path, flags: int, *, dir_fd: int | None = None) -> int:
        if path == bundle.PREDICT:
            (place / bundle.PREDICT).unlink()
            (place / bundle.PREDICT).symlink_to(outside)
        return really(path, flags, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(BundleError, match=r"^predict.onnx is a link, not a file$"):
        read_all(place)


@pytest.mark.parametrize("swapped", ["coins", "1"])
def test_a_directory_that_becomes_a_link_while_it_is_opened_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swapped: str
) -> None:
    place = publish(tmp_path / "models")
    publish(tmp_path / "outside")
    really = os.open

    def swap(path: str | Path, flags: int, *, dir_fd: int | None = None) -> int:
        if path == swapped:
            there = place if swapped == "1" else place.parent
            there.rename(tmp_path / "away")
            there.symlink_to(tmp_path / "outside" / there.relative_to(tmp_path / "models"))
        return really(path, flags, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(BundleError, match=r"^its directory cannot be read: Not a directory$"):
        read_all(place)


def test_a_directory_that_is_swapped_for_another_while_it_is_read_is_read_on(
    tmp_path: Path,
) -> None:
    place = publish(tmp_path / "models")
    publish(tmp_path / "outside")
    with loader.opened(place) as folder:
        read = loader.manifest_in(folder, place)
        place.rename(tmp_path / "away")
        place.symlink_to(tmp_path / "outside" / "coins" / "1")
        (tmp_path / "outside" / "coins" / "1" / bundle.PREDICT).unlink()
        assert loader.read_file(folder, read, bundle.PREDICT) == FILES[bundle.PREDICT]


def test_reading_leaves_no_descriptor_open(tmp_path: Path) -> None:
    place = publish(tmp_path)
    (place.parent / "2").symlink_to("/tmp")
    (place.parent / "3").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    read_all(place)
    for version in ("2", "3", "4"):
        with pytest.raises(BundleError):
            read_all(place.parent / version)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_link_that_cannot_be_followed_hides_no_other_model(tmp_path: Path) -> None:
    place = publish(tmp_path)
    for link in (tmp_path / "zloop", place.parent / "7"):
        link.symlink_to("x" * 300)  # longer than a name may be
    (tmp_path / "loop").symlink_to("loop")
    assert list(loader.bundle_folders(tmp_path)) == [place]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    place = publish(tmp_path)
    (place / bundle.STOCHASTIC).unlink()
    with pytest.raises(BundleError, match=r"^stochastic.onnx cannot be read: No such file"):
        read_all(place)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"schema_version": 2},
            r"^manifest.json is of schema 2; this version of dropserve reads 1",
        ),
        ({"name": "other"}, r"^manifest.json is of other version 1, which is not its place$"),
        ({"name": "../coins"}, r"^manifest.json: name: String should match pattern"),
        ({"name": "a/b"}, r"^manifest.json: name: String should match pattern"),
        ({"name": "coins\n"}, r"^manifest.json: name: String should match pattern"),
        ({"version": "../1"}, r"^manifest.json: version: Input should be a valid integer"),
        ({"version": 7}, r"^manifest.json is of coins version 7, which is not its place$"),
        ({"task": "poetry"}, r"^manifest.json: task: Input should be 'classification' or"),
        ({"task": "regression"}, r"noise_std must hold 2 values for a regression$"),
        ({"noise_std": [1.0]}, r"noise_std must hold 0 values for a classification$"),
        ({"surprise": 1}, r"^manifest.json: surprise: Extra inputs are not permitted$"),
        ({"files": {"../x": "0"}}, r"^manifest.json: files must be predict.onnx, stochastic.onnx"),
        (
            {"files": dict.fromkeys([*bundle.FILES, "../x"], "0")},
            r"^manifest.json: files must be predict.onnx, stochastic.onnx",
        ),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(
    tmp_path: Path, change: dict[str, object], says: str
) -> None:
    place = publish(tmp_path)
    path = place / bundle.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=says):
        loader.read_manifest(place)


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", "null", "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    place = publish(tmp_path)
    (place / bundle.MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=r"^manifest.json is no JSON object with a schema"):
        loader.read_manifest(place)
