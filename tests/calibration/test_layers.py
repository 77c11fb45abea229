from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from branched_networks import BRANCHED, Network

from calibration.layers import (
    find_layers,
    followers,
    is_chain,
    paired_tensors,
    quantizable_layers,
    raw_pixel_tensors,
    share_ranges,
    tensors_to_calibrate,
)
from calibration.rewrites import fold_norms
from engines.errors import ArtefactError


def test_every_layer_with_weights_is_found(deployed_models: dict[str, Path]) -> None:
    layers = find_layers(onnx.load(deployed_models["dsc"]))
    assert [(layer.op, layer.shape, layer.axis) for layer in layers] == [
        ("Conv", (32, 1, 3, 3), 0),
        *[("Conv", (32, 1, 3, 3), 0), ("Conv", (32, 32, 1, 1), 0)] * 3,
        ("MatMul", (6272, 64), 1),
        ("MatMul", (64, 3), 1),
    ]
    assert [layer.depthwise for layer in layers] == [
        False,
        True,
        False,
        True,
        False,
        True,
        False,
        False,
        False,
    ]
    assert [layer.raw_pixels for layer in layers] == [True] + [False] * 8
    assert [layer.last for layer in layers] == [False] * 8 + [True]


def test_all_but_the_last_can_run_in_int8(deployed_models: dict[str, Path]) -> None:
    model = onnx.load(deployed_models["cnn"])
    layers = find_layers(model)
    assert quantizable_layers(model) == layers[:-1]
    assert len(layers) == 6
    assert tensors_to_calibrate(model) == tuple(sorted(layer.input for layer in layers))
    assert raw_pixel_tensors(model) == {layers[0].input}


def test_a_graph_whose_layers_have_no_names_is_refused(small_model: Path) -> None:
    model = onnx.load(small_model)
    for node in model.graph.node:
        node.name = ""
    with pytest.raises(ArtefactError, match="'small' has 3 layers with weights, not all with a name"):
        find_layers(model)


def test_transposed_gemm_weights_have_their_channels_first(small_model: Path) -> None:
    model = onnx.load(small_model)
    node = next(node for node in model.graph.node if node.name == "logits")
    node.op_type = "Gemm"
    node.attribute.append(onnx.helper.make_attribute("transB", 1))
    assert [layer.axis for layer in find_layers(model)] == [0, 1, 0]


def test_only_what_follows_one_node_after_the_other_is_a_chain(deployed_models: dict[str, Path]) -> None:
    assert all(is_chain(onnx.load(path)) for path in deployed_models.values())
    assert not any(is_chain(make()) for make in BRANCHED.values())


@pytest.mark.parametrize(
    ("shape", "group", "suits"),
    [
        ((64, 64, 3, 3), 1, True),
        ((8, 32, 3, 3), 1, True),
        ((12, 20, 3, 3), 1, False),  # neither side a multiple of 8
        ((8, 8, 3, 3), 1, False),  # both sides below 16
        ((8, 32, 1, 7), 1, False),  # not square
        ((32, 1, 3, 3), 32, True),
        ((32, 1, 1, 3), 32, False),
        ((12, 1, 3, 3), 12, False),
    ],
)
def test_convolutions_of_few_channels_run_in_int8_where_their_sizes_suit(
    shape: tuple[int, ...], group: int, suits: bool
) -> None:
    net = Network("sizes")
    x = net.conv("stem", net.pixels(), (1, shape[1] * group))
    net.store("weight", np.ones(shape, np.float32))
    x = net.add("Conv", "odd", x, "weight", group=group, kernel_shape=list(shape[2:]))
    x = net.add("Add", "sum", x, x)  # no chain: in a chain all but the last layer run in INT8
    model = net.finish(x, shape[0])
    assert ("odd" in [layer.name for layer in quantizable_layers(model)]) is suits


@pytest.mark.parametrize(
    ("shape", "group", "bits"),
    [
        ((32, 1, 3, 3), 1, 8),
        ((32, 1, 3, 3), 32, 8),
        ((32, 1, 3, 3), 16, 7),  # more outputs than inputs: another kernel
        ((32, 2, 3, 3), 16, 7),
        ((32, 32, 1, 1), 1, 7),
    ],
)
def test_layers_without_sums_over_channels_keep_8_bits(shape: tuple[int, ...], group: int, bits: int) -> None:
    net = Network("bits")
    x = net.conv("stem", net.pixels(), (1, shape[1] * group))
    net.store("weight", np.ones(shape, np.float32))
    model = net.finish(
        net.add("Conv", "odd", x, "weight", group=group, kernel_shape=list(shape[2:])), shape[0]
    )
    stem, odd, logits = find_layers(model)
    assert [layer.bits(7) for layer in (stem, odd, logits)] == [8, bits, 7]
    assert [layer.bits(8) for layer in (stem, odd, logits)] == [8, 8, 8]


PAIRS = {  # beside the inputs of layers: what sums need, and where layers end
    "residual": (
        {"three_short.out", "four_short.out"},
        {"stem_relu.out", "one_last.out", "two_b.out", "three_b.out", "four_a.out"},
    ),
    "mobile": (set(), {"one_end.out", "grouped_relu.out"}),
    "inception": (
        set(),
        {"a_relu.out", "b_relu.out", "c_relu.out", "d_relu.out", "f_relu.out", "g0.out", "g1.out"},
    ),
    "swish": (
        set(),
        {"stem.out", "one.out", "two.out", "excite.out", "two_end.out", "end.out"},
    ),
}


@pytest.mark.parametrize("architecture", BRANCHED)
def test_pairs_stand_at_layers_and_sums_and_for_onnxruntime_at_the_ends_of_layers(architecture: str) -> None:
    model = fold_norms(BRANCHED[architecture]())
    layers = quantizable_layers(model)
    sums, ends = PAIRS[architecture]
    inputs = {layer.input for layer in layers}
    assert set(paired_tensors(model, layers, signed=True)) == inputs | sums
    assert set(paired_tensors(model, layers, signed=False)) == inputs | sums | ends
    assert set(tensors_to_calibrate(model)) == inputs | sums | ends


def test_a_sum_without_its_layer_in_int8_needs_no_pair() -> None:
    model = fold_norms(BRANCHED["residual"]())
    without = [layer for layer in quantizable_layers(model) if layer.name not in ("three_b", "four_a")]
    assert "three_short.out" not in paired_tensors(model, without, signed=True)
    assert "four_short.out" not in paired_tensors(model, without, signed=True)


def test_what_a_pool_or_a_concat_joins_shares_one_range() -> None:
    model = fold_norms(BRANCHED["inception"]())
    ranges = {
        name: (-float(place), float(place)) for place, name in enumerate(tensors_to_calibrate(model), 1)
    }
    shared = share_ranges(model, ranges)
    joined = ("a_relu.out", "b_relu.out", "c_relu.out", "d_relu.out", "branches.out", "reduced.out")
    widest = max(ranges[name][1] for name in joined)
    assert {shared[name] for name in joined} == {(-widest, widest)}
    # A concatenation without a pair of its own joins nothing: the dense block keeps a range for each step.
    assert all(shared[name] == ranges[name] for name in set(ranges) - set(joined))


def test_layers_know_which_follow_them(deployed_models: dict[str, Path]) -> None:
    chain = onnx.load(deployed_models["cnn"])
    assert followers(chain, quantizable_layers(chain)) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    model = BRANCHED["residual"]()
    layers = quantizable_layers(model)
    names = [(layers[before].name, layers[after].name) for before, after in followers(model, layers)]
    assert names[:3] == [("stem", "one_a"), ("one_a", "one_b"), ("stem", "two_a")]
    assert ("three_short", "four_a") in names and ("three_b", "four_a") in names


def test_pixels_from_which_a_mean_was_taken_are_calibrated() -> None:
    net = Network("mean")
    x = net.add("Add", "mean", net.pixels(), net.store("mean.value", np.array(-120, np.float32)))
    model = net.finish(net.conv("stem", x, (1, 32)), 32)
    assert [layer.raw_pixels for layer in find_layers(model)] == [False, False]
