from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from calibration.layers import find_layers, quantizable_layers, raw_pixel_tensors, tensors_to_calibrate
from engines.errors import ArtefactError


def test_every_layer_with_weights_is_found(deployed_models: dict[str, Path]) -> None:
    layers = find_layers(onnx.load(deployed_models["dsc"]))
    assert [(layer.op, layer.shape, layer.axis) for layer in layers] == [
        ("Conv", (32, 1, 3, 3), 0),
        *[("Conv", (32, 1, 3, 3), 0), ("Conv", (32, 32, 1, 1), 0)] * 3,
        ("MatMul", (6272, 64), 1),
        ("MatMul", (64, 3), 1),
    ]
    assert [layer.depthwise for layer in layers] == [
        False,
        True,
        False,
        True,
        False,
        True,
        False,
        False,
        False,
    ]
    assert [layer.raw_pixels for layer in layers] == [True] + [False] * 8
    assert [layer.last for layer in layers] == [False] * 8 + [True]


def test_all_but_the_last_can_run_in_int8(deployed_models: dict[str, Path]) -> None:
    model = onnx.load(deployed_models["cnn"])
    layers = find_layers(model)
    assert quantizable_layers(model) == layers[:-1]
    assert len(layers) == 6
    assert tensors_to_calibrate(model) == tuple(sorted(layer.input for layer in layers))
    assert raw_pixel_tensors(model) == {layers[0].input}


def test_a_graph_whose_layers_have_no_names_is_refused(small_model: Path) -> None:
    model = onnx.load(small_model)
    for node in model.graph.node:
        node.name = ""
    with pytest.raises(ArtefactError, match="'small' has 3 layers with weights, not all with a name"):
        find_layers(model)


def test_transposed_gemm_weights_have_their_channels_first(small_model: Path) -> None:
    model = onnx.load(small_model)
    node = next(node for node in model.graph.node if node.name == "logits")
    node.op_type = "Gemm"
    node.attribute.append(onnx.helper.make_attribute("transB", 1))
    assert [layer.axis for layer in find_layers(model)] == [0, 1, 0]
