from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_dsc.networks import build_network, load_keras
from edge_dsc.training import RECIPES, TrainProgress
from edge_dsc.training.batches import Batches
from edge_dsc.training.fit import (
    compile_model,
    fit_model,
    predict,
    seed_everything,
    start_convolutions,
    start_dense,
)
from edge_dsc.training.run_folder import TrainState, load_state
from engines.errors import ArtefactError, UnstableError


class StubModel:
    """What :func:`fit_model` sees of a Keras model; its one weight counts the steps, its answers are as told.

    Args:
        shares: Probability of the true class at the end of each epoch of two steps.
        losses: Loss of each step; 1, 2, 3, ... by default.
    """

    def __init__(self, shares: list[float], losses: list[float] | None = None) -> None:
        self._shares = shares
        self._losses = losses
        self.steps = _Number(0)
        self.variables = [self.steps]
        self.optimizer = SimpleNamespace(variables=[_Number(7)])

    def reset_metrics(self) -> None:
        pass

    def train_on_batch(self, *batch: object, **more: object) -> dict[str, float]:
        self.steps.value += 1
        loss = float(self.steps.value) if self._losses is None else self._losses[self.steps.value - 1]
        return {"loss": loss, "accuracy": 0.5}

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        share = self._shares[self.steps.value // 2 - 1]
        return np.tile(np.float32([share, 1 - share]), (len(images), 1))

    def get_weights(self) -> list[np.ndarray]:
        return [self.steps.numpy()]

    def set_weights(self, values: list[np.ndarray]) -> None:
        self.steps.assign(values[0])


class _Number:
    def __init__(self, value: int) -> None:
        self.value = value

    def numpy(self) -> np.ndarray:
        return np.array(self.value)

    def assign(self, value: Any) -> None:
        self.value = int(value)


PIXELS = np.zeros((4, 8, 8, 1), np.uint8)
VALIDATION = (PIXELS, np.zeros(4, np.int64))


def batches(epochs: int) -> Batches:
    """Two steps in each epoch."""
    return Batches(
        pixels=PIXELS,
        targets=np.array([0, 1, 0, 1]),
        weights=np.ones(4, np.float32),
        classes=2,
        recipe=replace(RECIPES["quick"]["dsc"], epochs=epochs, batch=2),
        seed=0,
    )


def stop_at(epoch: int, step: int) -> Any:
    def report(state: TrainProgress) -> None:
        if (state.epoch, state.step) == (epoch, step):
            raise KeyboardInterrupt

    return report


def test_the_best_weights_are_kept_and_every_epoch_is_saved(tmp_path: Path) -> None:
    model, state = StubModel([0.5, 0.8, 0.7]), TrainState(file=tmp_path / "state.npz", settings={"seed": 3})
    reports: list[TrainProgress] = []
    assert not fit_model(model, batches(3), VALIDATION, state, reports.append)
    assert (state.epoch, state.best_epoch) == (3, 2)
    assert model.steps.value == 4  # after epoch 2
    assert state.history["loss"] == [1.5, 3.5, 5.5]
    assert state.history["validation_loss"] == pytest.approx(-np.log([0.5, 0.8, 0.7]))
    assert state.history["validation_accuracy"] == [1.0, 1.0, 1.0]
    saved = load_state(tmp_path / "state.npz")
    assert (saved.settings, saved.epoch, saved.best_epoch) == ({"seed": 3}, 3, 2)
    assert saved.history == state.history
    assert [(report.epoch, report.step) for report in reports] == [
        (epoch, step) for epoch in (1, 2, 3) for step in (1, 2)
    ]
    assert [report.loss for report in reports] == [1, 1.5, 3, 3.5, 5, 5.5]
    assert [report.validation_accuracy for report in reports] == [None, None, 1, 1, 1, 1]
    assert (reports[0].epochs, reports[0].steps) == (3, 2)
    assert reports[0].seconds_left > 0
    assert reports[-1].seconds_left == 0


def test_ctrl_c_keeps_the_whole_epochs_and_goes_on_from_there(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    model, state = StubModel([0.5, 0.8, 0.7]), TrainState(file=path)
    assert fit_model(model, batches(3), VALIDATION, state, stop_at(2, 1))
    assert (state.epoch, state.best_epoch, model.steps.value) == (1, 1, 2)
    resumed, state = StubModel([0.5, 0.8, 0.7]), load_state(path)
    resumed.optimizer.variables[0].value = 0
    assert not fit_model(resumed, batches(3), VALIDATION, state)
    assert resumed.optimizer.variables[0].value == 7
    assert state.history["loss"] == [1.5, 3.5, 5.5]
    assert resumed.steps.value == 4


@pytest.mark.parametrize("spoilt", ["variables", "optimizer", "best_weights"])
def test_a_state_of_another_network_is_refused(tmp_path: Path, spoilt: str) -> None:
    path = tmp_path / "state.npz"
    assert fit_model(StubModel([0.5, 0.8]), batches(2), VALIDATION, TrainState(file=path), stop_at(2, 1))
    state = load_state(path)
    getattr(state, spoilt).append(np.zeros((2, 2)))
    with pytest.raises(ArtefactError, match=r"state\.npz does not fit this network: .*begin anew"):
        fit_model(StubModel([0.5, 0.8]), batches(2), VALIDATION, state)


def test_ctrl_c_in_the_first_epoch_leaves_nothing(tmp_path: Path) -> None:
    state = TrainState(file=tmp_path / "state.npz")
    with pytest.raises(KeyboardInterrupt):
        fit_model(StubModel([0.5]), batches(1), VALIDATION, state, stop_at(1, 2))
    assert not list(tmp_path.iterdir())


def test_training_that_diverges_says_so(tmp_path: Path) -> None:
    model = StubModel([0.5, 0.5], losses=[1.0, 1.0, 1.0, float("nan")])
    with pytest.raises(
        UnstableError, match="training diverged: the loss is nan in epoch 2, step 2"
    ) as caught:
        fit_model(model, batches(2), VALIDATION, TrainState(file=tmp_path / "state.npz"))
    assert "--seed" in caught.value.remedy
    assert load_state(tmp_path / "state.npz").epoch == 1


@pytest.mark.slow
def test_the_dense_layer_learns_at_its_share_of_the_rate() -> None:
    seed_everything(0)
    model = build_network("dsc", 3)
    recipe = replace(RECIPES["default"]["dsc"], learning_rate=0.01, cosine=False, dense_rate=0.02)
    start_dense(model, 0)
    trained = compile_model(model, recipe, 1)
    before = {weight.path: weight.numpy().copy() for weight in model.trainable_weights}
    pixels = np.random.default_rng(0).integers(0, 256, (6, 224, 224, 1)).astype(np.float32)
    trained.train_on_batch(pixels, np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]], np.ones(6, np.float32))
    # Adam's first step moves every weight by the learning rate, whatever the gradient.
    moves = {
        weight.path: np.abs(weight.numpy() - before[weight.path]).max() for weight in model.trainable_weights
    }
    assert moves.pop("dense/kernel") == pytest.approx(0.0002, rel=0.01)
    assert moves.pop("dense/bias") == pytest.approx(0.0002, rel=0.01)
    assert moves["probabilities/kernel"] == pytest.approx(0.01, rel=0.01)
    assert moves["block3_separable/pointwise_kernel"] == pytest.approx(0.01, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_that_of_softened_answers(temperature: float) -> None:
    keras = load_keras()
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Softmax()])
    recipe = replace(
        RECIPES["default"]["dsc"], temperature=temperature, label_smoothing=0.0, dense_rate=1.0, cosine=False
    )
    compile_model(model, recipe, 1)
    logits = np.array([[2.0, 0.5, -1.0], [0.0, 3.0, 1.0]], np.float32)
    targets = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], np.float32)
    softened = logits / temperature
    logs = softened - np.log(np.exp(softened).sum(axis=1, keepdims=True))
    expected = temperature**2 * -(targets * logs).sum(axis=1).mean()
    assert model.test_on_batch(logits, targets)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_teachers_have_their_share_of_the_loss_and_none_of_the_accuracy() -> None:
    keras = load_keras()
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Softmax()])
    recipe = replace(
        RECIPES["default"]["dsc"],
        temperature=2.0, distillation=0.25, label_smoothing=0.1, dense_rate=1.0, cosine=False,
    )  # fmt: skip
    compile_model(model, recipe, 1)
    # Answers 0.8 and 0.2; softened 2/3 and 1/3. The first label is right, the second wrong.
    logits = np.log(np.array([[0.8, 0.2], [0.8, 0.2]], np.float32))
    targets = np.array([[1, 0, 0.5, 0.5], [0, 1, 0.5, 0.5]], np.float32)
    weights = np.array([1, 3], np.float32)
    hard = -np.array([0.95 * np.log(0.8) + 0.05 * np.log(0.2), 0.05 * np.log(0.8) + 0.95 * np.log(0.2)])
    soft = -4 * 0.5 * (np.log(2 / 3) + np.log(1 / 3))
    figures = model.test_on_batch(logits, targets, sample_weight=weights, return_dict=True)
    expected = (weights * (0.75 * hard + 0.25 * soft)).mean()
    assert figures["loss"] == pytest.approx(expected, rel=1e-5)
    assert figures["accuracy"] == 0.5


@pytest.mark.slow
def test_kernels_decay_by_their_own_learning_rate_and_nothing_else_does() -> None:
    keras = load_keras()
    model = keras.Sequential(
        [
            keras.layers.Input((2,)),
            keras.layers.Dense(2, kernel_initializer="ones", bias_initializer="ones", name="dense"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(2, kernel_initializer="ones", bias_initializer="ones", name="logits"),
            keras.layers.Softmax(),
        ]
    )
    recipe = replace(
        RECIPES["default"]["dsc"], learning_rate=0.5, cosine=False, dense_rate=0.5, weight_decay=0.25
    )
    compile_model(model, recipe, 1)
    optimizer, variables = model.optimizer, model.trainable_variables
    optimizer.apply([variable * 0 for variable in variables], variables)
    found = {variable.path.split("/", 1)[-1]: variable.numpy() for variable in variables}
    kernels = [variable.numpy() for variable in variables if variable.path.endswith("kernel")]
    # 1 - 0.5 * 0.5 * 0.25 in the slow layer, 1 - 0.5 * 0.25 in the other; without a gradient Adam moves nothing.
    assert [np.unique(kernel).tolist() for kernel in kernels] == [[0.9375], [0.875]]
    others = [values for path, values in found.items() if not path.endswith("kernel")]
    assert {value for values in others for value in values.ravel().tolist()} == {0, 1}


def tiny_network() -> Any:
    keras = load_keras()
    seed_everything(1)
    return keras.Sequential(
        [keras.layers.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dropout(0.2), keras.layers.Dense(2),
         keras.layers.Softmax()]
    )  # fmt: skip


@pytest.mark.slow
def test_a_stopped_run_with_everything_added_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    recipe = replace(
        RECIPES["quick"]["dsc"],
        epochs=3, batch=4, dense_rate=1.0, fixed=True,
        mixup=0.2, cutmix=1.0, erasing=0.5, weight_decay=0.05, distillation=0.5, temperature=2.0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 8, 8, 1), np.uint8)
    nothing = (images[:0], np.zeros(0, np.int64))
    whole = Batches(
        pixels=images, targets=np.arange(12) % 2, weights=np.ones(12, np.float32), classes=2, recipe=recipe,
        seed=4, teachers=(tiny_network(),),
    )  # fmt: skip

    def fit(
        file: str, report: Any = None, state: TrainState | None = None
    ) -> tuple[list[np.ndarray], TrainState]:
        model, state = tiny_network(), state or TrainState(file=tmp_path / file)
        compile_model(model, recipe, whole.steps)
        fit_model(model, whole, nothing, state, report)
        return model.get_weights(), state

    expected, history = fit("whole.npz")
    fit("stopped.npz", stop_at(3, 2))
    seen, resumed = fit("", state=load_state(tmp_path / "stopped.npz"))
    assert resumed.history == history.history
    assert [weight.tobytes() for weight in seen] == [weight.tobytes() for weight in expected]


@pytest.mark.slow
def test_convolutions_start_at_unit_scale() -> None:
    import keras

    seed_everything(0)
    model = build_network("cnn", 3)
    images = np.random.default_rng(0).integers(60, 120, (4, 224, 224, 1), dtype=np.uint8)
    start_convolutions(model, images)
    layer = model.get_layer("block3_conv")
    features = keras.Model(model.input, layer.input)(images.astype(np.float32), training=False)
    kernel, bias = layer.get_weights()
    answers = keras.ops.convert_to_numpy(keras.ops.conv(features, kernel, padding="same")) + bias
    assert np.abs(answers.mean(axis=(0, 1, 2))).max() < 1e-3
    assert np.abs(answers.std(axis=(0, 1, 2)) - 1).max() < 1e-3


@pytest.mark.slow
def test_prediction_does_not_depend_on_the_batch() -> None:
    seed_everything(0)
    model = build_network("dsc", 3)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 1), dtype=np.uint8)
    whole = predict(model, pixels)
    assert whole.shape == (3, 3)
    assert np.array_equal(whole[1:2], predict(model, pixels[1:2]))


def test_without_validation_images_the_last_weights_are_kept(tmp_path: Path) -> None:
    nothing = (PIXELS[:0], np.zeros(0, np.int64))
    state = TrainState(file=tmp_path / "state.npz")
    model: Any = StubModel([0.9, 0.1, 0.5])
    assert not fit_model(model, batches(3), nothing, state)
    assert (state.best_epoch, model.steps.value) == (3, 6)
    assert set(state.history) == {"loss", "accuracy"}
    # As a stopped run goes on.
    again = load_state(tmp_path / "state.npz")
    other: Any = StubModel([0.9] * 4)
    assert not fit_model(other, batches(4), nothing, again)
    assert (again.best_epoch, other.steps.value) == (4, 8)
