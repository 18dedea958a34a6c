"""Bundles that are well-formed and whose hashes are right, but that cannot be served."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from dropserve.export.bundle import LIMITS, MAX_EXAMPLES, MAX_NUMBERS
from tests.bundles import rewrite

FLOAT = TensorProto.FLOAT
node = helper.make_node


class Bad(NamedTuple):
    """A way to spoil a copy of the digits bundle, and what the refusal says (a pattern)."""

    spoil: Callable[[Path], None]
    says: str


def constant(name: str, value: object, dtype: type) -> TensorProto:
    return numpy_helper.from_array(np.array(value, dtype), name)


# Numbers of the first ten pixels, [batch, 10].
START = [
    node("Flatten", ["x"], ["flat"]),
    node("Slice", ["flat", "zero", "ten", "one"], ["some"]),
]
NUMBERS = [constant("zero", [0], np.int64), constant("ten", [10], np.int64)]
NUMBERS += [constant("one", [1], np.int64)]


def graph(
    *nodes: NodeProto,
    constants: Sequence[TensorProto] = (),
    of: int = FLOAT,
    to: int = FLOAT,
    shape: Sequence[str | int] = ("batch", 10),
    rows: Sequence[str | int] = ("batch", 8, 8),
) -> bytes:
    """Return a graph that computes ``y`` from ``x``, or from ``some`` of its numbers."""
    used = {name for each in nodes for name in each.input}
    start, more = (START, NUMBERS) if "some" in used else ([], [])
    model = helper.make_model(
        helper.make_graph(
            [*start, *nodes],
            "g",
            [helper.make_tensor_value_info("x", of, rows)],
            [helper.make_tensor_value_info("y", to, shape)],
            [*more, *constants],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    content: bytes = model.SerializeToString()
    return content


def predict(content: bytes) -> Callable[[Path], None]:
    """Return what replaces the predict graph."""

    def spoil(place: Path) -> None:
        (place / "predict.onnx").write_bytes(content)
        rewrite(place)

    return spoil


def stochastic(change: Callable[[onnx.GraphProto], None]) -> Callable[[Path], None]:
    """Return what changes the stochastic graph."""

    def spoil(place: Path) -> None:
        model = onnx.load(place / "stochastic.onnx")
        change(model.graph)
        (place / "stochastic.onnx").write_bytes(model.SerializeToString())
        rewrite(place)

    return spoil


def before_output(*nodes: NodeProto, constants: Sequence[TensorProto] = ()) -> Any:
    """Return what puts nodes from ``before`` to ``output`` at the end of a graph."""

    def change(graph: onnx.GraphProto) -> None:
        for each in graph.node:
            for place, name in enumerate(each.output):
                if name == "output":
                    each.output[place] = "before"
        graph.node.extend(nodes)
        graph.initializer.extend(constants)

    return change


def manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Return what changes a manifest."""

    def spoil(place: Path) -> None:
        path = place / "manifest.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return spoil


def said(field: str, value: object, *path: str | int) -> Callable[[Path], None]:
    """Return what sets a field of the manifest, or of a part of it."""

    def change(document: dict[str, Any]) -> None:
        part: Any = document
        for step in path:
            part = part[step]
        part[field] = value

    return manifest(change)


def more_masks(*shapes: Sequence[int]) -> Callable[[Path], None]:
    """Return what adds sites with masks of these shapes, which the graph does not use."""

    def spoil(place: Path) -> None:
        def add_inputs(graph: onnx.GraphProto) -> None:
            for number, shape in enumerate(shapes):
                more: list[str | int] = ["passes", *shape]
                name = f"mask.more{number}"
                graph.input.append(helper.make_tensor_value_info(name, TensorProto.BOOL, more))

        def add_sites(document: dict[str, Any]) -> None:
            for number, shape in enumerate(shapes):
                more = {"name": f"more{number}", "mask_input": f"mask.more{number}"}
                document["sites"].append(document["sites"][0] | more | {"mask_shape": shape})

        stochastic(add_inputs)(place)
        manifest(add_sites)(place)

    return spoil


def examples(text: str) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        (place / "examples.json").write_text(text)
        rewrite(place)

    return spoil


def truth(text: str) -> Callable[[Path], None]:
    return examples(f'[{{"input": {[0] * 64}, "truth": {text}}}]')


def where_first(name: str, to: int) -> Callable[[onnx.GraphProto], None]:
    """Return what gives an input of a graph another type, and casts it back."""

    def change(graph: onnx.GraphProto) -> None:
        (value,) = [value for value in graph.input if value.name == name]
        of = value.type.tensor_type.elem_type
        value.type.tensor_type.elem_type = to
        for each in graph.node:
            each.input[:] = [f"cast.{name}" if used == name else used for used in each.input]
        graph.node.insert(0, node("Cast", [name], [f"cast.{name}"], to=of))

    return change


def reshaped(*how: NodeProto, constants: Sequence[TensorProto] = ()) -> bytes:
    """Return a graph that reshapes its numbers, of shape ``there``, to ``wanted``.

    It also adds ``more``, if one of the nodes computes that.
    """
    some = "some"
    if any("more" in each.output for each in how):
        how, some = (*how, node("Add", ["some", "more"], ["sum"])), "sum"
    return graph(
        # Not by a Concat, which onnxruntime would take the liberty to understand.
        node("Shape", ["some"], ["there"]),
        *how,
        node("Reshape", [some, "wanted"], ["y"]),
        constants=constants,
    )


SEVEN = constant("seven", [7], np.int64)
NONE = constant("none", [0], np.int64)
BIG = constant("big", [2**15, 2**15, 2**15], np.int64)
ZEROS = [
    node("Cast", ["some"], ["whole"], to=TensorProto.INT64),
    node("Mul", ["whole", "none"], ["zeros"]),
]
LONG = 2**20

BAD: dict[str, Bad] = {
    # The predict graph loads, and fails when it runs.
    "reshape": Bad(
        predict(
            reshaped(
                node("Mul", ["there", "none"], ["nothing"]),
                node("Add", ["nothing", "seven"], ["wanted"]),
                constants=[NONE, SEVEN],
            )
        ),
        r"predict\.onnx does not run: .*Reshape node.* requested shape:\{7,7\}$",
    ),
    "reshape-of-64": Bad(
        predict(
            reshaped(
                node("Equal", ["there", "most"], ["full"]),
                node("Where", ["full", "seven", "there"], ["wanted"]),
                constants=[constant("most", [64, 0], np.int64), SEVEN],
            )
        ),
        r"predict\.onnx does not run: .*Input shape:\{64,10\}, requested shape:\{7,10\}$",
    ),
    "slow-reshape-of-64": Bad(
        predict(
            reshaped(
                node("Equal", ["there", "most"], ["full"]),
                node("Where", ["full", "seven", "there"], ["wanted"]),
                # Several milliseconds, of a shape that onnxruntime cannot compute beforehand.
                node("Mul", ["there", "none"], ["zeros"]),
                node("Add", ["zeros", "much"], ["size"]),
                node("ConstantOfShape", ["size"], ["many"]),
                node("ReduceMax", ["many"], ["more"], keepdims=0),
                constants=[
                    constant("most", [64, 0], np.int64),
                    constant("much", [2**12, 2**12], np.int64),
                    SEVEN,
                    NONE,
                ],
            )
        ),
        r"predict\.onnx does not run: .*Input shape:\{64,10\}, requested shape:\{7,10\}$",
    ),
    "division": Bad(
        predict(
            graph(
                *ZEROS,
                node("Div", ["whole", "zeros"], ["ratio"]),
                node("Cast", ["ratio"], ["y"], to=FLOAT),
                constants=[NONE],
            )
        ),
        r"predict\.onnx does not run: .*Integer division by zero$",
    ),
    "division-by-a-constant": Bad(
        predict(
            graph(
                node("Cast", ["some"], ["whole"], to=TensorProto.INT64),
                node("Div", ["whole", "none"], ["ratio"]),
                node("Cast", ["ratio"], ["y"], to=FLOAT),
                constants=[NONE],
            )
        ),
        r"predict\.onnx does not load: .*Integer division by zero$",
    ),
    "allocation": Bad(
        predict(
            graph(
                node("ConstantOfShape", ["big"], ["many"]),
                node("ReduceMax", ["many"], ["largest"], keepdims=0),
                node("Add", ["some", "largest"], ["y"]),
                constants=[BIG],
            )
        ),
        r"predict\.onnx does not run: .*buffer of size 140737488355328$",
    ),
    "index": Bad(
        predict(
            graph(
                node("Gather", ["some", "places"], ["y"], axis=1),
                constants=[constant("places", [99] * 10, np.int64)],
            )
        ),
        r"predict\.onnx does not run: .*idx=99 must be within",
    ),
    # Its output is not what it says.
    "more-rows": Bad(
        predict(graph(node("Concat", ["some", "some"], ["y"], axis=0))),
        r"predict\.onnx returns \[20, 10\] numbers in place of \[10, 10\]$",
    ),
    "one-row": Bad(
        predict(graph(node("ReduceSum", ["some", "zero"], ["y"]))),
        r"predict\.onnx: its output is not for any number of rows or passes: \[1, 10\]$",
    ),
    "fewer-numbers": Bad(
        predict(
            graph(
                node("Shape", ["some"], ["two"]),
                node("Slice", ["two", "one", "second", "zero"], ["width"]),
                node("Sub", ["width", "one"], ["less"]),
                node("Slice", ["some", "zero", "less", "one"], ["y"]),
                constants=[constant("second", [2], np.int64)],
            )
        ),
        r"predict\.onnx(: its output is of shape| returns \[10, 9\] numbers in place of)",
    ),
    "nan": Bad(
        predict(
            graph(
                node("Sub", ["some", "some"], ["nothing"]),
                node("Div", ["nothing", "nothing"], ["y"]),
            )
        ),
        r"predict\.onnx answers the bundle's own examples with NaN, or beyond float32$",
    ),
    "texts": Bad(
        predict(
            graph(
                node("Cast", ["some"], ["y"], to=TensorProto.STRING),
                to=TensorProto.STRING,
            )
        ),
        r"predict\.onnx: its output is 'tensor\(string\)'; it must be tensor\(float\)$",
    ),
    "double-output": Bad(
        predict(
            graph(
                node("Cast", ["some"], ["y"], to=TensorProto.DOUBLE),
                to=TensorProto.DOUBLE,
            )
        ),
        r"predict\.onnx: its output is 'tensor\(double\)'",
    ),
    "two-outputs": Bad(
        stochastic(lambda graph: graph.output.append(graph.output[0].__class__(name="val_2"))),
        r"stochastic\.onnx (does not load|has 2 outputs)",
    ),
    # Its inputs are of other types.
    "double": Bad(
        predict(
            graph(
                node("Cast", ["x"], ["single"], to=FLOAT),
                node("Flatten", ["single"], ["all"]),
                node("Slice", ["all", "zero", "ten", "one"], ["y"]),
                of=TensorProto.DOUBLE,
                constants=NUMBERS,
            )
        ),
        r"predict\.onnx: input 'x' is 'tensor\(double\)'; it must be tensor\(float\)$",
    ),
    "whole": Bad(
        predict(
            graph(
                node("Cast", ["x"], ["single"], to=FLOAT),
                node("Flatten", ["single"], ["all"]),
                node("Slice", ["all", "zero", "ten", "one"], ["y"]),
                of=TensorProto.INT64,
                constants=NUMBERS,
            )
        ),
        r"predict\.onnx: input 'x' is 'tensor\(int64\)'; it must be tensor\(float\)$",
    ),
    "ten-rows": Bad(
        predict(graph(node("Identity", ["some"], ["y"]), rows=(10, 8, 8), shape=(10, 10))),
        r"predict\.onnx: input 'x' is not for any number of rows or passes: \[10, 8, 8\]$",
    ),
    "int32-rows": Bad(
        stochastic(where_first("rows", TensorProto.INT32)),
        r"stochastic\.onnx: input 'rows' is 'tensor\(int32\)'; it must be tensor\(int64\)$",
    ),
    "float-masks": Bad(
        stochastic(where_first("mask.network.dropouts.1", FLOAT)),
        r"stochastic\.onnx: input 'mask.network.dropouts.1' is 'tensor\(float\)'; it must be",
    ),
    # It is no graph that can be loaded.
    "nothing": Bad(predict(b""), r"predict\.onnx does not load: No graph was found"),
    "no-such-operator": Bad(
        predict(graph(node("Nope", ["some"], ["y"]))),
        r"predict\.onnx does not load: .*No Op registered for Nope",
    ),
    # The stochastic graph fails when it runs.
    "passes": Bad(
        stochastic(
            before_output(
                node("Gather", ["before", "far"], ["output"], axis=1),
                constants=[constant("far", [99] * 10, np.int64)],
            )
        ),
        r"stochastic\.onnx does not run: .*idx=99 must be within",
    ),
    "fewer-passes": Bad(
        stochastic(
            before_output(
                node("Unique", ["before"], ["output"], axis=0),
            )
        ),
        r"stochastic\.onnx returns \[\d+, 10\] numbers in place of",
    ),
    "endless-passes": Bad(
        stochastic(
            before_output(
                node("Div", ["before", "naught"], ["output"]),
                constants=[constant("naught", [0], np.float32)],
            )
        ),
        r"stochastic\.onnx answers the bundle's own examples with NaN, or beyond float32$",
    ),
    # The manifest is at its limits, or beyond.
    "no-labels": Bad(
        said("labels", [], "outputs"),
        r"manifest\.json: outputs\.labels: Tuple should have at least",
    ),
    "masks-of-2-to-the-40": Bad(
        more_masks([2**20, 2**20]), rf"the masks must hold at most {MAX_NUMBERS} numbers$"
    ),
    "masks-of-2-to-the-33": Bad(
        more_masks([2**33]), r"mask_shape\.0: Input should be less than or equal to"
    ),
    "many-masks": Bad(
        more_masks([2**23], [2**23]), rf"the masks must hold at most {MAX_NUMBERS} numbers$"
    ),
    "huge-row": Bad(
        said("shape", [2**24] * 16, "input"), rf"a row must hold at most {MAX_NUMBERS} numbers$"
    ),
    "many-axes": Bad(
        said("shape", [1] * 17, "input"), r"input\.shape: Tuple should have at most 16"
    ),
    "no-shape": Bad(said("shape", [], "input"), r"input\.shape: Tuple should have at least 1 item"),
    "same-site": Bad(
        manifest(lambda it: it["sites"][1].update(name=it["sites"][0]["name"])),
        r"two sites have the same name$",
    ),
    "same-mask": Bad(
        manifest(lambda it: it["sites"][1].update(mask_input=it["sites"][0]["mask_input"])),
        r"two inputs of stochastic\.onnx have the same name$",
    ),
    "mask-of-rows": Bad(
        said("mask_input", "rows", "sites", 0),
        r"two inputs of stochastic\.onnx have the same name$",
    ),
    "certain-dropout": Bad(
        said("p", 1.0, "sites", 0), r"sites\.0\.p: Input should be less than 1$"
    ),
    "negative-noise": Bad(
        said("noise_std", [-1.0]), r"noise_std\.0: Input should be greater than 0$"
    ),
    "schema": Bad(
        said("schema_version", "x" * 15 * LONG),
        r"manifest\.json is of schema 'x+\.\.\.; this version",
    ),
    "schema-in-lists": Bad(
        said("schema_version", [[["x"]]]), r"manifest\.json is of schema list; this"
    ),
    "long-name": Bad(
        said("name", "x" * LONG), r"manifest\.json: name: String should match pattern"
    ),
    "long-label": Bad(
        said("labels", ["x" * 1001], "outputs"), r"labels\.0: String should have at most 1000"
    ),
    "long-feature": Bad(
        said("features", ["x" * LONG], "input"), r"features\.0: String should have at most 1000"
    ),
    "long-field": Bad(said("x" * LONG, 1), r"manifest\.json: x+\.\.\.: Extra inputs are not"),
    "bold-field": Bad(
        said("\x1b[1m\n\u202e\u2028", 1),
        r"manifest\.json: \\x1b\[1m\\n\\u202e\\u2028: Extra inputs are not permitted$",
    ),
    "faulty-sites": Bad(said("sites", [{}] * (LONG // 4)), r"sites\.0\.name: Field required$"),
    "faulty-labels": Bad(
        said("labels", [1] * (LONG // 3), "outputs"), r"labels\.0: Input should be a valid string$"
    ),
    "many-fields": Bad(
        manifest(lambda it: it.update({str(number): 1 for number in range(LONG // 13)})),
        r"manifest\.json has more than 20000 fields in all$",
    ),
    "uneven-scores": Bad(
        lambda place: rewrite(
            place,
            task="regression",
            noise_std=[1.0] * 10,
            conformal_scores=[[0.1, 0.2]] + [[0.1]] * 9,
        ),
        r"conformal_scores must be 10 ascending lists of one length$",
    ),
    # The examples.
    "large-examples": Bad(
        examples(f"[{' ' * 16 * 10**6}]"),
        rf"examples\.json is larger than {LIMITS['examples.json']} bytes$",
    ),
    "many-examples": Bad(
        examples(json.dumps([{"input": [0] * 64}] * (MAX_EXAMPLES + 1))),
        rf"examples\.json holds more than {MAX_EXAMPLES} examples$",
    ),
    "nested-truth": Bad(
        truth("[" * 300 + "]" * 300), r"examples\.json: truth 0 must be null, a text, a finite"
    ),
    "object-as-truth": Bad(truth('{"a": 1}'), r"examples\.json: truth 0 must be"),
    "boolean-truth": Bad(truth("[true]"), r"examples\.json: truth 0 must be"),
    "endless-truth": Bad(truth("1e999"), r"examples\.json"),
    "nested-input": Bad(examples('[{"input": ' + "[" * 900 + "]" * 900 + "}]"), "examples.json"),
}


def without_sites(place: Path) -> None:
    """Replace the stochastic graph by the predict graph, its answers repeated for each pass."""
    model = onnx.load(place / "predict.onnx")
    before_output(node("Gather", ["before", "rows"], ["output"]))(model.graph)
    model.graph.input.append(helper.make_tensor_value_info("rows", TensorProto.INT64, ["passes"]))
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "passes"
    (place / "stochastic.onnx").write_bytes(model.SerializeToString())
    rewrite(place)
    said("sites", [])(place)


# Changes that are odd, but no reason to refuse.
ODD: dict[str, Callable[[Path], None]] = {
    "no-values": said("values_per_pass", 1),
    "many-values": manifest(lambda it: it.update(values_per_row=10**30, values_per_pass=10**30)),
    "truth-of-all-kinds": truth('[1, 0.5, "a", null]'),
    "without-sites": without_sites,
}
