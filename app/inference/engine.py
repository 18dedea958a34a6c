"""The two graphs of a bundle, loaded into onnxruntime."""

from collections.abc import Mapping

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from dropserve.app.bundles.loader import Bundle
from dropserve.app.errors import DeviceUnavailable
from dropserve.app.inference.examples import Examples, read_examples
from dropserve.app.inference.providers import Device, open_session
from dropserve.export.bundle import PREDICT, ROWS, STOCHASTIC, BundleError, Manifest

ERRORS_ONLY, FATAL = 3, 4


class Engine:
    """The two sessions of a bundle; each run takes ``threads`` CPUs.

    Runs that are under way end with an exception once ``options.terminate`` is set.

    Raises
    ------
    BundleError
        If a graph does not load or has other inputs than the manifest says, or an example does not
        fit them.
    DeviceUnavailable
        If the device's provider does not load.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        threads: int = 1,
        options: onnxruntime.RunOptions | None = None,
    ) -> None:
        self.options = options or run_options()
        self.manifest: Manifest = bundle.manifest
        self.examples: Examples = read_examples(bundle.examples, bundle.manifest)
        rows = {self.manifest.input.name: self.manifest.input.shape}
        masks = {site.mask_input: site.mask_shape for site in self.manifest.sites}
        outputs = self.manifest.width
        self.predict_session = open_graph(PREDICT, bundle.predict, device, threads, rows, outputs)
        self.stochastic_session = open_graph(
            STOCHASTIC, bundle.stochastic, device, threads, rows | {ROWS: ()} | masks, outputs
        )
        self.device = device
        self.provider: str = self.predict_session.get_providers()[0]

    def predict(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map ``x [B, *shape]`` to logits or values ``[B, width]`` in eval mode."""
        (output,) = self.predict_session.run(None, {self.manifest.input.name: x}, self.options)
        return np.asarray(output)

    def passes(
        self,
        x: NDArray[np.float32],
        rows: NDArray[np.int64],
        masks: Mapping[str, NDArray[np.bool_]],
    ) -> NDArray[np.float32]:
        """Run train-mode passes.

        Parameters
        ----------
        x
            ``[B, *shape]``.
        rows
            ``[N]``, the row of each pass.
        masks
            By mask input: ``[N, *mask_shape]``.

        Returns
        -------
        numpy.ndarray
            Logits or values ``[N, width]``.
        """
        feed = {self.manifest.input.name: x, ROWS: rows, **masks}
        (output,) = self.stochastic_session.run(None, feed, self.options)
        return np.asarray(output)


def run_options() -> onnxruntime.RunOptions:
    """Return options for the runs of an engine, by which they can be ended."""
    options = onnxruntime.RunOptions()
    # A failed run raises an exception; onnxruntime need not log it.
    options.log_severity_level = FATAL
    return options


def open_graph(
    file: str,
    graph: bytes,
    device: Device,
    threads: int,
    inputs: dict[str, tuple[int, ...]],
    outputs: int,
) -> onnxruntime.InferenceSession:
    """Load a graph from the given inputs (shapes without the first axis) to ``[., outputs]``."""
    options = onnxruntime.SessionOptions()
    # By default onnxruntime sizes its pools for the host, not for this process's share of it.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    try:
        session = open_session(graph, device, options)
    except DeviceUnavailable:
        raise
    # onnxruntime's exceptions share no base class but Exception.
    except Exception as error:
        raise BundleError(f"{file} does not load: {str(error).splitlines()[0]}") from error
    found = {value.name: tuple(value.shape[1:]) for value in session.get_inputs()}
    answers = [tuple(value.shape[1:]) for value in session.get_outputs()]
    if found != inputs or answers != [(outputs,)]:
        raise BundleError(
            f"{file} maps {found} to {answers}; its manifest says {inputs} to {[(outputs,)]}"
        )
    return session
