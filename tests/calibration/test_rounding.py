"""Learnt roundings and corrected biases: against all roundings there are, and against sums done by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec import structs
from onnx import TensorProto, helper, numpy_helper

from calibration.chain import quantized_chain
from calibration.chain.rounding import (
    Reconstruction,
    adaround,
    learn_corrections,
    pack_bits,
    round_layer,
    turn_over,
)
from calibration.layers import find_layers
from calibration.qdq import prepare, put_rest_in_half, quantize, weight_scales
from calibration.select import CalibrationSet
from calibration.table import CalibrationTable, Correction
from engines.errors import ArtefactError


def known(inputs: np.ndarray, outputs: np.ndarray) -> Reconstruction:
    """What a layer of one group is told of ``[P, inputs]`` and ``[P, outputs]``."""
    return Reconstruction(
        products=(inputs.T @ inputs / len(inputs))[None],
        targets=(inputs.T @ outputs / len(inputs))[None],
        rounded_mean=inputs.mean(axis=0)[None],
        target_mean=outputs.mean(axis=0)[None],
    )


def test_of_two_equal_inputs_one_weight_is_rounded_up() -> None:
    """0.4 + 0.4 steps are 0.8: nearest gives 0, one up gives 1, both give 2."""
    inputs = np.array([[1.0, 1.0], [3.0, 3.0]])
    values = np.array([[[0.4], [0.4]]])
    up = round_layer(values, np.ones((1, 1)), known(inputs, inputs @ values[0]))
    assert up.sum() == 1


def all_errors(values: np.ndarray, told: Reconstruction) -> np.ndarray:
    """Mean squared error of each output, beyond the exact weights', for all roundings: ``[2^inputs, outputs]``."""
    every = np.array(list(itertools.product((0, 1), repeat=values.shape[1])), float)
    added = np.floor(values[0]) + every[:, :, None] - values[0]
    return np.einsum("mio,ij,mjo->mo", added, told.products[0], added)


def error(values: np.ndarray, up: np.ndarray, told: Reconstruction) -> np.ndarray:
    added = np.floor(values[0]) + up[0] - values[0]
    return np.asarray(np.einsum("io,ij,jo->o", added, told.products[0], added))


@pytest.mark.parametrize("seed", range(3))
def test_of_a_depthwise_kernel_the_best_of_all_roundings_is_taken(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, steps = rng.uniform(-20, 20, (1, 9, 4)), np.array([[0.5, 2.0, 1.0, 0.1]])
    inputs = rng.random((200, 3)) @ rng.random((3, 9)) + 0.5 * rng.random((200, 9))
    told = known(inputs, inputs @ (values[0] * steps))
    best = all_errors(values, told).min(axis=0)
    np.testing.assert_allclose(error(values, round_layer(values, steps, told), told), best)
    assert (error(values, values - np.floor(values) >= 0.5, told) > 1.2 * best).all()  # nearest is not it


@pytest.mark.parametrize("seed", [0, 1])
def test_adaround_finds_the_best_of_2048_roundings(seed: int) -> None:
    """Eleven inputs that have a third in common, four outputs; nearest errs up to seven or nine times as much."""
    rng = np.random.default_rng(seed)
    inputs = 0.3 * rng.random((200, 1)) + 0.7 * rng.random((200, 11))
    values = rng.uniform(-20, 20, (1, 11, 4))
    told = known(inputs, inputs @ values[0])
    best = all_errors(values, told).min(axis=0)
    for learnt in (adaround(values, told.products, told.targets), round_layer(values, np.ones((1, 4)), told)):
        np.testing.assert_allclose(error(values, learnt, told), best)
    assert (error(values, values - np.floor(values) >= 0.5, told) / best).max() > 6


def test_adaround_errs_less_than_the_nearest_roundings_and_turning_over_never_adds() -> None:
    rng = np.random.default_rng(3)
    inputs = np.maximum(rng.standard_normal((500, 4)) @ rng.standard_normal((4, 24)), 0)
    values = rng.uniform(-90, 90, (1, 24, 6))
    told = known(inputs, inputs @ values[0])
    floor, nearest = np.floor(values), values - np.floor(values) >= 0.5
    learnt = adaround(values, told.products, told.targets)
    before = error(values, nearest, told)
    assert (error(values, learnt, told) < 0.5 * before).all()
    for start in (learnt, nearest):
        turned = turn_over(start, floor, told.products, told.targets)
        assert (error(values, turned, told) <= error(values, start, told)).all()
    best = round_layer(values, np.ones((1, 6)), told)
    assert (error(values, best, told) <= np.minimum(error(values, learnt, told), before)).all()


def test_the_means_are_left_to_the_bias() -> None:
    rng = np.random.default_rng(4)
    inputs, outputs = rng.random((50, 3)), rng.random((50, 2))
    weights = rng.random((1, 3, 2))
    told = known(inputs, outputs)
    np.testing.assert_allclose(told.mean_error(weights)[0], (outputs - inputs @ weights[0]).mean(axis=0))
    centred = known(inputs - inputs.mean(axis=0), outputs - outputs.mean(axis=0))
    np.testing.assert_allclose(told.centred().products, centred.products)
    np.testing.assert_allclose(told.centred().targets, centred.targets)
    assert not told.centred().mean_error(weights).any()


def two_dense(weight: list[list[float]], bias: bool = True) -> onnx.ModelProto:
    """Two pixels, a dense layer of two units with ReLU, and the logits."""
    stored = {
        "flat": np.array([-1, 2], np.int64),
        "first.weight": np.array(weight, np.float32),
        "first.bias": np.array([100.0, 200.0], np.float32),
        "logits.weight": np.eye(2, 3, dtype=np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["cast"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["cast", "flat"], ["pixels"], "flatten"),
        helper.make_node("MatMul", ["pixels", "first.weight"], ["product"], "first"),
        helper.make_node("Add", ["product", "first.bias"], ["sum"], "first_bias"),
        helper.make_node("Relu", ["sum" if bias else "product"], ["hidden"], "relu"),
        helper.make_node("MatMul", ["hidden", "logits.weight"], ["logits"], "last"),
        helper.make_node("Softmax", ["logits"], ["probabilities"], "softmax", axis=1),
    ]
    graph = helper.make_graph(
        nodes if bias else [node for node in nodes if node.name != "first_bias"],
        "two dense",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 2, 1, 1])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 3])],
        [
            numpy_helper.from_array(value, name)
            for name, value in stored.items()
            if bias or name != "first.bias"
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_a_bias_takes_out_what_rounding_adds_on_average(small_table: CalibrationTable) -> None:
    """Pixels 0..255 have steps of 255/127; weights the next float16 above 1/127 and 0.7/127."""
    model = two_dense([[1.0, 0.25], [0.5, -0.7]])
    table = structs.replace(small_table, ranges={"pixels": (0.0, 255.0), "hidden": (0.0, 999.0)})
    pixels = np.array([[10, 20], [30, 41]], np.uint8).reshape(2, 2, 1, 1)
    found = learn_corrections(model, table, pixels, rounding="nearest", bias=True)
    # 10, 20, 30 and 41 are 4.98, 9.96, 14.94 and 20.42 steps
    seen = np.array([[5, 10], [15, 20]]) * 255 / 127
    # 1 and 0.5 are 126.9 and 63.4 steps of 0.00788116, 0.25 and -0.7 are 45.4 and -127.0 of 0.00551224
    steps = np.array([float(np.float16(0.00788116)), float(np.float16(0.00551224))])
    rounded = np.array([[127, 45], [63, -127]]) * steps
    exact = pixels.reshape(2, 2) @ np.array([[1.0, 0.25], [0.5, -0.7]])
    shift = (exact - seen @ rounded).mean(axis=0)
    assert list(found) == ["first"] and found["first"].rounded_up == ""
    np.testing.assert_allclose(found["first"].bias, shift, rtol=1e-5)

    graph = quantize(model, structs.replace(table, corrections=found), signed_activations=True)
    (add,) = (node for node in graph.graph.node if node.op_type == "Add")
    stored = {each.name: numpy_helper.to_array(each) for each in graph.graph.initializer}
    np.testing.assert_allclose(stored[add.input[1]], np.array([100, 200]) + shift, rtol=1e-6)
    unsigned = quantize(model, structs.replace(table, corrections=found), signed_activations=False)
    assert unsigned == quantize(model, table, signed_activations=False)


def test_a_product_without_a_bias_has_no_place_for_one(small_table: CalibrationTable) -> None:
    table = structs.replace(small_table, ranges={"pixels": (0.0, 255.0), "hidden": (0.0, 999.0)})
    pixels = np.arange(12, dtype=np.uint8).reshape(6, 2, 1, 1)
    found = learn_corrections(
        two_dense([[1.0, 0.25], [0.5, -0.7]], bias=False), table, pixels, rounding="nearest", bias=True
    )
    assert found == {}


@pytest.fixture(scope="module")
def learnt(small_model: Path, small_table: CalibrationTable, small_set: CalibrationSet) -> CalibrationTable:
    found = learn_corrections(
        onnx.load(small_model), small_table, small_set.pixels[:64], rounding="adaround", bias=True
    )
    return structs.replace(small_table, corrections=found)


def test_the_layers_of_a_chain_are_learnt_and_a_wide_dense_layer_is_not(learnt: CalibrationTable) -> None:
    """The dense layer has 1,024 inputs, and no more places than images."""
    assert {name: bool(each.rounded_up) for name, each in learnt.corrections.items()} == {
        "stem": True,
        "dense": False,
    }
    assert [len(each.bias) for each in learnt.corrections.values()] == [4, 8]
    assert (
        learnt.describe_corrections()
        == "roundings of 1 layers learnt by AdaRound, biases of 2 layers corrected"
    )


@pytest.mark.parametrize("half", [False, True])
def test_the_graph_rounds_every_weight_as_it_was_learnt(
    small_model: Path, learnt: CalibrationTable, half: bool
) -> None:
    model = onnx.load(small_model)
    graph = quantize(model, learnt, signed_activations=True)
    graph = put_rest_in_half(graph) if half else graph
    stored = {each.name: numpy_helper.to_array(each) for each in graph.graph.initializer}
    (pair,) = (node for node in graph.graph.node if node.input[0] == "stem.rounded_weight")
    weight, scale = stored[pair.input[0]], stored[pair.input[1]].reshape(-1, 1, 1, 1)
    integers = np.rint(weight.astype(np.float32) / scale.astype(np.float32))

    prepared = prepare(model, learnt)
    layer = find_layers(prepared)[0]
    before = {each.name: numpy_helper.to_array(each) for each in prepared.graph.initializer}[layer.weight]
    scales = weight_scales(before, 0)
    np.testing.assert_array_equal(scale, scales)
    up = np.ceil(before / scales) == integers
    exact = before / scales == integers
    assert pack_bits(up & ~exact) == learnt.corrections["stem"].rounded_up
    assert (integers != np.rint(before / scales)).any()


def test_a_chain_computes_what_the_corrected_graph_does(
    small_model: Path, learnt: CalibrationTable, small_set: CalibrationSet
) -> None:
    model = onnx.load(small_model)
    chain, grids = quantized_chain(model, learnt, signed=True)
    graph = quantize(model, learnt, signed_activations=True)
    graph.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, None))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    seen = small_set.pixels[64:80]
    (logits,) = session.run(["logits"], {"image": seen})
    np.testing.assert_allclose(chain.run(seen, grids), logits, atol=2e-3)


def test_images_that_were_not_seen_err_less(
    small_model: Path, small_table: CalibrationTable, learnt: CalibrationTable, small_set: CalibrationSet
) -> None:
    model, seen = onnx.load(small_model), small_set.pixels[64:]

    def error(table: CalibrationTable) -> float:
        chain, grids = quantized_chain(model, table, signed=True)
        added = chain.run(seen, grids) - chain.finish(0, chain.start(seen))
        return float((added**2).mean())

    assert error(learnt) < error(small_table)


@pytest.mark.parametrize(
    ("correction", "held"),
    [
        (Correction(bias=(1.0,)), "1 biases for stem, whose weight is"),
        (Correction(rounded_up="AAAA"), "24 roundings for stem"),
        (Correction(rounded_up="A"), "roundings that cannot be read for stem"),
    ],
)
def test_a_correction_of_another_layer_is_refused(
    small_model: Path, small_table: CalibrationTable, correction: Correction, held: str
) -> None:
    table = structs.replace(small_table, corrections={"stem": correction})
    with pytest.raises(ArtefactError, match=held) as caught:
        quantize(onnx.load(small_model), table, signed_activations=True)
    assert caught.value.remedy.startswith("calibrate this model again")
