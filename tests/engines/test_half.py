from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from engines.errors import AccuracyGateError
from engines.graph import cast_to_fp16, load_model


def run(model: onnx.ModelProto, batch: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
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
    batch = pixels(32)
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
    assert caught.value.remedy == "build with --fp32, or train anew; nothing was written"
