"""``python -m model``: files, tables, warnings, errors."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dropserve.model import checkpoint, training
from dropserve.model.__main__ import main
from dropserve.model.datasets import Split
from dropserve.model.networks import NetworkConfig
from dropserve.model.training import Trained, TrainingConfig
from tests.model.toys import tree, two_classes, two_targets

FILES = ["checkpoint.json", "holdout.npz", "plots.png", "weights.safetensors"]
SMALL = ["--hidden", "8", "--epochs", "2"]


@dataclass(frozen=True)
class Done:
    """The exit status and the output of a command."""

    status: object
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run the train command within this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)

    return partial(command, monkeypatch, capsys, "train")


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the evaluate command within this process."""
    return partial(command, monkeypatch, capsys, "evaluate")


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> Done:
    """Run a command within this process."""
    monkeypatch.setattr(sys, "argv", ["model", *arguments])
    try:
        status: object = main()
    except SystemExit as stop:
        status = stop.code
    return Done(status, *capsys.readouterr())


def write_csv(path: Path, target: str = "y", rows: int = 60) -> None:
    toy = two_classes(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([*toy.features, target])
        table.writerows(zip(*toy.x.T, [toy.outputs[y] for y in toy.y.tolist()], strict=True))


def write_values(path: Path, target: str) -> None:
    rows = "".join(f"{row},{row / 7}\n" for row in range(1, 41))
    path.write_text(f"a,{target}\n{rows}", encoding="utf-8")


def table(out: str) -> dict[str, tuple[float, float]]:
    """Parse both columns of the printed table of metrics."""
    assert re.search(r"^held out: \d+ rows +eval mode +100 passes$", out, re.MULTILINE)
    rows = re.findall(r"^(\w+) +(-?[\d.e-]+) +(-?[\d.e-]+)$", out, re.MULTILINE)
    return {name: (float(left), float(right)) for name, left, right in rows}


def refused(done: Done, status: int) -> str:
    """Return the one line of an error."""
    assert done.status == status, done.err
    assert done.err.endswith("\n")
    assert done.err.count("\n") == 1
    return done.err


def test_the_default_is_digits_with_classic_scaling(train: Command, tmp_path: Path) -> None:
    done = train("--out", "runs/digits", *SMALL)
    assert done.status == 0
    assert tree(tmp_path / "runs") == ["digits", *(f"digits/{name}" for name in FILES)]
    assert (tmp_path / "runs/digits/plots.png").read_bytes().startswith(b"\x89PNG")
    saved = checkpoint.load(tmp_path / "runs/digits")
    assert (saved.config.network, saved.config.scaling, saved.config.p) == ("mlp", "classic", 0.5)
    printed = table(done.out)
    assert list(printed) == ["accuracy", "nll", "brier", "ece"]
    for name, (left, right) in printed.items():
        assert left == pytest.approx(saved.metrics["eval"][name], rel=6e-4)
        assert right == pytest.approx(saved.metrics["mc"][name], rel=6e-4)
    assert saved.feature_ranges == ()
    assert saved.input_range == (0.0, 16.0)
    assert done.out.splitlines()[-1] == "wrote runs/digits"
    assert "warning" not in done.err


@pytest.mark.parametrize("network", ["mlp", "residual"])
def test_a_regression_reports_errors_in_target_units(
    train: Command, tmp_path: Path, network: str
) -> None:
    done = train("--data", "diabetes", "--out", "run", "--network", network, *SMALL)
    assert done.status == 0
    assert tree(tmp_path / "run") == FILES
    printed = table(done.out)
    assert list(printed) == ["rmse", "mae", "log_likelihood"]
    # Progression goes from 25 to 346 with a standard deviation of 77.
    assert 20 < printed["rmse"][0] < 120
    saved = checkpoint.load(tmp_path / "run")
    assert saved.noise_std is not None
    assert len(saved.feature_ranges) == 10
    low, high = saved.feature_ranges[0]
    assert 19 <= low < high <= 79


def test_a_csv_file_is_trained_on(train: Command, tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv")
    done = train("--data", "t.csv", "--target", "y", "--out", "run", "--seed", "3", *SMALL)
    assert done.status == 0
    assert tree(tmp_path / "run") == FILES
    assert "t: classification, 60 rows of shape [3], 2 outputs" in done.out
    assert list(table(done.out)) == ["accuracy", "nll", "brier", "ece"]
    saved = checkpoint.load(tmp_path / "run")
    assert (saved.holdout.outputs, saved.seed) == (("above", "below"), 3)


def test_an_npz_file_of_images_is_trained_on(train: Command, tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(40, 4, 4))
    np.savez(tmp_path / "i.npz", x=images, y=np.arange(40) % 2)
    done = train("--data", "i.npz", "--out", "run", "--network", "convnet", *SMALL)
    assert done.status == 0
    assert tree(tmp_path / "run") == FILES
    assert checkpoint.load(tmp_path / "run").config.input_shape == (4, 4)


def test_an_npz_file_of_two_targets_is_trained_on(train: Command, tmp_path: Path) -> None:
    toy = two_targets(40)
    np.savez(tmp_path / "v.npz", x=toy.x, y=toy.y)
    assert train("--data", "v.npz", "--out", "run", *SMALL).status == 0
    assert tree(tmp_path / "run") == FILES
    noise = checkpoint.load(tmp_path / "run").noise_std
    assert noise is not None
    assert len(noise) == 2


def test_the_same_seed_writes_the_same_weights_over_the_older_ones(
    train: Command, tmp_path: Path
) -> None:
    write_csv(tmp_path / "t.csv")
    weights = []
    for seed in ("7", "7", "8"):
        done = train("--data", "t.csv", "--target", "y", "--out", "run", "--seed", seed, *SMALL)
        assert done.status == 0
        weights.append((tmp_path / "run/weights.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert tree(tmp_path) == ["run", *(f"run/{name}" for name in FILES), "t.csv"]


def test_options_of_training_reach_it(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = training.train

    def watched(config: NetworkConfig, parts: Split, how: TrainingConfig, **more: bool) -> Trained:
        asked.append((config.input_p, how))
        return real(config, parts, how, **more)

    monkeypatch.setattr(training, "train", watched)
    write_csv(tmp_path / "t.csv")
    arguments = ["--data", "t.csv", "--target", "y", "--out", "run", *SMALL]
    train(*arguments)
    given = ["--learning-rate", "1e-2", "--weight-decay", "0", "--schedule", "constant"]
    train(*arguments, *given, "--input-p", "0.25", "--patience", "none")
    train(*arguments, "--patience", "7")
    assert asked == [
        (0.0, TrainingConfig(epochs=2)),
        (
            0.25,
            TrainingConfig(
                epochs=2, learning_rate=1e-2, weight_decay=0, schedule="constant", patience=None
            ),
        ),
        (0.0, TrainingConfig(epochs=2, patience=7)),
    ]


def test_double_scaling_is_warned_of_in_one_line(train: Command, tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv")
    arguments = ["--data", "t.csv", "--target", "y", "--out", "run", *SMALL]
    done = train(*arguments, "--scaling", "double")
    assert done.status == 0
    warnings = [line for line in done.err.splitlines() if "scal" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: scaling 'double' scales twice")
    for quiet in (["--scaling", "inverted"], ["--scaling", "double", "--p", "0"]):
        assert "warning" not in train(*arguments, *quiet).err


@pytest.mark.parametrize("target", ["cost_$_per_$", "$x^$", "50 %", "a\\b{", "_y_"])
def test_a_column_name_is_plain_text_to_the_plots(
    train: Command, tmp_path: Path, target: str
) -> None:
    write_values(tmp_path / "t.csv", target)
    done = train("--data", "t.csv", "--target", target, "--out", "run", *SMALL)
    assert done.status == 0, done.err
    assert tree(tmp_path / "run") == FILES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "foo"], "unknown data set 'foo'"),
        (["--data", "absent.csv", "--target", "y"], "no such file: absent.csv"),
        (["--data", "empty.csv", "--target", "y"], "empty.csv: empty"),
        (["--data", "broken.csv", "--target", "y"], "broken.csv: not a CSV file"),
        (["--data", "ragged.csv", "--target", "y"], "ragged.csv: row 2 has 1 cells"),
        (["--data", "missing.csv", "--target", "y"], "missing value in row 2, column 'a'"),
        (["--data", "good.csv"], "good.csv: --target COLUMN is needed, one of: a, b, c, y"),
        (["--data", "good.csv", "--target", "z"], "good.csv: no column 'z'"),
        (["--data", "one.csv", "--target", "y"], "one.csv: one class only"),
        (["--data", "good.npz"], "no array y"),
        (["--data", "broken.npz"], "not an NPZ file"),
        (["--data", "digits", "--task", "regression"], "digits is for classification"),
        (["--data", "diabetes", "--network", "convnet"], "convnet needs images"),
        (["--data", "diabetes", "--calibrate"], "this is a regression"),
        (["--data", "good.csv", "--target", "y", "--out", "file/run"], "cannot write to file/run"),
        (["--data", "good.csv", "--target", "y", "--out", "file"], "file is there already"),
        (["--data", "good.csv", "--target", "y", "--out", "folder"], "folder is there already"),
    ],
)
@pytest.mark.parametrize("out", ["run", "deep/er/run"])
def test_a_failed_training_prints_one_line_and_leaves_nothing(
    train: Command, tmp_path: Path, arguments: list[str], message: str, out: str
) -> None:
    write_csv(tmp_path / "good.csv")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "broken.csv").write_bytes(b"a,y\n\xff,1\n")
    (tmp_path / "ragged.csv").write_text("a,y\n1,2\n1\n")
    (tmp_path / "missing.csv").write_text("a,y\n1,2\n,2\n")
    (tmp_path / "one.csv").write_text("a,y\n" + "1,2\n" * 30)
    np.savez(tmp_path / "good.npz", x=np.zeros((30, 2)))
    (tmp_path / "broken.npz").write_bytes(b"PK")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").touch()
    before = tree(tmp_path)
    line = refused(train("--out", out, *SMALL, *arguments), 1)
    assert line.startswith("error: ")
    assert message in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("--p", value) for value in ("1", "-0.1", "nan", "inf", "half", "")],
        *[("--input-p", value) for value in ("1", "-0.1", "nan", "half")],
        *[("--scaling", value) for value in ("foo", "Classic")],
        *[("--network", value) for value in ("foo", "")],
        *[("--hidden", value) for value in ("0", "8,0", "8,,8", "-8", "8.5", "", "9" * 20)],
        *[("--epochs", value) for value in ("0", "-1", "1.5", "many", "9" * 20)],
        *[("--batch-size", value) for value in ("0", "1e3", "9" * 20)],
        *[("--learning-rate", value) for value in ("-1e-3", "nan", "inf", "fast")],
        *[("--weight-decay", value) for value in ("-1", "nan", "inf", "")],
        *[("--schedule", value) for value in ("linear", "")],
        *[("--patience", value) for value in ("0", "-1", "None", "2.5")],
        *[("--seed", value) for value in ("-1", "0.5", str(2**63))],
        *[("--task", value) for value in ("foo", "")],
        ("--foo", "1"),
    ],
)
def test_a_wrong_option_is_one_line_with_exit_status_2(
    train: Command, tmp_path: Path, option: str, value: str
) -> None:
    line = refused(train("--out", "run", *SMALL, f"{option}={value}"), 2)
    assert option in line
    assert tree(tmp_path) == []


def test_a_place_for_the_checkpoint_is_needed(train: Command) -> None:
    assert "--out" in refused(train(*SMALL), 2)


def test_calibration_is_printed_and_recorded(train: Command, tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv")
    arguments = ["--data", "t.csv", "--target", "y", "--out", "run", *SMALL]
    assert "temperature" not in train(*arguments).out
    assert checkpoint.load(tmp_path / "run").temperature is None
    done = train(*arguments, "--calibrate")
    temperature = checkpoint.load(tmp_path / "run").temperature
    assert temperature is not None
    assert f"temperature {temperature:.4g}, folded into the last layer" in done.out


def test_training_prints_every_method_and_each_shift(train: Command) -> None:
    images = np.random.default_rng(0).normal(size=(40, 4, 4))
    np.savez("i.npz", x=images, y=np.arange(40) % 2)
    out = train("--data", "i.npz", "--out", "run", *SMALL).out
    assert re.search(r"^100 hypercube +[\d.e-]+ \[[\d.e-]+, [\d.e-]+\] ", out, re.MULTILINE)
    assert re.search(r"^NLL of 100 passes - NLL of eval mode: ", out, re.MULTILINE)
    for shift in ("rotated", "noisy", "inverted"):
        assert re.search(rf"^{shift} +mutual_information +- +[\d.]+", out, re.MULTILINE)


@pytest.mark.parametrize("place", [None, "deep/er"])
def test_a_checkpoint_is_evaluated_as_it_was_when_it_was_trained(
    train: Command, evaluate: Command, tmp_path: Path, place: str | None
) -> None:
    write_csv(tmp_path / "t.csv")
    trained = train("--data", "t.csv", "--target", "y", "--out", "run", *SMALL)
    done = evaluate("run", *([] if place is None else ["--out", place]))
    assert done.status == 0, done.err
    folder = tmp_path / (place or "run")
    assert {"evaluation.json", "evaluation.png"} <= set(tree(folder))
    document = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert (document["data"], document["task"], document["rows"]) == ("t", "classification", 9)
    metrics = checkpoint.load(tmp_path / "run").metrics
    for method, mode in (("eval mode", "eval"), ("100 passes", "mc")):
        found = document["answers"][method]["metrics"]
        assert {name: e["value"] for name, e in found.items()} == pytest.approx(metrics[mode])
    # Both commands print the same tables.
    first, *tables, last = done.out.splitlines()
    assert "\n".join(tables) in trained.out
    assert first == "t: classification, 9 held-out rows"
    assert last.startswith("wrote ")
    # Training still replaces a checkpoint that holds an evaluation.
    assert train("--data", "t.csv", "--target", "y", "--out", "run", *SMALL).status == 0


def test_eval_mode_of_a_regression_keeps_its_own_noise(
    train: Command, evaluate: Command, tmp_path: Path
) -> None:
    write_values(tmp_path / "t.csv", "y")
    train("--data", "t.csv", "--target", "y", "--out", "run", *SMALL)
    evaluate("run")
    found = json.loads((tmp_path / "run/evaluation.json").read_text())["answers"]["eval mode"]
    saved = checkpoint.load(tmp_path / "run")
    expected = saved.metrics["eval"]["log_likelihood"]
    assert found["metrics"]["log_likelihood"]["value"] == pytest.approx(expected)
    assert saved.eval_noise_std != saved.noise_std


def test_a_failed_evaluation_prints_one_line(
    train: Command, evaluate: Command, tmp_path: Path
) -> None:
    assert "none holds no checkpoint" in refused(evaluate("none"), 1)
    assert "run" in refused(evaluate(), 2)
    write_csv(tmp_path / "t.csv")
    train("--data", "t.csv", "--target", "y", "--out", "run", *SMALL)
    (tmp_path / "file").touch()
    assert "file" in refused(evaluate("run", "--out", "file"), 1)


def test_the_command_runs_as_a_process(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv")
    command = [sys.executable, "-m", "model", "train", "--data", str(tmp_path / "t.csv"), *SMALL]
    arguments = ["--target", "y", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "run") == FILES
    assert list(table(done.stdout)) == ["accuracy", "nll", "brier", "ece"]
