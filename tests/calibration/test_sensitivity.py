from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec import structs

from calibration.branched import MixedGraph
from calibration.chain import quantized_chain
from calibration.layers import find_layers, quantizable_layers
from calibration.qdq import quantize
from calibration.select import CalibrationSet
from calibration.sensitivity import measure_sensitivity, time_layers
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


@pytest.mark.parametrize("signed", [True, False])
def test_each_layer_of_a_branched_network_alone_and_left_out(
    branched_models: dict[str, Path],
    branched_tables: dict[str, CalibrationTable],
    branched_set: CalibrationSet,
    signed: bool,
) -> None:
    model, table = onnx.load(branched_models["mobile"]), branched_tables["mobile"]
    pixels = branched_set.pixels[:20]
    ranges = dict(table.ranges)
    ranges["one_clip.out"] = (0.0, ranges["one_clip.out"][1] / 200)  # what one_depthwise takes
    table = structs.replace(table, ranges=ranges)
    seen: list[tuple[str, int, int]] = []
    found = measure_sensitivity(model, table, pixels, signed=signed, progress=lambda *step: seen.append(step))
    assert [layer.name for layer in found.layers] == [layer.name for layer in quantizable_layers(model)]
    assert [layer.name for layer in found.layers if layer.depthwise] == [
        "one_depthwise",
        "two_depthwise",
        "grouped",
    ]
    assert seen == [("sensitivity", step, 8) for step in range(1, 9)]
    graph = MixedGraph(model, table, signed=signed)
    reference = graph.logits(pixels, graph.names)
    difference = graph.logits(pixels, ("stem",)) - reference
    difference -= difference.mean(axis=1, keepdims=True)
    assert found.layers[0].logit_error_without == pytest.approx(float((difference**2).sum()) / 20, rel=1e-4)
    worst = found.harmful(1)[0]
    # An unsigned graph rounds that tensor for the layer before it as well.
    assert worst.name in (("one_depthwise",) if signed else ("one_expand", "one_depthwise"))
    assert found.harmful(99) == found.layers
    if signed:
        assert found.worst == worst
        assert worst.output_error > 0.5
        assert found.worst.flips_without < found.flips == 20


def test_layers_of_a_branched_network_are_timed_by_their_names(
    branched_models: dict[str, Path],
    branched_tables: dict[str, CalibrationTable],
    branched_set: CalibrationSet,
) -> None:
    for architecture in ("residual", "inception"):
        model = onnx.load(branched_models[architecture])
        names = [layer.name for layer in find_layers(model)]
        integer = quantize(model, branched_tables[architecture], signed_activations=False)
        for graph in (model, integer):
            times = time_layers(graph, names, branched_set.pixels)
            assert list(times) == names
            assert all(time > 0 for time in times.values())
