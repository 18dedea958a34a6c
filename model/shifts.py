"""Rows that are not what the network was trained on, made from rows that are.

Whoever is asked about them should be less sure. Each shift keeps the features' ranges or scales, so
that no single number gives it away.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Rows = NDArray[np.float32]

DEGREES = 45
STRETCH = 3


def shifted(x: Rows, seed: int = 0) -> dict[str, Rows]:
    """Return shifted copies of ``x [B, ...]`` by name.

    Images (more than one axis a row):

    - ``rotated``: by 45 degrees, bilinear, the corners filled with the least value.
    - ``noisy``: plus normal noise of the pixels' standard deviation, cut off at their range.
    - ``inverted``: low + high - x, foreign: the same range, and no image that was trained on.

    Tables:

    - ``noisy``: plus normal noise of each feature's standard deviation.
    - ``shuffled``: each feature from a row of its own, foreign: all as usual but their relations.
    - ``stretched``: three times as far from the mean, outside of what was trained on.
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
