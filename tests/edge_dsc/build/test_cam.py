"""Class activation maps: their sum is the logit, in every precision, of every head that they are given for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from calibration.qdq import put_rest_in_half, quantize
from calibration.table import load_table
from edge_dsc.build.cam import add_cam
from edge_dsc.build.engine import BuildRequest, build_again, build_engine
from edge_dsc.build.export import convert_to_onnx, deploy_graph
from edge_dsc.networks import build_network, fold_network, load_keras
from engines.contract import ModelContract
from engines.cpu.ort import open_session
from engines.errors import ArtefactError, UsageError
from engines.files import sha256_file
from engines.graph import cast_to_fp16, load_model, parse_model
from engines.packages import load
from engines.record import BatchRange, load_record
from engines.runtimes import get_runtime, open_engine

RNG = np.random.default_rng(0)
SIDES = (8, 8)


def weight(*shape: int) -> NDArray[np.float32]:
    return (RNG.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


def small_network(
    head: list[tuple[str, dict[str, Any], list[NDArray[Any]]]],
) -> tuple[ModelProto, ModelContract]:
    """Raw pixels 8x8, a convolution of 4 channels with ReLU, then a head of (operator, attributes, constants)."""
    contract = ModelContract(labels=("a", "b", "c"), architecture="small", height=8, width=8)
    nodes, constants, tensor = [], [], contract.input_name
    steps = [
        ("Cast", {"to": TensorProto.FLOAT}, []),
        ("Reshape", {}, [np.array([-1, 1, 8, 8], np.int64)]),
        ("Conv", {"pads": [1] * 4, "kernel_shape": [3, 3]}, [weight(4, 1, 3, 3) / 99, weight(4)]),
        ("Relu", {}, []),
        *head,
        ("Softmax", {"axis": 1}, []),
    ]
    for place, (op, attributes, values) in enumerate(steps):
        names = [f"{op}{place}.{index}" for index in range(len(values))]
        constants += [numpy_helper.from_array(value, name) for value, name in zip(values, names, strict=True)]
        made = contract.output_name if op == "Softmax" else f"{op}{place}"
        nodes.append(helper.make_node(op, [tensor, *names], [made], name=made, **attributes))
        tensor = made
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(contract.input_name, TensorProto.UINT8, ["N", 8, 8, 1])],
        [helper.make_tensor_value_info(contract.output_name, TensorProto.FLOAT, ["N", 3])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, contract.to_metadata())
    onnx.checker.check_model(model, full_check=True)
    return model, contract


FLAT = ("Reshape", {}, [np.array([-1, 64], np.int64)])
POOL = ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}, [])
HEADS: dict[str, tuple[list[Any], tuple[int, int]]] = {
    "pooled, two dense layers": (
        [POOL, FLAT, ("MatMul", {}, [weight(64, 6)]), ("Add", {}, [weight(6)]), ("Relu", {}, []),
         ("Gemm", {"transB": 1}, [weight(3, 6), weight(3)])],
        (4, 4),
    ),
    "three dense layers, one without ReLU": (
        [POOL, ("Flatten", {"axis": 1}, []), ("Gemm", {}, [weight(64, 6), weight(6)]),
         ("Gemm", {}, [weight(6, 5), weight(5)]), ("Relu", {}, []), ("MatMul", {}, [weight(5, 3)])],
        (4, 4),
    ),
    "flattened by rows": (
        [POOL, ("Transpose", {"perm": [0, 2, 3, 1]}, []), FLAT, ("MatMul", {}, [weight(64, 6)]),
         ("Relu", {}, []), ("MatMul", {}, [weight(6, 3)])],
        (4, 4),
    ),
    "averaged, one dense layer": (
        [("GlobalAveragePool", {}, []), ("Flatten", {"axis": 1}, []), ("Gemm", {}, [weight(4, 3), weight(3)])],
        SIDES,
    ),
    "averaged by axes, two dense layers": (
        [("ReduceMean", {"keepdims": 0}, [np.array([2, 3], np.int64)]), ("MatMul", {}, [weight(4, 6)]),
         ("Relu", {}, []), ("MatMul", {}, [weight(6, 3)])],
        SIDES,
    ),
    "averaged, channels last": (
        [("Transpose", {"perm": [0, 2, 3, 1]}, []),
         ("ReduceMean", {"keepdims": 0}, [np.array([1, 2], np.int64)]), ("MatMul", {}, [weight(4, 3)])],
        SIDES,
    ),
}  # fmt: skip


def logits_and_maps(model: ModelProto, pixels: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Run a graph with maps; return its logits and its maps."""
    seen = ModelProto()
    seen.CopyFrom(model)
    softmax = next(node for node in seen.graph.node if node.op_type == "Softmax")
    seen.graph.output.append(helper.make_tensor_value_info(softmax.input[0], TensorProto.FLOAT, None))
    session = open_session(seen.SerializeToString(), "maps", threads=1, remedy="none")
    _, maps, logits = session.run(None, {seen.graph.input[0].name: pixels})
    return logits.astype(np.float64), maps


def constants_of(head: list[Any], model: ModelProto, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """What the biases give to the logits where each ReLU of the head selects as these pixels have it select."""
    seen = ModelProto()
    seen.CopyFrom(model)
    relus = [node.output[0] for node in seen.graph.node if node.op_type == "Relu"][1:]
    for name in relus:
        seen.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = open_session(seen.SerializeToString(), "head", threads=1, remedy="none")
    gates = iter(session.run(relus, {seen.graph.input[0].name: pixels})) if relus else iter(())
    value = None
    for op, attributes, constants in head:
        if op in ("MatMul", "Gemm"):
            kernel = constants[0].T if attributes.get("transB") else constants[0]
            value = np.zeros((len(pixels), kernel.shape[0])) if value is None else value
            value = value @ kernel.astype(np.float64) + (constants[1] if len(constants) > 1 else 0)
        elif op == "Add":
            value = value + constants[0]
        elif op == "Relu":
            value = value * (next(gates) > 0)
    assert value is not None
    return value


@pytest.mark.parametrize("name", HEADS)
def test_the_sum_of_a_map_is_the_logit_up_to_the_constants(name: str) -> None:
    head, sides = HEADS[name]
    model, contract = small_network(head)
    before = model.SerializeToString()
    made, told = add_cam(model, contract)
    assert model.SerializeToString() == before
    assert told.cam == sides and told == parse_model(made.SerializeToString(), Path("made")).contract
    pixels = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 1), np.uint8)
    logits, maps = logits_and_maps(made, pixels)
    assert maps.shape == (5, 3, *sides) and maps.dtype == np.float32
    assert np.abs(logits - maps.sum(axis=(2, 3)) - constants_of(head, model, pixels)).max() < 1e-5
    assert np.abs(maps).max() > 0.01


@pytest.mark.parametrize("name", HEADS)
def test_in_fp32_the_first_dense_layer_is_read_once_and_keeps_its_name(name: str) -> None:
    head, _ = HEADS[name]
    model, contract = small_network(head)
    made, _ = add_cam(model, contract)
    layers = [
        [
            node.name
            for node in graph.graph.node
            if node.op_type in ("MatMul", "Gemm") and node.input[1] in stored
        ]
        for graph, stored in ((g, {each.name for each in g.graph.initializer}) for g in (model, made))
    ]
    assert layers[0] == [each for each in layers[1] if not each.startswith("cam")]
    sizes = [
        max(each.dims[-1] * each.dims[-2] * (each.dims[0] if len(each.dims) == 3 else 1)
            for each in graph.graph.initializer if len(each.dims) in (2, 3))
        for graph in (model, made)
    ]  # fmt: skip
    assert sizes[0] == sizes[1]
    pixels = np.random.default_rng(4).integers(0, 256, (3, 8, 8, 1), np.uint8)
    plain = open_session(model.SerializeToString(), "plain", threads=1, remedy="none").run(
        None, {"image": pixels}
    )
    mapped = open_session(made.SerializeToString(), "maps", threads=1, remedy="none").run(
        None, {"image": pixels}
    )
    np.testing.assert_allclose(mapped[0], plain[0], atol=1e-6)


@pytest.mark.parametrize("name", ["pooled, two dense layers", "averaged, one dense layer"])
def test_a_place_of_the_map_is_a_place_of_the_picture(name: str) -> None:
    """Black pixels in one corner change the map there and nowhere else but beside it."""
    head, (height, width) = HEADS[name]
    plain = [step for step in head if step[0] != "Relu"]  # without ReLU the effective weights are the same
    model, contract = small_network(plain)
    made, _ = add_cam(model, contract)
    pixels = np.full((2, 8, 8, 1), 200, np.uint8)
    pixels[1, :2, :2] = 0
    _, maps = logits_and_maps(made, pixels)
    changed = np.abs(maps[1] - maps[0]).max(axis=0) > 1e-6
    assert changed[0, 0] and not changed[height // 2 :].any() and not changed[:, width // 2 :].any()


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ([POOL, FLAT, ("MatMul", {}, [weight(64, 6)]), ("Tanh", {}, []), ("MatMul", {}, [weight(6, 3)])], "Tanh"),
        ([("Conv", {"kernel_shape": [8, 8]}, [weight(3, 4, 8, 8)]), ("Flatten", {"axis": 1}, [])], "Flatten"),
        ([POOL, ("Transpose", {"perm": [0, 3, 2, 1]}, []), FLAT, ("MatMul", {}, [weight(64, 3)])], "Transpose"),
    ],
)  # fmt: skip
def test_a_head_that_is_not_linear_or_of_no_map_is_refused(head: list[Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        add_cam(*small_network(head))
    assert "build without --cam" in caught.value.remedy


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8 in half"])
def test_maps_of_a_deployed_network_follow_its_precision(calibrated_run: Path, precision: str) -> None:
    model, table = load_model(calibrated_run / "model.onnx"), load_table(calibrated_run / "calibration.json")
    graph = model.proto
    if precision == "fp16":
        graph = cast_to_fp16(graph)
    elif precision != "fp32":
        graph = quantize(graph, table, signed_activations=True)
        graph = put_rest_in_half(graph) if "half" in precision else graph
    made, contract = add_cam(graph, model.contract)
    assert contract == msgspec.structs.replace(model.contract, cam=(14, 14))
    stored = {
        one.name: numpy_helper.to_array(one).astype(np.float64) for one in model.proto.graph.initializer
    }
    pixels = np.random.default_rng(1).integers(0, 200, (2, 7, 7, 1), np.uint8).repeat(32, 1).repeat(32, 2)
    seen = ModelProto()
    seen.CopyFrom(made)
    softmax = next(node for node in seen.graph.node if node.op_type == "Softmax")
    relu = [node.output[0] for node in seen.graph.node if node.op_type == "Relu"][-1]
    kind = TensorProto.FLOAT16 if precision in ("fp16", "int8 in half") else TensorProto.FLOAT
    for name in (softmax.input[0], relu):
        seen.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    session = open_session(seen.SerializeToString(), precision, threads=1, remedy="none")
    _, maps, logits, units = session.run(None, {model.contract.input_name: pixels})
    constant = ((units > 0) * stored["dense.bias"]) @ stored["logits.weight"] + stored["logits.bias"]
    error = np.abs(logits.astype(np.float64) - maps.sum(axis=(2, 3)) - constant).max()
    assert error < (1e-6 if kind == TensorProto.FLOAT else 1e-2) * max(np.abs(logits).max(), 10)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_engine_with_maps_answers_as_one_without(
    runtime: str, deployed_models: dict[str, Path], tmp_path: Path
) -> None:
    if reason := get_runtime(runtime).availability().no_run:
        pytest.skip(reason)
    model = deployed_models["dsc"]
    request = BuildRequest(
        model=model, runtime=runtime, batch=BatchRange(1, 1, 4), out=tmp_path / "plain.engine"
    )
    plain = build_engine(request)
    built = build_engine(BuildRequest(**{**vars(request), "cam": True, "out": tmp_path / "cam.engine"}))
    record = load_record(built.path)
    assert record.contract.cam == (14, 14) and "--cam" in record.build_command
    pixels = np.random.default_rng(2).integers(0, 256, (3, 224, 224, 1), np.uint8)
    with open_engine(plain.path) as first, open_engine(built.path) as second:
        answers, maps = second.explain(pixels)
        assert np.array_equal(second.run(pixels), answers)
        assert (
            np.abs(first.run(pixels) - answers).max() < 1e-6
        )  # the first dense layer is summed up in another order
        assert (maps.shape, maps.dtype) == ((3, 3, 14, 14), np.float32)
        one_by_one = np.concatenate([second.explain(pixels[index : index + 1])[1] for index in range(3)])
        assert np.abs(one_by_one - maps).max() < 1e-4 * np.abs(maps).max()
        with pytest.raises(UsageError, match="built without class activation maps") as caught:
            first.explain(pixels)
        assert caught.value.remedy.endswith("--cam")
    again = build_again(built.path, tmp_path / "again.engine")
    assert sha256_file(again.path) == sha256_file(built.path)


def test_an_engine_whose_record_hides_its_maps_is_refused(
    deployed_models: dict[str, Path], tmp_path: Path
) -> None:
    request = BuildRequest(
        model=deployed_models["dsc"], runtime="onnxruntime", cam=True, out=tmp_path / "cam.engine"
    )
    built = build_engine(request)
    told = msgspec.structs.replace(
        built.record, contract=msgspec.structs.replace(built.record.contract, cam=(7, 7))
    )
    with pytest.raises(ArtefactError, match="has the inputs and outputs"):
        get_runtime("onnxruntime").open_runner(built.path, told)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_maps_are_those_of_keras_own_gradient_times_activation(architecture: str) -> None:
    """The gradient of a logit with respect to the last convolution's output, 28 x 28, times that output.

    Of four places that are pooled Keras' gradient is at one; the map has one number for the four.
    """
    keras, tensorflow = load_keras(), load("tensorflow")
    trained = build_network(architecture, 3)
    rng = np.random.default_rng(1)
    for layer in trained.layers:
        layer.set_weights([value + 0.05 * rng.random(value.shape) for value in layer.get_weights()])
    folded = fold_network(trained)
    contract = ModelContract(labels=("a", "b", "c"), architecture=architecture)
    made, _ = add_cam(deploy_graph(convert_to_onnx(folded), contract, {}), contract)
    pixels = rng.integers(0, 256, (2, 224, 224, 1), np.uint8)
    session = open_session(made.SerializeToString(), architecture, threads=1, remedy="none")
    maps = session.run(["cam"], {"image": pixels})[0]

    last = folded.get_layer("block3_pointwise" if architecture == "dsc" else "block3_conv").output
    features = keras.Model(folded.input, last)(pixels.astype(np.float32))
    kernel, bias = folded.get_layer("probabilities").get_weights()
    with tensorflow.GradientTape(persistent=True) as tape:
        tape.watch(features)
        x = features
        for name in ("pool", "flatten", "dense"):
            x = folded.get_layer(name)(x)
        scores = [tensorflow.reduce_sum((x @ kernel + bias)[:, index]) for index in range(3)]
    wanted = []
    for score in scores:
        evidence = (tape.gradient(score, features) * features).numpy().sum(axis=3)
        wanted.append(evidence.reshape(2, 14, 2, 14, 2).sum(axis=(2, 4)))
    expected = np.stack(wanted, axis=1)
    assert np.abs(expected).max() > 0.05
    assert np.abs(maps - expected).max() < 1e-4 * max(1.0, float(np.abs(expected).max()))
