"""Trace a network into an ONNX graph with a marker node at each dropout site.

Supported dropout layers are ``CustomDropout`` and torch's own ``nn.Dropout``, ``nn.Dropout1d``,
``nn.Dropout2d`` and ``nn.Dropout3d``. Randomness outside these layers, such as a functional
dropout, leaves no trace here; ``export.verify`` finds it.
"""

import copy
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError
from onnx_ir.passes import common as passes
from torch import Tensor, nn

from dropserve.export.sites import DOMAIN, MARKER, ExportError, batch_dimension, marker_attributes
from dropserve.model.dropout import CustomDropout

INPUT = "x"
OUTPUT = "output"
BATCH = "batch"

# Number of input axes that each layer needs to drop whole channels: with fewer, torch takes the
# batch axis for the channel axis. 0: any number.
TORCH_DROPOUTS: dict[type[nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d], int] = {
    nn.Dropout: 0,
    nn.Dropout1d: 3,
    nn.Dropout2d: 4,
    nn.Dropout3d: 5,
}
# These layers do not multiply by a mask, so neither rewrite can represent them.
REFUSED_DROPOUTS = (nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class KnownDropout:
    """A supported dropout layer, described by an equivalent ``CustomDropout``."""

    layer: CustomDropout
    axes: int  # number of input axes; 0: any
    inplace: bool


class Marker(nn.Module):
    """Replacement for a dropout layer that leaves a marker node in the graph."""

    def __init__(self, name: str, known: KnownDropout) -> None:
        super().__init__()
        self.p = known.layer.p
        self.attributes = marker_attributes(
            name, self.p, known.layer.scaling, channels=known.layer.channels, axes=known.axes
        )

    def forward(self, x: Tensor) -> Tensor:
        """Pass ``x`` through a symbolic operator of the same shape."""
        out: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{MARKER}",
            (x,),
            attrs=self.attributes,
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
        return out


def swap_dropouts(
    model: nn.Module, substitute: Callable[[str, KnownDropout], nn.Module]
) -> nn.Module:
    """Return a copy of ``model`` with each dropout layer replaced by ``substitute(name, known)``.

    Raises
    ------
    ExportError
        If a dropout layer is of an unsupported kind.
    """
    model = copy.deepcopy(model)
    substitutes = {
        layer: substitute(name, known)
        for name, layer in model.named_modules()
        if (known := known_dropout(name, layer)) is not None
    }
    if model in substitutes:
        return substitutes[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in substitutes:
                parent._modules[name] = substitutes[child]
    return model


def known_dropout(name: str, layer: nn.Module) -> KnownDropout | None:
    """Return the description of a dropout layer, or None for any other layer.

    A subclass may override how its base acts, so subclasses are refused.

    Raises
    ------
    ExportError
        If the layer is a dropout of an unsupported kind.
    """
    if type(layer) is CustomDropout:
        return KnownDropout(layer, axes=0, inplace=False)
    for kind, axes in TORCH_DROPOUTS.items():
        if type(layer) is kind:
            if layer.p >= 1.0:
                raise ExportError(f"{name}: p must be a number in [0, 1), not {layer.p}")
            alike = CustomDropout(layer.p, "inverted", channels=axes > 0)
            return KnownDropout(alike, axes, layer.inplace)
    if isinstance(layer, REFUSED_DROPOUTS):
        raise ExportError(f"{name}: {type(layer).__name__} does more than multiply by a mask")
    if isinstance(layer, (CustomDropout, *TORCH_DROPOUTS)):
        raise ExportError(
            f"{name}: {type(layer).__name__} is a subclass of a dropout layer and may act otherwise"
        )
    return None


def trace(model: nn.Module, rows: Tensor) -> ir.Model:
    """Return the eval-mode graph of ``model`` with a marker at each dropout site.

    Parameters
    ----------
    model
        Maps ``[B, ...]`` to ``[B, C]``.
    rows
        At least two rows of input, ``[B, ...]``: torch treats an axis of length 1 as fixed.

    Raises
    ------
    ExportError
        If a dropout layer is of an unsupported kind, or torch cannot trace the network.
    """
    marked = swap_dropouts(model, Marker).eval()
    # The exporter logs that torchvision is missing, and warns about its own deprecations.
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                marked,
                (rows,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim(BATCH)},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    # torch's exporter wraps failures in exceptions without a common base.
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).strip().partition("\n")[0]
        raise ExportError(f"torch cannot trace the network: {reason}") from error
    finally:
        exporter_log.setLevel(level)
    if program is None:
        raise ExportError("torch.onnx.export returned no program")
    traced: ir.Model = program.model
    # The metadata holds torch's stack traces, with paths of this machine.
    passes.ClearMetadataAndDocStringPass()(traced)
    return traced


def from_onnx(path: Path) -> ir.Model:
    """Read an ONNX file and replace each Dropout node with a marker.

    ONNX Dropout scales in training mode, so its sites are ``inverted``.

    Raises
    ------
    ExportError
        If the file is not an ONNX graph with one input, one output and a named batch axis; or if a
        Dropout lies in a branch or loop, its mask is used, or its ratio is no constant in [0, 1).
    """
    try:
        proto = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
        model = ir.from_proto(proto)
    except (OSError, DecodeError, ValueError) as error:
        raise ExportError(f"{path}: not a readable ONNX file: {error}") from error
    # Older exporters list weights among the graph's inputs.
    passes.RemoveInitializersFromInputsPass()(model)
    batch_dimension(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for node in list(model.graph.all_nodes()):
        if (node.domain, node.op_type) == ("", "Dropout"):
            if node.graph is not model.graph:
                raise ExportError(f"node {node.name}: a dropout site inside a branch or loop")
            mark_dropout(model.graph, node)
    model.graph.opset_imports[DOMAIN] = 1
    return model


def mark_dropout(graph: ir.Graph, node: ir.Node) -> None:
    """Replace one ONNX Dropout node with a marker."""
    name = node.name or node.outputs[0].name or "dropout"
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        raise ExportError(f"{name}: the mask of an ONNX Dropout is used, which no site can offer")
    ratio = node.inputs[1] if len(node.inputs) > 1 else None
    if "ratio" in node.attributes:  # before opset 12
        value: object = np.float32(node.attributes["ratio"].as_float())
    elif ratio is None:
        value = 0.5
    elif ratio.const_value is None:
        raise ExportError(f"{name}: the ratio of an ONNX Dropout must be a constant")
    else:
        value = ratio.const_value.numpy().reshape(-1)[0]
    # Via text, so that a float32 ratio of 0.3 becomes 0.3.
    p = float(str(value))
    if not 0.0 <= p < 1.0:
        raise ExportError(f"{name}: p must be a number in [0, 1), not {p}")
    old = node.outputs[0]
    marker = ir.node(
        MARKER,
        [node.inputs[0]],
        marker_attributes(name, p, "inverted", channels=False, axes=0),
        domain=DOMAIN,
    )
    marker.outputs[0].shape, marker.outputs[0].type = old.shape, old.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], [marker], [old], marker.outputs)
