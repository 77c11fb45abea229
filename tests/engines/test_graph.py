from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from engines.errors import ArtefactError
from engines.graph import count_multiply_adds, count_parameters, executed_layers, load_model, weighted_layers

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


def test_multiply_adds_need_the_shapes(deployed_models: dict[str, Path]) -> None:
    model = load_model(deployed_models["dsc"]).proto
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "H"
    next(node for node in model.graph.node if node.op_type == "Reshape").op_type = "Unknown"
    with pytest.raises(ArtefactError, match="output shape of Conv_2 is not known"):
        count_multiply_adds(model)
