"""The two graphs of a bundle, loaded into onnxruntime."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from dropserve.app.bundles.loader import Bundle
from dropserve.app.errors import StartError
from dropserve.app.inference.batcher import Paces
from dropserve.app.inference.examples import Examples, read_examples
from dropserve.app.inference.providers import FATAL, Device, open_session
from dropserve.export.bundle import (
    PREDICT,
    ROWS,
    STOCHASTIC,
    BundleError,
    Manifest,
    quoted,
    shortened,
)

# onnxruntime's names of the types that the service feeds and reads.
ROWS_TYPE, FLOATS, BOOLS = "tensor(int64)", "tensor(float)", "tensor(bool)"
# What stands before the reason in a message of onnxruntime: a code, and places in its source.
NOISE = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : |(?<!\S)/\S+\.(?:cc|h|cu|cuh):\d+ ")
# Characters of another library's message.
MAX_REASON = 500

Signature = dict[str, tuple[str, tuple[int, ...]]]


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn any failure of a block into a BundleError: ``what``, and the reason.

    For all that runs a bundle's graphs or depends on its sizes: onnxruntime's exceptions share no
    base class but Exception, and the memory that is needed may not be there.

    Raises
    ------
    BundleError
        In place of any exception but a StartError, which is no fault of the bundle.
    """
    try:
        yield
    except (BundleError, StartError):
        raise
    except Exception as error:
        raise BundleError(f"{what}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return the first line of an error, without places in the source of onnxruntime."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return shortened(NOISE.sub("", line), MAX_REASON)


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

    # How long runs take; see ``registry.load_engine``.
    paces: Paces

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
        # Of these a bundle may say anything; what is fed and read takes memory in any case.
        self.values_per_row = max(
            self.manifest.values_per_row, self.manifest.row_numbers, self.manifest.width
        )
        self.values_per_pass = max(
            self.manifest.values_per_pass, self.manifest.mask_numbers, self.manifest.width
        )
        inputs: Signature = {self.manifest.input.name: (FLOATS, self.manifest.input.shape)}
        masks: Signature = {s.mask_input: (BOOLS, s.mask_shape) for s in self.manifest.sites}
        width = self.manifest.width
        self.predict_session = open_graph(PREDICT, bundle.predict, device, threads, inputs, width)
        inputs |= {ROWS: (ROWS_TYPE, ())} | masks
        self.stochastic_session = open_graph(
            STOCHASTIC, bundle.stochastic, device, threads, inputs, width
        )
        self.device = device
        self.provider: str = self.predict_session.get_providers()[0]

    def predict(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map ``x [B, *shape]`` to logits or values ``[B, width]`` in eval mode."""
        feed = {self.manifest.input.name: x}
        (output,) = self.predict_session.run(None, feed, self.options)
        return checked(PREDICT, np.asarray(output), (len(x), self.manifest.width))

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
        return checked(STOCHASTIC, np.asarray(output), (len(rows), self.manifest.width))


def checked(file: str, output: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return the output of a run; raise BundleError for another shape than the graph declares."""
    # onnxruntime only logs this. Rows too few or too many would be answers to other requests.
    if output.shape != shape:
        raise BundleError(f"{file} returns {list(output.shape)} numbers in place of {list(shape)}")
    return output


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
    inputs: Signature,
    width: int,
) -> onnxruntime.InferenceSession:
    """Load a graph from the given inputs (shapes without the first axis) to ``[., width]``."""
    options = onnxruntime.SessionOptions()
    # By default onnxruntime sizes its pools for the host, not for this process's share of it.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # What fails is raised, too.
    options.log_severity_level = FATAL
    with refusing(f"{file} does not load"):
        session = open_session(graph, device, options)
        found, given = session.get_inputs(), session.get_outputs()
        names = [value.name for value in found]
        if set(names) != inputs.keys():
            raise BundleError(f"{file} has the inputs {names}; its manifest says {list(inputs)}")
        for value in found:
            check_value(f"{file}: input {quoted(value.name)}", value, *inputs[value.name])
        if len(given) != 1:
            raise BundleError(f"{file} has {len(given)} outputs; there must be one")
        check_value(f"{file}: its output", given[0], FLOATS, (width,))
    return session


def check_value(what: str, value: onnxruntime.NodeArg, dtype: str, shape: tuple[int, ...]) -> None:
    """Raise BundleError if an input or output has another type or shape, or a fixed first axis."""
    if value.type != dtype:
        raise BundleError(f"{what} is {quoted(value.type)}; it must be {dtype}")
    if tuple(value.shape[1:]) != shape:
        raise BundleError(f"{what} is of shape {value.shape[1:]}; its manifest says {list(shape)}")
    if not value.shape or isinstance(value.shape[0], int):
        raise BundleError(f"{what} is not for any number of rows or passes: {value.shape}")
