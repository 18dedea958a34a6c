"""Compare the two exported graphs with the network, value by value, on real rows.

The checks run in this order; the first failure raises ``VerificationError``:

1. The reference equals the network in eval mode, and a row alone gives the output that it gives in
   a batch. A network that mixes the rows of a batch would let concurrent requests change each
   other's responses.
2. Two train-mode runs with the same masks agree. If not, the network has randomness outside its
   dropout sites, which no exported graph could reproduce.
3. Neither graph holds a dropout or random operator.
4. ``predict.onnx`` equals eval mode on every row.
5. ``stochastic.onnx`` equals train mode with the same masks in every pass, for 1 row and for many;
   and a pass alone equals the same pass in a batch.
6. Two seeds disagree, if any site drops units.

The expectation gap (``dropserve.expectation``) is measured and reported, but fails no check.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from dropserve.expectation import TINY, expectation_gap
from dropserve.export.bundle import PREDICT, ROWS, STOCHASTIC, Verification
from dropserve.export.reference import Floats, Masks, Reference, VerificationError
from dropserve.export.sites import Site
from dropserve.export.stochastic_graph import mask_input

# Relative to the largest value of each output, so that each target counts in its own unit.
TOLERANCE = 1e-5
# For half precision, whose 11-bit rounding errors accumulate through a network. Relative to the
# largest distance from an output's mean: an offset common to all rows must not hide an error.
HALF_TOLERANCE = 1e-2
RANDOM_OPERATORS = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
SEED = 0
MANY_ROWS = 64
PASSES_OF_ONE_ROW = 100
PASSES_OF_MANY_ROWS = 4
ROWS_ALONE = 8
GAP_ROWS = 64
GAP_PASSES = 1000
# Bounds the memory of one run.
ROW_PASSES_AT_ONCE = 4096


class Graph:
    """An exported graph in its own onnxruntime session, with the tolerance for its errors."""

    tolerance = TOLERANCE
    # Errors are relative to the largest distance of an output from this point.
    centre: Floats | float = 0.0

    def __init__(self, name: str, content: bytes) -> None:
        self.name = name
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        # onnxruntime's exceptions share no narrower base class.
        except Exception as error:
            raise VerificationError(f"{name} does not load: {first_line(error)}") from error
        self.input: str = self.session.get_inputs()[0].name

    def run(self, feed: Mapping[str, NDArray[np.generic]]) -> Floats:
        """Return the graph's one output."""
        try:
            (output,) = self.session.run(None, dict(feed))
        except Exception as error:
            raise VerificationError(f"{self.name} does not run: {first_line(error)}") from error
        return np.asarray(output, dtype=np.float32)

    def error(self, measured: Floats, expected: Floats, scale: Floats) -> float:
        """Return the relative ``difference`` of ``[N, C]``, counted from the graph's centre."""
        return difference(measured, expected, scale, self.centre)

    def passes(self, x: Floats, rows: NDArray[np.int64], masks: Masks) -> Floats:
        """Run the train-mode graph on rows ``x [B, ...]``; return ``[N, C]``.

        Pass n runs on row ``rows[n]`` with the masks ``[n]`` of each site.
        """
        inputs = {mask_input(site): mask for site, mask in masks.items()}
        return self.run({self.input: x, ROWS: rows, **inputs})


class HalfGraph(Graph):
    """A graph in half precision, run node by node in numpy, which rounds after every node.

    onnxruntime's CPU provider computes float16 as float32 and would hide a GPU's rounding.
    """

    tolerance = HALF_TOLERANCE

    def __init__(self, name: str, content: bytes, centre: Floats) -> None:
        super().__init__(name, content)
        self.centre = centre
        self.evaluator = ReferenceEvaluator(onnx.load_from_string(content))

    def run(self, feed: Mapping[str, NDArray[np.generic]]) -> Floats:
        """Return the graph's one output."""
        # Overflow becomes infinity, which ``difference`` reports as an infinite error.
        with np.errstate(over="ignore", invalid="ignore"):
            (output,) = self.evaluator.run(None, dict(feed))
        return np.asarray(output, dtype=np.float32)


def first_line(error: Exception) -> str:
    """Return the first line of an onnxruntime exception."""
    return str(error).strip().splitlines()[0]


def verify(
    reference: Reference,
    sites: tuple[Site, ...],
    predict: bytes,
    stochastic: bytes,
    x: Floats,
    outputs: Floats,
    *,
    half: bool = False,
) -> Verification:
    """Run all checks of this module on two graphs.

    Parameters
    ----------
    reference
        The network with its masks as inputs.
    sites
        Its dropout sites.
    predict, stochastic
        The graphs as bytes of ONNX files.
    x
        Rows ``[B, ...]``.
    outputs
        The network's own outputs for them in eval mode, ``[B, C]``.
    half
        Whether the graphs are in half precision.

    Returns
    -------
    Verification
        The measured errors and the expectation gap.

    Raises
    ------
    VerificationError
        If a check fails.
    """
    check_reference(reference, x, outputs)
    some = x[:MANY_ROWS]
    masks = draw_masks(sites, len(some), np.random.default_rng(SEED))
    reference.check_no_other_randomness(some, masks)
    for name, content in ((PREDICT, predict), (STOCHASTIC, stochastic)):
        check_operators(name, content)
    centre = outputs.mean(axis=0) if half else np.zeros_like(outputs[0])
    scale = np.abs(outputs - centre).max(axis=0)

    def load(name: str, content: bytes) -> Graph:
        return HalfGraph(name, content, centre) if half else Graph(name, content)

    predict_error = check_predict(reference, sites, load(PREDICT, predict), x, scale)
    graph = load(STOCHASTIC, stochastic)
    stochastic_error = max(
        check_stochastic(reference, sites, graph, x[:rows], passes, scale)
        for rows, passes in ((1, PASSES_OF_ONE_ROW), (MANY_ROWS, PASSES_OF_MANY_ROWS))
    )
    check_passes_alone(sites, graph, x[:ROWS_ALONE], scale)
    check_seeds_disagree(sites, graph, x[:1])
    # The gap takes tens of thousands of passes, for which ``HalfGraph`` would need minutes.
    fast = Graph(STOCHASTIC, stochastic) if half else graph
    gap = measure_gap(reference, sites, fast, x[:GAP_ROWS])
    return Verification(
        predict_error=predict_error,
        predict_rows=len(x),
        stochastic_error=stochastic_error,
        stochastic_passes=PASSES_OF_ONE_ROW + PASSES_OF_MANY_ROWS * len(some),
        expectation_gap=float(np.sqrt((gap**2).mean())),
        expectation_gap_largest=float(np.abs(gap).max()),
        expectation_gap_passes=GAP_PASSES,
    )


def draw_masks(sites: tuple[Site, ...], passes: int, generator: np.random.Generator) -> Masks:
    """Draw independent masks for N = ``passes`` passes, ``[N, *mask_shape]`` for each site."""
    return {
        site.name: generator.random((passes, *site.mask_shape), dtype=np.float32) >= site.p
        for site in sites
    }


def difference(
    measured: Floats, expected: Floats, scale: Floats, centre: Floats | float = 0.0
) -> float:
    """Return the largest difference of ``[N, C]``, relative to the largest value of each output.

    Values count from ``centre``. ``scale [C]`` is a lower bound of these largest values, in case
    ``expected`` holds only small ones. NaN and wrong shapes give infinity.
    """
    if measured.shape != expected.shape:
        return float("inf")
    largest = np.maximum(scale, np.abs(expected - centre).max(axis=0))
    distance = np.abs(measured.astype(np.float64) - expected) / np.maximum(largest, TINY)
    return float(np.nan_to_num(distance, nan=np.inf).max())


def check_reference(reference: Reference, x: Floats, outputs: Floats) -> None:
    """Raise if the reference differs from the network, or a row alone from a row in a batch."""
    if outputs.ndim != 2:
        raise VerificationError(f"the network must return [B, C], not {list(outputs.shape)}")
    scale = np.abs(outputs).max(axis=0)
    error = difference(reference.eval_mode(x), outputs, scale)
    if error > TOLERANCE:
        raise VerificationError(
            f"with its dropout layers replaced, the network is off from itself by {error:.3g}: "
            "a dropout layer does not act as dropout"
        )
    alone = np.concatenate([reference.eval_mode(row[None]) for row in x[:ROWS_ALONE]])
    error = difference(alone, outputs[:ROWS_ALONE], scale)
    if error > TOLERANCE:
        raise VerificationError(
            f"the network mixes the rows of a batch: a row alone is off by {error:.3g}"
        )


def check_passes_alone(sites: tuple[Site, ...], graph: Graph, x: Floats, scale: Floats) -> None:
    """Raise if a pass depends on the other passes of its batch."""
    masks = draw_masks(sites, len(x), np.random.default_rng(SEED))
    together = graph.passes(x, np.arange(len(x)), masks)
    alone = np.concatenate(
        [
            graph.passes(
                x[n : n + 1],
                np.zeros(1, np.int64),
                {site: mask[n : n + 1] for site, mask in masks.items()},
            )
            for n in range(len(x))
        ]
    )
    error = graph.error(alone, together, scale)
    if error > graph.tolerance:
        raise VerificationError(
            f"the network mixes the rows of a batch: a pass alone is off by {error:.3g}"
        )


def check_operators(name: str, content: bytes) -> None:
    """Raise if a graph, or a subgraph or function of it, holds a dropout or random operator."""
    model = onnx.load_from_string(content)
    for node in nodes_of([*model.graph.node, *(n for f in model.functions for n in f.node)]):
        if node.op_type in RANDOM_OPERATORS:
            raise VerificationError(f"{name}: node {node.name} is a {node.op_type}")


def nodes_of(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """List nodes and the nodes of their branches and loops."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from nodes_of(graph.node)


def check_predict(
    reference: Reference, sites: tuple[Site, ...], graph: Graph, x: Floats, scale: Floats
) -> float:
    """Return the relative error of the eval-mode graph; raise if it is too large."""
    measured = graph.run({graph.input: x})
    error = graph.error(measured, reference.eval_mode(x), scale)
    if error > graph.tolerance:
        suspects = [
            site.name
            for site in sites
            if site.eval_factor != 1.0
            and graph.error(measured, reference.eval_mode(x, site.name), scale) <= graph.tolerance
        ]
        at = f"; the factor of site {suspects[0]} is left out" if suspects else ""
        raise VerificationError(
            f"{PREDICT} is off from eval mode by {error:.3g} (allowed: {graph.tolerance:g}){at}"
        )
    return error


def check_stochastic(
    reference: Reference,
    sites: tuple[Site, ...],
    graph: Graph,
    x: Floats,
    passes: int,
    scale: Floats,
) -> float:
    """Return the relative error of the train-mode graph; raise if it is too large.

    Runs ``passes`` passes of each row, in random order as in a batch of several requests.
    """
    generator = np.random.default_rng(SEED)
    rows = generator.permutation(np.repeat(np.arange(len(x)), passes))
    masks = draw_masks(sites, len(rows), generator)
    error = graph.error(graph.passes(x, rows, masks), reference.train_mode(x[rows], masks), scale)
    if error > graph.tolerance:
        raise VerificationError(
            f"{STOCHASTIC} is off from train mode with the same masks by {error:.3g} "
            f"(allowed: {graph.tolerance:g}), {len(x)} rows, {passes} passes each"
            + locate_error(reference, sites, graph, x, rows, masks, scale)
        )
    return error


def locate_error(
    reference: Reference,
    sites: tuple[Site, ...],
    graph: Graph,
    x: Floats,
    rows: NDArray[np.int64],
    masks: Masks,
    scale: Floats,
) -> str:
    """Name the first site whose mask alone, with all other units kept, causes an error."""

    def error_with(some: Masks) -> float:
        return graph.error(graph.passes(x, rows, some), reference.train_mode(x[rows], some), scale)

    keep_all = {site: np.ones_like(mask) for site, mask in masks.items()}
    if error_with(keep_all) > graph.tolerance:
        return "; also with masks that keep every unit"
    for site in sites:
        error = error_with({**keep_all, site.name: masks[site.name]})
        if error > graph.tolerance:
            return f"; at site {site.name} by {error:.3g}"
    return ""


def check_seeds_disagree(sites: tuple[Site, ...], graph: Graph, x: Floats) -> None:
    """Raise if two seeds give the same passes although a site drops units."""
    if all(site.p == 0.0 for site in sites):
        return
    rows = np.zeros(PASSES_OF_ONE_ROW, dtype=np.int64)
    first, second = (
        graph.passes(x, rows, draw_masks(sites, len(rows), np.random.default_rng(seed)))
        for seed in (SEED, SEED + 1)
    )
    if np.array_equal(first, second):
        raise VerificationError(f"{STOCHASTIC}: two seeds give the same {len(rows)} passes")


def measure_gap(
    reference: Reference, sites: tuple[Site, ...], graph: Graph, x: Floats
) -> NDArray[np.floating]:
    """Return the expectation gap ``[B, C]`` of ``GAP_PASSES`` passes of rows ``x [B, ...]``."""
    generator = np.random.default_rng(SEED)
    at_once = max(1, ROW_PASSES_AT_ONCE // len(x))
    samples = []
    for start in range(0, GAP_PASSES, at_once):
        passes = min(at_once, GAP_PASSES - start)
        rows = np.tile(np.arange(len(x)), passes)
        outputs = graph.passes(x, rows, draw_masks(sites, len(rows), generator))
        samples.append(outputs.reshape(passes, len(x), -1))
    values = np.concatenate(samples).astype(np.float64)  # [T, B, C]
    standard_error = values.std(axis=0, ddof=1) / np.sqrt(GAP_PASSES)
    expected = reference.eval_mode(x).astype(np.float64)
    return expectation_gap(values.mean(axis=0), standard_error, expected)


def summary(verification: Verification, sites: tuple[Site, ...]) -> str:
    """Return the lines that the export prints about a verification."""
    v = verification
    return "\n".join(
        (
            f"predict.onnx     equals eval mode within {v.predict_error:.1e}, "
            f"{v.predict_rows} rows",
            f"stochastic.onnx  equals train mode with the same masks within "
            f"{v.stochastic_error:.1e}, {v.stochastic_passes} passes",
            f"expectation gap  {v.expectation_gap:.1f} standard errors of the mean of "
            f"{v.expectation_gap_passes} passes (largest {v.expectation_gap_largest:.1f}): "
            + gap_explanation(v.expectation_gap, sites),
        )
    )


def gap_explanation(gap: float, sites: tuple[Site, ...]) -> str:
    """Explain an expectation gap (root mean square over the outputs, in standard errors)."""
    # Chance alone gives about 1 over the hundreds of outputs tested, and stays well below 1.5.
    if gap < 1.5:
        return "the passes scatter around the output of eval mode"
    if any(site.scaling == "double" and site.p > 0.0 for site in sites):
        return (
            "eval mode is scaled down once more at each site and does not match the passes; "
            "trust the mean of the passes, or train with 'classic' or 'inverted'"
        )
    return (
        "the network behind the sites is not linear, so the mean of the passes is not quite "
        "the output of eval mode"
    )
