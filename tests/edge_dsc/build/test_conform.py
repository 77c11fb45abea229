"""Classifiers of other exporters in the deployed form: the same answers from raw pixels, for any batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from foreign_models import CLASSES, MEAN, MODELS, SIDE, STD, Exporter
from onnx import TensorProto, helper

from calibration.rewrites import center_pixels
from edge_dsc.build.conform import Normalisation, deploy_any, describe_source
from engines.contract import ModelContract
from engines.errors import BadInputError
from engines.graph import contract_of, parse_model, seal_model

LABELS = ("a", "b", "c")
IMAGENET = Normalisation(scale=1 / 255, mean=MEAN, std=STD)
NORMALISATIONS = {
    "residual": IMAGENET,
    "mobile": Normalisation(scale=1 / 255),  # the rest is inside
    "grey": Normalisation(scale=1 / 127.5, mean=(1.0,)),
}
# What a runtime sees behind Cast and the change of layout.
OPERATORS = {
    "residual": "Pad Conv Relu MaxPool Conv Relu Conv Add Relu Conv Relu GlobalAveragePool Reshape Gemm Softmax",
    "mobile": "Pad Conv Clip Conv Clip Conv AveragePool Reshape Gemm Softmax",
    "grey": "Conv Sigmoid Mul Conv Sigmoid Mul AveragePool Concat Conv GlobalAveragePool Flatten Gemm Softmax",
}


def contract(name: str = "x", *, colour: bool = False, side: int = SIDE) -> ModelContract:
    decode = "rgb8-v1" if colour else "grey8-v1"
    return ModelContract(labels=LABELS, architecture=name, height=side, width=side, decode=decode)


def run(model: onnx.ModelProto, feed: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: feed})[0]


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def pixels_for(wanted: ModelContract, count: int = 4) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, *wanted.input_shape), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "colour"),
    [("residual", False), ("residual", True), ("mobile", False), ("mobile", True), ("grey", False)],
)
def test_the_answers_are_those_of_the_original(name: str, colour: bool) -> None:
    original, wanted = MODELS[name](), contract(name, colour=colour)
    before = original.SerializeToString()
    deployed = deploy_any(original, wanted, NORMALISATIONS[name])
    assert original.SerializeToString() == before
    assert deployed.front.kept is None
    kinds = [node.op_type for node in deployed.proto.graph.node]
    assert kinds == ["Cast", "Transpose" if colour else "Reshape", *OPERATORS[name].split()]
    assert contract_of(deployed.proto, "it") == wanted
    pixels = pixels_for(wanted)
    planes = NORMALISATIONS[name].apply(pixels, 1 if name == "grey" else 3).transpose(0, 3, 1, 2)
    expected = np.concatenate([run(original, planes[n : n + 1]) for n in range(len(planes))])
    expected = expected if name == "mobile" else softmax(expected)
    np.testing.assert_allclose(run(deployed.proto, pixels), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(run(deployed.proto, pixels[:1]), expected[:1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("colour", [False, True])
def test_centred_for_int8_the_constant_plane_is_zero_inside_the_picture(colour: bool) -> None:
    deployed = deploy_any(MODELS["residual"](), contract(colour=colour), IMAGENET).proto
    centred = center_pixels(deployed)
    (stem,) = (node for node in centred.graph.node if node.name == "/conv1/Conv")
    taken = stem.input[0]
    centred.graph.output.append(helper.make_tensor_value_info(taken, TensorProto.FLOAT, None))
    pixels = pixels_for(contract(colour=colour))
    session = onnxruntime.InferenceSession(centred.SerializeToString(), providers=["CPUExecutionProvider"])
    answers, values = session.run(None, {"image": pixels})
    plane = np.full((SIDE + 6, SIDE + 6), -128, np.float32)
    plane[3:-3, 3:-3] = 0
    np.testing.assert_array_equal(values[:, -1], np.broadcast_to(plane, (4, *plane.shape)))
    np.testing.assert_array_equal(values[:, :-1, 3:-3, 3:-3], pixels.transpose(0, 3, 1, 2) - np.float32(128))
    np.testing.assert_allclose(answers, run(deployed, pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_one_that_every_later_step_takes(name: str) -> None:
    proto = deploy_any(MODELS[name](), contract(name)).proto
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names) and "" not in names
    stored = {tensor.name for tensor in proto.graph.initializer}
    assert all(node.input[1] in stored for node in proto.graph.node if node.op_type == "Reshape")
    assert stored == {name for node in proto.graph.node for name in node.input if name in stored}
    assert b"secret" not in proto.SerializeToString()
    assert [entry.domain for entry in proto.opset_import] == [""]
    parse_model(seal_model(proto), Path("model.onnx"))


def tiny(
    image: list[object], finish: Callable[[Exporter, str], str], *, opset: int = 17, ends: str = ""
) -> onnx.ModelProto:
    """A convolution of three channels first, global pooling, and what ``finish`` adds."""
    net = Exporter(0)
    x = net.conv("input", "conv", 3, CLASSES, 3)
    x = net.add("GlobalAveragePool", "pool", x)
    model = net.model(finish(net, x), image, ["N", CLASSES, 1, 1][: 4 if ends else 2], opset)
    return model


@pytest.mark.parametrize(
    ("finish", "square"),
    [
        pytest.param(lambda net, x: x, True, id="[N, C, 1, 1]"),
        pytest.param(
            lambda net, x: net.add("LogSoftmax", "log", net.add("Flatten", "flat", x)), False, id="logs"
        ),
        pytest.param(
            lambda net, x: net.add("Flatten", "flat", net.add("Softmax", "s", x, axis=1)), False, id="flat"
        ),
    ],
)
def test_ends_of_other_forms(finish: Callable[[Exporter, str], str], square: bool) -> None:
    original, wanted = tiny(["N", 3, SIDE, SIDE], finish, ends="square" if square else ""), contract()
    pixels = pixels_for(wanted)
    raw = run(original, np.repeat(pixels, 3, axis=3).transpose(0, 3, 1, 2).astype(np.float32)).reshape(4, -1)
    expected = raw if describe_source(original).gives == "probabilities" else softmax(raw)
    np.testing.assert_allclose(run(deploy_any(original, wanted).proto, pixels), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_flatten_as_tensorflow_has_it_is_one_static_reshape(op: str) -> None:
    """tf2onnx computes its shape from the batch, and turns to channels last before it."""
    net = Exporter(0)
    x = net.add("MaxPool", "pool", net.conv("input", "conv", 3, 4, 3), kernel_shape=[8, 8], strides=[8, 16])
    turned = net.add("Transpose", "turn", x, perm=[0, 2, 3, 1])
    size = net.add("Shape", "shape", x)
    size = net.add("Gather", "order", size, net.constant("order", np.array([0, 2, 3, 1])))
    size = net.add("Cast", "small", size, to=TensorProto.INT32)
    size = net.add("Slice", "batch", size, *(net.constant(f"s{n}", np.array([n])) for n in (0, 1)), "s0")
    size = net.add("Concat", "both", size, net.constant("rest", np.array([4 * 8 * 4], np.int32)), axis=0)
    flat = net.add("Reshape", "flatten", turned, net.add("Cast", "large", size, to=TensorProto.INT64))
    shape = (4 * 8 * 4, CLASSES) if op == "MatMul" else (CLASSES, 4 * 8 * 4)
    x = net.add(
        op, "dense", flat, net.weight("dense.weight", *shape), **({} if op == "MatMul" else {"transB": 1})
    )
    original = net.model(x, ["N", 3, SIDE, SIDE], ["N", CLASSES])
    deployed = deploy_any(original, contract(), Normalisation(scale=1 / 255)).proto
    assert [node.op_type for node in deployed.graph.node] == [
        "Cast",
        "Reshape",
        "Conv",
        "MaxPool",
        "Reshape",
        op,
        "Softmax",
    ]
    pixels = pixels_for(contract())
    planes = Normalisation(scale=1 / 255).apply(pixels, 3).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(run(deployed, pixels), softmax(run(original, planes)), rtol=0, atol=1e-6)


def test_names_of_the_original_that_are_ours() -> None:
    original = MODELS["mobile"]()
    for node in original.graph.node:
        node.input[:] = ["image" if name == "input" else name for name in node.input]
        node.output[:] = [
            "probabilities" if "Conv" in name and "1.0" in name else name for name in node.output
        ]
        node.input[:] = ["probabilities" if "Conv" in name and "1.0" in name else name for name in node.input]
    original.graph.node[-1].name, original.graph.node[0].name = "pixels", "probabilities"
    original.graph.input[0].name = "image"
    onnx.checker.check_model(original)
    deployed = deploy_any(original, contract()).proto
    assert [value.name for value in (*deployed.graph.input, *deployed.graph.output)] == [
        "image",
        "probabilities",
    ]
    pixels = pixels_for(contract())
    planes = np.repeat(pixels, 3, axis=3).transpose(0, 3, 1, 2).astype(np.float32)
    np.testing.assert_allclose(run(deployed, pixels), run(original, planes), rtol=0, atol=1e-5)


def test_channels_last_need_no_detour() -> None:
    """As TensorFlow keeps them: the Transpose stands in the graph, behind the normalisation."""
    net = Exporter(0)
    x = net.add("Mul", "rescaling", "input", net.constant("scale", np.float32(1 / 127.5)))
    x = net.add("Sub", "rescaling", x, net.constant("one", np.float32(1)))
    x = net.conv(net.add("Transpose", "nchw", x, perm=[0, 3, 1, 2]), "conv", 3, CLASSES, 3)
    x = net.add("Flatten", "flat", net.add("GlobalAveragePool", "pool", x))
    original = net.model(x, ["N", SIDE, SIDE, 3], ["N", CLASSES])
    deployed = deploy_any(original, contract())
    assert str(deployed.front) == (
        "folded into the first convolution: Concat, Mul, Sub, Transpose; its border: padded with grey 127.5"
    )
    pixels = pixels_for(contract())
    expected = softmax(run(original, np.repeat(pixels, 3, axis=3).astype(np.float32)))
    np.testing.assert_allclose(run(deployed.proto, pixels), expected, rtol=0, atol=1e-6)


def test_a_front_that_is_not_affine_stays_and_answers_the_same() -> None:
    net = Exporter(0)
    x = net.add("Sqrt", "gamma", "input")
    x = net.add("Flatten", "flat", net.add("GlobalAveragePool", "pool", net.conv(x, "conv", 3, CLASSES, 3)))
    original = net.model(x, ["N", 3, SIDE, SIDE], ["N", CLASSES])
    deployed = deploy_any(original, contract(), Normalisation(scale=1 / 255))
    assert deployed.front.kept == "Sqrt takes it"
    assert [node.op_type for node in deployed.proto.graph.node][:5] == [
        "Cast",
        "Reshape",
        "Concat",
        "Mul",
        "Sqrt",
    ]
    pixels = pixels_for(contract())
    planes = Normalisation(scale=1 / 255).apply(pixels, 3).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(run(deployed.proto, pixels), softmax(run(original, planes)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("opset", [9, 12, 21])
def test_other_opsets_are_brought_into_range(opset: int) -> None:
    original = tiny(["N", 3, SIDE, SIDE], lambda net, x: net.add("Flatten", "flat", x), opset=opset)
    deployed = deploy_any(original, contract())
    assert 13 <= deployed.proto.opset_import[0].version <= 20
    pixels = pixels_for(contract())
    expected = softmax(run(original, np.repeat(pixels, 3, axis=3).transpose(0, 3, 1, 2).astype(np.float32)))
    np.testing.assert_allclose(run(deployed.proto, pixels), expected, rtol=0, atol=1e-6)


def with_ends(change: Callable[[onnx.GraphProto], object]) -> onnx.ModelProto:
    model = MODELS["residual"]()
    change(model.graph)
    return model


def shaped(name: str, *shape: object, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.input.append(shaped("age", 1)), "the model has 2 inputs: input, age"),
        (
            lambda g: g.output.append(shaped("/relu/Relu_output_0", 1, 16, 32, 32)),
            "the model has 2 outputs: ",
        ),
        (
            lambda g: g.input[0].CopyFrom(shaped("input", 1, 3, 64)),
            r"the input input has the shape \[1, 3, 64\]",
        ),
        (lambda g: g.input[0].CopyFrom(shaped("input", 1, 4, 64, 64)), "no axis of one or three channels"),
        (lambda g: g.input[0].CopyFrom(shaped("input", 1, 3, 64, 3)), "no axis of one or three channels"),
        (
            lambda g: g.input[0].CopyFrom(shaped("input", 1, 3, 64, 64, kind=TensorProto.DOUBLE)),
            "input among the inputs is double, not float32",
        ),
        (lambda g: g.input[0].CopyFrom(shaped("input", 1, 3, 96, 96)), "the network's height is 96, not 64"),
        (
            lambda g: g.output[0].CopyFrom(shaped("/layer2.relu/Relu_output_0", 1, 32, 8, 8)),
            r"the output /layer2.relu/Relu_output_0 has the shape \[1, 32, 8, 8\]",
        ),
    ],
)
def test_what_is_no_classifier_is_refused(change: Callable[[onnx.GraphProto], object], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        deploy_any(with_ends(change), contract())


def test_a_contract_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BadInputError, match="the network takes one grey channel, not colour"):
        deploy_any(MODELS["grey"](), contract(colour=True))
    two = ModelContract(labels=("a", "b"), architecture="x", height=SIDE, width=SIDE)
    with pytest.raises(BadInputError, match="the network has 3 outputs, and there are 2 labels"):
        deploy_any(MODELS["residual"](), two)
