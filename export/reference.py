"""References for verification: the original network, run with masks given as inputs."""

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dropserve.export.sites import DOMAIN, ExportError, call_name
from dropserve.export.trace import KnownDropout, swap_dropouts
from dropserve.model.dropout import SCALINGS, factors

Floats = NDArray[np.float32]
Masks = dict[str, NDArray[np.bool_]]  # by site: [N, *mask_shape]


class VerificationError(ExportError):
    """A graph differs from the network; the message says which graph, where and by how much."""


class Reference(Protocol):
    """A network that the graphs are compared with."""

    def eval_mode(self, x: Floats, without_factor: str | None = None) -> Floats:
        """Run eval mode on ``x [B, ...]``, without the factor of one site if named: ``[B, C]``."""

    def train_mode(self, x: Floats, masks: Masks) -> Floats:
        """Run a pass of each row of ``x [N, ...]`` with the masks of N passes: ``[N, C]``."""

    def check_no_other_randomness(self, x: Floats, masks: Masks) -> None:
        """Raise VerificationError if two runs with the same masks differ."""


class Replay(nn.Module):
    """Replacement for a dropout layer that applies given masks."""

    def __init__(self, name: str, known: KnownDropout, reference: "TorchReference") -> None:
        super().__init__()
        self.name, self.known = name, known
        self.reference = reference

    def forward(self, x: Tensor) -> Tensor:
        """Apply the mask of this call, or in eval mode the factor."""
        reference, layer = self.reference, self.known.layer
        site = call_name(self.name, reference.calls[self.name])
        reference.calls[self.name] += 1
        if reference.masks is None:
            factor = 1.0 if site == reference.without_factor else layer.eval_factor
            return x * factor
        if site not in reference.masks:
            raise VerificationError(f"dropout site {site} has no part in the network's output")
        mask = torch.from_numpy(reference.masks[site]) * layer.train_factor
        # An in-place layer may change a tensor that is read again, which no graph can do. Do the
        # same here, so that verification shows the difference.
        return x.mul_(mask) if self.known.inplace else x * mask


class TorchReference:
    """A torch network as the reference."""

    def __init__(self, model: nn.Module) -> None:
        self.masks: Mapping[str, NDArray[np.bool_]] | None = None
        self.without_factor: str | None = None
        self.calls: Counter[str] = Counter()
        self.model = swap_dropouts(model, lambda name, known: Replay(name, known, self))

    @torch.no_grad()
    def eval_mode(self, x: Floats, without_factor: str | None = None) -> Floats:
        """Run eval mode; see ``Reference``."""
        self.model.eval()
        self.masks, self.without_factor = None, without_factor
        self.calls.clear()
        return np.asarray(self.model(torch.from_numpy(x)))

    @torch.no_grad()
    def train_mode(self, x: Floats, masks: Masks) -> Floats:
        """Run passes; see ``Reference``.

        Layers with running statistics stay in eval mode. All others are in train mode, so that
        randomness outside the sites shows.
        """
        self.model.train()
        for module in self.model.modules():
            if hasattr(module, "running_mean"):
                module.eval()
        self.masks = masks
        self.calls.clear()
        return np.asarray(self.model(torch.from_numpy(x)))

    def check_no_other_randomness(self, x: Floats, masks: Masks) -> None:
        """Raise VerificationError with the first module whose two runs with equal masks differ."""
        runs: list[list[tuple[str, list[Tensor], list[Tensor]]]] = []

        def record(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
            def hook(_: nn.Module, inputs: tuple[object, ...], outputs: object) -> None:
                title = name or type(module).__name__
                runs[-1].append((title, tensors(inputs), tensors(outputs)))

            return module.register_forward_hook(hook)

        handles = [record(name, module) for name, module in self.model.named_modules()]
        try:
            with torch.random.fork_rng(devices=[]):
                for seed in (0, 1):
                    torch.manual_seed(seed)
                    runs.append([])
                    self.train_mode(x, masks)
        finally:
            for handle in handles:
                handle.remove()
        first, second = runs
        # Hooks run when a module is done, so inner modules come first.
        for (name, inputs, outputs), (_, other_inputs, others) in zip(first, second, strict=True):
            if all(map(torch.equal, inputs, other_inputs)):
                for output, other in zip(outputs, others, strict=True):
                    if not torch.equal(output, other):
                        off = float((output - other).abs().max())
                        raise VerificationError(
                            f"module {name} has randomness that is no dropout site: two runs with "
                            f"the same masks differ by {off:.3g}; use dropout layers in place of "
                            "functions and of a module's own dropout argument"
                        )


def tensors(value: object) -> list[Tensor]:
    """Return copies of all tensors in the inputs or outputs of a module."""
    return [leaf.clone() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class OnnxReference:
    """An ONNX graph with markers as the reference, run in numpy by onnx's reference evaluator."""

    def __init__(self, source: ir.Model) -> None:
        self.masks: Mapping[str, NDArray[np.bool_]] | None = None
        self.without_factor: str | None = None
        self.calls: Counter[str] = Counter()
        reference = self

        class DropoutSite(OpRun):  # onnx finds it by its name, which must be the operator's
            """Implementation of the marker operator."""

            op_domain = DOMAIN

            def _run(
                self,
                x: Floats,
                name: str = "",
                p: str = "",
                scaling: int = 0,
                channels: int = 0,
                axes: int = 0,
            ) -> tuple[Floats]:
                train_factor, eval_factor = factors(float(p), SCALINGS[scaling])
                site = call_name(name, reference.calls[name])
                reference.calls[name] += 1
                if reference.masks is not None:
                    return ((x * reference.masks[site] * train_factor).astype(x.dtype),)
                factor = 1.0 if site == reference.without_factor else eval_factor
                return ((x * factor).astype(x.dtype),)

        self.evaluator = ReferenceEvaluator(ir.to_proto(source), new_ops=[DropoutSite])

    def eval_mode(self, x: Floats, without_factor: str | None = None) -> Floats:
        """Run eval mode; see ``Reference``."""
        self.masks, self.without_factor = None, without_factor
        return self.run(x)

    def train_mode(self, x: Floats, masks: Masks) -> Floats:
        """Run passes; see ``Reference``."""
        self.masks = masks
        return self.run(x)

    def run(self, x: Floats) -> Floats:
        """Return the graph's one output."""
        self.calls.clear()
        (output,) = self.evaluator.run(None, {self.evaluator.input_names[0]: x})
        return np.asarray(output)

    def check_no_other_randomness(self, x: Floats, masks: Masks) -> None:
        """Do nothing: ``verify`` finds random operators of an ONNX graph by name."""
