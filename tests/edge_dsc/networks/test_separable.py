"""Separable twins: kernels, the paper's formulas, and networks of which every convolution is replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_dsc.networks import build_network, count_parameters, identify, load_keras, save_network
from edge_dsc.networks.keras_files import read_network
from edge_dsc.networks.separable import (
    SeparatedLayer,
    SeparationOptions,
    fit_kernel,
    format_separation,
    separate_network,
    split_kernel,
    split_kernel_pointwise_first,
)
from engines.errors import BadInputError, UsageError


def product_of(depthwise: np.ndarray, pointwise: np.ndarray, groups: int = 1) -> np.ndarray:
    """The ordinary kernel ``[h, w, inputs per group, outputs]`` of a depthwise and a pointwise convolution."""
    height, width, channels, rank = depthwise.shape
    outputs = pointwise.shape[-1]
    filters = depthwise.reshape(height, width, groups, channels // groups, rank)
    weights = pointwise.reshape(channels // groups, rank, groups, outputs // groups)
    kernel = np.einsum("hwgir,irgo->hwigo", filters, weights)
    return kernel.reshape(height, width, channels // groups, outputs)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_kernel_that_is_separable_is_found_again(groups: int) -> None:
    kernel = product_of(drawn(3, 5, 8, 1), drawn(1, 1, 8 // groups, 12, seed=1), groups)
    split = split_kernel(kernel, groups=groups)
    assert split.depthwise.shape == (3, 5, 8, 1)
    assert split.pointwise.shape == (1, 1, 8 // groups, 12)
    assert split.error < 1e-7
    np.testing.assert_allclose(product_of(split.depthwise, split.pointwise, groups), kernel, atol=1e-6)


@pytest.mark.parametrize(
    ("outputs", "groups", "full"), [(16, 1, 9), (4, 1, 4), pytest.param(16, 2, 8, id="within groups")]
)
def test_the_full_rank_reproduces_any_kernel(outputs: int, groups: int, full: int) -> None:
    kernel = drawn(3, 3, 6 // groups, outputs)
    almost = split_kernel(kernel, full - 1, groups)
    split = split_kernel(kernel, 99, groups)
    assert split.depthwise.shape[-1] == full
    assert split.error < 1e-7 < almost.error
    np.testing.assert_allclose(product_of(split.depthwise, split.pointwise, groups), kernel, atol=1e-5)


def test_the_error_is_what_the_lost_singular_values_weigh() -> None:
    # One input channel, two taps, two outputs: the matrix has the singular values 4 and 3.
    kernel = np.array([[3.0, 0.0], [0.0, 4.0]]).reshape(1, 2, 1, 2)
    split = split_kernel(kernel)
    assert split.error == pytest.approx(3 / 5)
    np.testing.assert_allclose(
        product_of(split.depthwise, split.pointwise)[0, :, 0], [[0, 0], [0, 4]], atol=1e-7
    )
    # The root of 4 on both sides, the filter's largest entry positive.
    np.testing.assert_allclose(split.depthwise[0, :, 0, 0], [0, 2], atol=1e-7)
    np.testing.assert_allclose(split.pointwise[0, 0, 0], [0, 2], atol=1e-7)


def test_no_other_pair_is_nearer() -> None:
    kernel = drawn(3, 3, 4, 8)
    split = split_kernel(kernel)
    best = np.linalg.norm(kernel - product_of(split.depthwise, split.pointwise))
    assert best == pytest.approx(split.error * np.linalg.norm(kernel), rel=1e-5)
    for seed in range(20):
        depthwise = split.depthwise + 0.01 * drawn(*split.depthwise.shape, seed=seed)
        pointwise = split.pointwise + 0.01 * drawn(*split.pointwise.shape, seed=seed + 100)
        assert np.linalg.norm(kernel - product_of(depthwise, pointwise)) > best


@pytest.mark.parametrize("groups", [1, 2])
def test_smooth_inputs_are_met_far_better_than_the_nearest_kernel_does(groups: int) -> None:
    kernel, rng = drawn(3, 3, 8 // groups, 12), np.random.default_rng(1)
    patches = rng.standard_normal((8, 2000, 1)) + 0.2 * rng.standard_normal((8, 2000, 9)) + 5.0

    def missed(tried: np.ndarray) -> float:
        by_group = patches.reshape(groups, 8 // groups, 2000, 9)
        weights = [k.reshape(9, 8 // groups, groups, 12 // groups) for k in (kernel, tried)]
        wanted, found = (np.einsum("gipt,tigo->pgo", by_group, w).reshape(2000, 12) for w in weights)
        wanted, found = wanted - wanted.mean(axis=0), found - found.mean(axis=0)
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

    exact = np.einsum(
        "gipt,tigo->pgo",
        patches.reshape(groups, 8 // groups, 2000, 9),
        kernel.reshape(9, 8 // groups, groups, 12 // groups),
    )
    wanted = exact.reshape(2000, 12)
    nearest, fitted = split_kernel(kernel, groups=groups), fit_kernel(kernel, patches, wanted, groups=groups)
    assert fitted.depthwise.shape == nearest.depthwise.shape
    assert fitted.pointwise.shape == nearest.pointwise.shape
    assert missed(product_of(fitted.depthwise, fitted.pointwise, groups)) == pytest.approx(
        fitted.error, rel=1e-3
    )
    assert fitted.error < 0.25 < 0.6 < missed(product_of(nearest.depthwise, nearest.pointwise, groups))
    assert fit_kernel(kernel, patches, wanted, rank=99, groups=groups).error < 1e-3
    # Both factors carry as much, so that one learning rate suits both.
    np.testing.assert_allclose(
        np.linalg.norm(fitted.depthwise[..., 0], axis=(0, 1)),
        np.linalg.norm(fitted.pointwise.reshape(8 // groups, groups, -1), axis=2).T.reshape(-1),
        rtol=1e-4,
    )


def test_dead_channels_do_not_stop_a_fit() -> None:
    patches = np.zeros((4, 100, 9))
    split = fit_kernel(drawn(3, 3, 4, 6), patches, np.zeros((100, 6)))
    assert split.error == 0.0
    assert np.isfinite(split.depthwise).all() and np.isfinite(split.pointwise).all()


@pytest.mark.parametrize("split", [split_kernel, split_kernel_pointwise_first])
def test_a_kernel_of_zeros_has_no_error(split: Any) -> None:
    found = split(np.zeros((3, 3, 2, 4), np.float32))
    assert found.error == 0.0
    assert not found.depthwise.any()
    assert not found.pointwise.any()


def test_pointwise_first_is_exact_for_equal_channels() -> None:
    kernel = np.repeat(drawn(3, 3, 1, 32), 3, axis=2)
    split = split_kernel_pointwise_first(kernel)
    assert (split.depthwise.shape, split.pointwise.shape) == ((3, 3, 32, 1), (1, 1, 3, 32))
    assert split.error < 1e-7
    product = split.depthwise.transpose(0, 1, 3, 2) * split.pointwise
    np.testing.assert_allclose(product, kernel, atol=1e-6)
    assert split_kernel_pointwise_first(drawn(3, 3, 3, 32)).error > 0.1


# What a person finds with pencil and paper: (1), (2), (3), (4).
@pytest.mark.parametrize(
    ("options", "numbers", "ratio"),
    [
        pytest.param({}, (18_432, 288, 2_048, 2_336), 1 / 64 + 1 / 9, id="the paper's letters"),
        pytest.param({"rank": 2}, (18_432, 576, 4_096, 4_672), 2 / 64 + 2 / 9, id="rank 2"),
        pytest.param({"groups": 4}, (4_608, 288, 512, 800), 4 / 64 + 1 / 9, id="four groups"),
        pytest.param({"kernel": (1, 7)}, (14_336, 224, 2_048, 2_272), 1 / 64 + 1 / 7, id="1x7"),
        pytest.param(
            {"inputs": 3, "pointwise_first": True}, (1_728, 576, 192, 768), 1 / 3 + 1 / 9, id="pointwise first"
        ),
    ],
)  # fmt: skip
def test_the_papers_formulas(options: dict[str, Any], numbers: tuple[int, ...], ratio: float) -> None:
    layer = SeparatedLayer(**{"name": "c", "kernel": (3, 3), "inputs": 32, "outputs": 64, **options})
    assert (layer.ordinary, layer.depthwise, layer.pointwise, layer.separable) == numbers
    assert layer.ratio == pytest.approx(ratio, rel=1e-12)
    assert layer.multiply_adds is None


def test_multiply_adds_are_counted_where_each_convolution_runs() -> None:
    strided: dict[str, Any] = {
        "name": "c",
        "kernel": (3, 3),
        "inputs": 3,
        "outputs": 8,
        "positions": (100, 25),
    }
    assert SeparatedLayer(**strided).multiply_adds == (216 * 25, (27 + 24) * 25)
    # The pointwise convolution comes before the stride.
    first = SeparatedLayer(**strided, pointwise_first=True)
    assert first.multiply_adds == (216 * 25, 72 * 25 + 24 * 100)


def network(*stack: Any, side: int = 12, channels: int = 8) -> Any:
    """A functional network of the given layers, one after the other, ending in two probabilities."""
    keras = load_keras()
    keras.utils.set_random_seed(5)
    image = x = keras.layers.Input((side, side, channels), name="image")
    for layer in stack:
        x = layer(x)
    x = keras.layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(image, keras.layers.Dense(2, activation="softmax", name="answers")(x), name="small")


def make_separable(layer: Any) -> None:
    """Give a convolution a kernel that a depthwise and a pointwise one can be equal to, and a bias."""
    height, width, inputs, outputs = layer.kernel.shape
    depthwise = drawn(height, width, inputs * layer.groups, 1, seed=7)
    kernel = product_of(depthwise, drawn(1, 1, inputs, outputs, seed=8), layer.groups) / 4
    layer.set_weights([kernel, drawn(outputs, seed=9)] if layer.use_bias else [kernel])


def pictures(side: int = 12, channels: int = 8, count: int = 4) -> np.ndarray:
    return drawn(count, side, side, channels, seed=3)


def answers(model: Any, images: np.ndarray) -> np.ndarray:
    return np.asarray(model(images, training=False))


PLAIN = SeparationOptions(batch_norm=False)
slow = pytest.mark.slow  # TensorFlow alone takes seconds to start


@slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="as it comes"),
        pytest.param({"padding": "same", "activation": "relu"}, id="same, with ReLU"),
        pytest.param({"strides": 2, "padding": "same"}, id="strided"),
        pytest.param({"strides": 3}, id="strided, valid"),
        pytest.param({"dilation_rate": 2, "padding": "same"}, id="dilated"),
        pytest.param({"groups": 2, "padding": "same", "activation": "gelu"}, id="grouped"),
        pytest.param({"groups": 4, "strides": 2, "use_bias": False}, id="grouped and strided, no bias"),
        pytest.param({"kernel_size": (1, 5), "padding": "same"}, id="1x5"),
    ],
)
@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_separable_kernel_gives_the_same_answers(options: dict[str, Any], batch_norm: bool) -> None:
    keras = load_keras()
    layer = keras.layers.Conv2D(16, **{"kernel_size": 3, "name": "c", **options})
    model = network(layer)
    make_separable(layer)
    twin = separate_network(model, SeparationOptions(batch_norm=batch_norm))
    assert type(layer) not in {type(one) for one in twin.model.layers} or layer.groups > 1
    assert [one.name for one in twin.separation.layers] == ["c"]
    assert twin.separation.layers[0].error < 1e-6
    found, expected = answers(twin.model, pictures()), answers(model, pictures())
    # A BatchNorm that was never trained divides by sqrt(1 + epsilon).
    np.testing.assert_allclose(found, expected, atol=1e-3 if batch_norm else 1e-6)


@slow
def test_the_twin_of_the_papers_cnn_is_its_dsc() -> None:
    model = build_network("cnn", 3)
    twin = separate_network(model)
    assert count_parameters(twin.model)["feature_extractor"] == 4_640
    dsc = build_network("dsc", 3)
    assert identify(twin.model) == identify(dsc)
    assert [layer.name for layer in twin.model.layers] == [layer.name for layer in dsc.layers]
    by_name = {layer.name: layer for layer in twin.separation.layers}
    assert list(by_name) == ["stem", "block1_conv", "block2_conv", "block3_conv"]
    assert by_name["stem"].pointwise_first
    assert by_name["stem"].error < 1e-6  # its three channels are one grey
    assert 0.3 < by_name["block1_conv"].error < 0.95
    # 4,320 by the formulas, four biases of 32, three BatchNorms of 64.
    assert sum(layer.separable for layer in by_name.values()) + 4 * 32 + 3 * 64 == 4_640
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 1)).astype(np.float32)
    keras = load_keras()
    stems = [
        keras.Model(one.input, one.get_layer(name).output)
        for one, name in ((model, "stem"), (twin.model, "stem_depthwise"))
    ]
    np.testing.assert_allclose(answers(stems[1], images), answers(stems[0], images), atol=1e-5)


@slow
def test_without_batch_norm_or_with_layers_left_alone_the_count_is_another() -> None:
    model = build_network("cnn", 3)
    assert count_parameters(separate_network(model, PLAIN).model)["feature_extractor"] == 4_640 - 3 * 64
    options = SeparationOptions(layers=("^stem", "^block3*"))
    twin = separate_network(model, options)
    assert count_parameters(twin.model)["feature_extractor"] == 896 + 2 * 1_408 + 9_248
    assert twin.separation.left_alone == (("stem", "as asked"), ("block3_conv", "as asked"))
    twin = separate_network(model, SeparationOptions(layers=("block1_conv",), rank=2))
    assert [layer.name for layer in twin.separation.layers] == ["block1_conv"]
    assert count_parameters(twin.model)["feature_extractor"] == 896 + 2 * 9_248 + (2 * 1_312 + 32 + 64)


@slow
def test_the_table_of_the_papers_cnn() -> None:
    model = build_network("cnn", 3)
    model.get_layer("stem").set_weights([np.ones((3, 3, 3, 32)), np.zeros(32)])
    for block in (1, 2, 3):
        make_separable(model.get_layer(f"block{block}_conv"))
    twin = separate_network(model, SeparationOptions(layers=("^block3_conv",)))
    lines = format_separation(twin.separation).splitlines()
    assert [" ".join(line.split()) for line in lines if "----" not in line] == [
        "separable twin of cnn",
        "",
        "layer kernel M N (1) Dk^2 M N (2) Dk^2 M (3) M N (4) M (Dk^2+N) (4)/(1)"
        " multiply-adds of the twin error missed",
        "stem 3x3 3 32 864 288 96 384 0.4444 43,352,064 19,267,584 0.000",
        "block1_conv 3x3 32 32 9,216 288 1,024 1,312 0.1424 115,605,504 16,457,728 0.000",
        "block2_conv 3x3 32 32 9,216 288 1,024 1,312 0.1424 28,901,376 4,114,432 0.000",
        "together 19,296 864 2,144 3,008 0.1559 187,858,944 39,839,744",
        "* (4)/(1) is 1/N + 1/Dk^2, and r times that for the r filters of a higher rank",
        "* error: of the nearest kernel, relative; missed: of the output's deviation, by the pair fitted on images",
        "* stem: pointwise first, so (2) is Dk^2 N, (4) N (Dk^2 + M) and (4)/(1) 1/M + 1/Dk^2",
        "* left alone: block3_conv, as asked",
        "* the feature extractor, with biases and BatchNorm: 28,640 parameters, of the twin 12,480 (56.42% fewer)",
    ]


@slow
def test_models_within_models_shared_layers_and_sums_are_kept() -> None:
    keras = load_keras()
    layers = keras.layers
    shared = layers.Conv2D(8, 3, padding="same", name="shared")
    inner = keras.Sequential(
        [layers.Input((12, 12, 8)), layers.Conv2D(8, 3, padding="same", name="deep"), layers.ReLU()], name="inner"
    )  # fmt: skip
    image = layers.Input((12, 12, 8))
    x = layers.Add(name="sum")([shared(image), inner(shared(shared(image)))])
    x = layers.Dropout(0.5)(layers.GlobalMaxPooling2D()(x * 2.0))
    model = keras.Model(image, layers.Dense(2, activation="softmax")(x), name="outer")
    for layer in (shared, inner.get_layer("deep")):
        make_separable(layer)
    twin = separate_network(model, PLAIN)
    assert [layer.name for layer in twin.separation.layers] == ["shared", "inner/deep"]
    assert len([one for one in twin.model.layers if one.name == "shared_separable"]) == 1
    assert twin.model.get_layer("inner").get_layer("deep_separable").filters == 8
    np.testing.assert_allclose(answers(twin.model, pictures()), answers(model, pictures()), atol=1e-5)


@slow
def test_the_twin_is_read_back_in_safe_mode(tmp_path: Path) -> None:
    keras = load_keras()
    twin = separate_network(network(keras.layers.Conv2D(16, 3, activation="relu")))
    save_network(twin.model, tmp_path / "twin.keras")
    loaded = read_network(tmp_path / "twin.keras")
    np.testing.assert_array_equal(answers(loaded, pictures()), answers(twin.model, pictures()))


@slow
def test_a_batch_norm_that_follows_is_not_doubled() -> None:
    layers = load_keras().layers
    model = network(
        layers.Conv2D(8, 3, use_bias=False, name="c_conv"),
        layers.BatchNormalization(name="c_bn"),
        layers.ReLU(),
    )
    norm = model.get_layer("c_bn")
    norm.set_weights([drawn(8, seed=1), drawn(8, seed=2), drawn(8, seed=3), np.full(8, 2.0)])
    twin = separate_network(model)
    kinds = [type(layer).__name__ for layer in twin.model.layers]
    assert kinds.count("BatchNormalization") == 1
    (pair,) = twin.pairs
    assert pair.norm is twin.model.get_layer("c_bn") and not pair.added
    for one, other in zip(pair.norm.get_weights(), norm.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@slow
def test_equal_channels_stay_equal_when_they_are_scaled_and_padded() -> None:
    keras = load_keras()
    layers = keras.layers
    image = layers.Input((12, 12, 1))
    for scale, exact in ((1 / 127.5, True), ([0.1, 0.2, 0.3], False)):
        x = layers.Concatenate()([image, image, image])
        x = layers.ZeroPadding2D(1)(layers.Rescaling(scale, offset=-1.0)(x))
        x = layers.Conv2D(8, 3, strides=2, name="c")(x)
        twin = separate_network(keras.Model(image, layers.GlobalAveragePooling2D()(x)))
        assert (twin.separation.layers[0].error < 1e-6) == exact


@slow
def test_what_cannot_or_need_not_be_separated_is_named() -> None:
    layers = load_keras().layers
    model = network(
        layers.Conv2D(8, 1, name="one"),
        layers.Conv2D(8, 3, groups=8, padding="same", name="depthwise"),
        layers.Conv2D(8, (3, 3), strides=(2, 1), padding="same", name="uneven"),
        layers.Conv2D(1, 3, padding="same", name="narrow"),
        layers.Conv2D(8, 3, padding="same", name="grey"),
        layers.Conv2D(8, 3, padding="same", name="plain"),
    )
    twin = separate_network(model)
    assert [layer.name for layer in twin.separation.layers] == ["plain"]
    assert dict(twin.separation.left_alone) == {
        "depthwise": "its groups have one input channel: it is depthwise already",
        "uneven": "strides 2x1, which Keras' depthwise convolution lacks",
        "narrow": "a pair of rank 1 would be no smaller, 80 weights instead of 72",
        "grey": "its groups have one input channel: it is depthwise already",
    }
    np.testing.assert_array_equal(
        twin.model.get_layer("uneven").get_weights()[0], model.get_layer("uneven").get_weights()[0]
    )


@slow
def test_names_that_are_taken_are_not_taken_again() -> None:
    layers = load_keras().layers
    model = network(
        layers.Conv2D(8, 3, activation="relu", name="a_conv"), layers.Activation("tanh", name="a_relu")
    )
    names = [layer.name for layer in separate_network(model).model.layers]
    assert names[1:5] == ["a_conv_separable", "a_conv_norm", "a_conv_relu", "a_relu"]


@slow
def test_a_network_without_convolutions_is_refused() -> None:
    layers = load_keras().layers
    with pytest.raises(
        BadInputError, match=r"small has no convolution to separate \(none is larger than 1x1\)"
    ):
        separate_network(network(layers.Conv2D(4, 1)))
    with pytest.raises(BadInputError, match=r"\(c: a pair of rank 8 would be no smaller, 1,088 weights"):
        separate_network(network(layers.Conv2D(8, 3, name="c")), SeparationOptions(rank=99))


@slow
def test_a_name_that_no_convolution_has_is_refused() -> None:
    model = network(load_keras().layers.Conv2D(8, 3, name="c"))
    with pytest.raises(UsageError, match=r"--layers \^d\*: no convolution .* has that name") as refused:
        separate_network(model, SeparationOptions(layers=("c", "^d*")))
    assert refused.value.remedy == "choose among c"


@slow
def test_a_network_of_code_is_refused() -> None:
    keras = load_keras()

    class Code(keras.Model):  # type: ignore[misc, name-defined]
        def call(self, inputs: Any) -> Any:
            return inputs

    with pytest.raises(BadInputError, match=r"is no graph of layers but code of its own \(Code\)"):
        separate_network(Code(name="code"))
    with pytest.raises(BadInputError, match="is no graph of layers"):
        separate_network(keras.Sequential([keras.layers.Conv2D(8, 3)]))  # never built: of no input


def test_a_rank_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="the rank 0"):
        SeparationOptions(rank=0)
