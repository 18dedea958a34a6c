"""Distribution shifts: rows unlike those that the network was trained on, made from held-out rows.

A network should be less certain of them. Most shifts keep the ranges or scales of the features, so
that no single value gives them away.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Rows = NDArray[np.float32]

DEGREES = 45
STRETCH = 3


def shifted(x: Rows, seed: int = 0) -> dict[str, Rows]:
    """Return shifted copies of ``x [B, ...]`` by name.

    Images (rows with more than one axis):

    - ``rotated``: by 45 degrees, bilinear, corners filled with the smallest value.
    - ``noisy``: plus normal noise of the pixels' standard deviation, clipped to their range.
    - ``inverted``: low + high - x, which keeps the range.

    Tables:

    - ``noisy``: plus normal noise of each feature's standard deviation.
    - ``shuffled``: each feature permuted over the rows, which breaks only their relations.
    - ``stretched``: three times as far from the mean, outside the training data.
    """
    rng = np.random.default_rng(seed)
    exact = x.astype(np.float64)
    noise = rng.normal(size=x.shape)
    if x.ndim > 2:
        low, high = exact.min(), exact.max()
        found = {
            "rotated": ndimage.rotate(
                exact, DEGREES, axes=(-1, -2), reshape=False, order=1, cval=low
            ),
            "noisy": np.clip(exact + exact.std() * noise, low, high),
            "inverted": low + high - exact,
        }
    else:
        mean = exact.mean(axis=0)
        found = {
            "noisy": exact + exact.std(axis=0) * noise,
            "shuffled": rng.permuted(exact, axis=0),
            "stretched": mean + STRETCH * (exact - mean),
        }
    largest = np.finfo(np.float32).max
    return {name: np.clip(y, -largest, largest).astype(np.float32) for name, y in found.items()}
