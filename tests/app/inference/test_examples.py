"""Examples of a bundle: valid and refused ones."""

import json

import numpy as np
import pytest

from dropserve.app.inference.examples import read_examples
from dropserve.export.bundle import BundleError, Input, Manifest

SHAPE = (2, 3)
ROW = [[1, 2, 3], [4, 5, 6.5]]


def manifest() -> Manifest:
    """A manifest; only the shape of its input matters here."""
    rows = Input(name="x", shape=SHAPE, features=(), feature_ranges=(), range=(0, 7))
    return Manifest.model_construct(input=rows)


def test_rows_and_truths_are_read_as_written() -> None:
    text = json.dumps([{"input": ROW, "truth": "a"}, {"input": [1, 2, 3, 4, 5, 6.5]}]).encode()
    inputs, truths = read_examples(text, manifest())
    assert inputs.dtype == np.float32
    np.testing.assert_array_equal(inputs, [ROW, ROW])
    assert truths == ["a", None]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "examples.json is no list of inputs"),
        ("7", "examples.json is no list of inputs"),
        ("[7]", "examples.json is no list of inputs"),
        ("[[1]]", "examples.json is no list of inputs"),
        ('[{"truth": 1}]', "examples.json is no list of inputs"),
        ("{}", "examples.json is empty"),
        ("[]", "examples.json is empty"),
        (json.dumps([{"input": ROW}] * 101), "examples.json holds more than 100 examples"),
        ('[{"input": [1]}]', "examples.json: inputs.0: "),
        ('[{"input": [[1, 2, 3], [4, 5, "6"]]}]', "examples.json: inputs.0.1.2: "),
    ],
)
def test_anything_but_a_list_of_rows_is_refused(content: str, said: str) -> None:
    with pytest.raises(BundleError) as refused:
        read_examples(content.encode(), manifest())
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize("truth", [None, "a", 1, -2.5, [], [1, 2.5], ["a", None]])
def test_a_truth_is_null_a_text_a_number_or_a_list_of_these(truth: object) -> None:
    text = json.dumps([{"input": ROW, "truth": truth}]).encode()
    assert read_examples(text, manifest()).truths == [truth]


@pytest.mark.parametrize("truth", [True, [False], {}, {"a": 1}, [[1]], [{}]])
def test_any_other_truth_is_refused_by_its_place(truth: object) -> None:
    text = json.dumps([{"input": ROW}, {"input": ROW, "truth": truth}]).encode()
    with pytest.raises(BundleError, match=r"^examples\.json: truth 1 must be null, a text, a fin"):
        read_examples(text, manifest())
