"""Bundles are written whole or not at all, and changed files are refused."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from dropserve.app.bundles import loader
from dropserve.export import bundle
from dropserve.export.bundle import BundleError

FILES = {bundle.PREDICT: b"predict", bundle.STOCHASTIC: b"stochastic", bundle.EXAMPLES: b"[]"}


def manifest(name: str, version: int, sums: dict[str, str]) -> bundle.Manifest:
    return bundle.Manifest(
        name=name,
        version=version,
        task="classification",
        input=bundle.Input(
            name="x", shape=(2,), features=("a", "b"), feature_ranges=((0, 1),) * 2, range=(0, 1)
        ),
        outputs=bundle.Outputs(name="output", labels=("no", "yes"), units=None),
        preprocessing="none",
        values_per_row=8,
        values_per_pass=8,
        sites=(
            bundle.DropoutSite(
                name="drop",
                p=0.5,
                scaling="classic",
                mask_input="mask.drop",
                mask_shape=(3,),
                folded=True,
            ),
        ),
        noise_std=None,
        provenance=bundle.Provenance(
            data="coins",
            seed=0,
            packages={"torch": "1"},
            metrics={"eval": {"accuracy": 1.0}},
            verification=bundle.Verification(
                predict_error=0,
                predict_rows=1,
                stochastic_error=0,
                stochastic_passes=1,
                expectation_gap=1,
                expectation_gap_largest=2,
                expectation_gap_passes=1000,
            ),
        ),
        files=sums,
    )


def publish(models: Path, name: str = "coins") -> Path:
    return bundle.publish(models, name, FILES, lambda version, sums: manifest(name, version, sums))


def test_a_published_bundle_reads_back_as_it_was_written(tmp_path: Path) -> None:
    place = publish(tmp_path / "new" / "models")
    assert place == tmp_path / "new" / "models" / "coins" / "1"
    sums = {file: hashlib.sha256(content).hexdigest() for file, content in FILES.items()}
    assert loader.read_manifest(place) == manifest("coins", 1, sums)
    assert {file: (place / file).read_bytes() for file in FILES} == FILES


def test_publishing_again_makes_the_next_version_and_leaves_the_first_alone(tmp_path: Path) -> None:
    first = publish(tmp_path)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.iterdir()}
    assert publish(tmp_path).name == "2"
    assert bundle.versions(tmp_path / "coins") == [1, 2]
    assert before == {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.iterdir()
    }


def test_a_version_that_somebody_else_publishes_meanwhile_is_left_alone(tmp_path: Path) -> None:
    def late(version: int, sums: dict[str, str]) -> bundle.Manifest:
        if version == 1:
            publish(tmp_path)
        return manifest("coins", version, sums)

    assert bundle.publish(tmp_path, "coins", FILES, late).name == "2"
    assert [loader.read_manifest(tmp_path / "coins" / v).version for v in ("1", "2")] == [1, 2]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(_: int, __: dict[str, str]) -> bundle.Manifest:
        raise KeyError

    with pytest.raises(KeyError):
        bundle.publish(tmp_path, "coins", FILES, fail)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from dropserve.export import bundle
files = {name: b"x" for name in bundle.FILES}
bundle.publish(Path(sys.argv[1]), "coins", files, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_an_export_that_is_killed_leaves_no_version(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert [entry.name[:15] for entry in tmp_path.iterdir() if entry.name != "coins"] == [
        ".staging-coins-"
    ]
    assert publish(tmp_path).name == "1"


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match=r"^cannot write to .*/file: it is no folder$"):
        publish(tmp_path / "file")


def test_files_that_the_service_would_not_read_are_not_published(tmp_path: Path) -> None:
    files = FILES | {bundle.EXAMPLES: bytes(bundle.LIMITS[bundle.EXAMPLES] + 1)}
    with pytest.raises(BundleError, match=r"^examples\.json would be larger than 8388608 bytes$"):
        bundle.publish(tmp_path, "coins", files, lambda *of: manifest("coins", *of))

    def no_labels(version: int, sums: dict[str, str]) -> bundle.Manifest:
        return bundle.Manifest.model_validate(
            manifest("coins", version, sums).model_dump()
            | {"outputs": {"name": "output", "labels": [], "units": None}}
        )

    with pytest.raises(BundleError, match=r"^manifest\.json: outputs\.labels: Tuple should have"):
        bundle.publish(tmp_path, "coins", FILES, no_labels)
    assert list(tmp_path.iterdir()) == []


def test_a_message_is_one_printable_line_of_bounded_length() -> None:
    said = str(BundleError("a\n\x1b[1mb\u202e" + "x" * 10**6))
    assert said.startswith(r"a\n\x1b[1mb\u202ex")
    assert len(said) == bundle.MAX_MESSAGE
    assert str(BundleError(said)) == said


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a b", ".hidden", "a" * 65, "é"])
def test_a_name_that_could_lead_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="a model's name must be letters, digits"):
        publish(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_the_suffix_of_uncertainty_models_is_reserved(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"must not end in '\.mc': 'coins\.mc'"):
        publish(tmp_path, "coins.mc")


def test_names_that_are_no_version_are_not_listed(tmp_path: Path) -> None:
    publish(tmp_path)
    for name in ("0", "01", "x", ".staging-x", "-1", "1.5"):
        (tmp_path / "coins" / name).mkdir()
    (tmp_path / "coins" / "3").touch()
    assert bundle.versions(tmp_path / "coins") == [1]
