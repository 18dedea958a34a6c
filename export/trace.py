"""Trace a network into an ONNX graph in which a marker node stands at each dropout site.

Known dropout layers are ``CustomDropout`` and torch's own ``nn.Dropout``, ``nn.Dropout1d``,
``nn.Dropout2d`` and ``nn.Dropout3d``. Randomness that is no layer (a functional dropout, say)
leaves no trace here; ``export.verify`` finds it.
"""

import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError
from onnx_ir.passes import common as passes
from torch import Tensor, nn

from export.sites import DOMAIN, MARKER, ExportError, batch_dimension, marker_attributes
from model.dropout import CustomDropout, Scaling

INPUT = "x"
OUTPUT = "output"
BATCH = "batch"

UNIT_DROPOUTS = (nn.Dropout,)
CHANNEL_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# These do not multiply by a mask, so neither rewrite could stand for them.
REFUSED_DROPOUTS = (nn.AlphaDropout, nn.FeatureAlphaDropout)


class Marker(nn.Module):
    """Stands in for a dropout layer and leaves a marker node in the graph."""

    def __init__(self, name: str, layer: CustomDropout) -> None:
        super().__init__()
        self.attributes = marker_attributes(name, layer.p, layer.scaling, channels=layer.channels)

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
    model: nn.Module, substitute: Callable[[str, CustomDropout], nn.Module]
) -> nn.Module:
    """Return a copy of ``model`` with each dropout layer replaced by ``substitute(name, layer)``.

    Raises
    ------
    ExportError
        If a layer is a dropout that no mask can stand for.
    """
    model = copy.deepcopy(model)
    substitutes = {
        layer: substitute(name, known)
        for name, layer in model.named_modules()
        if (known := as_custom_dropout(name, layer)) is not None
    }
    if model in substitutes:
        return substitutes[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in substitutes:
                parent._modules[name] = substitutes[child]
    return model


def as_custom_dropout(name: str, layer: nn.Module) -> CustomDropout | None:
    """Return the ``CustomDropout`` that acts like ``layer``, or None if it is no dropout."""
    if isinstance(layer, CustomDropout):
        return layer
    if isinstance(layer, REFUSED_DROPOUTS):
        raise ExportError(f"{name}: {type(layer).__name__} does more than multiply by a mask")
    if isinstance(layer, (*UNIT_DROPOUTS, *CHANNEL_DROPOUTS)):
        if layer.p >= 1.0:
            raise ExportError(f"{name}: p must be a number in [0, 1), not {layer.p}")
        scaling: Scaling = "inverted"
        return CustomDropout(layer.p, scaling, channels=isinstance(layer, CHANNEL_DROPOUTS))
    return None


def trace(model: nn.Module, rows: Tensor) -> ir.Model:
    """Return the eval-mode graph of ``model`` with a marker at each dropout site.

    Parameters
    ----------
    model
        Maps ``[B, ...]`` to ``[B, C]``.
    rows
        At least two rows of input, ``[B, ...]``: torch takes an axis of length 1 as fixed.

    Raises
    ------
    ExportError
        If a dropout layer is of an unknown kind.
    """
    marked = swap_dropouts(model, Marker).eval()
    # The exporter logs the absence of torchvision and warns about its own deprecations.
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
    finally:
        exporter_log.setLevel(level)
    if program is None:
        raise ExportError("torch.onnx.export returned no program")
    traced: ir.Model = program.model
    # It holds torch's stack traces, with the paths of this machine.
    passes.ClearMetadataAndDocStringPass()(traced)
    return traced


def from_onnx(path: Path) -> ir.Model:
    """Read an ONNX file and put a marker in place of each Dropout node.

    ONNX Dropout scales while training, so its sites are ``inverted``.

    Raises
    ------
    ExportError
        If the file is no ONNX graph with a named batch axis, or a Dropout's ratio is no constant
        in [0, 1), or its mask is used.
    """
    try:
        proto = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
        model = ir.from_proto(proto)
    except (OSError, DecodeError, ValueError) as error:
        raise ExportError(f"{path}: not a readable ONNX file: {error}") from error
    batch_dimension(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for node in list(model.graph):
        if (node.domain, node.op_type) == ("", "Dropout"):
            mark_dropout(model.graph, node)
    model.graph.opset_imports[DOMAIN] = 1
    return model


def mark_dropout(graph: ir.Graph, node: ir.Node) -> None:
    """Replace one ONNX Dropout node by a marker."""
    name = node.name or node.outputs[0].name or "dropout"
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        raise ExportError(f"{name}: the mask of an ONNX Dropout is used, which no site can offer")
    ratio = node.inputs[1] if len(node.inputs) > 1 else None
    if ratio is None:
        p = 0.5
    elif ratio.const_value is None:
        raise ExportError(f"{name}: the ratio of an ONNX Dropout must be a constant")
    else:
        # Through text, so that a float32 ratio of 0.3 is read as 0.3.
        p = float(str(ratio.const_value.numpy().reshape(-1)[0]))
    if not 0.0 <= p < 1.0:
        raise ExportError(f"{name}: p must be a number in [0, 1), not {p}")
    old = node.outputs[0]
    marker = ir.node(
        MARKER,
        [node.inputs[0]],
        marker_attributes(name, p, "inverted", channels=False),
        domain=DOMAIN,
    )
    marker.outputs[0].shape, marker.outputs[0].type = old.shape, old.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], [marker], [old], marker.outputs)
