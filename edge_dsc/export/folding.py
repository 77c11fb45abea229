"""Fold a trained network into its deployed form, in Keras: the same function with fewer operations.

The deployed network takes one grey channel, ``float32 [N, 224, 224, 1]``, raw 0..255. Folded away are the scale
and the three equal channels (into the first kernel), the dsc stem's two kernels (into one), BatchNorm (into
the pointwise kernel and bias) and Dropout. All sums are taken in float64 and rounded once.
"""

from __future__ import annotations

from typing import Any

from edge_dsc.networks import BLOCKS, DENSE_UNITS, FILTERS, INPUT_SIDE, load_keras
from engines.packages import load

Array = Any
Model = Any


def fold_network(trained: Model) -> Model:
    """Build the deployed network of a trained one.

    Args:
        trained: What :func:`edge_dsc.networks.build_network` built, with any weights; or a deployed network, which
            is returned as it is.

    Returns:
        A ``keras.Model`` of the same name and outputs without Rescaling, BatchNorm and Dropout.
    """
    if "scale" not in {layer.name for layer in trained.layers}:
        return trained
    separable = trained.name == "dsc"
    deployed = _deployed_network(trained.name, separable, int(trained.output_shape[-1]))
    weights = _folded_dsc(trained) if separable else _folded_cnn(trained)
    for name in ("dense", "probabilities"):
        weights[name] = trained.get_layer(name).get_weights()
    for name, values in weights.items():
        deployed.get_layer(name).set_weights([value.astype("float32") for value in values])
    return deployed


def fold_stem(kernel: Array, scale: float) -> Array:
    """Return the kernel ``[3, 3, 1, 32]`` that does to raw grey what ``[3, 3, 3, 32]`` does to three scaled copies."""
    return kernel.astype("float64").sum(axis=2, keepdims=True) * scale


def fold_separable_stem(pointwise: Array, depthwise: Array, scale: float) -> Array:
    """Return the one kernel of a pointwise convolution without bias and the depthwise one after it.

    Args:
        pointwise: ``[1, 1, 3, 32]``; its input channels are equal, so only their sum matters.
        depthwise: ``[3, 3, 32, 1]``.
        scale: Factor on the input's pixels.

    Returns:
        ``float64 [3, 3, 1, 32]``. Exact at the borders too: without a bias the padding stays zero.
    """
    per_channel = pointwise.astype("float64").sum(axis=2)[0, 0] * scale
    return depthwise.astype("float64").transpose(0, 1, 3, 2) * per_channel


def fold_batch_norm(kernel: Array, bias: Array, norm: list[Array], epsilon: float) -> tuple[Array, Array]:
    """Fold BatchNorm into the convolution before it.

    Args:
        kernel: ``[h, w, in, out]``.
        bias: ``[out]``.
        norm: gamma, beta, moving mean and moving variance, each ``[out]``.
        epsilon: BatchNorm's epsilon.

    Returns:
        Kernel and bias in float64, of the same shapes.
    """
    gamma, beta, mean, variance = (value.astype("float64") for value in norm)
    factor = gamma / (variance + epsilon) ** 0.5
    return kernel.astype("float64") * factor, (bias.astype("float64") - mean) * factor + beta


def _deployed_network(name: str, separable: bool, classes: int) -> Model:
    layers = load_keras().layers
    image = layers.Input((INPUT_SIDE, INPUT_SIDE, 1), name="image")
    x = layers.Conv2D(FILTERS, 3, padding="same", activation="relu", name="stem")(image)
    for block in range(1, BLOCKS + 1):
        x = layers.MaxPooling2D(2, name=f"block{block}_pool")(x)
        if separable:
            x = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name=f"block{block}_depthwise")(x)
            x = layers.Conv2D(FILTERS, 1, activation="relu", name=f"block{block}_pointwise")(x)
        else:
            x = layers.Conv2D(FILTERS, 3, padding="same", activation="relu", name=f"block{block}_conv")(x)
    x = layers.MaxPooling2D(2, name="pool")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(DENSE_UNITS, activation="relu", name="dense")(x)
    x = layers.Dense(classes, activation="softmax", name="probabilities")(x)
    return load("keras").Model(image, x, name=name)


def _folded_cnn(trained: Model) -> dict[str, list[Array]]:
    kernel, bias = trained.get_layer("stem").get_weights()
    weights = {"stem": [fold_stem(kernel, _scale(trained)), bias]}
    for block in range(1, BLOCKS + 1):
        name = f"block{block}_conv"
        weights[name] = trained.get_layer(name).get_weights()
    return weights


def _folded_dsc(trained: Model) -> dict[str, list[Array]]:
    (pointwise,) = trained.get_layer("stem_pointwise").get_weights()
    depthwise, bias = trained.get_layer("stem_depthwise").get_weights()
    weights = {"stem": [fold_separable_stem(pointwise, depthwise, _scale(trained)), bias]}
    for block in range(1, BLOCKS + 1):
        depthwise, pointwise, bias = trained.get_layer(f"block{block}_separable").get_weights()
        norm = trained.get_layer(f"block{block}_norm")
        kernel, bias = fold_batch_norm(pointwise, bias, norm.get_weights(), norm.epsilon)
        weights[f"block{block}_depthwise"] = [depthwise]
        weights[f"block{block}_pointwise"] = [kernel, bias]
    return weights


def _scale(trained: Model) -> float:
    return float(trained.get_layer("scale").scale)
