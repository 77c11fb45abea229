from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from calibration.qdq import put_rest_in_half, quantize, round_up_to_half
from calibration.table import CalibrationTable
from engines.errors import ArtefactError


def answers(model: onnx.ModelProto) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    images = np.random.default_rng(3).integers(0, 256, (4, 224, 224, 1), dtype=np.uint8)
    return np.asarray(session.run(None, {"image": images})[0])


@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_the_half_graph_answers_as_the_float_one(
    deployed_models: dict[str, Path], network_tables: dict[str, CalibrationTable], architecture: str
) -> None:
    model = onnx.load(deployed_models[architecture])
    made = quantize(model, network_tables[architecture], signed_activations=True)
    before = made.SerializeToString(deterministic=True)
    half = put_rest_in_half(made)
    assert made.SerializeToString(deterministic=True) == before
    assert half.opset_import[0].version == 19
    assert half.graph.input == model.graph.input
    assert half.graph.output == model.graph.output
    assert {e.key: e.value for e in half.metadata_props} == {e.key: e.value for e in model.metadata_props}
    assert answers(half).dtype == np.float32
    np.testing.assert_allclose(answers(half), answers(made), atol=0.02)


def test_scales_are_rounded_up_to_the_next_half() -> None:
    scales = np.array([1.0, 1.0001, 2.0078740, 3.14e-6, 1e-9], np.float32)
    half = round_up_to_half(scales)
    assert half.dtype == np.float16
    assert (half.astype(np.float32) >= scales).all()
    assert half.tolist() == [1.0, 1.0009765625, 2.0078125 + 2**-9, 53 * 2.0**-24, 2.0**-24]


def test_a_graph_without_pairs_is_refused(deployed_models: dict[str, Path]) -> None:
    with pytest.raises(ArtefactError, match="'dsc' has no QuantizeLinear"):
        put_rest_in_half(onnx.load(deployed_models["dsc"]))
