"""Uncertainties, one number per row, and measures of how well they predict errors and shifts.

``probabilities [T, B, C]`` are those of T passes, ``samples [T, B, C]`` their values; eval mode is
one pass. A larger number means a less certain prediction.

References
----------
Gal (2016), Uncertainty in Deep Learning, section 3.3.
Kendall and Gal (2017), What Uncertainties Do We Need in Bayesian Deep Learning for Computer Vision?
Houlsby et al. (2011), Bayesian Active Learning for Classification and Preference Learning.
Geifman and El-Yaniv (2017), Selective Classification for Deep Neural Networks.
Geifman, Uziel and El-Yaniv (2019), Bias-Reduced Uncertainty Estimation for Deep Neural
Classifiers.
Hendrycks and Gimpel (2017), A Baseline for Detecting Misclassified and Out-of-Distribution Examples
in Neural Networks.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr
from sklearn.metrics import roc_auc_score

Floats = NDArray[np.float64]


def of_classes(probabilities: Floats) -> dict[str, Floats]:
    """Return the uncertainties ``[B]`` of class probabilities ``[T, B, C]``; entropies in nats.

    With m the mean over the passes f_t and H[p] = -sum p log p:

    - ``max_probability``: 1 - max m, one minus the confidence (Hendrycks and Gimpel 2017).
    - ``predictive_entropy``: H[m], total uncertainty (Gal 2016, eq. 3.20).
    - ``expected_entropy``: 1/T sum H[f_t], the aleatoric part.
    - ``mutual_information``: H[m] - 1/T sum H[f_t], the epistemic part (Houlsby et al. 2011,
      eq. 2).
    - ``variation_ratio``: share of passes that do not predict the most frequent class (Gal 2016,
      eq. 3.19).

    A single pass has the first two only.
    """
    passes, _, classes = probabilities.shape
    mean = probabilities.mean(axis=0)
    predictive = entr(mean).sum(axis=1)
    found = {"max_probability": 1.0 - mean.max(axis=1), "predictive_entropy": predictive}
    if passes == 1:
        return found
    # Rounding can put the mean of equal entropies slightly above the entropy of their mean.
    expected = np.minimum(entr(probabilities).sum(axis=2).mean(axis=0), predictive)
    votes = probabilities.argmax(axis=2)[..., None] == np.arange(classes)  # [T, B, C]
    return found | {
        "expected_entropy": expected,
        "mutual_information": predictive - expected,
        "variation_ratio": 1.0 - votes.mean(axis=0).max(axis=1),
    }


def of_values(samples: Floats, noise_std: Floats) -> dict[str, Floats]:
    """Return the uncertainties ``[B]`` of values ``[T, B, C]`` in the target's unit.

    - ``epistemic_std``: s, the standard deviation of the passes (Gal and Ghahramani 2016, eq. 7).
    - ``total_std``: sqrt(s^2 + mean of ``noise_std``^2), where ``noise_std``, ``[C]`` or
      ``[T, B, C]``, is that of the observation noise (Kendall and Gal 2017, eq. 9).

    For several targets each is the root mean square over them. A single pass has ``total_std``
    only, which a constant noise makes equal for all rows.
    """
    total = np.broadcast_to(np.square(noise_std), samples.shape).mean(axis=0)
    if len(samples) == 1:
        return {"total_std": np.sqrt(total.mean(axis=1))}
    epistemic = samples.var(axis=0, ddof=1)
    return {
        "epistemic_std": np.sqrt(epistemic.mean(axis=1)),
        "total_std": np.sqrt((epistemic + total).mean(axis=1)),
    }


def risk_coverage(loss: Floats, uncertainty: Floats) -> Floats:
    """Return the mean ``loss`` ``[B]`` of the 1, 2, ..., B rows with the least ``uncertainty [B]``.

    This is the risk at the coverages 1/B, 2/B, ..., 1 (Geifman and El-Yaniv 2017). Each of several
    equally uncertain rows counts with their mean loss, the expectation over a random order. The
    mean of the result is the area under the curve, AURC (Geifman et al. 2019).
    """
    levels, level = np.unique(uncertainty, return_inverse=True)
    rows = np.bincount(level, minlength=len(levels))
    of_level = np.bincount(level, loss, len(levels)) / rows
    risk: Floats = np.cumsum(np.repeat(of_level, rows)) / np.arange(1, len(loss) + 1)
    return risk


def auroc(clean: Floats, shifted: Floats) -> float:
    """Return the area under the ROC curve of an uncertainty as a detector of shifted rows.

    It is the probability that a shifted row is more uncertain than a clean one, ties counted half
    (Hendrycks and Gimpel 2017); 0.5 is chance. ``clean`` and ``shifted`` are uncertainties ``[B]``.
    """
    labels = np.repeat([0, 1], [len(clean), len(shifted)])
    return float(roc_auc_score(labels, np.concatenate([clean, shifted])))
