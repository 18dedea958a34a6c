"""What an answer says of its own doubt, a number a row, and what that number is good for.

``probabilities [T, B, C]`` are those of T passes, ``samples [T, B, C]`` their values; eval mode is
one pass. The greater a number, the less sure the answer.

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

    - ``max_probability``: 1 - max m, the confidence's counterpart (Hendrycks and Gimpel 2017).
    - ``predictive_entropy``: H[m] (Gal 2016, eq. 3.20).
    - ``expected_entropy``: 1/T sum H[f_t], the data's part.
    - ``mutual_information``: H[m] - 1/T sum H[f_t], the model's part (Houlsby et al. 2011, eq. 2).
    - ``variation_ratio``: the share of passes that name another class than the commonest (Gal 2016,
      eq. 3.19).

    A single pass has the first two only.
    """
    passes, _, classes = probabilities.shape
    mean = probabilities.mean(axis=0)
    predictive = entr(mean).sum(axis=1)
    found = {"max_probability": 1.0 - mean.max(axis=1), "predictive_entropy": predictive}
    if passes == 1:
        return found
    # Rounding can put a mean of equal entropies a hair above the entropy of their mean.
    expected = np.minimum(entr(probabilities).sum(axis=2).mean(axis=0), predictive)
    named = probabilities.argmax(axis=2)[..., None] == np.arange(classes)  # [T, B, C]
    return found | {
        "expected_entropy": expected,
        "mutual_information": predictive - expected,
        "variation_ratio": 1.0 - named.mean(axis=0).max(axis=1),
    }


def of_values(samples: Floats, noise_std: Floats) -> dict[str, Floats]:
    """Return the uncertainties ``[B]`` of values ``[T, B, C]`` in the target's unit.

    - ``epistemic_std``: s, the standard deviation of the passes (Gal and Ghahramani 2016, eq. 7).
    - ``total_std``: sqrt(s^2 + mean square of the noise), whose standard deviation ``noise_std`` is
      ``[C]`` or ``[T, B, C]`` (Kendall and Gal 2017, eq. 9).

    Of several targets it is the root of the mean square. Of a single pass there is only the
    second, and a noise that is the same for all rows tells no row from another.
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
    """Return the mean loss ``[B]`` of the 1, 2, ..., B rows of least ``uncertainty [B]``.

    Geifman and El-Yaniv (2017): the risk at the coverages 1/B, 2/B, ..., 1. Rows that are equally
    uncertain come in any order: each counts with the mean loss of them all, which is what a random
    order expects. The mean of the result is the area under the curve, AURC (Geifman et al. 2019).
    """
    levels, level = np.unique(uncertainty, return_inverse=True)
    rows = np.bincount(level, minlength=len(levels))
    of_level = np.bincount(level, loss, len(levels)) / rows
    risk: Floats = np.cumsum(np.repeat(of_level, rows)) / np.arange(1, len(loss) + 1)
    return risk


def auroc(clean: Floats, shifted: Floats) -> float:
    """Return how well an uncertainty tells shifted rows from clean ones.

    The area under the ROC curve: the chance that a shifted row is more uncertain than a clean one,
    ties counted half (Hendrycks and Gimpel 2017). 0.5 tells nothing.
    """
    labels = np.repeat([0, 1], [len(clean), len(shifted)])
    return float(roc_auc_score(labels, np.concatenate([clean, shifted])))
