from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines import graph
from engines.errors import AccuracyGateError, ArtefactError
from engines.graph import (
    SEAL_KEY,
    cast_to_fp16,
    contract_of,
    count_multiply_adds,
    count_parameters,
    executed_layer_types,
    executed_layers,
    layer_types,
    load_model,
    seal_model,
    weighted_layers,
)

# Input and output sizes by hand. Feature maps: 224, 112, 56, 28, then 14 x 14 x 32 = 6,272 into the dense layers.
DENSE = 6272 * 64 + 64 * 3
DENSE_BIAS = 64 + 3
BLOCK_PIXELS = 112 * 112 + 56 * 56 + 28 * 28
PARAMETERS = {
    # 3x3 stem with bias, then three times depthwise 3x3 without and pointwise 1x1 with bias
    "dsc": 9 * 32 + 32 + 3 * (9 * 32 + 32 * 32 + 32) + DENSE + DENSE_BIAS,
    "cnn": 9 * 32 + 32 + 3 * (9 * 32 * 32 + 32) + DENSE + DENSE_BIAS,
}
MULTIPLY_ADDS = {
    "dsc": 224 * 224 * 32 * 9 + BLOCK_PIXELS * (32 * 9 + 32 * 32) + DENSE,
    "cnn": 224 * 224 * 32 * 9 + BLOCK_PIXELS * (32 * 32 * 9) + DENSE,
}
LAYERS = {"dsc": 9, "cnn": 6}
Graphs = Callable[..., bytes]


def save(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def model(deployed_models: dict[str, Path]) -> onnx.ModelProto:
    return load_model(deployed_models["dsc"]).proto


def test_a_model_of_ours_is_read_with_all_that_a_command_needs(deployed_models: dict[str, Path]) -> None:
    path = deployed_models["dsc"]
    model = load_model(path)
    assert model.path == path
    assert model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.proto == onnx.load(path)
    assert model.contract == contract_of(model.proto, "here")
    assert (model.contract.labels, model.contract.architecture) == (("clear", "focal", "diffuse"), "dsc")


@pytest.mark.parametrize("data", [b"", b"not a protobuf", b"\x89PNG\r\n\x1a\n" + bytes(64)])
def test_what_is_no_onnx_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match="is not an ONNX model") as caught:
        load_model(path)
    assert caught.value.remedy == "export it again: edge-dsc export RUN"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"cannot read .*absent.onnx: No such file"):
        load_model(tmp_path / "absent.onnx")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="cannot read"):
        load_model(tmp_path)


def test_a_truncated_file_is_refused(deployed_models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(deployed_models["dsc"].read_bytes()[:-1000])
    with pytest.raises(ArtefactError, match="is not an ONNX model"):
        load_model(path)


def test_too_large_a_file_is_not_read(
    deployed_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "LARGEST_MODEL", 1000)
    with pytest.raises(ArtefactError, match="the limit is 1000"):
        load_model(deployed_models["dsc"])


def test_a_foreign_model_is_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    del model.metadata_props[:]
    with pytest.raises(ArtefactError, match="was not exported by edge-dsc"):
        load_model(save(model, tmp_path))


def test_tensors_in_other_files_are_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    tensor = model.graph.initializer[1]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    with pytest.raises(ArtefactError, match=f"keeps {tensor.name} in another file"):
        load_model(save(model, tmp_path))


def outside(name: str = "evil") -> TensorProto:
    tensor = TensorProto(
        name=name, data_type=TensorProto.FLOAT, dims=[16], data_location=TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def inner_graph() -> onnx.GraphProto:
    out = helper.make_tensor_value_info("so", TensorProto.FLOAT, [16])
    return helper.make_graph([helper.make_node("Identity", ["evil"], ["so"])], "sub", [], [out], [outside()])


def with_constant(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], name="c", value=outside()))


def with_tensors(model: onnx.ModelProto) -> None:
    attribute = onnx.AttributeProto(name="x", type=onnx.AttributeProto.TENSORS, tensors=[outside()])
    model.graph.node[0].attribute.append(attribute)


def with_sparse_tensor(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add().values.CopyFrom(outside())


def with_sparse_attribute(model: onnx.ModelProto) -> None:
    sparse = onnx.SparseTensorProto(values=outside(), dims=[64])
    node = helper.make_node("Constant", [], ["c"], name="c", sparse_value=sparse)
    model.graph.node.insert(0, node)


def with_inner_graph(model: onnx.ModelProto) -> None:
    graph = inner_graph()
    model.graph.node.insert(
        0, helper.make_node("If", ["b"], ["i"], name="if", then_branch=graph, else_branch=graph)
    )


def with_function(model: onnx.ModelProto) -> None:
    """Forty functions, each of which calls the next one twice."""
    opsets = [helper.make_opsetid("edge", 1), helper.make_opsetid("", 18)]
    for index in range(40):
        name = f"F{index + 1}" if index < 39 else "Relu"
        calls = [
            helper.make_node(name, [x], [y], domain="edge" if index < 39 else "")
            for x, y in (("x", "a"), ("a", "y"))
        ]
        model.functions.append(helper.make_function("edge", f"F{index}", ["x"], ["y"], calls, opsets))


def with_many_nodes(model: onnx.ModelProto) -> None:
    for index in range(10_001):
        model.graph.node.add(op_type="Identity", input=["image"], output=[f"u{index}"])


def with_unknown_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].data_type = 99


def with_huge_value(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2**38], np.int64), "size"))
    for node in (
        helper.make_node("ConstantOfShape", ["size"], ["huge"], name="huge"),
        helper.make_node("ReduceSum", ["huge"], ["sum"], name="sum", keepdims=0),
    ):
        model.graph.node.insert(0 if node.name == "huge" else 1, node)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_unknown_type, "in the unknown element type 99"),
        (with_huge_value, "computes huge of 274877906944 numbers"),
        (with_constant, "keeps evil in another file"),
        (with_tensors, "keeps evil in another file"),
        (with_sparse_tensor, "has functions, training steps or sparse tensors"),
        (with_sparse_attribute, "has a sparse tensor in its node c"),
        (with_inner_graph, "has a graph inside its node if"),
        (with_function, "has functions, training steps or sparse tensors"),
        (with_many_nodes, "has more than 10000 nodes"),
    ],
)
def test_what_no_export_of_ours_has_is_refused_before_it_is_used(
    model: onnx.ModelProto, tmp_path: Path, change: Callable[[onnx.ModelProto], None], words: str
) -> None:
    change(model)
    with pytest.raises(ArtefactError, match=words):
        load_model(save(model, tmp_path))


def test_a_graph_that_a_runtime_has_optimised_is_no_model(model: onnx.ModelProto, tmp_path: Path) -> None:
    model.graph.node[2].domain = "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    path = save(model, tmp_path)
    with pytest.raises(ArtefactError, match=r"is no exported model: .* is an operator of com\.microsoft"):
        load_model(path)


def swap_labels(model: onnx.ModelProto) -> None:
    entry = next(entry for entry in model.metadata_props if entry.key == "edge_dsc.contract")
    entry.value = entry.value.replace("focal", "x").replace("clear", "focal").replace("x", "clear", 1)


def zero_weights(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].raw_data = bytes(len(model.graph.initializer[1].raw_data))


def test_a_sealed_model_is_read_like_any_other_and_its_graph_carries_no_seal(
    model: onnx.ModelProto, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(seal_model(model))
    read = load_model(path)
    assert read.proto == model
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    written = onnx.load(path)
    assert [entry.key for entry in written.metadata_props][-1] == SEAL_KEY
    onnx.save(written, path)  # what is saved again unchanged stays sealed
    assert load_model(path).proto == model


@pytest.mark.parametrize("edit", [swap_labels, zero_weights])
def test_an_edited_model_is_refused(
    model: onnx.ModelProto, tmp_path: Path, edit: Callable[[onnx.ModelProto], None]
) -> None:
    sealed = parsed(seal_model(model))
    edit(sealed)
    with pytest.raises(ArtefactError, match="was edited after its export") as caught:
        load_model(save(sealed, tmp_path))
    assert caught.value.remedy == "export it again: edge-dsc export RUN"


def test_no_bit_of_a_sealed_model_changes_unnoticed(model: onnx.ModelProto, tmp_path: Path) -> None:
    good = seal_model(model)
    path = tmp_path / "model.onnx"
    places = np.random.default_rng(0).integers(0, 8 * (len(good) - 100), 20)
    for place in places:
        data = bytearray(good)
        data[place // 8] ^= 1 << (place % 8)
        path.write_bytes(data)
        with pytest.raises(ArtefactError, match=r"was edited after its export|is not an ONNX model"):
            load_model(path)


def test_inputs_that_break_the_contract_are_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    with pytest.raises(ArtefactError, match=r"takes image float \[N, 224, 224, 1\].*says image uint8 \["):
        load_model(save(model, tmp_path))


def test_an_invalid_graph_is_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    model.graph.node.append(helper.make_node("Relu", ["nowhere"], ["lost"]))
    with pytest.raises(ArtefactError, match="is not a valid ONNX model"):
        load_model(save(model, tmp_path))


def parsed(data: bytes) -> onnx.ModelProto:
    return onnx.load_model_from_string(data)


@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_counts_do_not_depend_on_the_precision(graph_in: Graphs, architecture: str, precision: str) -> None:
    model = parsed(graph_in(architecture, precision))
    assert count_parameters(model) == PARAMETERS[architecture]
    assert count_multiply_adds(model) == MULTIPLY_ADDS[architecture]


def test_the_numbers_behind_the_formulas() -> None:
    assert PARAMETERS == {"dsc": 406_019, "cnn": 429_731}
    assert MULTIPLY_ADDS == {"dsc": 36_453_056, "cnn": 166_584_512}


@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_layers_are_counted_by_precision(graph_in: Graphs, architecture: str) -> None:
    layers = LAYERS[architecture]
    assert weighted_layers(parsed(graph_in(architecture, "fp32"))) == {"FP32": layers}
    assert weighted_layers(parsed(graph_in(architecture, "fp16"))) == {"FP16": layers}
    for signed in (True, False):
        quantized = parsed(graph_in(architecture, "int8", signed=signed))
        assert weighted_layers(quantized)["INT8"] >= layers - 1


def test_pairs_that_were_not_fused_are_executed_in_float(graph_in: Graphs) -> None:
    assert executed_layers(parsed(graph_in("dsc", "int8"))) == {"FP32": 9}
    assert executed_layers(parsed(graph_in("dsc", "fp16"))) == {"FP16": 9}


NAMES = ["Conv_2", "Conv_5", "Conv_6", "Conv_9", "Conv_10", "Conv_13", "Conv_14", "MatMul_18", "MatMul_21"]


def test_layers_are_named_in_the_order_of_the_graph(graph_in: Graphs) -> None:
    assert list(layer_types(parsed(graph_in("dsc", "fp32"))).items()) == [(name, "FP32") for name in NAMES]
    quantized = layer_types(parsed(graph_in("dsc", "int8")))
    assert list(quantized) == NAMES
    assert [name for name, kind in quantized.items() if kind == "FP32"] == ["MatMul_21"]


@pytest.mark.parametrize("name", ["", "Conv_5"])
def test_layers_without_a_name_of_their_own_are_not_named_at_all(model: onnx.ModelProto, name: str) -> None:
    next(node for node in model.graph.node if node.name == "Conv_2").name = name
    assert layer_types(model) == {}


def test_an_optimised_graph_gets_the_names_of_its_source_unless_layers_are_missing(graph_in: Graphs) -> None:
    executed = parsed(graph_in("dsc", "fp16"))
    for node in executed.graph.node:
        node.name = "fused"
    assert executed_layer_types(executed, NAMES) == dict.fromkeys(NAMES, "FP16")
    assert executed_layer_types(executed, NAMES[1:]) == {}


def test_multiply_adds_need_the_shapes(deployed_models: dict[str, Path]) -> None:
    model = load_model(deployed_models["dsc"]).proto
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "H"
    next(node for node in model.graph.node if node.op_type == "Reshape").op_type = "Unknown"
    with pytest.raises(ArtefactError, match="output shape of Conv_2 is not known"):
        count_multiply_adds(model)


def run(model: onnx.ModelProto, batch: np.ndarray) -> np.ndarray:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"image": batch})[0]


@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_one_cast_in_and_one_out(deployed_models: dict[str, Path], architecture: str) -> None:
    model = load_model(deployed_models[architecture]).proto
    half = cast_to_fp16(model)
    onnx.checker.check_model(half, full_check=True)
    casts = [(node.input[0], node.attribute[0].i) for node in half.graph.node if node.op_type == "Cast"]
    assert casts == [("image", TensorProto.FLOAT16), ("probabilities.fp16", TensorProto.FLOAT)]
    assert half.graph.input == model.graph.input
    assert half.graph.output == model.graph.output
    assert half.metadata_props == model.metadata_props
    assert {tensor.data_type for tensor in half.graph.initializer} == {TensorProto.FLOAT16, TensorProto.INT64}


@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_probabilities_stay_close(
    deployed_models: dict[str, Path], pixels: Callable[..., np.ndarray], architecture: str
) -> None:
    model = load_model(deployed_models[architecture]).proto
    batch = pixels(12)
    expected, seen = run(model, batch), run(cast_to_fp16(model), batch)
    assert seen.dtype == np.float32
    assert np.abs(seen - expected).max() < 2e-3
    assert (seen.argmax(axis=1) == expected.argmax(axis=1)).all()


def test_small_weights_of_the_first_kernel_are_kept(deployed_models: dict[str, Path]) -> None:
    model = load_model(deployed_models["dsc"]).proto
    stem = next(tensor for tensor in model.graph.initializer if tensor.name == "stem.weight")
    values = numpy_helper.to_array(stem).copy()
    values[0, 0, 0, 0] = 3e-7  # a subnormal float16
    stem.CopyFrom(numpy_helper.from_array(values, stem.name))
    half = cast_to_fp16(model)
    seen = numpy_helper.to_array(next(t for t in half.graph.initializer if t.name == "stem.weight"))
    assert seen[0, 0, 0, 0] == np.float16(3e-7) != 0
    assert np.abs(seen.astype(np.float32) - values).max() <= np.abs(values).max() * 2**-11


@pytest.mark.parametrize(
    ("scale", "message"),
    [(1e9, "float16 ends at 65504"), (1e-6, "too small for float16"), (np.nan, "reaches nan")],
)
def test_weights_out_of_range_are_refused(
    deployed_models: dict[str, Path], scale: float, message: str
) -> None:
    model = load_model(deployed_models["dsc"]).proto
    stem = next(tensor for tensor in model.graph.initializer if tensor.name == "stem.weight")
    values = numpy_helper.to_array(stem) * np.float32(scale)
    stem.CopyFrom(numpy_helper.from_array(values, stem.name))
    with pytest.raises(AccuracyGateError, match=message) as caught:
        cast_to_fp16(model)
    assert caught.value.remedy == "build with --fp32, or train again; nothing was written"
