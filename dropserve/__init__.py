"""Train networks with dropout, export them to ONNX, and serve predictions with their uncertainty.

Three packages, whose folders are at the top of the repository and linked from here: ``model``
trains (torch), ``export`` turns a trained network into a bundle (torch, onnx), ``app`` serves
bundles (onnxruntime, no torch). docs/architecture.md describes them.

Array shapes use these letters throughout:

    B  rows of a request or of a data set       T  passes per row
    C  outputs (classes or targets)             N  row-passes: the sum of T over rows
    D  features, or the input's own axes        H  units of a layer
"""

import os

__version__ = "0.2.0"

# onnxruntime's official builds send telemetry unless this is set before they are loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
