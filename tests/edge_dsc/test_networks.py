from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge_dsc.networks import (
    FEATURE_EXTRACTOR_PARAMETERS,
    build_network,
    feature_extractor_parameters,
    fold_batch_norm,
    fold_network,
    fold_separable_stem,
    fold_stem,
    load_network,
    save_network,
)
from engines.contract import LARGEST_MODEL
from engines.errors import ArtefactError, UsageError

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
    assert feature_extractor_parameters(model) == features == FEATURE_EXTRACTOR_PARAMETERS[architecture]
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
    with pytest.raises(UsageError, match=r"there is no network 'resnet' \(choose one of dsc, cnn\)"):
        build_network("resnet", 3)
    with pytest.raises(UsageError, match=r"a classifier of 1 classes \(give at least two class folders\)"):
        build_network("dsc", 1)


@pytest.mark.slow
def test_a_network_is_saved_and_loaded(tmp_path: Path) -> None:
    model = build_network("dsc", 3)
    save_network(model, tmp_path / "model.keras")
    loaded = load_network(tmp_path / "model.keras", "dsc", 3)
    assert loaded.name == "dsc"
    for one, other in zip(model.get_weights(), loaded.get_weights(), strict=True):
        assert np.array_equal(one, other)


def other_networks() -> dict[str, Callable[[], Any]]:
    """Networks that Keras reads gladly and that are not ours."""
    import keras

    layers = keras.layers

    def two_outputs() -> Any:
        made = build_network("dsc", 3)
        return keras.Model(made.input, [made.output, made.get_layer("dense").output], name="dsc")

    def of_another_side() -> Any:
        image = layers.Input((64, 64, 1), name="image")
        return keras.Model(image, layers.Dense(3)(layers.Flatten()(image)), name="dsc")

    return {
        "the other network": lambda: build_network("cnn", 3),
        "of four classes": lambda: build_network("dsc", 4),
        "a chain": lambda: keras.Sequential([layers.Input((224, 224, 1)), layers.Flatten(), layers.Dense(3)]),
        "two outputs": two_outputs,
        "another side": of_another_side,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "which", ["the other network", "of four classes", "a chain", "two outputs", "another side"]
)
def test_another_network_is_refused(tmp_path: Path, which: str) -> None:
    save_network(other_networks()[which](), tmp_path / "model.keras")
    with pytest.raises(ArtefactError, match=r"model\.keras is not the dsc of 3 classes that its run records"):
        load_network(tmp_path / "model.keras", "dsc", 3)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_a_deployed_network_is_loaded_too(tmp_path: Path, architecture: str) -> None:
    save_network(fold_network(build_network(architecture, 3)), tmp_path / "model.keras")
    assert load_network(tmp_path / "model.keras", architecture, 3).name == architecture


@pytest.mark.slow
def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.keras").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(ArtefactError, match=r"Keras cannot load .*model\.keras: .*train again"):
        load_network(tmp_path / "model.keras", "dsc", 3)


@pytest.mark.slow
def test_an_archive_that_unpacks_without_end_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_network(build_network("dsc", 3), tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("assets/zeros", bytes(LARGEST_MODEL // 64))
    assert (tmp_path / "model.keras").stat().st_size < LARGEST_MODEL // 64
    load_network(tmp_path / "model.keras", "dsc", 3)
    monkeypatch.setattr("edge_dsc.networks.LARGEST_MODEL", LARGEST_MODEL // 64)
    with pytest.raises(
        ArtefactError, match=r"load .*model\.keras: it unpacks to \d+ bytes, the limit is 8388608 "
    ):
        load_network(tmp_path / "model.keras", "dsc", 3)


@pytest.mark.slow
def test_a_lambda_layer_is_not_run(tmp_path: Path) -> None:
    import keras

    image = keras.layers.Input((2,))
    model = keras.Model(image, keras.layers.Lambda(lambda x: x * 2, output_shape=(2,))(image))
    save_network(model, tmp_path / "model.keras")
    with pytest.raises(ArtefactError, match=r"Keras cannot load"):
        load_network(tmp_path / "model.keras", "dsc", 3)


@pytest.mark.slow
def test_a_layer_of_pytorch_is_refused_and_no_package_is_named(tmp_path: Path) -> None:
    save_network(build_network("dsc", 3), tmp_path / "whole.keras")
    with (
        zipfile.ZipFile(tmp_path / "whole.keras") as whole,
        zipfile.ZipFile(tmp_path / "m.keras", "w") as other,
    ):
        for name in whole.namelist():
            data = whole.read(name)
            if name == "config.json":
                config = json.loads(data)
                layer = config["config"]["layers"][1]
                layer["class_name"], layer["registered_name"] = "TorchModuleWrapper", None
                layer["config"] = {"name": layer["config"]["name"], "module": "gASVAAAA"}
                data = json.dumps(config).encode()
            other.writestr(name, data)
    with pytest.raises(ArtefactError, match=r"Keras cannot load .*m\.keras: .*torch.*train again"):
        load_network(tmp_path / "m.keras", "dsc", 3)


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
