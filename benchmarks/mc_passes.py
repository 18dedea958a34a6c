"""What do 100 train-mode passes cost, relative to the alternatives? ``make mc-passes``.

The table gives the time from rows to statistics of class probabilities, in process and on one
thread, for 1, 16 and 64 rows, the default network and one four times as wide. The floor is the
network's matrix products alone, in onnxruntime. baal is timed where it is installed, as
``make bench-peers`` does.
"""

import importlib.util
import os

# numpy and torch read it when they are imported.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable
from functools import partial

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from benchmarks import figures, network, timing
from benchmarks.blocking import BlockingService
from dropserve.app.inference.query import Query
from dropserve.app.inference.registry import load_engines
from dropserve.app.inference.service import Service
from dropserve.export.trace import swap_dropouts
from dropserve.model import checkpoint

PASSES = 100
BATCHES = (1, 16, 64)
WIDTHS = (256, 1024)
OPSET = 20
OURS, FLOOR = "dropserve", "matrix products alone"

Floats = NDArray[np.float32]
Work = Callable[[], object]


def main() -> None:
    command = figures.parser(__file__, __doc__)
    command.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    command.add_argument("--rows", type=int, nargs="+", default=BATCHES)
    args = command.parse_args()
    torch.set_num_threads(1)
    found: list[figures.Row] = []
    for width in args.widths:
        for rows in args.rows:
            seconds = timing.interleaved(works(width, rows))
            found += [
                {
                    "width": width,
                    "rows": rows,
                    "what": name,
                    "ms": 1000 * value,
                    "x the floor": value / seconds[FLOOR],
                    "x dropserve": value / seconds[OURS],
                }
                for name, value in seconds.items()
            ]
    figures.report(args.result, f"{PASSES} passes, one thread ({timing.machine()})", found)


def works(width: int, rows: int) -> dict[str, Work]:
    """Return the alternatives, by name."""
    models = network.models(width)
    trained = checkpoint.load(network.run(width))
    x = trained.holdout.x[:rows]
    service = BlockingService(
        Service(
            load_engines(models, "cpu"),
            max_rows=rows,
            max_passes=PASSES,
            max_row_passes=10**6,
            queue_rows=10**6,
        )
    )
    query = Query(x.tolist(), "digits", 1, PASSES, seed=7, interval=0.9)
    found: dict[str, Work] = {
        OURS: partial(service.uncertainty, query),
        FLOOR: products(width, rows),
        "torch, a loop": partial(torch_loop, trained.model, torch.from_numpy(x)),
        "torch, rows repeated": partial(torch_tiled, trained.model, torch.from_numpy(x)),
        "onnxruntime, RandomUniformLike": random_uniform_like(trained.model, x),
    }
    if importlib.util.find_spec("baal"):
        found |= baal(trained.model, torch.from_numpy(x))
    return found


def products(width: int, rows: int) -> Work:
    """Return one graph of the network's matrix products, in the sizes that the passes need."""
    generator = np.random.default_rng(0)
    sizes = [(rows, 64, width), (rows * PASSES, width, width), (rows * PASSES, width, 10)]
    nodes, inputs, outputs, weights, feed = [], [], [], [], {}
    for place, (n, k, m) in enumerate(sizes):
        names = [f"{letter}{place}" for letter in "xwy"]
        nodes.append(helper.make_node("MatMul", names[:2], names[2:]))
        inputs.append(helper.make_tensor_value_info(names[0], TensorProto.FLOAT, (n, k)))
        outputs.append(helper.make_tensor_value_info(names[2], TensorProto.FLOAT, (n, m)))
        weight = generator.normal(size=(k, m)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, names[1]))
        feed[names[0]] = generator.normal(size=(n, k)).astype(np.float32)
    graph = helper.make_graph(nodes, "products", inputs, outputs, weights)
    return partial(session(graph).run, None, feed)


def torch_loop(model: nn.Module, x: torch.Tensor) -> object:
    """Run the passes one after another."""
    with torch.inference_mode():
        model.train()
        samples = torch.stack([model(x).softmax(-1) for _ in range(PASSES)])
        return statistics(samples)


def torch_tiled(model: nn.Module, x: torch.Tensor) -> object:
    """Run all passes as rows of one batch."""
    with torch.inference_mode():
        model.train()
        outputs = model(x.repeat(PASSES, 1, 1)).softmax(-1)
        return statistics(outputs.reshape(PASSES, len(x), -1))


def statistics(samples: torch.Tensor) -> object:
    """Summarise samples ``[T, B, C]`` as dropserve does, without the interval."""
    mean = samples.mean(0)
    expected = -torch.xlogy(samples, samples).sum(-1).mean(0)
    predictive = -torch.xlogy(mean, mean).sum(-1)
    return mean, samples.std(0), predictive, predictive - expected


def random_uniform_like(model: nn.Module, x: Floats) -> Work:
    """Return a graph that draws its own masks, ``x * (u >= p)`` at every site, rows repeated."""
    nodes: list[NodeProto] = []
    weights: list[TensorProto] = []
    value = "x"

    def add(kind: str, *inputs: str, **attributes: int) -> str:
        name = f"v{len(nodes)}"
        node = helper.make_node(kind, inputs, [name])
        node.attribute.extend(helper.make_attribute(*pair) for pair in attributes.items())
        nodes.append(node)
        return name

    def constant(array: Floats) -> str:
        name = f"w{len(weights)}"
        weights.append(numpy_helper.from_array(array, name))
        return name

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    for place, layer in enumerate(layers):
        weight = constant(layer.weight.detach().numpy())
        bias = constant(layer.bias.detach().numpy())
        value = add("Gemm", value, weight, bias, transB=1)
        if place + 1 < len(layers):
            value = add("Relu", value)
            uniform = add("RandomUniformLike", value)
            kept = add("GreaterOrEqual", uniform, constant(np.array(0.5, np.float32)))
            value = add("Mul", value, add("Cast", kept, to=TensorProto.FLOAT))
    value = add("Softmax", value, axis=-1)
    shape = ["n", x[0].size]
    graph = helper.make_graph(
        nodes,
        "passes",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["n", 10])],
        weights,
    )
    run, flat = session(graph).run, x.reshape(len(x), -1)

    def work() -> object:
        (outputs,) = run(None, {"x": np.tile(flat, (PASSES, 1))})
        samples = outputs.reshape(PASSES, len(x), -1)
        return samples.mean(axis=0), samples.std(axis=0, ddof=1)

    return work


def session(graph: GraphProto) -> onnxruntime.InferenceSession:
    """Load a graph on one thread."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    content = model.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def baal(model: nn.Module, x: torch.Tensor) -> dict[str, Work]:
    """Return baal's two ways to run passes, for the network with torch's own dropout."""
    from baal import ModelWrapper
    from baal.bayesian.dropout import MCDropoutModule
    from baal.modelwrapper import TrainingArgs

    found: dict[str, Work] = {}
    for in_memory in (True, False):
        plain = swap_dropouts(model, lambda _, known: nn.Dropout(known.layer.p))
        arguments = TrainingArgs(use_cuda=False, replicate_in_memory=in_memory)
        wrapper = ModelWrapper(MCDropoutModule(plain), arguments)

        def work(wrapper: ModelWrapper = wrapper) -> object:
            samples = wrapper.predict_on_batch(x, iterations=PASSES)  # [B, C, T]
            return statistics(samples.permute(2, 0, 1).softmax(-1))

        found[f"baal, replicate_in_memory={in_memory}"] = work
    return found


if __name__ == "__main__":
    main()
