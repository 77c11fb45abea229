from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec import structs

from calibration import mixed
from calibration.branched import MixedGraph
from calibration.layers import quantizable_layers
from calibration.mixed import LayerCost, Mix, predict_costs, search
from calibration.select import CalibrationSet
from calibration.table import CalibrationTable
from engines.errors import AccuracyGateError, BadInputError, UsageError

Tables = dict[str, CalibrationTable]
Paths = dict[str, Path]


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (3, 224, 224, 1), dtype=np.uint8)


def test_all_mixes_of_both_networks_are_tried(
    deployed_models: Paths, network_tables: Tables, pixels: np.ndarray
) -> None:
    for architecture, possible in (("dsc", 256), ("cnn", 32)):
        model = onnx.load(deployed_models[architecture])
        found = search(model, network_tables[architecture], pixels, [0, 1, 2], signed=True, max_drop=100.0)
        assert (found.tried, found.possible, found.images) == (possible, possible, 3)
        assert found.all_int8.float_layers == ()
        assert found.all_float.float_layers == tuple(layer.name for layer in quantizable_layers(model))
        assert (found.all_float.same_top1, found.all_float.error) == (3, 0.0)
        assert found.best.correct >= found.all_int8.correct
        assert found.best.cost <= found.all_float.cost
        again = search(model, network_tables[architecture], pixels, [0, 1, 2], signed=True, max_drop=100.0)
        assert again == found
        assert found.text.startswith(f"mixed precision: {possible} of {possible} mixes tried on 3 images")


def test_multiply_adds_are_weighted_and_changes_counted(deployed_models: Paths) -> None:
    model = onnx.load(deployed_models["dsc"])
    costs = predict_costs(model)
    assert costs["Conv_2"] == LayerCost(int8=224 * 224 * 288 / 2, rest=224 * 224 * 288, change=224 * 224)
    assert costs["Conv_5"] == LayerCost(int8=112 * 112 * 288, rest=112 * 112 * 288, change=112 * 112 * 32)
    dense = 32 * 14 * 14 * 64
    assert costs[quantizable_layers(model)[-1].name] == LayerCost(
        int8=dense / 2, rest=dense, change=32 * 14 * 14
    )


def cheapest_without(layer: str) -> dict[str, LayerCost]:
    """Costs by which INT8 pays everywhere but in one layer."""
    names = ["Conv_2", "Conv_5", "Conv_8", "Conv_11", "MatMul_15"]
    return {name: LayerCost(int8=9.0 if name == layer else 1.0, rest=2.0) for name in names}


def test_the_cheapest_mix_is_taken(
    deployed_models: Paths, network_tables: Tables, pixels: np.ndarray
) -> None:
    model = onnx.load(deployed_models["cnn"])
    found = search(
        model,
        network_tables["cnn"],
        pixels,
        [0, 1, 2],
        signed=True,
        max_drop=100.0,
        costs=cheapest_without("Conv_8"),
    )
    assert found.float_layers == ("Conv_8",)
    assert (found.best.cost, found.all_int8.cost, found.all_float.cost) == (6.0, 13.0, 10.0)
    assert found.unit == "measured"


def test_a_ruined_layer_shows_and_is_left_out(
    deployed_models: Paths, network_tables: Tables, pixels: np.ndarray
) -> None:
    """One range far too small: the layer's input is cut to nothing."""
    model = onnx.load(deployed_models["cnn"])
    table = network_tables["cnn"]
    broken = structs.replace(table, ranges={**table.ranges, quantizable_layers(model)[2].input: (0.0, 1e-6)})
    free = {layer.name: LayerCost(int8=1.0, rest=1.0) for layer in quantizable_layers(model)}
    right = search(model, table, pixels, [0, 0, 0], signed=True, max_drop=100.0).all_float
    found = search(model, broken, pixels, [0, 0, 0], signed=True, max_drop=100.0, costs=free)
    whole = search(model, table, pixels, [0, 0, 0], signed=True, max_drop=100.0, costs=free)
    assert found.all_float == dataclasses.replace(right, cost=5.0)
    assert found.all_int8.error > 10 * whole.all_int8.error
    assert found.best.error < found.all_int8.error
    assert quantizable_layers(model)[2].name in found.float_layers


def test_a_budget_that_nothing_keeps_is_an_accuracy_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    from calibration import mixed

    def mix(floats: tuple[str, ...], correct: int, cost: float) -> Mix:
        return Mix(float_layers=floats, correct=correct, same_top1=0, error=0.0, cost=cost)

    int8, half, none = mix((), 90, 1), mix(("a",), 94, 2), mix(("a", "b"), 100, 3)
    chosen = mixed._choose([int8, half, none], int8, none, 6.0, 100)
    assert chosen is half
    with pytest.raises(
        AccuracyGateError, match=r"none of 2 mixes .* at most 5 points \(all INT8 loses 10.00\)"
    ):
        mixed._choose([int8, half, none], int8, none, 5.0, 100)
    # Of two that lose nothing in sum, the one that changes fewer answers, though it costs more.
    lucky = dataclasses.replace(mix(("b",), 100, 1.5), same_top1=90)
    steady = dataclasses.replace(mix(("c",), 100, 2.5), same_top1=99)
    assert mixed._choose([int8, lucky, steady, none], int8, none, 0.5, 100) is steady
    assert mixed._choose([int8, lucky, steady, none], int8, none, 10.0, 100).same_top1 == 90
    # Where INT8 answers more images right than the mix, the mix is no improvement.
    assert mixed._choose([mix((), 95, 2.5), half, none], mix((), 95, 2.5), none, 6.0, 100).correct == 95


def test_senseless_requests_are_refused(
    deployed_models: Paths, network_tables: Tables, pixels: np.ndarray
) -> None:
    model = onnx.load(deployed_models["cnn"])
    with pytest.raises(UsageError, match="budget of -1 points"):
        search(model, network_tables["cnn"], pixels, [0, 1, 2], signed=True, max_drop=-1)
    with pytest.raises(BadInputError, match="3 images with 1 labels"):
        search(model, network_tables["cnn"], pixels, [0], signed=True, max_drop=1)


def ruined(table: CalibrationTable, *tensors: str) -> CalibrationTable:
    """A table whose ranges of some tensors are far too small: what takes them answers nonsense in INT8."""
    ranges = {
        name: (low / 200, high / 200) if name in tensors else (low, high)
        for name, (low, high) in table.ranges.items()
    }
    return structs.replace(table, ranges=ranges)


def float_answers(model: onnx.ModelProto, table: CalibrationTable, pixels: np.ndarray) -> list[int]:
    graph = MixedGraph(model, table, signed=True)
    return [int(place) for place in graph.logits(pixels, graph.names).argmax(axis=1)]


def test_a_branched_network_stays_in_int8_where_that_keeps_the_answers(
    branched_models: Paths, branched_tables: Tables, branched_set: CalibrationSet
) -> None:
    model, table = onnx.load(branched_models["mobile"]), branched_tables["mobile"]
    pixels = branched_set.pixels[::4]
    found = search(model, table, pixels, float_answers(model, table, pixels), signed=True, max_drop=1.0)
    assert (found.tried, found.possible) == (2, 256)
    assert found.float_layers == ()
    assert found.text.startswith("mixed precision: 2 of 256 mixes tried on 32 images; left out of INT8: none")


@pytest.mark.slow
def test_the_layers_that_ruin_a_branched_network_are_found_and_no_more_than_the_budget_is_tried(
    branched_models: Paths,
    branched_tables: Tables,
    branched_set: CalibrationSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = onnx.load(branched_models["mobile"])
    table = ruined(branched_tables["mobile"], "one_clip.out", "two_clip2.out")
    pixels = branched_set.pixels[::4]
    labels = float_answers(model, table, pixels)
    seen = []
    found = search(
        model, table, pixels, labels, signed=True, max_drop=1.0,
        progress=lambda phase, done, total: seen.append((phase, done, total)),
    )  # fmt: skip
    assert found.all_int8.same_top1 < found.images
    assert set(found.float_layers) == {"one_depthwise", "two_project"}
    assert (found.best.same_top1, found.possible) == (32, 256)
    assert 3 <= found.tried <= mixed.MOST_TRIES
    assert seen[:1] == [("mixed precision", 2, mixed.MOST_TRIES)]
    assert ("sensitivity", 8, 8) in seen
    again = search(model, table, pixels, labels, signed=True, max_drop=1.0)
    assert again == found
    monkeypatch.setattr(mixed, "MOST_TRIES", 4)
    assert (
        search(model, table, pixels, labels, signed=True, max_drop=1.0).tried <= 6
    )  # found before it gives back


def test_a_tensor_that_two_layers_take_is_converted_once(branched_models: Paths) -> None:
    model = onnx.load(branched_models["inception"])
    layers = quantizable_layers(model)
    costs = {layer.name: LayerCost(int8=1, rest=2, change=10) for layer in layers}
    scales = mixed._Scales(layers, costs, mixed.followers(model, layers), 4, 1.0)
    names = [layer.name for layer in layers]
    float_stem = tuple(name != "stem" for name in names)
    # a and b1 take the stem's own output, c a pool of it: two tensors.
    assert scales.weigh(float_stem, [4, 4, 0.0]).cost == 2 + 8 * 1 + 2 * 10


def test_many_mixes_are_counted_as_a_power_of_two() -> None:
    mix = Mix(float_layers=(), correct=3, same_top1=3, error=0.0, cost=1.0)
    found = mixed.MixedSearch(
        best=mix,
        all_int8=mix,
        all_float=mix,
        tried=48,
        possible=2**53,
        images=3,
        unit="weighted multiply-adds",
    )
    assert found.text.startswith("mixed precision: 48 of 2^53 mixes tried on 3 images")
