"""docs/deployment.md shows the committed figures."""

from benchmarks import deployment, figures
from tests.conftest import ROOT

DOCS = (ROOT / "docs" / "deployment.md").read_text()


def test_the_docs_size_by_the_committed_figures() -> None:
    assert "\n".join(figures.markdown(deployment.sizing())) in DOCS


def test_the_docs_show_the_committed_cost_of_each_step() -> None:
    assert "\n".join(figures.markdown(figures.read("deployment"))) in DOCS
