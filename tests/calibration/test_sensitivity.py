from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec import structs

from calibration.chain import quantized_chain
from calibration.layers import quantizable_layers
from calibration.sensitivity import measure_sensitivity
from calibration.table import CalibrationTable
from engines.errors import BadInputError

PIXELS = np.random.default_rng(3).integers(0, 256, (5, 224, 224, 1), dtype=np.uint8)


@pytest.mark.parametrize("signed", [True, False])
def test_each_layer_alone_and_each_left_out(
    deployed_models: dict[str, Path], network_tables: dict[str, CalibrationTable], signed: bool
) -> None:
    model, table = onnx.load(deployed_models["dsc"]), network_tables["dsc"]
    times = {"Conv_2": {"FP32": 0.5, "INT8": 0.25}}
    found = measure_sensitivity(model, table, PIXELS, signed=signed, times=times)
    layers = quantizable_layers(model)
    assert [layer.name for layer in found.layers] == [layer.name for layer in layers]
    assert [layer.depthwise for layer in found.layers] == [layer.depthwise for layer in layers]
    assert (found.images, found.signed) == (5, signed)
    assert found.layers[0].time_ms == {"FP32": 0.5, "INT8": 0.25}
    assert found.layers[1].time_ms == {}
    assert all(0 < layer.output_error < 0.2 for layer in found.layers)
    # The whole and one layer left out, by the way that the other room takes.
    chain, grids = quantized_chain(model, table, signed=signed)
    reference = chain.finish(0, chain.start(PIXELS))
    for floats, seen in (
        ((), found.logit_error),
        ((layers[2].name,), found.layers[2].logit_error_without),
    ):
        difference = chain.run(PIXELS, grids, floats) - reference
        difference -= difference.mean(axis=1, keepdims=True)
        assert seen == pytest.approx(float((difference**2).sum()) / 5, rel=1e-4)


def test_a_ruined_layer_is_the_worst(
    deployed_models: dict[str, Path], network_tables: dict[str, CalibrationTable]
) -> None:
    model, table = onnx.load(deployed_models["cnn"]), network_tables["cnn"]
    target = quantizable_layers(model)[3]
    ranges = {**table.ranges, target.input: (0.0, table.ranges[target.input][1] / 50)}
    broken = structs.replace(table, ranges=ranges)
    found = measure_sensitivity(model, broken, PIXELS, signed=True)
    assert found.worst.name == target.name
    assert max(found.layers, key=lambda layer: layer.output_error).name == target.name
    assert found.worst.logit_error_without < found.logit_error


def test_no_images_are_refused(
    deployed_models: dict[str, Path], network_tables: dict[str, CalibrationTable]
) -> None:
    with pytest.raises(BadInputError, match="no images"):
        measure_sensitivity(onnx.load(deployed_models["cnn"]), network_tables["cnn"], PIXELS[:0], signed=True)
