from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from branched_networks import BRANCHED, Network

from calibration.layers import find_layers
from calibration.qdq import put_rest_in_half, quantize
from calibration.rewrites import center_pixels, fold_norms, pixel_border, scale_channels, take_int8_pixels
from calibration.table import CalibrationTable
from engines.errors import ArtefactError
from engines.graph import contract_of
from engines.images import shape_input

PIXELS = np.random.default_rng(3).integers(0, 256, (3, 224, 224, 1), dtype=np.uint8)


def run(model: onnx.ModelProto, *outputs: str, pixels: np.ndarray = PIXELS) -> list[np.ndarray]:
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    opened.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        opened.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, {"image": pixels}))


def before_first_layer(model: onnx.ModelProto) -> list[str]:
    producers = {name: node for node in model.graph.node for name in node.output}
    name = next(node for node in model.graph.node if node.op_type == "Conv").input[0]
    found: list[str] = []
    while name in producers:
        found.insert(0, producers[name].op_type)
        name = producers[name].input[0]
    return found


@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_centred_pixels_change_no_answer(deployed_models: dict[str, Path], architecture: str) -> None:
    model = onnx.load(deployed_models[architecture])
    centred = center_pixels(model)
    onnx.checker.check_model(centred)
    np.testing.assert_allclose(run(centred)[0], run(model)[0], atol=1e-6)
    first = find_layers(centred)[0]
    assert first.raw_pixels
    assert [(layer.name, layer.shape) for layer in find_layers(centred)] == [
        (layer.name, layer.shape) for layer in find_layers(model)
    ]
    assert [layer.raw_pixels for layer in find_layers(centred)[1:]] == [False] * (
        len(find_layers(centred)) - 1
    )


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_int8_holds_every_pixel_exactly(
    deployed_models: dict[str, Path],
    network_tables: dict[str, CalibrationTable],
    architecture: str,
    signed: bool,
) -> None:
    model = onnx.load(deployed_models[architecture])
    graph = quantize(model, network_tables[architecture], signed_activations=signed)
    node = next(node for node in graph.graph.node if node.op_type == "Conv")
    seen = run(graph, node.input[0])[1]
    expected = np.pad(PIXELS.astype(np.float32)[..., 0] - 128, ((0, 0), (1, 1), (1, 1)), constant_values=-128)
    np.testing.assert_array_equal(seen[:, 0], expected)


@pytest.mark.parametrize("float_stem", [False, True])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_int8_pixels_give_the_very_answers_of_grey_ones(
    deployed_models: dict[str, Path],
    network_tables: dict[str, CalibrationTable],
    architecture: str,
    signed: bool,
    float_stem: bool,
) -> None:
    model = onnx.load(deployed_models[architecture])
    left = (find_layers(model)[0].name,) if float_stem else ()
    graph = quantize(model, network_tables[architecture], signed_activations=signed, float_layers=left)
    contract = contract_of(model, "model").with_input("int8", 1)
    taken = take_int8_pixels(graph, contract)
    onnx.checker.check_model(taken, full_check=True)
    assert contract_of(taken, "taken") == contract
    pair = [] if signed else ["QuantizeLinear", "DequantizeLinear"]
    assert before_first_layer(taken) == ["DequantizeLinear", *pair]
    assert before_first_layer(graph)[:4] == ["Cast", "Reshape", "Add", "Pad"]
    pixels = shape_input(PIXELS, contract)
    assert (pixels.dtype, pixels.shape) == (np.int8, (3, 1, 226, 226))
    seen, expected = (
        run(which, find_layers(model)[-1].input, pixels=given)
        for which, given in ((taken, pixels), (graph, PIXELS))
    )
    for here, there in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(here, there)
    if signed:
        half = put_rest_in_half(taken)
        onnx.checker.check_model(half, full_check=True)
        np.testing.assert_array_equal(run(half, pixels=pixels)[0], run(put_rest_in_half(graph))[0])


def test_only_a_padding_of_one_or_none_can_be_given_by_the_host(deployed_models: dict[str, Path]) -> None:
    model = onnx.load(deployed_models["dsc"])
    assert pixel_border(model) == 1
    pads = next(
        attribute
        for node in model.graph.node
        if node.op_type == "Conv"
        for attribute in node.attribute
        if attribute.name == "pads"
    )
    for values, border in (([0] * 4, 0), ([2] * 4, None), ([0, 0, 1, 1], None)):
        pads.ints[:] = values
        assert pixel_border(model) == border
    assert pixel_border(center_pixels(onnx.load(deployed_models["dsc"]))) is None


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_rounded_kernels_do_not_shift_a_grey_image(
    deployed_models: dict[str, Path],
    network_tables: dict[str, CalibrationTable],
    architecture: str,
    signed: bool,
) -> None:
    """The roundings of a kernel add up; on pixels that were not centred they would meet 128 times their sum."""
    model = onnx.load(deployed_models[architecture])
    graph = quantize(model, network_tables[architecture], signed_activations=signed)
    grey = np.full((1, 224, 224, 1), 128, np.uint8)
    output = next(node for node in model.graph.node if node.op_type == "Conv").output[0]
    expected, seen = (run(which, output, pixels=grey)[1][0, :, 1:-1, 1:-1] for which in (model, graph))
    weight = find_layers(model)[0].weight
    kernels = next(tensor for tensor in model.graph.initializer if tensor.name == weight)
    step = np.abs(onnx.numpy_helper.to_array(kernels)).max(axis=(1, 2, 3)) / 127
    # The unsigned graph's bias is an integer of these steps; the signed graph's is a float.
    allowed = 0.51 * step[:, None, None] if not signed else 1e-6
    assert (np.abs(seen - expected) <= allowed).all()


def test_centering_happens_once(deployed_models: dict[str, Path]) -> None:
    once = center_pixels(onnx.load(deployed_models["dsc"]))
    assert center_pixels(once) == once


@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_scaled_channels_change_no_answer(deployed_models: dict[str, Path], architecture: str) -> None:
    model = onnx.load(deployed_models[architecture])
    rng = np.random.default_rng(0)
    factors = {
        layer.input: tuple(2 ** rng.uniform(-3, 3, 32))
        for layer in find_layers(model)
        if not layer.raw_pixels and not layer.last
    }
    scaled = scale_channels(model, factors)
    assert len(factors) == {"dsc": 7, "cnn": 4}[architecture]
    np.testing.assert_allclose(run(scaled)[0], run(model)[0], atol=1e-6)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert any(
        not np.array_equal(onnx.numpy_helper.to_array(t), weights[t.name]) for t in scaled.graph.initializer
    )


def test_factors_of_another_network_are_refused(deployed_models: dict[str, Path]) -> None:
    model = onnx.load(deployed_models["dsc"])
    with pytest.raises(ArtefactError, match="Conv_5 has no 3 channels to scale"):
        scale_channels(model, {"Conv_5": (1.0, 1.0, 1.0)})
    with pytest.raises(ArtefactError, match="elsewhere has no 1 channels to scale"):
        scale_channels(model, {"elsewhere": (1.0,)})
    with pytest.raises(ArtefactError, match="to scale"):
        scale_channels(model, {find_layers(model)[0].input: (1.0,)})


SMALL = PIXELS[:, :32, :32]


@pytest.mark.parametrize("architecture", BRANCHED)
def test_folded_norms_change_no_answer(architecture: str) -> None:
    model = BRANCHED[architecture]()
    before = model.SerializeToString(deterministic=True)
    folded = fold_norms(model)
    onnx.checker.check_model(folded, full_check=True)
    assert model.SerializeToString(deterministic=True) == before
    assert "BatchNormalization" not in {node.op_type for node in folded.graph.node}
    assert [layer.name for layer in find_layers(folded)] == [layer.name for layer in find_layers(model)]
    np.testing.assert_allclose(run(folded, pixels=SMALL)[0], run(model, pixels=SMALL)[0], atol=2e-6)


def test_a_norm_goes_into_the_convolution_before_it_or_becomes_a_product_and_a_sum() -> None:
    folded = fold_norms(BRANCHED["residual"]())
    nodes = {node.name: node for node in folded.graph.node}
    assert nodes["one_a"].output[0] == "one_norm.out"  # the norm's, which keeps its name
    assert list(nodes["one_a"].input) == ["stem_pool.out", "one_a.weight", "one_a.folded_bias"]
    assert {"three_norm.mul", "three_norm.add"} <= set(nodes)  # behind a sum: no convolution can take it


def test_a_graph_without_norms_stays_the_object_it_is(deployed_models: dict[str, Path]) -> None:
    for model in (onnx.load(deployed_models["dsc"]), BRANCHED["swish"]()):
        assert fold_norms(model) is model


def test_factors_and_shifts_behind_a_convolution_are_folded_and_shared_weights_left_alone() -> None:
    net = Network("steps")
    x = net.conv("stem", net.pixels(), (1, 16), scale=1 / 60)
    x = net.add(
        "Mul", "gain", x, net.store("gain.value", np.linspace(0.5, 2, 16, dtype=np.float32)[:, None, None])
    )
    x = net.add("Add", "offset", net.store("offset.value", np.array(0.25, np.float32)), x)
    x = net.norm("norm", x, 16)
    net.store("shared", np.ones((16, 16, 1, 1), np.float32) / 8)
    a = net.norm("a_norm", net.add("Conv", "a", x, "shared"), 16)
    b = net.add("Conv", "b", x, "shared")
    model = net.finish(net.add("Concat", "both", a, b, axis=1), 32)
    folded = fold_norms(model)
    names = [node.name for node in folded.graph.node]
    assert not {"gain", "offset", "norm"} & set(names)
    assert {"a_norm.mul", "a_norm.add"} <= set(names)
    np.testing.assert_allclose(run(folded, pixels=SMALL)[0], run(model, pixels=SMALL)[0], atol=2e-6)


def test_a_node_that_has_the_name_of_the_border_keeps_it() -> None:
    model = BRANCHED["swish"]()
    model.graph.node[1].name = "stem.border"
    names = [node.name for node in center_pixels(model).graph.node]
    assert names[1:4] == ["stem.border", "stem.centre", "stem.border_"]
