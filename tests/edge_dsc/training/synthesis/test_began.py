"""The two pairs of networks, the balance and the measure of convergence, and one step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge_dsc.networks import load_keras
from edge_dsc.training.fit import seed_everything
from edge_dsc.training.synthesis.began import (
    Began,
    BeganPair,
    build_discriminator,
    build_generator,
    convergence,
    draw_latent,
    next_balance,
)

TINY = Began(size=16, filters=2, latent=3, batch=2, steps=2)


def test_the_balance_follows_the_two_losses() -> None:
    """k + lambda_k (gamma L(x) - L(G(z))), held in [0, 1]."""
    began = Began(gamma=0.5, balance_rate=0.25)
    assert (
        next_balance(0.5, 1.0, 0.25, began) == 0.5625
    )  # generated images are rebuilt too well: weigh them more
    assert next_balance(0.5, 1.0, 0.75, began) == 0.4375
    assert next_balance(0.5, 1.0, 0.5, began) == 0.5  # at equilibrium
    assert next_balance(0.0, 1.0, 0.75, began) == 0.0
    assert next_balance(0.96875, 1.0, 0.25, began) == 1.0


def test_the_measure_of_convergence() -> None:
    """M = L(x) + abs(gamma L(x) - L(G(z)))."""
    began = Began(gamma=0.5)
    assert convergence(0.5, 0.125, began) == 0.625
    assert convergence(0.5, 0.375, began) == 0.625
    assert convergence(0.5, 0.25, began) == 0.5


@pytest.mark.parametrize(("size", "levels"), [(16, 1), (32, 2), (64, 3), (128, 4), (224, 5)])
def test_an_image_is_halved_to_eight_pixels_or_seven(size: int, levels: int) -> None:
    assert Began(size=size).levels == levels
    assert size >> levels in (7, 8)


def convolution(inputs: int, outputs: int, separable: bool) -> int:
    """Parameters of a 3x3 convolution with bias, as the paper counts them."""
    return inputs * (9 + outputs) + outputs if separable else 9 * inputs * outputs + outputs


@pytest.mark.parametrize("architecture", ["depthwise-began", "began"])
def test_the_networks_have_the_layers_that_are_described(architecture: str) -> None:
    began = replace(TINY, architecture=architecture)
    separable = architecture == "depthwise-began"
    generator, discriminator = build_generator(began), build_discriminator(began)
    assert (generator.input_shape, generator.output_shape) == ((None, 3), (None, 16, 16, 1))
    assert discriminator.input_shape == discriminator.output_shape == (None, 16, 16, 1)
    side = 8 * 8
    decoder = (3 + 1) * side * 2 + 4 * convolution(2, 2, separable) + (9 * 2 + 1)
    encoder = (9 + 1) * 2 + convolution(2, 2, separable) + convolution(2, 4, separable) + (4 * side + 1) * 3
    assert (generator.count_params(), discriminator.count_params()) == (decoder, encoder + decoder)


def test_a_draw_is_the_same_for_the_same_seed() -> None:
    one, same, other = (draw_latent(seed, 500, TINY) for seed in ([1, 2], [1, 2], [1, 3]))
    assert one.shape == (500, 3) and one.dtype == np.float32
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert -1 <= one.min() < -0.99 and 0.99 < one.max() < 1 and abs(one.mean()) < 0.1


@pytest.mark.slow
def test_a_step_moves_both_networks_and_the_average() -> None:
    seed_everything(0)
    pair = BeganPair(replace(TINY, averaging=0.75))
    keras = load_keras()
    real = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 1)).astype(np.float32)
    latent = draw_latent([0], 2, TINY)

    def error(images: np.ndarray) -> float:
        rebuilt = keras.ops.convert_to_numpy(pair.discriminator(images))
        return float(np.abs(images - rebuilt).mean())

    fake = keras.ops.convert_to_numpy(pair.generator(latent))
    expected = error(real), error(fake)
    before = pair.generator.get_weights()
    assert all(map(np.array_equal, pair.average.get_weights(), before))

    np.testing.assert_allclose(pair.step(real, latent, 0.5), expected, rtol=1e-5)
    after = pair.generator.get_weights()
    for kept, old, new in zip(pair.average.get_weights(), before, after, strict=True):
        np.testing.assert_allclose(kept, 0.75 * old + 0.25 * new, atol=1e-6)
        assert not np.array_equal(old, new)

    # Without weight on the generated images the autoencoder learns to rebuild, with much of it to fail on them.
    pair.set_learning_rate(0.003)
    assert pair.learning_rate == pytest.approx(0.003)
    first = pair.step(real, latent, 0.0)
    for _ in range(20):
        last = pair.step(real, latent, 0.0)
    assert last[0] < first[0]
    pair.set_learning_rate(0.0)
    stays = pair.generator.get_weights(), pair.discriminator.get_weights()
    pair.step(real, latent, 1.0)
    for models, weights in zip((pair.generator, pair.discriminator), stays, strict=True):
        assert all(map(np.array_equal, models.get_weights(), weights))
