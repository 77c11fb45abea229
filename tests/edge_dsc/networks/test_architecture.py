from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_dsc.networks import (
    NAMES,
    NetworkChoice,
    build_network,
    count_parameters,
    default_name,
    fold_network,
    identify,
    layer_multiply_adds,
    load_network,
    multiply_adds,
    open_network,
    save_network,
)
from engines.errors import ArtefactError, BadInputError, UsageError
from engines.graph import count_multiply_adds


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
        archive.writestr("assets/zeros", bytes(8 << 20))
    assert (tmp_path / "model.keras").stat().st_size < 8 << 20
    load_network(tmp_path / "model.keras", "dsc", 3)
    monkeypatch.setattr("edge_dsc.networks.keras_files._MOST_UNPACKED", 8 << 20)
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


def own_network(
    size: int | None = 24,
    channels: int = 1,
    classes: int = 3,
    end: str | None = "softmax",
    dtype: str = "float32",
    seed: int = 0,
) -> Any:
    """A small network as anyone has it."""
    import keras

    keras.utils.set_random_seed(seed)
    layers = keras.layers
    image = layers.Input((size, size, channels), dtype=dtype)
    x = layers.Rescaling(1 / 255)(image)
    x = layers.Conv2D(4, 3, strides=2, activation="relu")(x)
    x = layers.BatchNormalization()(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(classes, activation=end)(x))


def saved(model: Any, path: Path) -> str:
    save_network(model, path)
    return str(path)


PIXELS = np.random.default_rng(1).integers(0, 256, (3, 24, 24, 1)).astype(np.float32)


def test_what_names_no_network() -> None:
    for text in ("vgg", "resnet", "model.h5", ""):
        with pytest.raises(
            UsageError, match=f"there is no network '{text}' .choose one of dsc, cnn, resnet50v2"
        ) as found:
            open_network(NetworkChoice(architecture=text))
        assert found.value.remedy.endswith("densenet121, or give FILE.keras or module:function")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 96}, r"dsc takes no images of 96 x 96 \(give --size 224, or leave it out\)"),
        ({"size": 0}, r"images of 0 x 0 \(give a size from 1 to 1024\)"),
        ({"size": 2000}, "images of 2000 x 2000"),
        ({"weights": "imagenet"}, r"no ImageNet weights of dsc \(choose of resnet50v2"),
        ({"unfreeze": 3}, "--unfreeze 3 has no use with weights that were drawn"),
        ({"architecture": "vgg19", "unfreeze": 3, "weights": "none"}, "--unfreeze 3 has no use"),
        ({"architecture": "own.py:net", "weights": "imagenet"}, "no ImageNet weights of own.py:net"),
    ],
)
def test_options_that_a_network_does_not_take(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        open_network(NetworkChoice(**change))


def test_a_name_for_every_network() -> None:
    """It has no separators, is no name of ours, and is known before the network is opened."""
    assert [default_name(name) for name in NAMES] == list(NAMES)
    assert default_name("some/where/mine.keras") == "mine.keras"
    assert default_name("some/where/nets.py:build") == "nets.build"
    assert default_name("package.nets:cnn") == "package.nets.cnn"
    assert default_name("../weird name/é.keras") == "keras"
    assert default_name("x" * 90 + ".keras") == "x" * 58 + ".keras"


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("end", ["softmax", None])
def test_a_network_of_a_file_answers_as_it_did(tmp_path: Path, channels: int, end: str | None) -> None:
    """Three channels are made of one inside, logits get a softmax, and the file's weights are kept."""
    given = own_network(channels=channels, end=end)
    network = open_network(NetworkChoice(architecture=saved(given, tmp_path / "mine.keras")))
    assert (network.name, network.source, network.weights) == ("mine.keras",) * 3
    assert network.size == 24 and network.source_sha256 == network.weights_sha256 is not None
    made = network.make(3)
    assert (made.input_shape, made.output_shape) == ((None, 24, 24, 1), (None, 3))
    answers = np.asarray(given(np.repeat(PIXELS, channels, axis=3)))
    if end is None:
        answers = np.exp(answers) / np.exp(answers).sum(axis=1, keepdims=True)
    assert np.allclose(made(PIXELS), answers, atol=1e-6)
    drawn = open_network(NetworkChoice(architecture=str(tmp_path / "mine.keras"), weights="none"))
    assert (drawn.weights, drawn.weights_sha256) == ("none", None)
    assert not np.allclose(drawn.make(3)(PIXELS), answers, atol=1e-6)


@pytest.mark.slow
def test_a_network_of_any_size_takes_the_size_that_is_asked_for(tmp_path: Path) -> None:
    path = saved(own_network(size=None), tmp_path / "any.keras")
    assert open_network(NetworkChoice(architecture=path)).size == 224
    network = open_network(NetworkChoice(architecture=path, size=40))
    assert (network.size, network.make(3).input_shape) == (40, (None, 40, 40, 1))


@pytest.mark.slow
def test_networks_of_files_that_do_not_fit(tmp_path: Path) -> None:
    import keras

    layers = keras.layers

    def refused(model: Any, words: str, error: type[Exception] = ArtefactError, **more: Any) -> None:
        path = saved(model, tmp_path / "mine.keras")
        with pytest.raises(error, match=words):
            open_network(NetworkChoice(architecture=path, **more)).make(3)

    image = layers.Input((24, 24, 1))
    flat = layers.Flatten()(image)
    two = keras.Model(image, [layers.Dense(3)(flat), layers.Dense(3)(flat)])
    refused(two, "mine.keras has 1 inputs and 2 outputs .a classifier takes float32")
    refused(own_network(channels=4), r"takes float32 \[None, 24, 24, 4\]")
    refused(own_network(dtype="uint8"), "takes uint8")
    refused(own_network(classes=5), r"gives \[None, 5\], and the images have 3 classes")
    refused(own_network(end="sigmoid"), "ends in sigmoid, whose answers are no probabilities")
    words = r"takes images of 24 x 24, not 32 \(give --size 24"
    refused(own_network(), words, UsageError, size=32)
    doubled = layers.Lambda(lambda x: x * 2, output_shape=(24, 24, 1))(image)
    refused(
        keras.Model(image, layers.Dense(3)(layers.Flatten()(doubled))), r"Keras cannot load .*module:function"
    )
    with pytest.raises(ArtefactError, match=r"there is no gone\.keras"):
        open_network(NetworkChoice(architecture="gone.keras"))


OWN_CODE = """
import keras

class Doubled(keras.layers.Layer):
    def call(self, x):
        return x * 2

def build(classes, size):
    image = keras.layers.Input((size, size, 1))
    x = keras.layers.Conv2D(4, 3, strides=2)(Doubled()(image))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, keras.layers.Dense(classes, activation="softmax")(x))

def raises(classes, size):
    raise ValueError("too small\\nfor me")

def text(classes, size):
    return "a network"

def cnn(classes, size):
    return build(classes + 1, size)
"""


@pytest.mark.slow
def test_a_network_of_a_function_may_hold_code_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "nets.py"
    file.write_text(OWN_CODE)
    network = open_network(NetworkChoice(architecture=f"{file}:build", size=24))
    assert (network.name, network.source, network.size) == ("nets.build", "nets.py:build", 24)
    assert network.source_sha256
    made = network.make(3)
    path = Path(saved(made, tmp_path / "model.keras"))
    with pytest.raises(ArtefactError, match=r"Keras cannot load .*model\.keras"):
        load_network(path, "nets.build", 3, config_sha256=identify(made))
    loaded = load_network(path, "nets.build", 3, config_sha256=identify(made), network=network)
    assert np.array_equal(loaded(PIXELS), made(PIXELS))
    other = open_network(NetworkChoice(architecture=f"{file}:build", size=32))
    with pytest.raises(ArtefactError, match=r"is not the nets\.build of 3 classes that its run records"):
        load_network(path, "nets.build", 3, config_sha256=identify(made), network=other)


@pytest.mark.slow
def test_functions_that_give_no_network(tmp_path: Path) -> None:
    file = tmp_path / "nets.py"
    file.write_text(OWN_CODE)
    for name, error, words in (
        (
            "raises",
            BadInputError,
            r"called with 3 classes and size 24 failed: ValueError: too small \(it must be",
        ),
        ("text", ArtefactError, "nets.py:text is no Keras network of layers"),
        ("cnn", ArtefactError, r"gives \[None, 4\], and the images have 3 classes"),
    ):
        with pytest.raises(error, match=words):
            open_network(NetworkChoice(architecture=f"{file}:{name}", size=24)).make(3)


@pytest.mark.slow
def test_the_hash_of_an_architecture_is_of_what_it_does(tmp_path: Path) -> None:
    first, again = own_network(), own_network(seed=9)
    assert [layer.name for layer in first.layers] != [layer.name for layer in again.layers]
    known = identify(first)
    assert identify(again) == known
    first.trainable = False
    saved(first, tmp_path / "model.keras")
    assert identify(load_network(tmp_path / "model.keras", "model.keras", 3, config_sha256=known)) == known
    others = [own_network(size=32), own_network(channels=3), own_network(classes=4), own_network(end=None)]
    assert len({known, *map(identify, others)}) == 5


@pytest.mark.slow
def test_a_network_that_is_not_the_recorded_one_is_refused(tmp_path: Path) -> None:
    path = Path(saved(own_network(), tmp_path / "model.keras"))
    for digest, classes in ((identify(own_network(end=None)), 3), (None, 3), (identify(own_network()), 4)):
        with pytest.raises(
            ArtefactError, match=f"is not the mine.keras of {classes} classes that its run records"
        ):
            load_network(path, "mine.keras", classes, config_sha256=digest)
    model = build_network("dsc", 3)
    path = Path(saved(model, tmp_path / "dsc.keras"))
    assert load_network(path, "dsc", 3, config_sha256=identify(model)).name == "dsc"
    with pytest.raises(ArtefactError, match="is not the dsc of 3 classes"):
        load_network(path, "dsc", 3, config_sha256="0" * 64)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_multiply_adds_are_those_of_the_deployed_graph(
    architecture: str, deployed_models: dict[str, Path]
) -> None:
    import onnx

    graph = count_multiply_adds(onnx.load(deployed_models[architecture]))
    assert multiply_adds(fold_network(build_network(architecture, 3))) == graph


@pytest.mark.slow
def test_multiply_adds_of_every_kind_of_layer() -> None:
    """By hand: places of the output times what each takes."""
    import keras

    layers = keras.layers
    image = layers.Input((8, 8, 1))
    x = layers.Concatenate(name="colour")([image, image, image])
    x = layers.ZeroPadding2D(1)(layers.Rescaling(2.0)(x))
    x = layers.Conv2D(4, 3, strides=2)(x)  # 4 x 4 x 4 outputs, of one grey channel
    x = layers.Conv2D(6, 3, groups=2, padding="same")(x)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same")(x)
    x = layers.SeparableConv2D(5, 3, padding="same")(x)
    x = layers.BatchNormalization()(x)
    model = keras.Model(image, layers.Dense(2)(layers.Flatten()(x)))
    by_hand = [16 * 4 * 9 * 1, 16 * 6 * 9 * 2, 16 * 12 * 9, 16 * (12 * 9 + 12 * 5), 80 * 2]
    assert multiply_adds(model) == sum(by_hand)
    counted = [layer_multiply_adds(layer) for layer in model.layers]
    assert [count for count in counted if count] == [3 * by_hand[0], *by_hand[1:]]
    turned = layers.Conv2DTranspose(2, 3)(image)
    with pytest.raises(ArtefactError, match=r"the multiply-adds of Conv2DTranspose .* are not known"):
        multiply_adds(keras.Model(image, turned))


@pytest.mark.slow
def test_parameters_are_keras_own(tmp_path: Path) -> None:
    """Of a backbone: its features without the averages of BatchNorm, frozen or not, as Keras counts them."""
    import keras

    model = build_network("mobilenetv2", 3, 32)
    alone = keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(32, 32, 3))
    trainable = sum(int(np.prod(weight.shape)) for weight in alone.trainable_weights)
    head = 1280 * 64 + 64 + 64 * 3 + 3
    assert trainable == 2_223_872  # as its authors' tables have it, without the classifier
    assert count_parameters(model) == {
        "feature_extractor": trainable,
        "trainable": trainable + head,
        "total": alone.count_params() + head,
    }
    model.trainable = False
    assert count_parameters(model)["feature_extractor"] == trainable
    assert count_parameters(model)["trainable"] == 0
    assert count_parameters(build_network("dsc", 3)) == {
        "feature_extractor": 4640,
        "trainable": 406_307,
        "total": 406_499,
    }
