"""``python -m export``: its output, and its errors."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dropserve.export.__main__ import main
from dropserve.export.bundle import EXAMPLES, LIMITS
from dropserve.export.pipeline import examples
from dropserve.model import checkpoint
from dropserve.model.training import TrainingConfig
from tests.bundles import train_and_export
from tests.conftest import run
from tests.model import toys


def fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """Run the command, which must fail; return its status and its one line of error."""
    monkeypatch.setattr("sys.argv", ["export", *arguments])
    try:
        status = main()
    except SystemExit as left:
        status = int(str(left.code))
    (line,) = capsys.readouterr().err.splitlines()
    return status, line


def test_the_command_runs_as_a_process(built: Path, tmp_path: Path) -> None:
    done = run("export", str(built / "runs" / "diabetes"), "--models", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"wrote {tmp_path / 'diabetes' / '1'}\n")
    again = json.loads((tmp_path / "diabetes" / "1" / "manifest.json").read_text())
    manifest = json.loads((built / "models" / "diabetes" / "1" / "manifest.json").read_text())
    assert again["files"].keys() == manifest["files"].keys()


def test_the_export_prints_what_verification_measured(built: Path) -> None:
    log = (built / "digits.log").read_text()
    assert "predict.onnx     equals eval mode within" in log
    assert ", 270 rows" in log
    assert "stochastic.onnx  equals train mode with the same masks within" in log
    assert "expectation gap" in log
    assert f"wrote {built / 'models' / 'digits' / '1'}" in log


def test_exporting_a_double_model_says_what_it_costs_and_prints_the_gap(built: Path) -> None:
    log = (built / "double.log").read_text()
    # Training warns once and the export once.
    assert log.count("warning: scaling 'double' scales twice") == 2
    (line,) = [line for line in log.splitlines() if line.startswith("expectation gap")]
    assert float(line.split()[2]) > 10
    assert "scaled down once more at each site" in line


def test_the_manifest_tells_where_the_bundle_comes_from(built: Path) -> None:
    place = built / "models" / "digits" / "1"
    manifest = json.loads((place / "manifest.json").read_text())
    checkpoint = json.loads((built / "runs" / "digits" / "checkpoint.json").read_text())
    assert manifest["provenance"]["metrics"] == checkpoint["metrics"]
    assert manifest["provenance"]["data"] == "digits"
    assert {"torch", "onnx", "onnxruntime"} <= set(manifest["provenance"]["packages"])
    assert manifest["provenance"]["verification"]["predict_rows"] == 270
    assert manifest["provenance"]["verification"]["predict_error"] < 1e-5
    assert [(s["p"], s["scaling"], s["mask_shape"]) for s in manifest["sites"]] == [
        (0.5, "classic", [256]),
        (0.5, "classic", [256]),
    ]


def test_the_manifest_records_the_temperature_of_calibration(built: Path, tmp_path: Path) -> None:
    def temperature(bundle: Path) -> object:
        return json.loads((bundle / "manifest.json").read_text())["provenance"]["temperature"]

    assert temperature(built / "models" / "digits" / "1") is None
    classes = toys.noisy_classes(200)
    how = TrainingConfig(epochs=3, calibrate=True)
    train_and_export(classes, toys.config(classes), how, tmp_path, "toy")
    saved = checkpoint.load(tmp_path / "runs" / "toy").temperature
    assert temperature(tmp_path / "models" / "toy" / "1") == saved
    assert saved not in (None, 1.0)


def test_the_examples_are_held_out_rows_one_of_each_class(built: Path) -> None:
    place = built / "models" / "digits" / "1"
    examples = json.loads((place / "examples.json").read_text())
    assert [example["truth"] for example in examples] == [str(digit) for digit in range(10)]
    assert all(len(e["input"]) == 8 and len(e["input"][0]) == 8 for e in examples)


def test_of_large_inputs_there_are_as_many_examples_as_the_service_reads(built: Path) -> None:
    trained = checkpoint.load(built / "runs" / "diabetes")
    # 150,528 numbers a row, as of a color image of 224 x 224, of 18 characters or so each.
    x = np.random.default_rng(0).random((10, 3, 224, 224), np.float32)
    trained = replace(trained, holdout=replace(trained.holdout, x=x, y=trained.holdout.y[:10]))
    text = examples(trained)
    assert 1 < len(json.loads(text)) < 10
    assert len(text) <= LIMITS[EXAMPLES]


def test_a_directory_without_a_checkpoint_is_one_line_and_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "models"
    status, line = fails(monkeypatch, capsys, str(tmp_path / "none"), "--models", str(models))
    assert (status, line) == (
        1,
        f"error: {tmp_path / 'none'} holds no checkpoint (no checkpoint.json)",
    )
    assert not models.exists()


def test_a_name_that_is_not_allowed_is_one_line_and_status_1(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, models = str(built / "runs" / "digits"), str(built / "models")
    status, line = fails(monkeypatch, capsys, run, "--models", models, "--name", "../up")
    assert status == 1
    assert line.startswith("error: a model's name must be letters, digits")


def test_a_models_folder_that_cannot_be_written_is_one_line_and_status_1(
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    status, line = fails(
        monkeypatch, capsys, str(built / "runs" / "diabetes"), "--models", str(tmp_path / "file")
    )
    assert status == 1
    assert line.endswith("file: it is no folder")


@pytest.mark.parametrize("arguments", [[], ["run"], ["run", "--models"], ["--nonsense"]])
def test_wrong_arguments_are_one_line_and_status_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, line = fails(monkeypatch, capsys, *arguments)
    assert status == 2
    assert line.startswith("python -m export: error: ")
