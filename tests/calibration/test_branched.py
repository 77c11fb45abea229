"""Graphs that are no chains: any mix of INT8 and float layers, run as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from branched_networks import BRANCHED

from calibration.branched import MixedGraph
from calibration.layers import quantizable_layers
from calibration.qdq import quantize
from calibration.select import CalibrationSet
from calibration.table import CalibrationTable

Tables = dict[str, CalibrationTable]
Paths = dict[str, Path]


def answers(model: onnx.ModelProto, pixels: np.ndarray, name: str | None = None) -> np.ndarray:
    """What a graph answers with every node computed as it is written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    found: Any = session.run(None if name is None else [name], {"image": pixels})[0]
    return found


def grids(model: onnx.ModelProto) -> dict[str, tuple[float, int]]:
    """Scale and zero point of each activation that is rounded."""
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pairs = [
        node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] not in stored
    ]
    return {node.input[0]: (float(stored[node.input[1]]), int(stored[node.input[2]])) for node in pairs}


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("left_out", [0, 1, 2])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("architecture", BRANCHED)
def test_a_mix_answers_as_its_quantised_graph(
    branched_models: Paths,
    branched_tables: Tables,
    branched_set: CalibrationSet,
    architecture: str,
    signed: bool,
    left_out: int,
) -> None:
    model = onnx.load(branched_models[architecture])
    table = branched_tables[architecture]
    floating = [layer.name for layer in quantizable_layers(model)][::3] if left_out else []
    if left_out == 2:
        floating = [layer.name for layer in quantizable_layers(model) if layer.name not in floating]
    pixels = branched_set.pixels[::8]
    graph = quantize(model, table, signed_activations=signed, float_layers=floating)
    mixed = MixedGraph(model, table, signed=signed).graph(floating)
    assert grids(mixed) == {name: pytest.approx(grid, rel=1e-6) for name, grid in grids(graph).items()}
    # An unsigned graph also rounds its biases, to 32 bits: a value between two steps may fall to the other side.
    tolerance = 1e-6 if signed else 0.03
    np.testing.assert_allclose(softmax(answers(mixed, pixels)), answers(graph, pixels), atol=tolerance)


@pytest.mark.parametrize("architecture", BRANCHED)
def test_without_int8_nothing_is_rounded(
    branched_models: Paths, branched_tables: Tables, branched_set: CalibrationSet, architecture: str
) -> None:
    model = onnx.load(branched_models[architecture])
    graph = MixedGraph(model, branched_tables[architecture], signed=False)
    found = softmax(graph.logits(branched_set.pixels[:8], graph.names))
    np.testing.assert_allclose(found, answers(model, branched_set.pixels[:8]), atol=1e-5)


def test_the_error_of_a_layer_is_that_of_its_own_output(
    branched_models: Paths, branched_tables: Tables, branched_set: CalibrationSet
) -> None:
    model, table = onnx.load(branched_models["inception"]), branched_tables["inception"]
    pixels = branched_set.pixels[:24]  # three runs
    found = MixedGraph(model, table, signed=True).alone(pixels, "d")
    others = [layer.name for layer in quantizable_layers(model) if layer.name != "d"]
    graph = quantize(model, table, signed_activations=True, float_layers=others)
    seen = []
    for each in (model, graph):
        each.graph.output.append(onnx.helper.make_tensor_value_info("d.out", onnx.TensorProto.FLOAT, None))
        seen.append(answers(each, pixels, "d.out").astype(np.float64))
    assert found.power == pytest.approx((seen[0] ** 2).sum(), rel=1e-4)
    assert found.error == pytest.approx(((seen[0] - seen[1]) ** 2).sum(), rel=0.01)
    assert 0 < found.error < 0.01 * found.power
    np.testing.assert_allclose(softmax(found.logits), answers(graph, pixels), atol=0.02)
