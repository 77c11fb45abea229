from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from calibration.chain import Chain, quantized_chain
from calibration.qdq import quantize
from calibration.table import CalibrationTable
from engines.errors import ArtefactError

PIXELS = np.random.default_rng(3).integers(0, 256, (3, 224, 224, 1), dtype=np.uint8)


def probabilities(model: onnx.ModelProto) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"image": PIXELS})[0])


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("second_float", [False, True])
@pytest.mark.parametrize(
    ("signed", "weight_bits", "tolerance"), [(True, 8, 1e-3), (False, 8, 5e-3), (False, 7, 5e-3)]
)
@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_a_chain_computes_what_the_int8_graph_does(
    deployed_models: dict[str, Path],
    network_tables: dict[str, CalibrationTable],
    architecture: str,
    signed: bool,
    weight_bits: int,
    tolerance: float,
    second_float: bool,
) -> None:
    """A value at a boundary may round either way; an unsigned graph also rounds its biases to integers."""
    model = onnx.load(deployed_models[architecture])
    table = network_tables[architecture]
    bits = {"weight_bits": weight_bits}
    chain, grids = quantized_chain(model, table, signed=signed, **bits)
    left_out = (chain.layers[1].name,) if second_float else ()
    graph = quantize(model, table, signed_activations=signed, float_layers=left_out, **bits)
    np.testing.assert_allclose(
        softmax(chain.run(PIXELS, grids, left_out)), probabilities(graph), atol=tolerance
    )
    np.testing.assert_allclose(softmax(chain.finish(0, chain.start(PIXELS))), probabilities(model), atol=1e-6)


def test_a_graph_that_branches_is_refused(deployed_models: dict[str, Path]) -> None:
    model = onnx.load(deployed_models["cnn"])
    relus = [node for node in model.graph.node if node.op_type == "Relu"]
    add = onnx.helper.make_node("Add", [relus[1].output[0], relus[1].output[0]], ["twice"], "twice")
    model.graph.node.insert(list(model.graph.node).index(relus[1]) + 1, add)
    Chain(model, signed=True)  # a side branch that nothing needs
    model.graph.node[-1].input[0] = "pixels"
    model.graph.node.insert(
        0, onnx.helper.make_node("Add", [relus[2].output[0], relus[1].output[0]], ["pixels"], "skip")
    )
    with pytest.raises(ArtefactError, match="is no chain of layers"):
        Chain(model, signed=True)
