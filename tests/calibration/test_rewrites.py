from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from calibration.layers import find_layers
from calibration.qdq import put_rest_in_half, quantize
from calibration.rewrites import center_pixels, pixel_border, scale_channels, take_int8_pixels
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
