"""A graph that reaches outside its own bytes is refused before onnxruntime sees it."""

import resource
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dropserve.app.bundles.onnx_guard import MAX_DEPTH, check
from dropserve.export import half_precision, predict_graph, stochastic_graph, trace
from dropserve.export.bundle import PREDICT, STOCHASTIC, BundleError
from dropserve.model.networks import NETWORKS, Model, NetworkConfig, NetworkName

FLOAT = TensorProto.FLOAT
OPSET = helper.make_opsetid("", 20)
Y = helper.make_tensor_value_info("y", FLOAT, [4])


def external(location: str = "nowhere.bin") -> TensorProto:
    """A tensor whose four numbers are in another file."""
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def inline() -> TensorProto:
    return numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")


def graph_of(*nodes: onnx.NodeProto, w: TensorProto | None = None) -> onnx.GraphProto:
    return helper.make_graph(nodes, "g", [], [Y], [] if w is None else [w])


def model_of(graph: onnx.GraphProto, **more: object) -> onnx.ModelProto:
    # The version that onnxruntime 1.31 reads; onnx may write a newer one.
    model: onnx.ModelProto = helper.make_model(
        graph, **{"opset_imports": [OPSET], "ir_version": 10} | more
    )
    return model


def sparse(values: TensorProto, indices: TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=values, indices=indices, dims=[4])


def places() -> TensorProto:
    return numpy_helper.from_array(np.arange(4), "i")


IDENTITY = helper.make_node("Identity", ["w"], ["y"])


def initializer(w: TensorProto) -> onnx.ModelProto:
    return model_of(graph_of(IDENTITY, w=w))


def constant(w: TensorProto) -> onnx.ModelProto:
    return model_of(graph_of(helper.make_node("Constant", [], ["y"], value=w)))


def list_of_tensors(w: TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["y"])
    node.attribute.add(name="many", type=onnx.AttributeProto.TENSORS, tensors=[inline(), w])
    return model_of(graph_of(node))


def sparse_initializer(w: TensorProto) -> onnx.ModelProto:
    graph = graph_of(IDENTITY)
    graph.sparse_initializer.append(sparse(w, places()))
    return model_of(graph)


def indices_of_sparse_initializer(w: TensorProto) -> onnx.ModelProto:
    graph = graph_of(IDENTITY)
    graph.sparse_initializer.append(sparse(inline(), w))
    return model_of(graph)


def sparse_constant(w: TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["y"], sparse_value=sparse(w, places()))
    return model_of(graph_of(node))


def list_of_sparse_tensors(w: TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["y"])
    node.attribute.add(
        name="many",
        type=onnx.AttributeProto.SPARSE_TENSORS,
        sparse_tensors=[sparse(w, places())],
    )
    return model_of(graph_of(node))


def branch(w: TensorProto) -> onnx.ModelProto:
    true = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True)))
    inner = graph_of(IDENTITY, w=w)
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    return model_of(graph_of(true, node))


def constant_in_branch_in_branch(w: TensorProto) -> onnx.ModelProto:
    inner = constant(w).graph
    for _ in range(2):
        node = helper.make_node("If", ["c"], ["y"], then_branch=graph_of(), else_branch=inner)
        inner = graph_of(node)
    return model_of(inner)


def list_of_graphs(w: TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Loop", [], ["y"])
    node.attribute.add(
        name="many", type=onnx.AttributeProto.GRAPHS, graphs=[graph_of(IDENTITY, w=w)]
    )
    return model_of(graph_of(node))


def function(w: TensorProto) -> onnx.ModelProto:
    body = [helper.make_node("Constant", [], ["y"], value=w)]
    return model_of(
        graph_of(helper.make_node("Own", [], ["y"])),
        functions=[helper.make_function("", "Own", [], ["y"], body, [OPSET])],
    )


def default_of_function(w: TensorProto) -> onnx.ModelProto:
    model = function(inline())
    model.functions[0].attribute_proto.append(helper.make_attribute("value", w))
    return model


def training_start(w: TensorProto) -> onnx.ModelProto:
    model = model_of(graph_of())
    model.training_info.add(initialization=graph_of(w=w))
    return model


def training_step(w: TensorProto) -> onnx.ModelProto:
    model = model_of(graph_of())
    model.training_info.add(algorithm=graph_of(w=w))
    return model


PLACES: list[Callable[[TensorProto], onnx.ModelProto]] = [
    initializer,
    constant,
    list_of_tensors,
    sparse_initializer,
    indices_of_sparse_initializer,
    sparse_constant,
    list_of_sparse_tensors,
    branch,
    constant_in_branch_in_branch,
    list_of_graphs,
    function,
    default_of_function,
    training_start,
    training_step,
]


def custom_node() -> onnx.ModelProto:
    return model_of(graph_of(helper.make_node("Own", [], ["y"], domain="own.lib")))


def custom_node_in_branch() -> onnx.ModelProto:
    inner = custom_node().graph
    return model_of(graph_of(helper.make_node("If", ["c"], ["y"], then_branch=inner)))


def custom_node_in_function() -> onnx.ModelProto:
    model = function(inline())
    model.functions[0].node[0].domain = "own.lib"
    return model


def custom_import() -> onnx.ModelProto:
    return model_of(graph_of(), opset_imports=[OPSET, helper.make_opsetid("own.lib", 1)])


def custom_import_of_function() -> onnx.ModelProto:
    model = function(inline())
    model.functions[0].opset_import.add(domain="own.lib", version=1)
    return model


def function_of_a_domain() -> onnx.ModelProto:
    model = function(inline())
    model.functions[0].domain = "own.lib"
    return model


CUSTOM = [
    custom_node,
    custom_node_in_branch,
    custom_node_in_function,
    custom_import,
    custom_import_of_function,
    function_of_a_domain,
]


@contextmanager
def no_file_may_be_opened() -> Iterator[None]:
    """Make every attempt to open a file fail with an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def refusal(graph: bytes) -> str | None:
    """The error of ``check``, if any."""
    says = None
    try:
        with no_file_may_be_opened():
            check("g.onnx", graph)
    except BundleError as error:
        says = str(error)
    assert len((says or "").splitlines()) <= 1
    return says


@pytest.mark.parametrize("place", PLACES)
def test_external_data_is_refused_wherever_it_is(
    place: Callable[[TensorProto], onnx.ModelProto],
) -> None:
    assert refusal(place(inline()).SerializeToString()) is None
    assert (
        refusal(place(external()).SerializeToString())
        == "g.onnx keeps data outside itself, as external data"
    )


def test_either_mark_of_external_data_is_refused_alone() -> None:
    flag = TensorProto(data_type=FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    entries = external()
    entries.ClearField("data_location")
    for w in (flag, entries):
        assert "external data" in (refusal(initializer(w).SerializeToString()) or "")


def test_a_flag_that_protobuf_cuts_to_32_bits_is_refused() -> None:
    graph = inside(7, inside(5, b"\x70" + varint(2**32 + 1)))
    read = onnx.ModelProto.FromString(graph).graph.initializer[0]
    assert read.data_location == TensorProto.EXTERNAL
    assert "external data" in (refusal(graph) or "")


def test_external_data_after_data_in_place_is_refused() -> None:
    # If a field occurs twice, protobuf takes the last.
    w = inline()
    w.data_location = TensorProto.DEFAULT
    graph = initializer(w).SerializeToString()
    again = initializer(external()).SerializeToString()
    assert refusal(graph) is None
    assert "external data" in (refusal(graph + again) or "")


def test_onnxruntime_would_read_the_refused_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("secret.bin").write_bytes(np.arange(7, 11, dtype=np.float32).tobytes())
    graph = branch(external("secret.bin")).SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    assert session.run(None, {})[0].tolist() == [7, 8, 9, 10]
    assert "external data" in (refusal(graph) or "")


@pytest.mark.parametrize("make", CUSTOM)
def test_operators_of_another_domain_are_refused(make: Callable[[], onnx.ModelProto]) -> None:
    says = "g.onnx has operators of the domain 'own.lib', not ONNX's"
    assert refusal(make().SerializeToString()) == says


def test_a_compiled_graph_in_another_file_is_refused() -> None:
    node = helper.make_node(
        "EPContext", [], ["y"], domain="com.microsoft", embed_mode=0, ep_cache_context="../engine"
    )
    says = refusal(model_of(graph_of(node)).SerializeToString())
    assert says == "g.onnx has operators of the domain 'com.microsoft', not ONNX's"


def test_onnx_has_two_names_for_its_own_domain() -> None:
    node = helper.make_node("Identity", ["w"], ["y"], domain="ai.onnx")
    model = model_of(graph_of(node, w=inline()), opset_imports=[helper.make_opsetid("ai.onnx", 20)])
    assert refusal(model.SerializeToString()) is None


def test_a_domain_of_many_megabytes_and_lines_costs_one_short_line() -> None:
    model = model_of(graph_of(helper.make_node("Own", [], [], domain="a\n" * 4_000_000)))
    assert len(refusal(model.SerializeToString()) or "") < 300


def test_a_file_in_onnxruntimes_own_format_is_refused(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "g.ort")
    onnxruntime.InferenceSession(
        initializer(inline()).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    says = "g.onnx is in a format of onnxruntime's own, not in ONNX's"
    assert refusal((tmp_path / "g.ort").read_bytes()) == says
    # onnxruntime takes this for its own format too, though protobuf reads a model with a producer.
    both = b"\x12\xfc\xff\x03ORTM" + bytes(0xFFFC - 4)
    assert onnx.ModelProto.FromString(both).producer_name.startswith("ORTM")
    with pytest.raises(Exception, match="ORT model verification failed"):
        onnxruntime.InferenceSession(both, providers=["CPUExecutionProvider"])
    assert refusal(both) == says


def test_graphs_of_our_own_bundles_pass(built: Path) -> None:
    graphs = [*built.glob("models/*/*/*.onnx")]
    assert {graph.name for graph in graphs} == {PREDICT, STOCHASTIC}
    for graph in graphs:
        check(graph.name, graph.read_bytes())


@pytest.mark.parametrize("name", NETWORKS)
def test_graphs_of_every_network_and_precision_pass(name: NetworkName) -> None:
    torch.manual_seed(0)
    network = Model(NetworkConfig(name, (8, 8), 10, (32, 32), 0.5, "classic")).eval()
    source = trace.trace(network, torch.rand(2, 8, 8))
    for graph in (predict_graph.build(source)[0], stochastic_graph.build(source)):
        for variant in (graph, half_precision.build(graph)):
            check("g.onnx", ir.to_proto(variant).SerializeToString())


def test_weights_are_not_copied() -> None:
    w = TensorProto(name="w", data_type=FLOAT, dims=[2_500_000], raw_data=bytes(10_000_000))
    graph = initializer(w).SerializeToString()
    tracemalloc.start()
    check("g.onnx", graph)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10_000


def inside(field: int, content: bytes) -> bytes:
    """A field of bytes ``content``, as protobuf writes it."""
    return bytes([field << 3 | 2]) + varint(len(content)) + content


def varint(number: int) -> bytes:
    groups = b""
    while number >= 0x80:
        groups += bytes([number & 0x7F | 0x80])
        number >>= 7
    return groups + bytes([number])


def nested(depth: int, *fields: int) -> bytes:
    """Messages nested by the given fields in turn, the innermost empty."""
    content = b""
    for level in reversed(range(depth)):
        content = inside(fields[level % len(fields)], content)
    return content


def test_depth_is_bounded_as_protobuf_bounds_it() -> None:
    def deep(depth: int) -> bytes:
        """A model's graph, a node of it, an attribute of that, a graph of that, and so on."""
        return inside(7, nested(depth - 1, 1, 5, 6))

    onnx.ModelProto.FromString(deep(MAX_DEPTH))
    assert refusal(deep(MAX_DEPTH)) is None
    for depth in (MAX_DEPTH + 1, 20_000):
        with pytest.raises(DecodeError):
            onnx.ModelProto.FromString(deep(depth))
        assert "more than 100 messages in each other" in (refusal(deep(depth)) or "")


@pytest.mark.parametrize(
    ("graph", "says"),
    [
        (b"no graph", "wire type 6 at byte 0"),
        (b"\x00\x00", "no field at byte 0"),
        (b"\x08", "no number at byte 1"),
        (b"\x08" + b"\xff" * 10 + b"\x00", "no number at byte 1"),
        (b"\x3a\x01", "the field at byte 0 extends beyond its enclosing message"),
        # A node longer than its graph.
        (
            b"\x3a\x02\x0a\x7f" + bytes(200),
            "the field at byte 2 extends beyond its enclosing message",
        ),
        (
            b"\x3a" + b"\xff" * 9 + b"\x01",
            "the field at byte 0 extends beyond its enclosing message",
        ),
        (b"\x09" + bytes(7), "the field at byte 0 extends beyond its enclosing message"),
        (b"\x0d" + bytes(3), "the field at byte 0 extends beyond its enclosing message"),
        (b"\x3b\x3c", "wire type 3 at byte 0"),
        # The graph as a number.
        (b"\x38\x00", "wire type 0 at byte 0"),
        # A tag of 33 bits.
        (b"\xba\x80\x80\x80\x10\x00", "no field at byte 0"),
    ],
)
def test_bytes_that_are_no_protobuf_are_refused(graph: bytes, says: str) -> None:
    assert refusal(graph) == f"g.onnx does not load: it is no ONNX model: {says}"


def test_fields_unknown_to_onnx_are_skipped() -> None:
    unknown = b"\xe9\x07" + bytes(8) + b"\xed\x07" + bytes(4) + b"\xe8\x07\x01"
    assert refusal(unknown + inside(7, unknown)) is None
    assert "external data" in (refusal(unknown + initializer(external()).SerializeToString()) or "")


def test_many_small_fields_take_time_that_grows_with_them() -> None:
    # Nodes without content, two bytes each.
    graph = inside(7, inside(1, b"") * 200_000)
    begin = time.thread_time()
    assert refusal(graph) is None
    assert time.thread_time() - begin < 5


def faults(message: Message) -> Iterator[str]:
    """The faults that ``check`` must find, by protobuf's own parser and descriptors."""
    kind = message.DESCRIPTOR.name
    for field, value in message.ListFields():
        if field.name == "external_data" or (field.name == "data_location" and value != 0):
            yield "external data"
        if (
            field.name == "domain"
            and kind in ("NodeProto", "OperatorSetIdProto", "FunctionProto")
            and value not in ("", "ai.onnx")
        ):
            yield "domain"
        if field.message_type:
            for inner in [value] if isinstance(value, Message) else value:
                yield from faults(inner)


SEEDS = [place(w()).SerializeToString() for place in PLACES for w in (inline, external)]
SEEDS += [make().SerializeToString() for make in CUSTOM]


@settings(derandomize=True, deadline=None, max_examples=500)
@given(st.data())
def test_a_graph_with_bytes_changed_passes_only_if_protobuf_finds_nothing_in_it(
    data: st.DataObject,
) -> None:
    graph = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(0, 3))):
        graph[data.draw(st.integers(0, len(graph) - 1))] = data.draw(st.integers(0, 255))
    says = refusal(bytes(graph))
    model = onnx.ModelProto()
    try:
        model.ParseFromString(bytes(graph))
        found = set(faults(model))
    # The second is raised for a domain that is not UTF-8.
    except (DecodeError, UnicodeDecodeError):
        return
    if found:
        assert says is not None
    # Only the fields that protobuf knows, as it writes them.
    model.DiscardUnknownFields()
    assert (refusal(model.SerializeToString()) is None) == (not found)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.sampled_from(SEEDS), st.data())
def test_a_graph_that_is_cut_off_is_refused_or_whole_to_protobuf_too(
    graph: bytes, data: st.DataObject
) -> None:
    cut = graph[: data.draw(st.integers(0, len(graph)))]
    if refusal(cut) is None:
        assert not set(faults(onnx.ModelProto.FromString(cut)))


@settings(derandomize=True, deadline=None, max_examples=500)
@given(st.binary(max_size=300))
def test_any_bytes_pass_or_are_refused(graph: bytes) -> None:
    refusal(graph)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.integers(0, 3000), st.lists(st.sampled_from([1, 5, 6, 7, 11, 20]), min_size=1))
def test_nested_messages_pass_or_are_refused(depth: int, fields: list[int]) -> None:
    refusal(nested(depth, *fields))
