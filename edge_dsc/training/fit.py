"""Fitting a network: loss, optimizer and start of a recipe, the epochs, the best weights, going on after a stop."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_dsc.evaluate.metrics import classification_metrics
from edge_dsc.networks import load_keras, training_form
from edge_dsc.training.batches import SMALLEST_PROBABILITY, Batches
from edge_dsc.training.recipes import Recipe, ReportProgress, TrainProgress
from edge_dsc.training.run_folder import BEGIN_ANEW, TrainState, save_state
from engines.errors import ArtefactError, UnstableError
from engines.packages import load

if TYPE_CHECKING:
    from keras import Model, Variable
    from keras.optimizers import Optimizer
    from keras.optimizers.schedules import LearningRateSchedule

_DENSE_DEVIATION = 0.004
_DENSE_BIAS = 0.5
_PREDICT_BATCH = 16


def seed_everything(seed: int) -> None:
    """Make Keras and TensorFlow repeat themselves in this process: same seed, same machine, same weights."""
    keras = load_keras()
    keras.utils.set_random_seed(seed)
    load("tensorflow").config.experimental.enable_op_determinism()


def start_convolutions(model: Model, images: NDArray[np.uint8]) -> None:
    """Scale and shift every ordinary convolution so that its channels start at mean 0, deviation 1 on some images.

    Without BatchNorm, and with pixels that are all positive, the activations of the conventional network
    would shrink from layer to layer, and training would not leave the ground in the first epochs.
    Source: Mishkin and Matas, "All you need is a good init", ICLR 2016, here per channel.

    Args:
        model: Untrained; a network without ordinary convolutions that have a bias is left as it is.
        images: ``[N, 224, 224, 1]``, a few of each class.
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


def start_dense(model: Model, seed: int) -> None:
    """Give the Dense(64) layer a start with every unit alive on every image."""
    layer = model.get_layer("dense")
    kernel, bias = layer.get_weights()
    drawn = np.random.default_rng(seed).normal(0, _DENSE_DEVIATION, kernel.shape)
    layer.set_weights([drawn.astype(np.float32), np.full_like(bias, _DENSE_BIAS)])


def compile_model(model: Model, recipe: Recipe, steps_per_epoch: int) -> Model:
    """Return what is trained for a model, with the recipe's loss and optimizer, and all of the optimizer's variables.

    Args:
        model: Any classifier; where the recipe slows a layer down, with one named ``dense``.
        recipe: Learning rate, label smoothing, temperature.
        steps_per_epoch: The cosine ends with the recipe's epochs.

    Returns:
        The model itself, or the form of it that trains quicker (:func:`edge_dsc.networks.forms.training_form`): its
        variables are the model's.
    """
    keras = load_keras()
    rate: float | LearningRateSchedule = recipe.learning_rate
    if recipe.cosine:
        warmup = min(recipe.warmup, recipe.epochs - 1) * steps_per_epoch
        rate = keras.optimizers.schedules.CosineDecay(
            recipe.learning_rate / 20 if warmup else recipe.learning_rate,
            steps_per_epoch * recipe.epochs - warmup,
            warmup_target=recipe.learning_rate if warmup else None,
            warmup_steps=warmup,
        )
    slow = model.get_layer("dense").trainable_weights if recipe.dense_rate != 1.0 else []
    trained = training_form(model)
    trained.compile(
        _make_adam(rate, slow, recipe),
        loss=_make_loss(recipe),
        metrics=[_label_accuracy if recipe.distillation else "accuracy"],
        weighted_metrics=[],
        jit_compile=False,  # XLA on a CPU: 2.0 s a step instead of 0.1 s (measured on two cores)
    )
    trained.optimizer.build(trained.trainable_variables)
    return trained


def _make_loss(recipe: Recipe) -> Any:
    """Return the cross-entropy of a recipe; with a temperature that of softened answers to softened targets.

    Times the temperature squared, so that one learning rate suits all temperatures. With ``distillation`` it has that
    share, and the cross-entropy to the labels the rest. Source: Hinton, Vinyals and Dean, arXiv 1503.02531 (2015),
    section 2.
    """
    keras = load_keras()
    temperature, share = recipe.temperature, recipe.distillation
    if temperature == 1.0 and not share:
        return keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing)

    def softened_crossentropy(targets: Any, answers: Any) -> Any:
        logits = keras.ops.log(keras.ops.clip(answers, SMALLEST_PROBABILITY, 1.0)) / temperature
        return temperature**2 * keras.losses.categorical_crossentropy(targets, logits, from_logits=True)

    def distilled_crossentropy(targets: Any, answers: Any) -> Any:
        classes = answers.shape[-1]
        labels, taught = targets[:, :classes], targets[:, classes:]
        hard = keras.losses.categorical_crossentropy(labels, answers, label_smoothing=recipe.label_smoothing)
        return (1 - share) * hard + share * softened_crossentropy(taught, answers)

    return distilled_crossentropy if share else softened_crossentropy


def _label_accuracy(targets: Any, answers: Any) -> Any:
    """Say whether the most probable class is the label's, where teachers' answers stand behind the labels."""
    keras = load_keras()
    return keras.metrics.categorical_accuracy(targets[:, : answers.shape[-1]], answers)


_label_accuracy.__name__ = "accuracy"  # as Keras calls its own


def _make_adam(rate: float | LearningRateSchedule, slow: list[Variable], recipe: Recipe) -> Optimizer:
    """Return Adam with a share of its learning rate for some variables, and with weight decay; Keras has no such share.

    A step takes ``weight_decay`` times the variable's own learning rate off every kernel; biases and BatchNorm's
    parameters, which have one axis, keep theirs. Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization,
    ICLR 2019, algorithm 2.
    """
    keras = load_keras()
    share, decay = recipe.dense_rate, recipe.weight_decay
    if not slow and not decay:
        return keras.optimizers.Adam(rate)

    class AdamByVariable(keras.optimizers.Adam):  # type: ignore[misc, name-defined]
        """Adam that moves the variables in ``slow`` at a share of the learning rate, and lets kernels decay."""

        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            """Update one variable."""
            # TensorFlow's trainer hands over its own variable, the value of Keras' one.
            if any(variable is one or variable is one.value for one in slow):
                learning_rate = learning_rate * share
            if decay and len(variable.shape) > 1:
                self.assign_sub(variable, variable * keras.ops.cast(learning_rate * decay, variable.dtype))
            super().update_step(gradient, variable, learning_rate)

    return AdamByVariable(rate)


def fit_model(
    model: Model,
    batches: Batches,
    validation: tuple[NDArray[np.uint8], NDArray[np.int64]],
    state: TrainState,
    progress: ReportProgress | None = None,
) -> bool:
    """Train to the end of the recipe, or until the user stops it; the model ends with its best weights.

    Where no image validates, the best weights are the last ones.

    Args:
        model: As :func:`compile_model` returns it; a resumed one is brought to ``state`` first.
        batches: The training images.
        validation: Raw pixels ``[V, height, width, 1]`` and class indices ``[V]``; V is 0 for a fixed schedule.
        state: Changed in place and saved, a whole epoch at a time.
        progress: Called after every step.

    Returns:
        True where Ctrl-C ended it early.

    Raises:
        EdgeDscError: The loss is no number any more.
        KeyboardInterrupt: Stopped before the first epoch was done: there is nothing to keep.
    """
    if state.epoch:
        _restore(model, state)
    interrupted = False
    clock = _Clock(steps=batches.steps * (batches.recipe.epochs - state.epoch))
    try:
        while state.epoch < batches.recipe.epochs:
            trained = _train_epoch(model, batches, state, clock, progress)
            _close_epoch(model, trained, validation, batches.classes, state)
            save_state(state)
    except KeyboardInterrupt:
        if not state.epoch:
            raise
        interrupted = True
    model.set_weights(state.best_weights)
    return interrupted


def predict(model: Model, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return probabilities ``[N, classes]`` for raw pixels ``[N, height, width, 1]``.

    Every batch has the same size, so TensorFlow traces the model once.
    """
    answers = []
    for start in range(0, len(pixels), _PREDICT_BATCH):
        part = pixels[start : start + _PREDICT_BATCH]
        batch = np.zeros((_PREDICT_BATCH, *pixels.shape[1:]), np.float32)
        batch[: len(part)] = part
        answers.append(model.predict_on_batch(batch)[: len(part)])
    return np.concatenate(answers)


class _Clock:
    """Time left, from the steps done so far."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.done = 0
        self.started = time.monotonic()

    def step(self) -> float:
        self.left -= 1
        self.done += 1
        return (time.monotonic() - self.started) / self.done * self.left


def _restore(model: Model, state: TrainState) -> None:
    """Bring a model to a state.

    Raises:
        ArtefactError: The state is of another network.
    """
    try:
        for variables, values in (
            (model.variables, state.variables),
            (model.optimizer.variables, state.optimizer),
        ):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        best, now = (
            [np.shape(weight) for weight in found] for found in (state.best_weights, model.get_weights())
        )
        if best != now:
            raise ValueError(f"its best weights have the shapes {best[:3]}..., not {now[:3]}...")
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(f"{state.file} does not fit this network: {reason}", remedy=BEGIN_ANEW) from error


def _train_epoch(
    model: Model, batches: Batches, state: TrainState, clock: _Clock, progress: ReportProgress | None
) -> dict[str, float]:
    """Train one epoch and return the means of its steps' loss and accuracy."""
    seen = state.history.get("validation_accuracy")
    sums = {"loss": 0.0, "accuracy": 0.0}
    for step, (images, targets, weights) in enumerate(batches.of_epoch(state.epoch), start=1):
        model.reset_metrics()
        figures = model.train_on_batch(images, targets, sample_weight=weights, return_dict=True)
        sums = {name: value + float(figures[name]) for name, value in sums.items()}  # a step's own figures
        if not math.isfinite(sums["loss"]):
            raise UnstableError(
                f"training diverged: the loss is {figures['loss']} in epoch {state.epoch + 1}, step {step}",
                remedy="train with another --seed or --recipe; the last whole epoch is kept",
            )
        seconds_left = clock.step()
        if progress:
            progress(
                TrainProgress(
                    epoch=state.epoch + 1,
                    epochs=batches.recipe.epochs,
                    step=step,
                    steps=batches.steps,
                    loss=sums["loss"] / step,
                    accuracy=sums["accuracy"] / step,
                    validation_accuracy=seen[-1] if seen else None,
                    seconds_left=seconds_left,
                )
            )
    return {name: value / batches.steps for name, value in sums.items()}


def _close_epoch(
    model: Model,
    trained: dict[str, float],
    validation: tuple[NDArray[np.uint8], NDArray[np.int64]],
    classes: int,
    state: TrainState,
) -> None:
    """Validate and record an epoch. The state's fields change together, last, so that Ctrl-C cannot part them."""
    pixels, targets = validation
    row = {"loss": trained["loss"], "accuracy": trained["accuracy"]}
    if len(targets):
        labels = [str(index) for index in range(classes)]
        metrics = classification_metrics(targets, predict(model, pixels), labels)
        row |= {"validation_loss": metrics.loss, "validation_accuracy": metrics.accuracy}
    history = {name: [*state.history.get(name, []), value] for name, value in row.items()}
    losses = history.get("validation_loss", [0.0])
    best = min(losses) == losses[-1]
    changes: dict[str, Any] = {
        "history": history,
        "variables": [variable.numpy() for variable in model.variables],
        "optimizer": [variable.numpy() for variable in model.optimizer.variables],
        "epoch": state.epoch + 1,
    }
    if best:
        changes |= {"best_epoch": state.epoch + 1, "best_weights": model.get_weights()}
    vars(state).update(changes)
