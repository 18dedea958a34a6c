"""The reproduction of the paper's table: its data, its metrics, its committed figures, the docs."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import figures, gal2016, uci
from dropserve.model import evaluation
from tests.conftest import ROOT

DATA = ROOT / uci.DATA_DIR
README = (ROOT / "benchmarks" / "README.md").read_text()
RESULTS, TRIALS = uci.read()

every_set = pytest.mark.parametrize("name", gal2016.PAPER)


@pytest.mark.uci
@every_set
def test_every_split_divides_the_rows_into_training_and_test_rows(name: str) -> None:
    data = gal2016.load(DATA / name)
    assert len(data.splits) == 20
    for train_rows, test_rows in data.splits:
        assert len(test_rows) == round(0.1 * len(data.rows))
        assert sorted([*train_rows, *test_rows]) == list(range(len(data.rows)))
    assert len({tuple(sorted(test_rows)) for _, test_rows in data.splits}) == 20


@pytest.mark.uci
def test_settings_are_tried_on_training_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    data = gal2016.load(DATA / "yacht")
    _, test_rows = data.splits[3]
    # Any training run or metric that read these targets would turn to NaN.
    data.rows.y[test_rows] = np.nan
    setting = uci.Setting((8, 8), 0.05, 0.0, 1, 1e-3)
    monkeypatch.setitem(uci.GRID, "yacht", (setting, setting))
    trials = uci.tune(data, 3)
    assert [(trial.split, trial.setting) for trial in trials] == [(3, setting)] * 2
    assert np.isfinite([(trial.rmse, trial.noise_std) for trial in trials]).all()


@pytest.mark.uci
def test_a_split_of_yacht_through_the_bundle_repeats_the_committed_figures() -> None:
    data = gal2016.load(DATA / "yacht")
    for part in (uci.ONE_LAYER, uci.TUNED):
        found = uci.measure(data, 0, part, [trial for trial in TRIALS if trial.data == "yacht"])
        (last,) = [r for r in RESULTS if (r.data, r.part, r.split) == ("yacht", part, 0)]
        # Processors round differently, and thousands of training steps amplify that.
        assert found.rmse == pytest.approx(last.rmse, rel=0.3)
        assert found.log_likelihood == pytest.approx(last.log_likelihood, abs=0.3)


def test_the_log_likelihood_is_that_of_the_mixture_of_passes() -> None:
    generator = np.random.default_rng(0)
    samples, y = generator.normal(size=(50, 7, 1)), generator.normal(size=(7, 1))
    tau = gal2016.PAPER["yacht"].tau
    found = evaluation.regression_metrics(samples, y, np.array([tau**-0.5]))
    densities = stats.norm.pdf(y, samples, tau**-0.5).mean(axis=0)
    assert found["log_likelihood"] == pytest.approx(np.log(densities).mean())
    assert found["rmse"] == pytest.approx(np.sqrt(((samples.mean(axis=0) - y) ** 2).mean()))


def test_figures_are_means_over_splits_with_their_standard_errors() -> None:
    results = [uci.Result("yacht", uci.TUNED, k, float(k), -float(k)) for k in range(4)]
    (rmse, log_likelihood) = uci.summary(results, "yacht", uci.TUNED)
    assert rmse == pytest.approx((1.5, stats.sem(range(4))))
    assert log_likelihood == pytest.approx((-1.5, stats.sem(range(4))))


def test_a_run_replaces_only_the_figures_it_repeats(tmp_path: Path) -> None:
    file = tmp_path / "uci.json"
    uci.write(file, RESULTS, TRIALS)
    assert file.read_bytes() == (figures.COMMITTED / "uci.json").read_bytes()
    anew = [uci.Result("yacht", uci.TUNED, 0, 1.0, -1.0)]
    uci.write(file, anew, [])
    results, trials = uci.parse(json.loads(file.read_text()))
    others = [r for r in RESULTS if (r.data, r.part) != ("yacht", uci.TUNED)]
    assert (results, trials) == (others + anew, TRIALS)


@every_set
def test_one_layer_is_as_good_as_in_the_paper_or_better(name: str) -> None:
    paper = gal2016.PAPER[name]
    rmse, log_likelihood = uci.summary(RESULTS, name, uci.ONE_LAYER)
    assert rmse.mean <= paper.rmse[0].mean + 2 * paper.rmse[0].standard_error
    theirs = paper.log_likelihood[0]
    assert log_likelihood.mean >= theirs.mean - 2 * theirs.standard_error


@every_set
def test_the_tuned_network_has_no_higher_error_than_the_papers_two_layers(name: str) -> None:
    rmse, _ = uci.summary(RESULTS, name, uci.TUNED)
    assert rmse.mean <= gal2016.PAPER[name].rmse[1].mean


@every_set
def test_every_split_is_recorded_once_and_tried_every_setting(name: str) -> None:
    for part in uci.PARTS:
        splits = [r.split for r in RESULTS if (r.data, r.part) == (name, part)]
        assert sorted(splits) == list(range(gal2016.SPLITS))
    tried = {(trial.split, trial.setting) for trial in TRIALS if trial.data == name}
    assert tried == {(k, setting) for k in range(gal2016.SPLITS) for setting in uci.GRID[name]}


def test_the_docs_show_the_committed_figures() -> None:
    assert "\n".join(uci.markdown(RESULTS)) in README
    assert "\n".join(figures.markdown(uci.choices(TRIALS))) in README


def test_without_the_data_it_exits_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["uci", "--data-dir", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"^error: no folder .*none: --data-dir says where"):
        uci.main()
