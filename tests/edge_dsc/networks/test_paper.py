from __future__ import annotations

import cv2
import numpy as np
import pytest

from edge_dsc.networks import (
    FEATURE_EXTRACTOR_PARAMETERS,
    build_network,
    count_parameters,
    fold_batch_norm,
    fold_separable_stem,
    fold_stem,
)
from engines.errors import UsageError

DSC_LAYERS = {
    "stem_pointwise": 96,
    "stem_depthwise": 320,
    "block1_separable": 1344,
    "block1_norm": 64,
    "block2_separable": 1344,
    "block2_norm": 64,
    "block3_separable": 1344,
    "block3_norm": 64,
}
CNN_LAYERS = {"stem": 896, "block1_conv": 9248, "block2_conv": 9248, "block3_conv": 9248}
HEAD = {"dense": 6272 * 64 + 64, "probabilities": 64 * 3 + 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "features", "layers"), [("dsc", 4640, DSC_LAYERS), ("cnn", 28640, CNN_LAYERS)]
)
def test_parameters_are_the_papers(architecture: str, features: int, layers: dict[str, int]) -> None:
    model = build_network(architecture, 3)
    counted = {
        layer.name: sum(int(np.prod(weight.shape)) for weight in layer.trainable_weights)
        for layer in model.layers
        if layer.trainable_weights
    }
    assert counted == {**layers, **HEAD}
    assert (
        count_parameters(model)["feature_extractor"] == features == FEATURE_EXTRACTOR_PARAMETERS[architecture]
    )
    assert model.input_shape == (None, 224, 224, 1)
    assert model.output_shape == (None, 3)


def test_the_reduction_is_the_papers() -> None:
    dsc, cnn = (FEATURE_EXTRACTOR_PARAMETERS[name] for name in ("dsc", "cnn"))
    assert f"{1 - dsc / cnn:.4%}" == "83.7989%"  # the paper prints 83.79 %


@pytest.mark.slow
def test_raw_pixels_go_in_and_probabilities_come_out() -> None:
    model = build_network("cnn", 5)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 1)).astype(np.float32)
    answers = model.predict_on_batch(pixels)
    assert answers.shape == (2, 5)
    assert np.allclose(answers.sum(axis=1), 1, atol=1e-6)
    stem = model.get_layer("stem")
    assert stem.input.shape == (None, 224, 224, 3)
    assert model.get_layer("scale").scale == 1 / 255


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"there is no network 'resnet' \(choose one of dsc, cnn, resnet50v2"
    ):
        build_network("resnet", 3)
    with pytest.raises(UsageError, match=r"a classifier of 1 classes \(give at least two class folders\)"):
        build_network("dsc", 1)


RNG = np.random.default_rng(0)


def correlate(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return cv2.filter2D(image, cv2.CV_64F, kernel, borderType=cv2.BORDER_CONSTANT)


def test_the_stems_fold_exactly() -> None:
    image = RNG.integers(0, 256, (12, 12)).astype(np.float64)
    kernel = RNG.standard_normal((3, 3, 3, 32))
    whole = sum(correlate(image / 255, kernel[:, :, channel, 7]) for channel in range(3))
    assert np.allclose(correlate(image, fold_stem(kernel, 1 / 255)[:, :, 0, 7]), whole, atol=1e-12)
    pointwise, depthwise = RNG.standard_normal((1, 1, 3, 32)), RNG.standard_normal((3, 3, 32, 1))
    mixed = sum(image / 255 * pointwise[0, 0, channel, 7] for channel in range(3))
    folded = fold_separable_stem(pointwise, depthwise, 1 / 255)
    assert folded.shape == (3, 3, 1, 32)
    assert np.allclose(
        correlate(image, folded[:, :, 0, 7]), correlate(mixed, depthwise[:, :, 7, 0]), atol=1e-12
    )


def test_batch_norm_folds_exactly() -> None:
    kernel, bias = RNG.standard_normal((1, 1, 4, 5)), RNG.standard_normal(5)
    gamma, beta, mean = RNG.standard_normal((3, 5))
    variance = RNG.uniform(0.1, 2, 5)
    x = RNG.standard_normal(4)
    expected = gamma * (x @ kernel[0, 0] + bias - mean) / np.sqrt(variance + 1e-3) + beta
    folded_kernel, folded_bias = fold_batch_norm(kernel, bias, [gamma, beta, mean, variance], 1e-3)
    assert np.allclose(x @ folded_kernel[0, 0] + folded_bias, expected, atol=1e-12)
