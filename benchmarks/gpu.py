"""Does a GPU give the same outputs as the CPU, and how fast? ``make gpu``.

The table gives, for each width and number of rows:

- parity: how far both graphs on the GPU are off the CPU's outputs, with the same masks;
- the time of a run on the CPU and on the GPU: with arrays in and out, as in the service; with
  inputs and output bound to device memory, so that no copy is timed, also in float16; and as a
  CUDA graph;
- the time of the masks: drawn on the host, as in the service (their transfer is part of "passes");
  sent as bits and unpacked on the device (drawing and packing are not timed); and drawn by the
  device, which then differ from the host's.

Passes are also given as a share of the device's rate of large matrix products, measured with the
same library.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, load_from_string, numpy_helper

from benchmarks import figures, network, timing
from dropserve.app.bundles import loader
from dropserve.app.errors import DeviceUnavailable
from dropserve.app.inference.engine import Engine
from dropserve.app.inference.providers import OPTIONS, PROVIDERS, Device, check_present
from dropserve.app.uncertainty.masks import NUMBERS_A_BLOCK, MaskStream
from dropserve.export import half_precision
from dropserve.export.bundle import ROWS as ROWS_INPUT

WIDTHS = (256, 1024)
ROWS = (1, 16, 64, 256)
PASSES = 100
OPSET = 20
# Relative to the largest output: the effect of another order of additions.
PARITY = 1e-5
# Large enough to keep a GPU busy.
PRODUCT_SIDE, PRODUCTS = 4096, 8

Feed = Mapping[str, NDArray[Any]]
Value = tuple[str, TensorProto.DataType, tuple[int, ...]]  # name, type, shape
Work = Callable[[], object]


def main() -> None:
    args = figures.parser(__file__, __doc__).parse_args()
    try:
        check_present("cuda")
        figures.report(args.result, f"{PASSES} passes a row ({timing.machine()})", measure("cuda"))
    except DeviceUnavailable as error:
        # Not a failure, so that `make bench` goes on.
        print(f"there is nothing to measure here: {error}")


def measure(
    device: Device, widths: tuple[int, ...] = WIDTHS, rows: tuple[int, ...] = ROWS
) -> list[figures.Row]:
    """Return the rows of a device's table.

    Raises
    ------
    DeviceUnavailable
        If the machine has no such device.
    """
    found: list[figures.Row] = []
    rate = product_rate(device)
    for width in widths:
        bundle = loader.read_bundle(network.models(width) / "digits" / "1")
        engine, cpu = Engine(bundle, device), Engine(bundle, "cpu")
        for count in rows:
            works, parity = alternatives(bundle, engine, cpu, count)
            if not parity < PARITY:
                sys.exit(f"error: width {width}, {count} rows: off from the CPU by {parity:.2g}")
            operations = 2 * count * PASSES * width * (width + 10)
            found += [
                {
                    "width": width,
                    "rows": count,
                    "what": name,
                    "ms": 1000 * seconds,
                    "row-passes/s": count * PASSES / seconds if "predict" not in name else None,
                    "share of the product rate": (
                        operations / seconds / rate if name.startswith("passes") else None
                    ),
                    "off from the CPU": parity,
                }
                for name, seconds in timing.interleaved(works).items()
            ]
    return found


def alternatives(
    bundle: loader.Bundle, engine: Engine, cpu: Engine, count: int
) -> tuple[dict[str, Work], float]:
    """Return the ways to run passes of ``count`` rows, by name, and the device's relative error."""
    manifest, generator = engine.manifest, np.random.default_rng(count)
    x = generator.normal(8, 5, (count, *manifest.input.shape)).astype(np.float32)
    rows = np.repeat(np.arange(count), PASSES)
    draw = partial(MaskStream(7, manifest.sites).draw, range(count), range(PASSES))
    masks = draw()
    expected, answers = cpu.passes(x, rows, masks), cpu.predict(x)
    parity = max(
        float(np.abs(found - right).max() / np.abs(right).max())
        for found, right in (
            (engine.passes(x, rows, masks), expected),
            (engine.predict(x), answers),
        )
    )
    feed: Feed = {manifest.input.name: x, ROWS_INPUT: rows, **masks}
    device = engine.device
    works: dict[str, Work] = {
        "predict, CPU": partial(cpu.predict, x),
        "predict": partial(engine.predict, x),
        "passes, CPU": partial(cpu.passes, x, rows, masks),
        "passes": partial(engine.passes, x, rows, masks),
        "passes, bound to the device": bound(engine.stochastic_session, device, feed),
        "masks made on the host": draw,
        "masks sent as bits, unpacked on the device": unpacked(device, masks),
        "masks drawn by the device": drawn(device, masks),
    }
    half = ir.to_proto(half_precision.build(ir.from_proto(load_from_string(bundle.stochastic))))
    works["passes in float16, bound to the device"] = bound(
        session(half.SerializeToString(), device), device, feed
    )
    if device == "cuda":
        works["passes, a CUDA graph"] = bound(
            session(bundle.stochastic, device, enable_cuda_graph="1"), device, feed
        )
    return works, parity


def session(graph: bytes, device: Device, **more: str) -> onnxruntime.InferenceSession:
    """Load a graph on a device as the service does, with further options of its provider."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    first, *others = PROVIDERS[device]
    providers = [(first, OPTIONS.get(first, {}) | more), *others]
    return onnxruntime.InferenceSession(graph, options, providers=providers)


def bound(loaded: onnxruntime.InferenceSession, device: Device, feed: Feed) -> Work:
    """Return a run with its inputs and outputs in the device's memory."""
    binding = loaded.io_binding()
    for name, array in feed.items():
        value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0)
        binding.bind_ortvalue_input(name, value)
    # All runs write their outputs where the first one did: a CUDA graph needs fixed addresses.
    for output in loaded.get_outputs():
        binding.bind_output(output.name, device, 0)
    loaded.run_with_iobinding(binding)
    values = binding.get_outputs()
    binding.clear_binding_outputs()
    for output, value in zip(loaded.get_outputs(), values, strict=True):
        binding.bind_ortvalue_output(output.name, value)

    def work() -> None:
        loaded.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return work


def unpacked(device: Device, masks: Feed) -> Work:
    """Return a run that sends masks as bits and unpacks them to booleans on the device."""
    table = ((np.arange(256)[:, None] >> np.arange(7, -1, -1)) & 1).astype(bool)
    nodes: list[NodeProto] = []
    weights = [numpy_helper.from_array(table, "table")]
    inputs: list[Value] = []
    outputs: list[Value] = []
    feed = {}
    for place, mask in enumerate(masks.values()):
        flat = mask.reshape(len(mask), -1)
        assert flat.shape[1] % NUMBERS_A_BLOCK == 0
        feed[f"bits{place}"] = np.packbits(flat, axis=1)
        weights.append(numpy_helper.from_array(np.array(mask.shape), f"shape{place}"))
        nodes += [
            helper.make_node("Cast", [f"bits{place}"], [f"index{place}"], to=TensorProto.INT32),
            helper.make_node("Gather", ["table", f"index{place}"], [f"units{place}"]),
            helper.make_node("Reshape", [f"units{place}", f"shape{place}"], [f"mask{place}"]),
        ]
        inputs.append((f"bits{place}", TensorProto.UINT8, feed[f"bits{place}"].shape))
        outputs.append((f"mask{place}", TensorProto.BOOL, mask.shape))
    loaded = session(graph(nodes, inputs, outputs, weights), device)
    binding = loaded.io_binding()

    def work() -> None:
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        for output in loaded.get_outputs():
            binding.bind_output(output.name, device, 0)
        loaded.run_with_iobinding(binding)
        binding.synchronize_outputs()

    work()
    for value, mask in zip(binding.copy_outputs_to_cpu(), masks.values(), strict=True):
        np.testing.assert_array_equal(value, mask)
    return work


def drawn(device: Device, masks: Feed) -> Work:
    """Return a run that draws masks with p = 0.5 on the device and leaves them there."""
    nodes: list[NodeProto] = []
    outputs: list[Value] = []
    for place, mask in enumerate(masks.values()):
        nodes += [
            helper.make_node("RandomUniform", [], [f"u{place}"], shape=mask.shape),
            helper.make_node("Less", ["half", f"u{place}"], [f"mask{place}"]),
        ]
        outputs.append((f"mask{place}", TensorProto.BOOL, mask.shape))
    weights = [numpy_helper.from_array(np.array(0.5, np.float32), "half")]
    return bound(session(graph(nodes, [], outputs, weights), device), device, {})


def product_rate(device: Device) -> float:
    """Return the floating-point operations per second of large matrix products."""
    side = PRODUCT_SIDE if device != "cpu" else PRODUCT_SIDE // 8
    names = ["x", *(f"y{place}" for place in range(PRODUCTS))]
    nodes = [
        helper.make_node("MatMul", [before, "w"], [after]) for before, after in pairwise(names)
    ]
    matrix = np.random.default_rng(0).normal(0, side**-0.5, (side, side)).astype(np.float32)
    ends: list[Value] = [(name, TensorProto.FLOAT, (side, side)) for name in (names[0], names[-1])]
    weights = [numpy_helper.from_array(matrix, "w")]
    loaded = session(graph(nodes, ends[:1], ends[1:], weights), device)
    seconds = timing.interleaved({"": bound(loaded, device, {"x": matrix})})[""]
    return PRODUCTS * 2 * side**3 / seconds


def graph(
    nodes: list[NodeProto],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    weights: list[TensorProto],
) -> bytes:
    """Return a graph as the content of an ONNX file."""
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info(*value) for value in inputs],
            [helper.make_tensor_value_info(*value) for value in outputs],
            weights,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
    )
    content: bytes = model.SerializeToString()
    return content


if __name__ == "__main__":
    main()
