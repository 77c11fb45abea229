"""The two networks of the paper: ``cnn``, the conventional one, and ``dsc``, the depthwise separable one.

Source: Iklima, Kadarina and Priambodo, "Reduction of Feature Extraction for COVID-19 CXR using Depthwise
Separable Convolution Network", JEEEMI 4(4), 2022, doi 10.35882/jeeemi.v4i4.255.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines.errors import ArtefactError, UsageError
from engines.packages import load

ARCHITECTURES = ("dsc", "cnn")
FEATURE_EXTRACTOR_PARAMETERS = {"dsc": 4_640, "cnn": 28_640}
INPUT_SIDE = 224
FILTERS = 32
BLOCKS = 3
DENSE_UNITS = 64
DROPOUT = 0.5
# Keras' own 0.99 needs thousands of steps until the moving averages mean anything; a run here has a few hundred.
BATCH_NORM_MOMENTUM = 0.9

Model = Any  # keras.Model; Keras is heavy and loaded inside the functions


def load_keras() -> Any:
    """Import Keras on TensorFlow, with TensorFlow's start-up messages off the terminal.

    Raises:
        EnvironmentProblem: TensorFlow or Keras is missing.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    with _silenced_stderr():
        tensorflow = load("tensorflow")
        # Two operations at once finish in any order, and with oneDNN that changes the last bits of a sum,
        # whatever enable_op_determinism says (TensorFlow 2.21; seen in the second step). One operation still
        # uses every core. Must come before TensorFlow's first operation; a host program's choice stands.
        with contextlib.suppress(RuntimeError):
            tensorflow.config.threading.set_inter_op_parallelism_threads(1)
        # It warns of retracing whenever several models predict in one process, as they do here.
        logging.getLogger("tensorflow").setLevel(logging.ERROR)
        return load("keras")


@contextlib.contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Send file descriptor 2 to nowhere: TensorFlow 2.21 ignores its own log level while it is imported."""
    if "tensorflow" in sys.modules:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def build_network(architecture: str, classes: int) -> Model:
    """Build an untrained network.

    Both networks take ``float32 [N, 224, 224, 1]``, raw grey 0..255; the scale 1/255 and the three equal
    channels of the paper's colour stem are inside the model. Both end in MaxPool 2x2, Flatten (6,272),
    Dense(64, ReLU), Dropout(0.5) and Dense(classes, softmax), and give ``float32 [N, classes]``.

    ``cnn``: Conv 3x3 (3 -> 32) and three blocks [MaxPool 2x2, Conv 3x3 (32 -> 32)], each with ReLU::

        3*3*3*32 + 32 = 896;  3 * (3*3*32*32 + 32) = 3 * 9,248;  896 + 27,744 = 28,640

    ``dsc``: the same with every convolution separable. The stem is a pointwise 1x1 without bias and a
    depthwise 3x3 with bias; the blocks are [MaxPool 2x2, SeparableConv 3x3, BatchNorm, ReLU]::

        3*32 + (3*3*32 + 32) = 416;  3 * ((3*3*32 + 32*32 + 32) + 2*32) = 3 * 1,408;  416 + 4,224 = 4,640

    The paper gives the two sums and, in its text, 3x3 kernels. It draws the layers in a figure without
    text: the order inside the stem, 'same' padding, and the place of BatchNorm are this project's reading,
    the one that meets 4,640 with 3x3 kernels throughout.

    Args:
        architecture: ``dsc`` or ``cnn``.
        classes: Number of classes, at least 2.

    Returns:
        A ``keras.Model`` named after the architecture.

    Raises:
        UsageError: Another architecture, or fewer than two classes.
        EnvironmentProblem: TensorFlow is missing.
    """
    if architecture not in ARCHITECTURES:
        raise UsageError(
            f"there is no network {architecture!r}", remedy=f"choose one of {', '.join(ARCHITECTURES)}"
        )
    if classes < 2:
        raise UsageError(f"a classifier of {classes} classes", remedy="give at least two class folders")
    keras = load_keras()
    layers = keras.layers
    image = layers.Input((INPUT_SIDE, INPUT_SIDE, 1), name="image")
    x = layers.Rescaling(1 / 255, name="scale")(image)
    x = layers.Concatenate(name="colour")([x, x, x])
    x = _dsc_features(layers, x) if architecture == "dsc" else _cnn_features(layers, x)
    x = layers.MaxPooling2D(2, name="pool")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(DENSE_UNITS, activation="relu", name="dense")(x)
    x = layers.Dropout(DROPOUT, name="dropout")(x)
    x = layers.Dense(classes, activation="softmax", name="probabilities")(x)
    model = keras.Model(image, x, name=architecture)
    found, expected = feature_extractor_parameters(model), FEATURE_EXTRACTOR_PARAMETERS[architecture]
    assert found == expected, f"{architecture}: {found} trainable parameters, not {expected}"
    return model


def feature_extractor_parameters(model: Model) -> int:
    """Count the trainable parameters before the Flatten layer."""
    names = [layer.name for layer in model.layers]
    features = model.layers[: names.index("flatten")]
    return sum(int(weight.shape.num_elements()) for layer in features for weight in layer.trainable_weights)


def save_network(model: Model, path: Path) -> None:
    """Write a network as a ``.keras`` file."""
    with _keras_on_numpy_2():
        model.save(path)


def load_network(path: Path) -> Model:
    """Read a ``.keras`` file, without running code from it (safe mode).

    Raises:
        ArtefactError: Keras cannot read it.
        EnvironmentProblem: TensorFlow is missing.
    """
    keras = load_keras()
    try:
        with _keras_on_numpy_2():
            return keras.models.load_model(path, compile=False, safe_mode=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtefactError(
            f"Keras cannot load {path}: {reason}",
            remedy="train again, or use the versions named in training.json",
        ) from error


@contextlib.contextmanager
def _keras_on_numpy_2() -> Iterator[None]:
    """Quieten numpy 2 about Keras 3.15's variables, which take no ``copy`` keyword in ``__array__``."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="__array__ implementation doesn't accept", category=DeprecationWarning
        )
        yield


def _cnn_features(layers: Any, x: Any) -> Any:
    x = layers.Conv2D(FILTERS, 3, padding="same", activation="relu", name="stem")(x)
    for block in range(1, BLOCKS + 1):
        x = layers.MaxPooling2D(2, name=f"block{block}_pool")(x)
        x = layers.Conv2D(FILTERS, 3, padding="same", activation="relu", name=f"block{block}_conv")(x)
    return x


def _dsc_features(layers: Any, x: Any) -> Any:
    x = layers.Conv2D(FILTERS, 1, use_bias=False, name="stem_pointwise")(x)
    x = layers.DepthwiseConv2D(3, padding="same", activation="relu", name="stem_depthwise")(x)
    for block in range(1, BLOCKS + 1):
        x = layers.MaxPooling2D(2, name=f"block{block}_pool")(x)
        x = layers.SeparableConv2D(FILTERS, 3, padding="same", name=f"block{block}_separable")(x)
        x = layers.BatchNormalization(momentum=BATCH_NORM_MOMENTUM, name=f"block{block}_norm")(x)
        x = layers.ReLU(name=f"block{block}_relu")(x)
    return x
