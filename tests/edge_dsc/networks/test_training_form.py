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


def gradients(model: Any) -> tuple[list[str], list[np.ndarray]]:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        answers = model(PIXELS, training=False)
        loss = tf.reduce_mean(tf.keras.losses.categorical_crossentropy(TARGETS, answers))
    found = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    return [variable.path for variable in model.trainable_variables], [np.asarray(one) for one in found]


def made(architecture: str) -> Any:
    """A network none of whose weights is as it starts: biases above and below zero."""
    load_keras().utils.set_random_seed(0)
    model = build_network(architecture, 3)
    draw = np.random.default_rng(1)
    model.set_weights(
        [value + draw.uniform(0, 0.1, value.shape).astype(np.float32) for value in model.get_weights()]
    )
    return model


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
@pytest.mark.parametrize("architecture", ["cnn", "dsc"])
def test_answers_and_gradients_are_the_networks_own(architecture: str) -> None:
    model = made(architecture)
    form = training_form(model)
    assert form is not model
    np.testing.assert_allclose(form(PIXELS), model(PIXELS), atol=2e-6)
    paths, expected = gradients(model)
    same, found = gradients(form)
    assert same == paths
    for path, one, other in zip(paths, expected, found, strict=True):
        assert np.abs(one - other).max() <= 1e-5 * max(1.0, np.abs(one).max()), path
    assert max(np.abs(one).max() for one in expected) > 0.01  # there was something to compare


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
