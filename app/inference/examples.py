"""The examples of a bundle: real rows with their true answers, to try the model on."""

import math
from typing import NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from dropserve.app.errors import InputError
from dropserve.app.inference.rows import read_rows
from dropserve.export import bundle

Value = str | int | float | None
Truth = Value | list[Value]


class Examples(NamedTuple):
    """Rows, and the truth of each: a label or values, None where unknown."""

    inputs: NDArray[np.float32]  # [E, *shape]
    truths: list[Truth]


def read_examples(text: bytes, manifest: bundle.Manifest) -> Examples:
    """Read a bundle's examples.

    Raises
    ------
    BundleError
        If there are none or more than ``MAX_EXAMPLES``, if they are not rows of the model's input,
        or if a truth is anything but null, a text, a finite number or a flat list of these.
    """
    try:
        examples = orjson.loads(text)
        if len(examples) > bundle.MAX_EXAMPLES:
            raise bundle.BundleError(
                f"{bundle.EXAMPLES} holds more than {bundle.MAX_EXAMPLES} examples"
            )
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
    for number, truth in enumerate(truths):
        if not all(map(is_value, truth if isinstance(truth, list) else [truth])):
            raise bundle.BundleError(
                f"{bundle.EXAMPLES}: truth {number} must be null, a text, a finite number or a "
                "flat list of these"
            )
    return Examples(rows, truths)


def is_value(value: object) -> bool:
    """Tell whether a JSON value is null, a text or a finite number."""
    if isinstance(value, int | float):
        return not isinstance(value, bool) and math.isfinite(value)
    return value is None or isinstance(value, str)
