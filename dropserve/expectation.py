"""The expectation gap: how far the mean of train-mode passes lies from eval mode.

With scaling ``classic`` or ``inverted`` the two agree where the network behind the dropout sites is
linear; elsewhere, and with ``double``, they differ. ``export`` measures the gap before it publishes
a bundle, and the service reports it with its debug samples.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32] | NDArray[np.float64]

# Standard errors below this share of the output are rounding: another order of summation changes
# the mean by as much.
ROUNDING = 1e-5
# Smallest normal float32: keeps a zero out of denominators and logarithms.
TINY = float(np.finfo(np.float32).tiny)


def expectation_gap(mean: Floats, standard_error: Floats, deterministic: Floats) -> Floats:
    """Return ``(mean - deterministic) / max(standard_error, ROUNDING * |deterministic|, TINY)``.

    Its size is about 1 where the passes scatter around eval mode.

    Parameters
    ----------
    mean
        Mean over the passes of each row, ``[B, C]``.
    standard_error
        Standard error of that mean, ``[B, C]``. Where it is NaN (a single pass), so is the gap.
    deterministic
        Output of eval mode, ``[B, C]``, in the unit of ``mean``.

    Returns
    -------
    ndarray
        The gap ``[B, C]`` in standard errors, negative where eval mode lies above the mean.
    """
    floor = np.maximum(ROUNDING * np.abs(deterministic), TINY)
    gap: Floats = (mean - deterministic) / np.maximum(standard_error, floor)
    return gap
