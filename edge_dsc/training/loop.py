"""The training loop: steps, validation after every epoch, the best weights, and going on after a stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from edge_dsc.evaluation.metrics import classification_metrics
from edge_dsc.networks import load_keras
from edge_dsc.training.augmentation import Batches
from edge_dsc.training.options import ReportProgress, TrainProgress
from edge_dsc.training.state import TrainState
from engines.errors import EdgeDscError
from engines.packages import load

Array = Any
Model = Any
_PREDICT_BATCH = 64


def seed_everything(seed: int) -> None:
    """Make Keras and TensorFlow repeat themselves in this process: same seed, same machine, same weights."""
    keras = load_keras()
    keras.utils.set_random_seed(seed)
    load("tensorflow").config.experimental.enable_op_determinism()


def fit_model(
    model: Model,
    batches: Batches,
    validation: tuple[Array, Array],
    state: TrainState,
    *,
    save: Callable[[TrainState], None],
    progress: ReportProgress | None = None,
) -> bool:
    """Train to the end of the recipe, or until the user stops it; the model ends with its best weights.

    Args:
        model: Compiled; a resumed one is brought to ``state`` first.
        batches: The training images.
        validation: Pixels ``uint8 [V, height, width, 1]`` and class indices ``int [V]``.
        state: Changed in place, a whole epoch at a time.
        save: Called with the state after every epoch.
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
            save(state)
    except KeyboardInterrupt:
        if not state.epoch:
            raise
        interrupted = True
    model.set_weights(state.best_weights)
    return interrupted


def predict(model: Model, pixels: Array) -> Array:
    """Return probabilities ``float32 [N, classes]`` for ``uint8 [N, height, width, 1]``.

    Every batch has the same size, so TensorFlow traces the model once.
    """
    numpy = load("numpy")
    answers = []
    for start in range(0, len(pixels), _PREDICT_BATCH):
        part = pixels[start : start + _PREDICT_BATCH]
        batch = numpy.zeros((_PREDICT_BATCH, *pixels.shape[1:]), numpy.float32)
        batch[: len(part)] = part
        answers.append(model.predict_on_batch(batch)[: len(part)])
    return numpy.concatenate(answers)


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


def _train_epoch(
    model: Model, batches: Batches, state: TrainState, clock: _Clock, progress: ReportProgress | None
) -> dict[str, float]:
    seen = state.history.get("validation_accuracy")
    sums = {"loss": 0.0, "accuracy": 0.0}
    for step, (images, targets, weights) in enumerate(batches.of_epoch(state.epoch), start=1):
        model.reset_metrics()
        figures = model.train_on_batch(images, targets, sample_weight=weights, return_dict=True)
        sums = {name: value + float(figures[name]) for name, value in sums.items()}  # a step's own figures
        if not math.isfinite(sums["loss"]):
            raise EdgeDscError(
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
    model: Model, trained: dict[str, float], validation: tuple[Array, Array], classes: int, state: TrainState
) -> None:
    """Validate and record an epoch. The state's fields change together, last, so that Ctrl-C cannot part them."""
    pixels, targets = validation
    metrics = classification_metrics(
        targets, predict(model, pixels), [str(index) for index in range(classes)]
    )
    row = {
        "loss": trained["loss"],
        "accuracy": trained["accuracy"],
        "validation_loss": metrics.loss,
        "validation_accuracy": metrics.accuracy,
    }
    history = {name: [*state.history.get(name, []), value] for name, value in row.items()}
    best = min(history["validation_loss"]) == metrics.loss
    changes: dict[str, Any] = {
        "history": history,
        "variables": [variable.numpy() for variable in model.variables],
        "optimizer": [variable.numpy() for variable in model.optimizer.variables],
        "epoch": state.epoch + 1,
    }
    if best:
        changes |= {"best_epoch": state.epoch + 1, "best_weights": model.get_weights()}
    vars(state).update(changes)


def _restore(model: Model, state: TrainState) -> None:
    for variables, values in (
        (model.variables, state.variables),
        (model.optimizer.variables, state.optimizer),
    ):
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
