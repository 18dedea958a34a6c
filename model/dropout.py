"""The dropout layer, its three scalings, and the random numbers behind its masks.

With a mask ``m`` that keeps a unit with probability ``1 - p``:

    scaling      train mode          eval mode     E[train] = eval?
    double       x * m / (1 - p)     x * (1 - p)   no: scaled twice
    classic      x * m               x * (1 - p)   yes
    inverted     x * m / (1 - p)     x             yes

``double`` is the code of the article that this project started from. Dividing by ``1 - p`` in train
mode already keeps the expectation at ``x``; multiplying by ``1 - p`` in eval mode then breaks it,
once per layer. Accuracy hardly changes, so the error goes unnoticed, but probabilities and
regression values are wrong. The article's prose describes ``classic``.

References
----------
Srivastava et al. (2014), Dropout: A Simple Way to Prevent Neural Networks from Overfitting.
Gal and Ghahramani (2016), Dropout as a Bayesian Approximation.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

Scaling = Literal["double", "classic", "inverted"]
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)
# Draws numbers of a shape, uniform on [0, 1), from torch's global generator of a device.
Uniform = Callable[[tuple[int, ...], torch.device], Tensor]


class CustomDropout(nn.Module):
    """Drop units in train mode; scale units as ``scaling`` says.

    Parameters
    ----------
    p
        Probability of dropping a unit, in [0, 1). With 0 the layer is the identity in every mode.
    scaling
        ``"double"`` (the article's code), ``"classic"`` or ``"inverted"``; see the module.
    channels
        Drop whole channels instead of single units, for use behind a convolution.

    Raises
    ------
    ValueError
        If ``p`` is not a number in [0, 1), or ``scaling`` is unknown.

    Shape
    -----
    Input and output ``[B, ...]``; with ``channels``, ``[B, H, ...]`` with at least one axis behind
    the H channels.

    Examples
    --------
    >>> layer = CustomDropout(p=0.5)
    >>> sorted(set(layer(torch.ones(5, 5)).flatten().tolist()) | {0.0, 2.0})
    [0.0, 2.0]
    >>> layer.eval()(torch.ones(1, 2))
    tensor([[0.5000, 0.5000]])
    """

    def __init__(
        self, p: float = 0.5, scaling: Scaling = "double", *, channels: bool = False
    ) -> None:
        super().__init__()
        check_probability(p)
        if scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, not {scaling!r}")
        self.p = float(p)
        self.scaling: Scaling = scaling
        self.channels = channels
        self.train_factor, self.eval_factor = factors(self.p, scaling)
        self.uniform: Uniform = independent_uniforms

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x [B, ...]``."""
        if not self.training:
            return x * self.eval_factor
        return x * self.draw_mask(x) * self.train_factor

    def draw_mask(self, x: Tensor) -> Tensor:
        """Draw a mask of zeros and ones, broadcastable to ``x``, from torch's global generator."""
        shape = (len(x), *mask_shape(tuple(x.shape[1:]), self.channels))
        # Uniform numbers can be 0, so only >= (not >) keeps every unit at p = 0.
        return (self.uniform(shape, x.device) >= self.p).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the parameters that torch prints with a network."""
        return f"p={self.p}, scaling={self.scaling!r}, channels={self.channels}"


def check_probability(p: float) -> None:
    """Raise ValueError unless ``p`` is a number in [0, 1)."""
    # A caller without a type checker may pass anything. NaN fails the comparison.
    value: object = p
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0.0 <= p < 1.0:
        raise ValueError(f"p must be a number in [0, 1), not {p!r}")


def factors(p: float, scaling: Scaling) -> tuple[float, float]:
    """Return the factor of kept units in train mode, and that of all units in eval mode."""
    keep = 1.0 - p
    return {"double": (1.0 / keep, keep), "classic": (1.0, keep), "inverted": (1.0 / keep, 1.0)}[
        scaling
    ]


def mask_shape(unit_shape: tuple[int, ...], channels: bool) -> tuple[int, ...]:
    """Return the shape of one pass's mask for an input of ``unit_shape`` (no batch axis).

    Raises
    ------
    ValueError
        If ``channels`` is set and no axis follows the channel axis.
    """
    if not channels:
        return unit_shape
    if len(unit_shape) < 2:
        raise ValueError(f"channel dropout needs [H, ...] behind the batch axis, not {unit_shape}")
    return (unit_shape[0], *(1,) * (len(unit_shape) - 1))


def double_scaling_warning(module: nn.Module) -> str | None:
    """Return a one-line warning of what ``double`` costs ``module``; None if no site uses it."""
    keeps = [
        1.0 - site.p
        for site in module.modules()
        if isinstance(site, CustomDropout) and site.scaling == "double" and site.p > 0.0
    ]
    if not keeps:
        return None
    return (
        f"scaling 'double' scales twice: in eval mode a dropout site passes on as little as "
        f"{min(keeps):g} of what it did in training ({math.prod(keeps):g} over all {len(keeps)}), "
        "so probabilities and values are off though accuracy hardly moves; "
        "'classic' and 'inverted' have no such gap"
    )


def independent_uniforms(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Draw independent uniform numbers, as ordinary dropout does."""
    return torch.rand(shape, device=device, dtype=torch.float32)


def latin_hypercube(passes: int) -> Uniform:
    """Return a function that draws the uniforms of T = ``passes`` passes as a Latin hypercube.

    Its shapes are ``[T * B, ...]``, all rows of a pass together. The T numbers of each unit of each
    row and site are ``u_t = (pi(t) + v) / T`` with a random permutation pi and a uniform v. Every
    u_t alone is uniform, so a single pass is an ordinary one; but one of the T numbers falls into
    each of T equal parts of [0, 1), so a unit is dropped p T times, rounded up or down at random.
    Different units are independent. One v serves all t, since only the number in the part that
    contains p can fall on either side of p.

    The hypercube spans all T passes. The service's stratified masks (``app.uncertainty.masks``)
    repeat a short one in independent replicates instead, which give a standard error.

    References
    ----------
    McKay, Beckman and Conover (1979), A Comparison of Three Methods for Selecting Values of Input
    Variables in the Analysis of Output from a Computer Code.
    """

    def uniform(shape: tuple[int, ...], device: torch.device) -> Tensor:
        units = math.prod(shape) // passes  # of all rows
        # The order of random numbers is a random permutation. numpy sorts ten times faster.
        order = np.argsort(torch.rand(units, passes).numpy(), axis=1)
        # float64, since float32 would round numbers just below (k + 1) / T up into the next part.
        within = torch.rand(units, 1, dtype=torch.float64).numpy()
        drawn = torch.from_numpy((order + within) / passes)  # [units, T]
        return drawn.T.reshape(shape).to(device)

    return uniform


@contextmanager
def only_sites_in_train_mode(
    model: nn.Module, uniform: Uniform = independent_uniforms
) -> Iterator[None]:
    """Put the dropout layers of ``model`` in train mode and all other modules in eval mode.

    This is the mode of a Monte Carlo pass: batch norm must keep its learned statistics. Within the
    context the layers draw their numbers by ``uniform``; afterwards all modules are as before.
    """
    was_training = {module: module.training for module in model.modules()}
    sites = [module for module in model.modules() if isinstance(module, CustomDropout)]
    drew_by = [site.uniform for site in sites]
    model.eval()
    for site in sites:
        site.train()
        site.uniform = uniform
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training
        for site, before in zip(sites, drew_by, strict=True):
            site.uniform = before
