"""What trains in place of a paper network is that network: answers, gradients, variables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_dsc.networks import build_network, load_keras, training_form

RNG = np.random.default_rng(0)
# Flat areas, as an X-ray's borders are: pooling finds equal values there.
PIXELS = np.where(RNG.random((4, 64, 64, 1)) < 0.3, 0, RNG.integers(0, 256, (4, 64, 64, 1))).astype(
    np.float32
)
TARGETS = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]


def gradients(model: Any, *, training: bool) -> tuple[list[str], list[np.ndarray]]:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        answers = model(PIXELS, training=training)
        loss = tf.reduce_mean(tf.keras.losses.categorical_crossentropy(TARGETS, answers))
    found = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    return [variable.path for variable in model.trainable_variables], [np.asarray(one) for one in found]


def made(architecture: str) -> Any:
    """A network none of whose weights is as it starts: biases on both sides of zero. Without Dropout."""
    load_keras().utils.set_random_seed(0)
    model = build_network(architecture, 3)
    draw = np.random.default_rng(1)
    model.set_weights(
        [value + draw.uniform(0, 0.1, value.shape).astype(np.float32) for value in model.get_weights()]
    )
    model.get_layer("dropout").rate = 0.0
    return model


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("architecture", ["cnn", "dsc"])
def test_answers_and_gradients_are_the_networks_own(architecture: str, training: bool) -> None:
    model = made(architecture)
    form = training_form(model)
    assert form is not model
    np.testing.assert_allclose(form(PIXELS, training=training), model(PIXELS, training=training), atol=2e-6)
    paths, expected = gradients(model, training=training)
    same, found = gradients(form, training=training)
    assert same == paths
    for path, one, other in zip(paths, expected, found, strict=True):
        if not (
            training and path.endswith("separable/bias")
        ):  # BatchNorm takes it away: its gradient is rounding
            assert np.abs(one).max() > 0, path
            assert np.abs(one - other).max() <= 5e-4 * np.abs(one).max(), path


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_what_batch_norm_keeps_moves_as_in_the_network() -> None:
    model, other = made("dsc"), made("dsc")
    before = model.get_weights()
    for trained in (model, training_form(other)):
        trained(PIXELS, training=True)
    for one, same in zip(model.non_trainable_variables, other.non_trainable_variables, strict=True):
        np.testing.assert_allclose(same, one, rtol=1e-5, atol=1e-7, err_msg=one.path)
    moved = [np.abs(one - was).max() for one, was in zip(model.get_weights(), before, strict=True)]
    assert sum(one > 0 for one in moved) == 6  # mean and variance of three layers


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
@pytest.mark.parametrize("architecture", ["cnn", "dsc"])
def test_its_variables_are_the_networks_in_its_order(architecture: str) -> None:
    model = made(architecture)
    form = training_form(model)
    assert [id(one) for one in form.variables] == [id(one) for one in model.variables]
    assert [id(one) for one in form.weights] == [id(one) for one in model.weights]
    assert (form.name, form.input_shape, form.output_shape) == (
        model.name, model.input_shape, model.output_shape,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_any_other_network_trains_as_it_is() -> None:
    keras = load_keras()
    image = keras.Input((64, 64, 1), name="image")
    other = keras.Model(image, keras.layers.Conv2D(3, 3, name="stem")(image), name="cnn")
    assert training_form(other) is other
    renamed = keras.models.clone_model(made("dsc"))
    renamed.name = "another"
    assert training_form(renamed) is renamed
