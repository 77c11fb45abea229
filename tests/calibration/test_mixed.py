from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec import structs

from calibration.layers import quantizable_layers
from calibration.mixed import LayerCost, Mix, predict_costs, search
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
