"""Loss, optimizer and start of a recipe, put on a network."""

from __future__ import annotations

from typing import Any

from edge_dsc.networks import load_keras
from edge_dsc.training.options import Recipe
from engines.packages import load

_DENSE_DEVIATION = 0.004
_DENSE_BIAS = 0.5

Array = Any
Model = Any


def compile_model(model: Model, recipe: Recipe, steps_per_epoch: int) -> None:
    """Give the model the recipe's loss and optimizer, with all of the optimizer's variables made.

    Args:
        model: From :func:`edge_dsc.networks.build_network`.
        recipe: Learning rate, label smoothing.
        steps_per_epoch: Steps an epoch; the cosine ends with the recipe's epochs.
    """
    keras = load_keras()
    rate: Any = recipe.learning_rate
    if recipe.cosine:
        warmup = min(recipe.warmup, recipe.epochs - 1) * steps_per_epoch
        rate = keras.optimizers.schedules.CosineDecay(
            rate / 20 if warmup else rate,
            steps_per_epoch * recipe.epochs - warmup,
            warmup_target=rate if warmup else None,
            warmup_steps=warmup,
        )
    model.compile(
        _make_adam(rate, model.get_layer("dense").trainable_weights, recipe.dense_rate),
        loss=keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing),
        metrics=["accuracy"],
        weighted_metrics=[],
        jit_compile=False,  # XLA on a CPU: 2.0 s a step instead of 0.1 s (measured on two cores)
    )
    model.optimizer.build(model.trainable_variables)


def start_dense(model: Model, seed: int) -> None:
    """Give the Dense(64) layer a start with every unit alive on every image."""
    numpy = load("numpy")
    layer = model.get_layer("dense")
    kernel, bias = layer.get_weights()
    drawn = numpy.random.default_rng(seed).normal(0, _DENSE_DEVIATION, kernel.shape)
    layer.set_weights([drawn.astype(numpy.float32), numpy.full_like(bias, _DENSE_BIAS)])


def start_convolutions(model: Model, images: Array) -> None:
    """Scale and shift every ordinary convolution so that its channels start at mean 0, deviation 1 on some images.

    Without BatchNorm, and with pixels that are all positive, the activations of the conventional network
    would shrink from layer to layer, and training would not leave the ground in the first epochs.
    Source: Mishkin and Matas, "All you need is a good init", ICLR 2016, here per channel.

    Args:
        model: Untrained; a network without ordinary convolutions that have a bias is left as it is.
        images: ``uint8 [N, 224, 224, 1]``, a few of each class.
    """
    keras = load_keras()
    for layer in model.layers:
        if type(layer) is not keras.layers.Conv2D or not layer.use_bias:
            continue
        features = keras.Model(model.input, layer.input)(images.astype("float32"), training=False)
        kernel, bias = layer.get_weights()
        answers = keras.ops.convert_to_numpy(keras.ops.conv(features, kernel, padding="same"))
        mean, deviation = answers.mean(axis=(0, 1, 2)), answers.std(axis=(0, 1, 2)) + 1e-6
        layer.set_weights([kernel / deviation, (bias - mean) / deviation])


def _make_adam(rate: Any, slow: list[Any], share: float) -> Any:
    """Return Adam with a share of its learning rate for some variables; Keras 3 has no such option."""
    keras = load_keras()
    if share == 1.0:
        return keras.optimizers.Adam(rate)

    class AdamWithSlowLayer(keras.optimizers.Adam):  # type: ignore[misc, name-defined]
        """Adam that moves the variables in ``slow`` at a share of the learning rate."""

        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            """Update one variable."""
            # TensorFlow's trainer hands over its own variable, the value of Keras' one.
            if any(variable is one or variable is one.value for one in slow):
                learning_rate = learning_rate * share
            super().update_step(gradient, variable, learning_rate)

    return AdamWithSlowLayer(rate)
