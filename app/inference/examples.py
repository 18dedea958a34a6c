"""The examples of a bundle: real rows with their true answers, to try the model on."""

from typing import NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from dropserve.app.errors import InputError
from dropserve.app.inference.rows import read_rows
from dropserve.export import bundle


class Examples(NamedTuple):
    """Rows, and the truth of each: a label or values, None where unknown."""

    inputs: NDArray[np.float32]  # [E, *shape]
    truths: list[object]


def read_examples(text: bytes, manifest: bundle.Manifest) -> Examples:
    """Read a bundle's examples.

    Raises
    ------
    BundleError
        If there are none, or they are not rows of the model's input.
    """
    try:
        examples = orjson.loads(text)
        inputs = [example["input"] for example in examples]
        truths = [example.get("truth") for example in examples]
    except (orjson.JSONDecodeError, TypeError, KeyError, AttributeError):
        raise bundle.BundleError(f"{bundle.EXAMPLES} is no list of inputs") from None
    if not inputs:
        raise bundle.BundleError(f"{bundle.EXAMPLES} is empty")
    try:
        rows = read_rows(inputs, manifest.input.shape)
    except InputError as error:
        raise bundle.BundleError(f"{bundle.EXAMPLES}: {error}") from None
    return Examples(rows, truths)
