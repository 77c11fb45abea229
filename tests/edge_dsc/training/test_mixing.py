"""Mixed batches against values worked out by hand, with the draws given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from edge_dsc.training.mixing import ERASED_AREA, Batch, erase_rectangle, mix_batch
from edge_dsc.training.recipes import RECIPES, Recipe

PLAIN = replace(RECIPES["default"]["dsc"], label_smoothing=0.0)
SEEDS = [(7, 0, 0), (7, 0, 1)]


class Draws:
    """Stands in for a generator: gives what it was told, kind by kind."""

    def __init__(
        self, *, beta: float = 0.5, tosses: tuple[float, ...] = (), place: tuple[float, float] = (0, 0)
    ) -> None:
        self._beta, self._tosses, self._place = beta, iter(tosses), place
        self.strengths: list[tuple[float, float]] = []

    def beta(self, a: float, b: float) -> float:
        self.strengths.append((a, b))
        return self._beta

    def random(self) -> float:
        return next(self._tosses)

    def uniform(self, *, size: int) -> np.ndarray:
        assert size == 2
        return np.array(self._place)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[int]]]:
    """``drawn(Draws(...), Draws(...))``: what the generators give in turn; returns the seeds that they are made of."""

    def give(*draws: Draws) -> list[list[int]]:
        seeds: list[list[int]] = []
        coming: Iterator[Draws] = iter(draws)

        def make(seed: list[int]) -> Draws:
            seeds.append(seed)
            return next(coming)

        monkeypatch.setattr(np.random, "default_rng", make)
        return seeds

    return give


def pair(first: np.ndarray, second: np.ndarray) -> Batch:
    """Two images of two classes, of which the second weighs three times as much."""
    images = np.stack([first, second]).astype(np.float32)[..., None]
    return images, np.eye(2, dtype=np.float32), np.array([1, 3], np.float32)


def crossentropy(targets: np.ndarray, weights: np.ndarray, answers: np.ndarray) -> np.ndarray:
    return np.asarray(-weights * (targets * np.log(answers)).sum(axis=1))


def test_without_ingredients_a_batch_is_the_very_same() -> None:
    batch = pair(np.zeros((2, 2)), np.ones((2, 2)))
    for before, after in zip(batch, mix_batch(batch, PLAIN, SEEDS), strict=True):
        assert before is after


def test_mixup_mixes_pixels_targets_and_weights(drawn: Callable[..., list[list[int]]]) -> None:
    batch = pair(np.array([[10, 20]]), np.array([[110, 220]]))
    quarter, half = Draws(beta=0.25), Draws(beta=0.5)
    seeds = drawn(quarter, half)
    images, targets, weights = mix_batch(batch, replace(PLAIN, mixup=0.2), SEEDS)
    assert seeds == [[7, 0, 0, 2], [7, 0, 1, 2]] and quarter.strengths == half.strengths == [(0.2, 0.2)]
    assert images[:, 0, :, 0].tolist() == [[85, 170], [60, 120]]  # the last one is mixed with the first
    # 1/4 of weight 1 and 3/4 of weight 3; 1/2 of weight 3 and 1/2 of weight 1.
    assert weights.tolist() == [2.5, 2.0]
    np.testing.assert_allclose(targets, [[0.1, 0.9], [0.25, 0.75]], rtol=1e-6)
    assert {values.dtype for values in (images, targets, weights)} == {np.dtype(np.float32)}
    assert batch[0][0].ravel().tolist() == [10, 20]  # the batch that came in stays as it is


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_mix_is_that_of_both_images(
    drawn: Callable[..., list[list[int]]], smoothing: float
) -> None:
    batch = pair(np.zeros((2, 2)), np.ones((2, 2)))
    drawn(Draws(beta=0.25), Draws(beta=0.5))
    _, targets, weights = mix_batch(batch, replace(PLAIN, mixup=0.2), SEEDS)
    answers = np.array([[0.3, 0.7], [0.6, 0.4]])

    def loss(labels: np.ndarray, shares: np.ndarray) -> np.ndarray:
        return crossentropy(labels * (1 - smoothing) + smoothing / 2, shares, answers)

    one, other = np.eye(2), np.eye(2)[::-1]
    expected = [0.25, 0.5] * loss(one, np.array([1, 3])) + [0.75, 0.5] * loss(other, np.array([3, 1]))
    np.testing.assert_allclose(loss(targets, weights), expected, rtol=1e-6)


def test_cutmix_pastes_the_same_place_of_the_next_image(drawn: Callable[..., list[list[int]]]) -> None:
    batch = pair(np.zeros((4, 4)), np.full((4, 4), 9))
    # A quarter is to be pasted: 2 by 2 pixels, in the middle; of the second image's, three lie over the border.
    drawn(Draws(beta=0.75, place=(0.5, 0.5)), Draws(beta=0.75, place=(0, 0)))
    images, targets, weights = mix_batch(batch, replace(PLAIN, cutmix=1.0), SEEDS)
    assert images[0, :, :, 0].tolist() == [[0, 0, 0, 0], [0, 9, 9, 0], [0, 9, 9, 0], [0, 0, 0, 0]]
    assert images[1, 0, 0, 0] == 0 and (images[1] == 9).sum() == 15
    # Shares 12/16 and 15/16 of the pixels: weights 0.75 + 0.25 * 3 and 3 * 15/16 + 1/16.
    np.testing.assert_allclose(weights, [1.5, 2.875], rtol=1e-6)
    np.testing.assert_allclose(targets, [[0.5, 0.5], [0.0625 / 2.875, 2.8125 / 2.875]], rtol=1e-6)


def test_with_both_a_toss_decides_for_each_image(drawn: Callable[..., list[list[int]]]) -> None:
    batch = pair(np.zeros((2, 2)), np.full((2, 2), 8))
    pasted, mixed = Draws(tosses=(0.49,), beta=0.75, place=(0.5, 0.5)), Draws(tosses=(0.5,), beta=0.75)
    drawn(pasted, mixed)
    images, _, _ = mix_batch(batch, replace(PLAIN, mixup=0.2, cutmix=1.0), SEEDS)
    assert (pasted.strengths, mixed.strengths) == ([(1, 1)], [(0.2, 0.2)])
    assert set(images[0].ravel().tolist()) == {0, 8}
    assert set(images[1].ravel().tolist()) == {6}


def changed(image: np.ndarray) -> tuple[int, int, int]:
    """Height and width of the box around what is no longer -1, and how many pixels of it are."""
    rows, columns = np.nonzero(image != -1)
    tall, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
    return int(tall), int(wide), len(rows)


def test_a_rectangle_of_noise_is_as_large_as_the_source_says() -> None:
    sizes, levels = [], set()
    for seed in range(200):
        image = np.full((50, 80), -1, np.float32)
        erase_rectangle(image, np.random.default_rng(seed))
        tall, wide, count = changed(image)
        assert count == tall * wide
        sizes.append(count / image.size)
        levels.update(image[image != -1].tolist())
    assert ERASED_AREA[0] * 0.8 < min(sizes) < 0.05 and 0.3 < max(sizes) < ERASED_AREA[1] * 1.05
    assert levels == set(range(256))


def erased(recipe: Recipe, count: int) -> list[bool]:
    images = np.full((count, 20, 20, 1), -1, np.float32)
    seeds = [(0, 1, index) for index in range(count)]
    made, _, _ = mix_batch((images, np.ones((count, 1)), np.ones(count)), recipe, seeds)
    assert (images == -1).all()
    return [bool((image != -1).any()) for image in made]


def test_a_share_of_the_images_is_erased_the_same_ones_every_time() -> None:
    quarter = replace(PLAIN, erasing=0.25)
    first = erased(quarter, 400)
    assert 70 < sum(first) < 130 and first == erased(quarter, 400)
    assert all(erased(replace(PLAIN, erasing=1.0), 20))


def test_erasing_does_not_move_the_draws_of_mixing() -> None:
    batch = pair(np.zeros((8, 8)), np.full((8, 8), 9))
    plain = mix_batch(batch, replace(PLAIN, mixup=0.4), SEEDS)
    both = mix_batch(batch, replace(PLAIN, mixup=0.4, erasing=1.0), SEEDS)
    assert np.array_equal(plain[1], both[1]) and np.array_equal(plain[2], both[2])
    assert not np.array_equal(plain[0], both[0])
