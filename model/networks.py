"""The networks that the command line trains: mlp, convnet and residual.

A ``Model`` includes the preprocessing, so that the export includes it too and clients send raw
features.

References
----------
Nix and Weigend (1994), Estimating the Mean and Variance of the Target Probability Distribution.
Kendall and Gal (2017), What Uncertainties Do We Need in Bayesian Deep Learning for Computer Vision?
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dropserve.model.dropout import CustomDropout, Scaling

NetworkName = Literal["mlp", "convnet", "residual"]
NETWORKS: tuple[NetworkName, ...] = get_args(NetworkName)
Noise = Literal["constant", "input"]
NOISES: tuple[Noise, ...] = get_args(Noise)
# Limit of the logarithm of the noise's standard deviation, relative to that of the targets: a noise
# a thousand times larger or smaller than their spread is extrapolation.
LOG_STD_LIMIT = 7.0


@dataclass(frozen=True)
class NetworkConfig:
    """The complete description of a network, apart from its weights."""

    network: NetworkName
    input_shape: tuple[int, ...]  # without the batch axis
    outputs: int  # C: classes or targets
    hidden: tuple[int, ...]
    p: float
    scaling: Scaling
    input_p: float = 0.0  # dropout of the input features; 0: no site there
    noise: Noise = "constant"  # of a regression's targets; input: the network predicts it


class Model(nn.Module):
    """Standardize raw features, drop some of them with ``input_p``, then run the network.

    Shape
    -----
    Input ``[B, *input_shape]``, raw features. Output ``[B, C]``, logits, or values in the target's
    own units after ``fold_target_scale``. With noise ``input``, ``[B, 2C]``: the values, then the
    logarithms of their noise's standard deviations (Nix and Weigend 1994; Kendall and Gal 2017).
    """

    mean: Tensor
    std: Tensor
    log_scale: Tensor | None  # [C], of the noise's standard deviation

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        # All pixels of an image share one mean and one scale: a pixel that is nearly always blank
        # would otherwise turn a stray dot into a huge number.
        self.is_image = len(config.input_shape) > 1
        statistics = 1 if self.is_image else config.input_shape[0]
        self.register_buffer("mean", torch.zeros(statistics))
        self.register_buffer("std", torch.ones(statistics))
        # With input_p = 0 there is no site, and none in the bundle.
        self.input_dropout = (
            CustomDropout(config.input_p, config.scaling) if config.input_p else nn.Identity()
        )
        own_noise = config.noise == "input"
        self.register_buffer("log_scale", torch.zeros(config.outputs) if own_noise else None)
        width = 2 * config.outputs if own_noise else config.outputs
        self.network = build_network(replace(config, outputs=width))

    def learn_input_scale(self, x: Tensor) -> None:
        """Set the mean and standard deviation for standardization to those of ``x [B, ...]``."""
        columns = x.reshape(-1, 1) if self.is_image else x
        std = columns.std(0, correction=0)
        self.mean.copy_(columns.mean(0))
        # A constant column is only centered.
        self.std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    @torch.no_grad()
    def fold_target_scale(self, mean: Tensor, std: Tensor) -> None:
        """Make a network that was trained on ``(y - mean) / std`` output ``y``; ``[C]`` each."""
        output, targets = self.network.output, len(mean)
        output.weight[:targets].mul_(std[:, None])
        output.bias[:targets].mul_(std).add_(mean)
        if self.log_scale is not None:
            self.log_scale.add_(std.log())

    @torch.no_grad()
    def fold_temperature(self, temperature: float) -> None:
        """Divide the logits by ``temperature``."""
        output = self.network.output
        output.weight.div_(temperature)
        output.bias.div_(temperature)

    def forward(self, x: Tensor) -> Tensor:
        """Map raw features ``[B, *input_shape]`` to logits or values ``[B, C]``."""
        out: Tensor = self.network(self.input_dropout((x - self.mean) / self.std))
        if self.log_scale is None:
            return out
        values, log_std = out.chunk(2, dim=1)
        return torch.cat([values, log_std.clamp(-LOG_STD_LIMIT, LOG_STD_LIMIT) + self.log_scale], 1)


class Mlp(nn.Module):
    """Fully connected layers, with ReLU and dropout after each but the last."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        sizes = (math.prod(config.input_shape), *config.hidden)
        self.linears = nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:]))
        self.dropouts = nn.ModuleList(CustomDropout(config.p, config.scaling) for _ in self.linears)
        self.output = nn.Linear(sizes[-1], config.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, ...]`` to ``[B, C]``."""
        x = x.flatten(1)  # [B, D]
        for linear, dropout in zip(self.linears, self.dropouts, strict=True):
            x = dropout(torch.relu(linear(x)))  # [B, H]
        out: Tensor = self.output(x)
        return out


class ConvNet(nn.Module):
    """Two convolutions with batch norm and channel dropout, then an ``Mlp``."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        if len(config.input_shape) not in (2, 3) or min(config.input_shape[-2:]) < 2:
            raise ValueError(
                "network convnet needs images of at least 2x2, [height, width] or "
                f"[channels, height, width], not rows of shape {list(config.input_shape)}"
            )
        *channels, height, width = config.input_shape
        self.image_shape = (channels[0] if channels else 1, height, width)
        self.conv1 = nn.Conv2d(self.image_shape[0], 16, kernel_size=3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.dropout1 = CustomDropout(config.p, config.scaling, channels=True)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.norm2 = nn.BatchNorm2d(32)
        self.dropout2 = CustomDropout(config.p, config.scaling, channels=True)
        self.pool = nn.MaxPool2d(2)
        flat_shape = (32, height // 2, width // 2)
        self.classifier = Mlp(replace(config, input_shape=flat_shape))

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        return self.classifier.output

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, height, width]`` or ``[B, channels, height, width]`` to ``[B, C]``."""
        x = x.reshape(-1, *self.image_shape)
        x = self.dropout1(torch.relu(self.norm1(self.conv1(x))))  # [B, 16, h, w]
        x = self.dropout2(torch.relu(self.norm2(self.conv2(x))))  # [B, 32, h, w]
        out: Tensor = self.classifier(self.pool(x))
        return out


class ResidualBlock(nn.Module):
    """``skip(x) + dropout(linear(relu(x)))``: the skip path goes around the dropout site."""

    def __init__(self, inputs: int, outputs: int, p: float, scaling: Scaling) -> None:
        super().__init__()
        self.skip = nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs)
        self.linear = nn.Linear(inputs, outputs)
        self.dropout = CustomDropout(p, scaling)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, inputs]`` to ``[B, outputs]``."""
        out: Tensor = self.skip(x) + self.dropout(self.linear(torch.relu(x)))
        return out


class Residual(nn.Module):
    """A linear stem, one ``ResidualBlock`` per hidden width, and a linear output."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        sizes = (config.hidden[0], *config.hidden)
        self.stem = nn.Linear(math.prod(config.input_shape), sizes[0])
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(inputs, outputs, config.p, config.scaling)
                for inputs, outputs in pairwise(sizes)
            )
        )
        self.output = nn.Linear(sizes[-1], config.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, ...]`` to ``[B, C]``."""
        out: Tensor = self.output(torch.relu(self.blocks(self.stem(x.flatten(1)))))
        return out


def build_network(config: NetworkConfig) -> Mlp | ConvNet | Residual:
    """Build the network of ``config``, with new weights from torch's global generator.

    Raises
    ------
    ValueError
        If the network is ``convnet`` and the rows are not images.
    """
    networks: dict[NetworkName, type[Mlp | ConvNet | Residual]] = {
        "mlp": Mlp,
        "convnet": ConvNet,
        "residual": Residual,
    }
    return networks[config.network](config)
