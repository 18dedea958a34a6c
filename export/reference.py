"""What the exported graphs are held against: a network that is run with masks that come in."""

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
    """A graph that does not do what the network does; the message says which, where, how far."""


class Reference(Protocol):
    """What the graphs are held against."""

    def eval_mode(self, x: Floats, without_factor: str | None = None) -> Floats:
        """Return eval mode's ``[B, C]``; optionally with one site's factor left out."""

    def train_mode(self, x: Floats, masks: Masks) -> Floats:
        """Return the passes' ``[N, C]``, for ``x [N, ...]`` and the masks of N passes."""

    def check_no_other_randomness(self, x: Floats, masks: Masks) -> None:
        """Raise VerificationError if two runs with the same masks differ."""


class Replay(nn.Module):
    """Stands in for a dropout layer and applies masks that were made elsewhere."""

    def __init__(self, name: str, known: KnownDropout, reference: "TorchReference") -> None:
        super().__init__()
        self.name, self.known = name, known
        # In a list, so that torch does not take the reference for a part of this module.
        self.reference = [reference]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the mask of this call, or the eval factor."""
        reference, layer = self.reference[0], self.known.layer
        site = call_name(self.name, reference.calls[self.name])
        reference.calls[self.name] += 1
        if reference.masks is None:
            factor = 1.0 if site == reference.without_factor else layer.eval_factor
            return x * factor
        if site not in reference.masks:
            raise VerificationError(f"dropout site {site} has no part in the network's output")
        mask = torch.from_numpy(reference.masks[site]) * layer.train_factor
        # The layer may change what others read, which a graph cannot: that must show.
        return x.mul_(mask) if self.known.inplace else x * mask


class TorchReference:
    """A torch network."""

    def __init__(self, model: nn.Module) -> None:
        self.masks: Mapping[str, NDArray[np.bool_]] | None = None
        self.without_factor: str | None = None
        self.calls: Counter[str] = Counter()
        self.model = swap_dropouts(model, lambda name, known: Replay(name, known, self))

    @torch.no_grad()
    def eval_mode(self, x: Floats, without_factor: str | None = None) -> Floats:
        """Run eval mode."""
        self.model.eval()
        self.masks, self.without_factor = None, without_factor
        self.calls.clear()
        return np.asarray(self.model(torch.from_numpy(x)))

    @torch.no_grad()
    def train_mode(self, x: Floats, masks: Masks) -> Floats:
        """Run passes in train mode.

        Layers with running statistics stay in eval mode; all else is in train mode, so that
        randomness that is no site shows.
        """
        self.model.train()
        for module in self.model.modules():
            if hasattr(module, "running_mean"):
                module.eval()
        self.masks = masks
        self.calls.clear()
        return np.asarray(self.model(torch.from_numpy(x)))

    def check_no_other_randomness(self, x: Floats, masks: Masks) -> None:
        """Name the module by which two runs with the same masks differ."""
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
        # Modules report when they are done, so inner ones come first.
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
    """Return copies of the tensors in what a module takes or gives."""
    return [leaf.clone() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class OnnxReference:
    """An ONNX graph with markers, run node by node in numpy by onnx's reference evaluator."""

    def __init__(self, source: ir.Model) -> None:
        self.masks: Mapping[str, NDArray[np.bool_]] | None = None
        self.without_factor: str | None = None
        self.calls: Counter[str] = Counter()
        reference = self

        class DropoutSite(OpRun):  # named as its operator, by which onnx finds it
            """The marker."""

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
        """Run eval mode."""
        self.masks, self.without_factor = None, without_factor
        return self.run(x)

    def train_mode(self, x: Floats, masks: Masks) -> Floats:
        """Run passes in train mode."""
        self.masks = masks
        return self.run(x)

    def run(self, x: Floats) -> Floats:
        """Return the graph's one output."""
        self.calls.clear()
        (output,) = self.evaluator.run(None, {self.evaluator.input_names[0]: x})
        return np.asarray(output)

    def check_no_other_randomness(self, x: Floats, masks: Masks) -> None:
        """Do nothing: a random operator of the graph is found by its name."""
