"""Keras' networks with the paper's head: built, given weights, and frozen for transfer learning."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_dsc.networks.keras_files import load_keras, read_network
from edge_dsc.networks.paper import BATCH_NORM_MOMENTUM, DENSE_UNITS, DROPOUT
from engines.errors import ArtefactError, EnvironmentProblem, UsageError
from engines.files import sha256_file

if TYPE_CHECKING:
    from keras import Layer, Model

IMAGENET = "imagenet"
_HEAD = ["pooled", "dense", "dropout", "probabilities"]
_WEIGHT_FILES = (".keras", ".h5", ".hdf5")
_WEIGHTS_REMEDY = (
    "give a file of this very network: a model.keras of train, or Keras' own weights (*_notop.h5)"
)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A network of ``keras.applications`` without its own head.

    Attributes:
        function: Its name there.
        smallest: Least height and width that it takes.
        scale: Factor on raw pixels, one or one a channel.
        offset: Added after that.
    """

    function: str
    smallest: int
    scale: float | tuple[float, ...] = 1 / 127.5
    offset: float | tuple[float, ...] = -1.0


# Source: keras.applications.imagenet_utils.preprocess_input, whose modes "caffe" and "torch" these two are. Caffe's
# order is blue, green, red, which three equal channels do not show.
_CAFFE_OFFSET = (-103.939, -116.779, -123.68)
_TORCH_MEANS, _TORCH_DEVIATIONS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BACKBONES: dict[str, Backbone] = {
    "resnet50v2": Backbone(function="ResNet50V2", smallest=32),
    "inceptionv3": Backbone(function="InceptionV3", smallest=75),
    "inceptionresnetv2": Backbone(function="InceptionResNetV2", smallest=75),
    "xception": Backbone(function="Xception", smallest=71),
    "mobilenetv2": Backbone(function="MobileNetV2", smallest=32),
    "vgg19": Backbone(function="VGG19", smallest=32, scale=1.0, offset=_CAFFE_OFFSET),
    "densenet121": Backbone(
        function="DenseNet121",
        smallest=32,
        scale=tuple(1 / (255 * deviation) for deviation in _TORCH_DEVIATIONS),
        offset=tuple(
            -mean / deviation for mean, deviation in zip(_TORCH_MEANS, _TORCH_DEVIATIONS, strict=True)
        ),
    ),
}


def build_backbone(name: str, classes: int, size: int, *, imagenet: bool = False) -> Model:
    """Build a network of Keras with the paper's head.

    It takes ``float32 [N, size, size, 1]``, raw grey 0..255; the three equal channels and the network's own scaling of
    its pixels are inside the model. Its features end in a global average, Dense(64, ReLU), Dropout(0.5) and
    Dense(classes, softmax).

    The paper compares ResNet50-v2 and Inception-v3 and names neither the layers of their heads nor how features are
    pooled, what was frozen, or their size of input. Its own head and 224 x 224 are taken here, and the average over
    each feature's plane, as Keras' own networks end: flattened, the features of ResNet50-v2 alone would be 100,352.

    Args:
        name: Of :data:`BACKBONES`.
        classes: Number of classes.
        size: Height and width of the input, not below :attr:`Backbone.smallest`.
        imagenet: Start from the weights of Keras' own loader, which keeps them in Keras' cache and downloads them
            where they are not there. Else the weights are drawn, and BatchNorm follows the batches faster than Keras'
            default, as in ``dsc``.

    Raises:
        EnvironmentProblem: TensorFlow is missing, or the weights cannot be had.
    """
    backbone = BACKBONES[name]
    keras = load_keras()
    layers = keras.layers
    image = layers.Input((size, size, 1), name="image")
    x = layers.Concatenate(name="colour")([image, image, image])
    x = layers.Rescaling(_listed(backbone.scale), _listed(backbone.offset), name="scale")(x)
    make = getattr(keras.applications, backbone.function)
    options = {"include_top": False, "input_tensor": x, "input_shape": (size, size, 3)}
    body = _with_imagenet(make, options, name) if imagenet else make(weights=None, **options)
    x = layers.GlobalAveragePooling2D(name="pooled")(body.output)
    x = layers.Dense(DENSE_UNITS, activation="relu", name="dense")(x)
    x = layers.Dropout(DROPOUT, name="dropout")(x)
    x = layers.Dense(classes, activation="softmax", name="probabilities")(x)
    model = keras.Model(image, x, name=name)
    if not imagenet:
        for layer in model.layers:
            if isinstance(layer, layers.BatchNormalization):
                layer.momentum = BATCH_NORM_MOMENTUM
    return model


def has_head(model: Model) -> bool:
    """Whether a network ends as :func:`build_backbone` ends one."""
    return [layer.name for layer in model.layers[-len(_HEAD) :]] == _HEAD


def hash_weights(path: Path) -> str:
    """Return the SHA-256 of a file of weights.

    Raises:
        ArtefactError: There is none, or its name is of another kind.
    """
    if path.suffix not in _WEIGHT_FILES or not path.is_file():
        what = "is no file of weights" if path.exists() else "does not exist"
        raise ArtefactError(f"{path} {what}", remedy=_WEIGHTS_REMEDY)
    return sha256_file(path)


def give_weights(model: Model, path: Path) -> None:
    """Give a network the weights of a file: of the whole network, or of its features alone.

    Args:
        model: As it was built; its weights are changed in place.
        path: A ``.keras`` file, read in safe mode, or Keras' weights in HDF5, such as the file ending in
            ``_notop.h5`` that Keras' own loader keeps.

    Raises:
        ArtefactError: Not readable, or the weights of another network or of other classes.
    """
    keras = load_keras()
    features = keras.Model(model.input, model.get_layer("pooled").input) if has_head(model) else model
    if path.suffix != ".keras":
        read_weights(features, path)
        return
    source = read_network(path, remedy=_WEIGHTS_REMEDY)
    for target in (model, features):
        if _weighted_form(source) == _weighted_form(target):
            target.set_weights(source.get_weights())
            return
    raise ArtefactError(
        f"{path} holds the weights of another network than {model.name}, or of other classes",
        remedy=_WEIGHTS_REMEDY,
    )


def read_weights(model: Model, path: Path) -> None:
    """Read a file's weights, and nothing else of it, into a network that was built alike.

    Raises:
        ArtefactError: Not readable, or they do not fit.
    """
    try:
        model.load_weights(path)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtefactError(f"{path} does not fit {model.name}: {reason}", remedy=_WEIGHTS_REMEDY) from error


def flat_layers(model: Model) -> list[Layer]:
    """Return the layers of a model and of the models inside it, in order."""
    found = []
    for layer in model.layers:
        found += flat_layers(layer) if hasattr(layer, "layers") else [layer]
    return found


def freeze_layers(model: Model, unfreeze: int) -> None:
    """Leave the head and the last layers of the features to training, and no others.

    A layer counts where it has weights and is no BatchNorm. Every BatchNorm of a network with a head of ours keeps to
    inference: its averages are those of the images that the weights were made on, and a batch of few X-rays would
    spoil them.

    Args:
        model: A network whose weights were given.
        unfreeze: How many layers of the features are trained; of a network without a head of ours, how many in all.

    Raises:
        UsageError: It has fewer.
    """
    keras = load_keras()
    body = model.layers[: -len(_HEAD)] if has_head(model) else model.layers
    for layer in body:
        layer.trainable = False
    counted = [
        layer for layer in body if layer.weights and not isinstance(layer, keras.layers.BatchNormalization)
    ]
    if unfreeze > len(counted):
        raise UsageError(
            f"{model.name} has {len(counted)} layers with weights, not {unfreeze}",
            remedy=f"give --unfreeze {len(counted)} or less",
        )
    for layer in counted[len(counted) - unfreeze :]:
        layer.trainable = True


def _with_imagenet(make: object, options: dict[str, object], name: str) -> Model:
    """Call a function of keras.applications with its own loader, whose words go to standard error."""
    assert callable(make)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return make(weights=IMAGENET, **options)
    except Exception as error:  # Keras raises Exception itself where an address does not answer
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EnvironmentProblem(
            f"Keras could not load the ImageNet weights of {name}: {reason}",
            remedy="connect this machine, or give the file that another one has in ~/.keras/models: --weights FILE",
        ) from error


def _weighted_form(model: Model) -> list[tuple[str, list[tuple[int, ...]]]]:
    return [
        (type(layer).__name__, [tuple(weight.shape) for weight in layer.weights])
        for layer in flat_layers(model)
        if layer.weights
    ]


def _listed(value: float | tuple[float, ...]) -> float | list[float]:
    return list(value) if isinstance(value, tuple) else value
