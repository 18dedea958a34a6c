"""The steps of an export: load a checkpoint, trace, build both graphs, verify, score, publish."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from dropserve.export import (
    bundle,
    conformal,
    half_precision,
    predict_graph,
    stochastic_graph,
    trace,
    verify,
)
from dropserve.export.reference import TorchReference
from dropserve.export.sites import sites_of
from dropserve.model import checkpoint
from dropserve.model.dropout import double_scaling_warning

EXAMPLES = 10
PACKAGES = ("onnx", "onnx-ir", "onnxscript")


def export(run: Path, models: Path, name: str, *, half: bool = False) -> Path:
    """Export the checkpoint in ``run`` as the next version of ``models/NAME``.

    Prints what verification measured, and a warning if the network uses scaling ``double``.

    Parameters
    ----------
    run
        Directory of the checkpoint.
    models
        Folder of all models.
    name
        Name of the model.
    half
        Whether the graphs compute in float16.

    Returns
    -------
    Path
        Directory of the new bundle.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be read.
    ExportError
        If the network cannot be exported, or a graph fails verification.
    BundleError
        If the name is not allowed or the bundle cannot be written.
    """
    bundle.check_name(name)
    trained = checkpoint.load(run)
    x = trained.holdout.x
    if warning := double_scaling_warning(trained.model):
        print(f"warning: {warning}", file=sys.stderr)
    traced = trace.trace(trained.model, torch.from_numpy(x[:2]))
    sites = sites_of(traced)
    predict, not_folded = predict_graph.build(traced)
    stochastic = stochastic_graph.build(traced)
    if half:
        predict, stochastic = half_precision.build(predict), half_precision.build(stochastic)
    files = {
        bundle.PREDICT: serialize(predict),
        bundle.STOCHASTIC: serialize(stochastic),
        bundle.EXAMPLES: examples(trained),
    }
    with torch.no_grad():
        outputs = np.asarray(trained.model(torch.from_numpy(x)))
    measured = verify.verify(
        TorchReference(trained.model),
        sites,
        files[bundle.PREDICT],
        files[bundle.STOCHASTIC],
        x,
        outputs,
        half=half,
    )
    print(verify.summary(measured, sites))
    graph = verify.Graph(bundle.STOCHASTIC, files[bundle.STOCHASTIC])
    scores = conformal.scores(graph, sites, trained.holdout, trained.noise_std)

    def manifest(version: int, sums: dict[str, str]) -> bundle.Manifest:
        return bundle.Manifest(
            name=name,
            version=version,
            task=trained.holdout.task,
            input=bundle.Input(
                name=trace.INPUT,
                shape=trained.config.input_shape,
                features=trained.holdout.features,
                feature_ranges=trained.feature_ranges,
                range=trained.input_range,
            ),
            outputs=bundle.Outputs(name=trace.OUTPUT, labels=trained.holdout.outputs, units=None),
            values_per_row=predict_graph.values_per(predict, trace.BATCH),
            values_per_pass=predict_graph.values_per(stochastic, stochastic_graph.PASSES),
            preprocessing="standardisation, folded into both graphs: send raw features",
            precision="float16" if half else "float32",
            sites=tuple(
                bundle.DropoutSite(
                    name=site.name,
                    p=site.p,
                    scaling=site.scaling,
                    mask_input=stochastic_graph.mask_input(site.name),
                    mask_shape=site.mask_shape,
                    folded=site.name not in not_folded,
                )
                for site in sites
            ),
            noise=trained.config.noise,
            noise_std=trained.noise_std,
            provenance=bundle.Provenance(
                data=trained.holdout.name,
                seed=trained.seed,
                packages=trained.packages | package_versions(),
                metrics=trained.metrics,
                verification=measured,
                temperature=trained.temperature,
            ),
            files=sums,
            conformal_scores=scores,
        )

    return bundle.publish(models, name, files, manifest)


def package_versions() -> dict[str, str]:
    """Return the package versions that the export adds to those of the checkpoint."""
    # The distribution of onnxruntime has one name for the CPU and another with CUDA.
    return {name: version(name) for name in PACKAGES} | {"onnxruntime": onnxruntime.__version__}


def serialize(model: ir.Model) -> bytes:
    """Return a graph as the bytes of an ONNX file, weights included."""
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def examples(trained: checkpoint.Checkpoint) -> bytes:
    """Return a few held-out rows with their true labels or values, as JSON.

    For a classification, one row of each class comes first. Of large inputs there are fewer rows,
    so that the service reads them.
    """
    holdout = trained.holdout
    if holdout.task == "classification":
        _, firsts = np.unique(holdout.y, return_index=True)
        order = np.concatenate([firsts, np.setdiff1d(np.arange(len(holdout)), firsts)])
        truths: list[object] = [holdout.outputs[label] for label in holdout.y[order[:EXAMPLES]]]
    else:
        order = np.arange(len(holdout))
        truths = holdout.y[:EXAMPLES].tolist()
    inputs = holdout.x[order[:EXAMPLES]].tolist()
    rows = [{"input": row, "truth": truth} for row, truth in zip(inputs, truths, strict=True)]
    while len(text := json.dumps(rows).encode()) > bundle.LIMITS[bundle.EXAMPLES] and rows[1:]:
        rows.pop()
    return text
