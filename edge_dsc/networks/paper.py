"""The two networks of the paper, and their deployed forms."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_dsc.networks.keras_files import load_keras

if TYPE_CHECKING:
    from keras import KerasTensor, Model

ARCHITECTURES = ("dsc", "cnn")
FEATURE_EXTRACTOR_PARAMETERS = {"dsc": 4_640, "cnn": 28_640}
INPUT_SIDE = 224
FILTERS = 32
BLOCKS = 3
DENSE_UNITS = 64
DROPOUT = 0.5
# Keras' own 0.99 needs thousands of steps until the moving averages mean anything; a run here has a few hundred.
BATCH_NORM_MOMENTUM = 0.9

_Float32 = NDArray[np.float32]
_Float64 = NDArray[np.float64]
_Weights = dict[str, list[NDArray[np.floating]]]  # of each layer, in Keras' order


def build_paper_network(architecture: str, classes: int) -> Model:
    """Build an untrained network of the paper.

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
        classes: Number of classes.

    Returns:
        A ``keras.Model`` named after the architecture.

    Raises:
        EnvironmentProblem: TensorFlow is missing.
    """
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
    return keras.Model(image, x, name=architecture)


def fold_network(trained: Model) -> Model:
    """Build the deployed network of a trained one.

    Args:
        trained: What :func:`build_paper_network` built, with any weights; or a deployed network, which is returned as
            it is.

    Returns:
        A ``keras.Model`` of the same name and outputs without Rescaling, BatchNorm and Dropout.
    """
    if "scale" not in {layer.name for layer in trained.layers}:
        return trained
    deployed = deployed_network(trained.name, int(trained.output_shape[-1]))
    weights = _folded_dsc(trained) if trained.name == "dsc" else _folded_cnn(trained)
    for name in ("dense", "probabilities"):
        weights[name] = trained.get_layer(name).get_weights()
    for name, values in weights.items():
        deployed.get_layer(name).set_weights([value.astype(np.float32) for value in values])
    return deployed


def deployed_network(architecture: str, classes: int) -> Model:
    """Build the deployed form of a network without a trained one's weights; see :func:`fold_network`."""
    keras = load_keras()
    layers = keras.layers
    image = layers.Input((INPUT_SIDE, INPUT_SIDE, 1), name="image")
    x = layers.Conv2D(FILTERS, 3, padding="same", activation="relu", name="stem")(image)
    for block in range(1, BLOCKS + 1):
        x = layers.MaxPooling2D(2, name=f"block{block}_pool")(x)
        if architecture == "dsc":
            x = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name=f"block{block}_depthwise")(x)
            x = layers.Conv2D(FILTERS, 1, activation="relu", name=f"block{block}_pointwise")(x)
        else:
            x = layers.Conv2D(FILTERS, 3, padding="same", activation="relu", name=f"block{block}_conv")(x)
    x = layers.MaxPooling2D(2, name="pool")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(DENSE_UNITS, activation="relu", name="dense")(x)
    x = layers.Dense(classes, activation="softmax", name="probabilities")(x)
    return keras.Model(image, x, name=architecture)


def fold_stem(kernel: _Float32, scale: float) -> _Float64:
    """Return the kernel ``[3, 3, 1, 32]`` that does to raw grey what ``[3, 3, 3, 32]`` does to three scaled copies."""
    summed: _Float64 = kernel.astype(np.float64).sum(axis=2, keepdims=True)
    return summed * scale


def fold_separable_stem(pointwise: _Float32, depthwise: _Float32, scale: float) -> _Float64:
    """Return the one kernel of a pointwise convolution without bias and the depthwise one after it.

    Args:
        pointwise: ``[1, 1, 3, 32]``; its input channels are equal, so only their sum matters.
        depthwise: ``[3, 3, 32, 1]``.
        scale: Factor on the input's pixels.

    Returns:
        ``[3, 3, 1, 32]``. Exact at the borders too: without a bias the padding stays zero.
    """
    per_channel: _Float64 = pointwise.astype(np.float64).sum(axis=2)[0, 0] * scale
    turned: _Float64 = depthwise.astype(np.float64).transpose(0, 1, 3, 2)
    return turned * per_channel


def fold_batch_norm(
    kernel: _Float32, bias: _Float32, norm: list[_Float32], epsilon: float
) -> tuple[_Float64, _Float64]:
    """Fold BatchNorm into the convolution before it.

    Args:
        kernel: ``[h, w, in, out]``.
        bias: ``[out]``.
        norm: gamma, beta, moving mean and moving variance, each ``[out]``.
        epsilon: BatchNorm's epsilon.

    Returns:
        Kernel and bias, of the same shapes.
    """
    gamma, beta, mean, variance = (value.astype(np.float64) for value in norm)
    factor = gamma / (variance + epsilon) ** 0.5
    return kernel.astype(np.float64) * factor, (bias.astype(np.float64) - mean) * factor + beta


def _cnn_features(layers: ModuleType, x: KerasTensor) -> KerasTensor:
    x = layers.Conv2D(FILTERS, 3, padding="same", activation="relu", name="stem")(x)
    for block in range(1, BLOCKS + 1):
        x = layers.MaxPooling2D(2, name=f"block{block}_pool")(x)
        x = layers.Conv2D(FILTERS, 3, padding="same", activation="relu", name=f"block{block}_conv")(x)
    return x


def _dsc_features(layers: ModuleType, x: KerasTensor) -> KerasTensor:
    x = layers.Conv2D(FILTERS, 1, use_bias=False, name="stem_pointwise")(x)
    x = layers.DepthwiseConv2D(3, padding="same", activation="relu", name="stem_depthwise")(x)
    for block in range(1, BLOCKS + 1):
        x = layers.MaxPooling2D(2, name=f"block{block}_pool")(x)
        x = layers.SeparableConv2D(FILTERS, 3, padding="same", name=f"block{block}_separable")(x)
        x = layers.BatchNormalization(momentum=BATCH_NORM_MOMENTUM, name=f"block{block}_norm")(x)
        x = layers.ReLU(name=f"block{block}_relu")(x)
    return x


def _folded_cnn(trained: Model) -> _Weights:
    kernel, bias = trained.get_layer("stem").get_weights()
    weights: _Weights = {"stem": [fold_stem(kernel, _scale(trained)), bias]}
    for block in range(1, BLOCKS + 1):
        name = f"block{block}_conv"
        weights[name] = trained.get_layer(name).get_weights()
    return weights


def _folded_dsc(trained: Model) -> _Weights:
    (pointwise,) = trained.get_layer("stem_pointwise").get_weights()
    depthwise, bias = trained.get_layer("stem_depthwise").get_weights()
    weights: _Weights = {"stem": [fold_separable_stem(pointwise, depthwise, _scale(trained)), bias]}
    for block in range(1, BLOCKS + 1):
        depthwise, pointwise, bias = trained.get_layer(f"block{block}_separable").get_weights()
        norm = trained.get_layer(f"block{block}_norm")
        kernel, bias = fold_batch_norm(pointwise, bias, norm.get_weights(), norm.epsilon)
        weights[f"block{block}_depthwise"] = [depthwise]
        weights[f"block{block}_pointwise"] = [kernel, bias]
    return weights


def _scale(trained: Model) -> float:
    return float(trained.get_layer("scale").scale)
