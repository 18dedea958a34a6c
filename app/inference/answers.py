"""Answers: dictionaries of arrays, under the names that the HTTP interface has for them."""

from collections.abc import Sequence

import numpy as np

from dropserve.app.inference.batch import Prediction
from dropserve.app.inference.query import Query
from dropserve.app.uncertainty import conformal, summary
from dropserve.app.uncertainty.statistics import Samples, Spreads
from dropserve.app.uncertainty.summary import Summary
from dropserve.expectation import expectation_gap
from dropserve.export.bundle import Manifest

Answer = dict[str, object]


def identity(manifest: Manifest) -> Answer:
    """Return name and version of the model that answers."""
    return {"model": manifest.name, "version": manifest.version}


def uncertainty(manifest: Manifest, query: Query, seed: int, passes: int, found: Summary) -> Answer:
    """Answer with the statistics of the passes.

    Parameters
    ----------
    manifest
        The model's manifest.
    query
        The request.
    seed, passes
        Seed and number of the passes that were drawn.
    found
        Their summary.
    """
    moments, interval, parts = found
    answer = identity(manifest) | {"passes": passes, "seed": seed}
    if manifest.task == "classification":
        names = manifest.outputs.labels
        answer["labels"] = [names[place] for place in moments.mean.argmax(axis=1)]
    answer |= {
        "mean": moments.mean,
        "std": moments.std,
        # Unknown for a single pass.
        "standard_error": None if passes == 1 else moments.standard_error,
        "interval": {"level": query.interval, "lower": interval.lower, "upper": interval.upper},
        "converged": None
        if query.tolerance is None
        # As Python's floats: a tolerance may exceed float32. NaN, for one pass, is never within it.
        else float(moments.standard_error.max()) <= query.tolerance,
    }
    if isinstance(parts, Spreads):
        answer |= {
            "epistemic_std": parts.epistemic_std,
            "aleatoric_std": parts.aleatoric_std,
            "total_std": parts.total_std,
        }
    else:
        answer |= {
            "predictive_entropy": parts.predictive_entropy,
            "expected_entropy": parts.expected_entropy,
            "mutual_information": parts.mutual_information,
            "variation_ratio": parts.variation_ratio,
        }
    if query.coverage is not None:
        answer |= conformal.prediction_region(manifest, query.coverage, found)
    return answer


def passes(
    manifest: Manifest,
    samples: Samples,
    found: Summary,
    deterministic: Prediction,
    kept: Sequence[float],
) -> Answer:
    """Answer with the passes themselves.

    Parameters
    ----------
    manifest
        The model's manifest.
    samples
        ``[T, B, C]``, or ``[T, B, 2C]`` with a noise head.
    found
        Their summary.
    deterministic
        The same rows in eval mode.
    kept
        Share of units that the masks kept, for each site.
    """
    gap = None
    if len(samples) > 1:
        moments = found.moments
        gap = expectation_gap(moments.mean, moments.standard_error, deterministic.outputs)
    return {
        "samples": np.ascontiguousarray(summary.values(manifest, samples)),
        "deterministic": deterministic.outputs,
        "expectation_gap": gap,
        "sites": [
            {"name": site.name, "p": site.p, "scaling": site.scaling, "kept": share}
            for site, share in zip(manifest.sites, kept, strict=True)
        ],
    }
