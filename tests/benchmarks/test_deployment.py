"""What docs/deployment.md says of speed is what was measured last."""

from benchmarks import deployment, timing
from tests.conftest import ROOT

DOCS = (ROOT / "docs" / "deployment.md").read_text()


def test_the_docs_size_by_what_the_benchmarks_found_last() -> None:
    assert "\n".join(timing.markdown(deployment.sizing())) in DOCS


def test_the_docs_show_what_each_step_cost_when_it_was_last_measured() -> None:
    assert "\n".join(timing.markdown(deployment.read("deployment"))) in DOCS
