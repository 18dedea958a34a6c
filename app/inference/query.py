"""Queries, independent of the transport, with their defaults."""

import secrets
from dataclasses import dataclass

from dropserve.app.inference.rows import Inputs
from dropserve.app.uncertainty.masks import Kind

# Every seed is below this; a client may pass any such seed.
SEED_LIMIT = 2**63
# A drawn seed is an integer that JavaScript, too, reads without loss.
DRAWN_SEED_BITS = 53


@dataclass(frozen=True)
class PredictQuery:
    """Rows to predict in eval mode, by a model and a version of it (as in ``Query``)."""

    inputs: Inputs
    model: str | None = None
    version: int | None = None


@dataclass(frozen=True)
class MasksQuery:
    """The query whose masks are wanted, without its rows."""

    model: str
    version: int
    passes: int
    seed: int
    masks: Kind


@dataclass(frozen=True)
class Query:
    """A Monte Carlo query.

    Parameters
    ----------
    inputs
        The rows.
    model, version
        None: the only model; its newest version.
    passes
        Train-mode passes of each row; with a tolerance, their maximum.
    seed
        Seed of the masks, in [0, ``SEED_LIMIT``); None: one is drawn.
    interval
        Level of the interval.
    masks
        How masks are drawn.
    tolerance
        Largest standard error at which to stop drawing passes; None: all passes are drawn.
    coverage
        Probability that a conformal set or interval contains the truth; None: no such set.
    """

    inputs: Inputs
    model: str | None = None
    version: int | None = None
    passes: int = 100
    seed: int | None = None
    interval: float = 0.9
    masks: Kind = "independent"
    tolerance: float | None = None
    coverage: float | None = None


def draw_seed() -> int:
    """Return a random seed for a query without one."""
    return secrets.randbits(DRAWN_SEED_BITS)
