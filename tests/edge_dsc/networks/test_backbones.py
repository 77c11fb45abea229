"""Keras' networks with the paper's head. They are built small, with drawn weights: nothing is downloaded."""

from __future__ import annotations

import socket
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_dsc.networks import (
    BACKBONES,
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


def small(classes: int = 3, filters: int = 4, name: str = "small") -> Any:
    """A network with the same head that is built in no time."""
    keras = load_keras()
    layers = keras.layers
    image = layers.Input((32, 32, 1), name="image")
    x = layers.Concatenate(name="colour")([image, image, image])
    x = layers.Rescaling(1 / 127.5, -1.0, name="scale")(x)
    for number in (1, 2):
        x = layers.Conv2D(filters, 3, name=f"conv{number}")(x)
        x = layers.BatchNormalization(name=f"norm{number}")(x)
    x = layers.GlobalAveragePooling2D(name="pooled")(layers.DepthwiseConv2D(3, name="depthwise")(x))
    x = layers.Dropout(0.5, name="dropout")(layers.Dense(64, activation="relu", name="dense")(x))
    return keras.Model(image, layers.Dense(classes, name="probabilities")(x), name=name)


def trained_layers(model: Any) -> list[str]:
    return [layer.name for layer in model.layers if layer.trainable_weights]


@slow
def test_frozen_but_for_the_head_and_the_last_layers() -> None:
    model = small()
    freeze_layers(model, 0)
    assert trained_layers(model) == ["dense", "probabilities"]
    freeze_layers(model, 2)
    assert trained_layers(model) == ["conv2", "depthwise", "dense", "probabilities"]
    norms = [model.get_layer(name) for name in ("norm1", "norm2")]
    before = [layer.get_weights() for layer in norms]
    model(np.random.default_rng(0).uniform(0, 255, (4, 32, 32, 1)), training=True)
    for layer, kept in zip(norms, before, strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(layer.get_weights(), kept, strict=True))
    with pytest.raises(
        UsageError, match=r"small has 3 layers with weights, not 4 \(give --unfreeze 3 or less"
    ):
        freeze_layers(model, 4)


@slow
def test_a_network_without_that_head_is_frozen_from_its_beginning() -> None:
    model = build_network("cnn", 3)
    assert not has_head(model)
    freeze_layers(model, 2)
    assert trained_layers(model) == ["dense", "probabilities"]


def write_old_weights(model: Any, path: Path) -> None:
    """Write weights as the files of Keras' own loader hold them; Keras 3 reads these and writes others."""
    import h5py
    from keras.src.legacy.saving import legacy_h5_format

    with warnings.catch_warnings(), h5py.File(path, "w") as file:
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy 2 of Keras 3.15's variables
        legacy_h5_format.save_weights_to_hdf5_group(file, model)


@slow
def test_weights_of_a_run_and_of_keras_own_kind_of_file(tmp_path: Path) -> None:
    """The whole network, and its features alone, as .keras and as Keras' own loader keeps them."""
    keras = load_keras()
    given = small()
    features = keras.Model(given.input, given.get_layer("pooled").input)
    save_network(given, tmp_path / "model.keras")
    save_network(features, tmp_path / "alone.keras")
    write_old_weights(features, tmp_path / "old_notop.h5")
    for name, kept in (("model.keras", 0), ("alone.keras", 4), ("old_notop.h5", 4)):
        model = small()
        drawn = model.get_weights()
        give_weights(model, tmp_path / name)
        wanted = given.get_weights()
        wanted[len(wanted) - kept :] = drawn[len(drawn) - kept :]  # the head of features alone stays
        assert all(np.array_equal(one, other) for one, other in zip(model.get_weights(), wanted, strict=True))


@slow
def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_network(small(), tmp_path / "model.keras")
    write_old_weights(small(), tmp_path / "whole.h5")
    (tmp_path / "notes.h5").write_bytes(b"no HDF5")
    remedy = r"\(give a file of this very network"
    words = rf"another network than small, or of other classes {remedy}"
    for other in (small(classes=4), small(filters=5)):
        with pytest.raises(ArtefactError, match=words):
            give_weights(other, tmp_path / "model.keras")
    for name in ("whole.h5", "notes.h5"):
        with pytest.raises(ArtefactError, match=f"{name} does not fit .*{remedy}"):
            give_weights(small(), tmp_path / name)


@slow
def test_a_network_that_was_given_weights_trains_its_head_alone(mobilenet: Any, tmp_path: Path) -> None:
    save_network(mobilenet, tmp_path / "model.keras")
    chosen = NetworkChoice(architecture="mobilenetv2", size=32, weights=str(tmp_path / "model.keras"))
    network = open_network(chosen)
    assert network.weights == "model.keras" and network.weights_sha256
    assert trained_layers(network.make(3)) == ["dense", "probabilities"]
    assert len(trained_layers(mobilenet)) > 100  # drawn weights are all trained


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
    load_keras()
    monkeypatch.setattr("keras.src.backend.config._KERAS_DIR", str(tmp_path))  # a cache without the file
    opened: list[object] = []
    make = socket.socket.__init__

    def watched(self: socket.socket, *arguments: Any, **options: Any) -> None:
        opened.append(arguments)
        make(self, *arguments, **options)

    monkeypatch.setattr(socket.socket, "__init__", watched)
    for name, size in (("dsc", 224), ("mobilenetv2", 32), ("vgg19", 32)):
        open_network(NetworkChoice(architecture=name, size=size)).make(2)
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
