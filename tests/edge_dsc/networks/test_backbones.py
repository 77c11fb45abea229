"""Keras' networks with the paper's head. They are built small, with drawn weights: nothing is downloaded."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_dsc.networks import (
    BACKBONES,
    NAMES,
    NetworkChoice,
    build_network,
    load_keras,
    open_network,
    save_network,
)
from edge_dsc.networks.backbones import freeze_layers, give_weights, has_head
from engines.errors import ArtefactError, EnvironmentProblem, UsageError

slow = pytest.mark.slow
MODULES = {
    "resnet50v2": "resnet_v2",
    "inceptionv3": "inception_v3",
    "inceptionresnetv2": "inception_resnet_v2",
    "xception": "xception",
    "mobilenetv2": "mobilenet_v2",
    "vgg19": "vgg19",
    "densenet121": "densenet",
}


@pytest.fixture(scope="module")
def mobilenet() -> Any:
    """Read only."""
    return build_network("mobilenetv2", 3, 32)


@slow
@pytest.mark.parametrize("name", ["resnet50v2", "vgg19", "densenet121"])
def test_pixels_are_scaled_as_the_network_wants_them(name: str) -> None:
    """One of each kind of scaling, against Keras' own function."""
    keras = load_keras()
    backbone = BACKBONES[name]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1)).astype(np.float32)
    equal = np.repeat(pixels, 3, axis=3)
    module = getattr(keras.applications, MODULES[name])
    wanted = module.preprocess_input(equal.copy())
    ours = equal * np.array(backbone.scale, np.float32) + np.array(backbone.offset, np.float32)
    assert np.allclose(ours, wanted, atol=2e-5)
    made = keras.layers.Rescaling(
        *(list(value) if isinstance(value, tuple) else value for value in (backbone.scale, backbone.offset))
    )
    assert np.allclose(made(equal), wanted, atol=2e-5)


@slow
@pytest.mark.parametrize("name", list(MODULES))
def test_every_module_has_the_mode_that_is_copied_here(name: str) -> None:
    module = getattr(load_keras().applications, MODULES[name])
    pixels = np.array([[[[0.0] * 3, [255.0] * 3]]], np.float32)
    backbone = BACKBONES[name]
    ours = pixels * np.array(backbone.scale) + np.array(backbone.offset)
    assert np.allclose(module.preprocess_input(pixels.copy()), ours, atol=2e-5)


@slow
def test_a_backbone_ends_in_the_papers_head(mobilenet: Any) -> None:
    assert (mobilenet.name, mobilenet.input_shape, mobilenet.output_shape) == (
        "mobilenetv2",
        (None, 32, 32, 1),
        (None, 3),
    )
    kinds = [(type(layer).__name__, layer.name) for layer in mobilenet.layers]
    assert kinds[:3] == [("InputLayer", "image"), ("Concatenate", "colour"), ("Rescaling", "scale")]
    assert kinds[-4:] == [
        ("GlobalAveragePooling2D", "pooled"),
        ("Dense", "dense"),
        ("Dropout", "dropout"),
        ("Dense", "probabilities"),
    ]
    assert has_head(mobilenet)
    assert mobilenet.get_layer("dense").units == 64
    assert mobilenet.get_layer("dropout").rate == 0.5
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1)).astype(np.float32)
    answers = mobilenet.predict_on_batch(pixels)
    assert np.allclose(answers.sum(axis=1), 1, atol=1e-6)
    momenta = {layer.momentum for layer in mobilenet.layers if type(layer).__name__ == "BatchNormalization"}
    assert momenta == {0.9}


def test_a_size_below_the_backbones_is_refused_by_name() -> None:
    for name, backbone in BACKBONES.items():
        small = backbone.smallest - 1
        with pytest.raises(
            UsageError,
            match=rf"{name} takes no images of {small} x {small} \(give --size {backbone.smallest} or more\)",
        ):
            open_network(NetworkChoice(architecture=name, size=small))


@slow
def test_the_smallest_size_is_keras_own() -> None:
    """Keras builds the smallest, and refuses less in its own words."""
    keras = load_keras()
    for name, backbone in BACKBONES.items():
        make = getattr(keras.applications, backbone.function)
        side = backbone.smallest - 1
        with pytest.raises(ValueError, match=f"at least {backbone.smallest}x{backbone.smallest}"):
            make(weights=None, include_top=False, input_shape=(side, side, 3))
        assert (
            open_network(NetworkChoice(architecture=name, size=backbone.smallest)).size == backbone.smallest
        )


@slow
def test_frozen_but_for_the_head_and_the_last_layers() -> None:
    model = build_network("mobilenetv2", 3, 32)
    freeze_layers(model, 0)
    assert [layer.name for layer in model.layers if layer.trainable_weights] == ["dense", "probabilities"]
    freeze_layers(model, 3)
    open_ones = [layer.name for layer in model.layers if layer.trainable_weights]
    assert open_ones == [
        "block_16_depthwise",
        "block_16_project",
        "Conv_1",
        "dense",
        "probabilities",
    ]
    norms = [layer for layer in model.layers if type(layer).__name__ == "BatchNormalization"]
    assert norms and not any(layer.trainable for layer in norms)
    before = [layer.get_weights() for layer in norms]
    model.compile("adam", "categorical_crossentropy")
    rng = np.random.default_rng(0)
    model.train_on_batch(rng.uniform(0, 255, (4, 32, 32, 1)), np.eye(3)[[0, 1, 2, 0]])
    for layer, kept in zip(norms, before, strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(layer.get_weights(), kept, strict=True))
    with pytest.raises(
        UsageError, match=r"mobilenetv2 has 52 layers with weights, not 53 \(give --unfreeze 52"
    ):
        freeze_layers(model, 53)


@slow
def test_weights_of_a_run_and_of_keras_own_kind_of_file(mobilenet: Any, tmp_path: Path) -> None:
    """The whole network from .keras, and the features alone from both kinds of HDF5."""
    keras = load_keras()
    save_network(mobilenet, tmp_path / "model.keras")
    features = keras.Model(mobilenet.input, mobilenet.get_layer("pooled").input)
    alone = keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(32, 32, 3))
    alone.set_weights(features.get_weights())
    for name in ("old_notop.h5", "new.weights.h5"):
        alone.save_weights(tmp_path / name)
    save_network(alone, tmp_path / "alone.keras")
    wanted = mobilenet.get_weights()
    for name in ("model.keras", "alone.keras", "old_notop.h5"):
        chosen = NetworkChoice(architecture="mobilenetv2", size=32, weights=str(tmp_path / name))
        network = open_network(chosen)
        assert network.weights == name and network.weights_sha256
        model = network.make(3)
        count = len(wanted) if name == "model.keras" else len(wanted) - 4
        assert all(np.array_equal(a, b) for a, b in zip(model.get_weights()[:count], wanted, strict=False))
        assert [layer.name for layer in model.layers if layer.trainable_weights] == ["dense", "probabilities"]


@slow
def test_weights_that_do_not_fit_are_refused(mobilenet: Any, tmp_path: Path) -> None:
    save_network(mobilenet, tmp_path / "model.keras")
    mobilenet.save_weights(tmp_path / "whole.weights.h5")
    (tmp_path / "notes.h5").write_bytes(b"no HDF5")
    other_classes, other = build_network("mobilenetv2", 4, 32), build_network("vgg19", 3, 32)
    remedy = r"\(give a file of this very network"
    with pytest.raises(
        ArtefactError, match=rf"another network than mobilenetv2, or of other classes {remedy}"
    ):
        give_weights(other_classes, tmp_path / "model.keras")
    with pytest.raises(ArtefactError, match=rf"another network than vgg19, or of other classes {remedy}"):
        give_weights(other, tmp_path / "model.keras")
    for name in ("whole.weights.h5", "notes.h5"):
        with pytest.raises(ArtefactError, match=f"{name} does not fit .*{remedy}"):
            give_weights(other, tmp_path / name)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "weights.txt").write_text("1 2 3")
    for name, words in (
        ("weights.txt", "is no file of weights"),
        ("gone.h5", "does not exist"),
        ("", "is no file"),
    ):
        with pytest.raises(ArtefactError, match=words):
            open_network(NetworkChoice(architecture="vgg19", weights=str(tmp_path / name)))


@slow
def test_no_socket_is_opened_unless_imagenet_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _calls_out: list[str]
) -> None:
    """And where it is, a closed network ends in one line."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    opened: list[object] = []
    make = socket.socket.__init__

    def watched(self: socket.socket, *arguments: Any, **options: Any) -> None:
        opened.append(arguments)
        make(self, *arguments, **options)

    monkeypatch.setattr(socket.socket, "__init__", watched)
    for name in NAMES:
        smallest = BACKBONES[name].smallest if name in BACKBONES else 224
        open_network(NetworkChoice(architecture=name, size=smallest)).make(2)
    assert opened == [] and _calls_out == []
    network = open_network(NetworkChoice(architecture="mobilenetv2", size=96, weights="imagenet"))
    assert opened == [] and _calls_out == []
    with pytest.raises(
        EnvironmentProblem, match="could not load the ImageNet weights of mobilenetv2"
    ) as caught:
        network.make(2)
    assert "\n" not in str(caught.value) and "--weights FILE" in caught.value.remedy
    assert caught.value.exit_code == 3
    assert _calls_out, "it was Keras' own loader that reached out"
    _calls_out.clear()
