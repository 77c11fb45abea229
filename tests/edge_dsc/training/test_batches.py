from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from edge_dsc.training.batches import (
    Batches,
    TaughtBatches,
    augment_image,
    class_weights,
    mix_in,
    soften,
)
from edge_dsc.training.mixing import mix_batch
from edge_dsc.training.recipes import RECIPES

STILL = replace(RECIPES["default"]["dsc"], rotation=0.0, zoom=0.0, shift=0.0, flip=False, batch=4)
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 24, 32, 1), dtype=np.uint8)


def make_batches(seed: int = 0, **changes: object) -> Batches:
    targets = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 2])
    return Batches(
        pixels=IMAGES,
        targets=targets,
        weights=class_weights(targets, 3),
        classes=3,
        recipe=replace(STILL, **changes),
        seed=seed,
    )


def test_without_ranges_the_image_stays() -> None:
    assert np.array_equal(
        augment_image(IMAGES[0, :, :, 0], STILL, np.random.default_rng(0)), IMAGES[0, :, :, 0]
    )


def test_a_flip_mirrors_left_to_right() -> None:
    image = IMAGES[0, :, :, 0]
    seen = {
        augment_image(image, replace(STILL, flip=True), np.random.default_rng(seed)).tobytes()
        for seed in range(20)
    }
    assert seen == {image.tobytes(), image[:, ::-1].tobytes()}


def test_both_flips_mirror_either_way_and_both() -> None:
    image = IMAGES[0, :, :, 0]
    recipe = replace(STILL, flip=True, flip_vertical=True)
    seen = {augment_image(image, recipe, np.random.default_rng(seed)).tobytes() for seed in range(40)}
    turned = (image, image[:, ::-1], image[::-1], image[::-1, ::-1])
    assert seen == {one.tobytes() for one in turned}


def test_the_draws_of_a_recipe_with_one_flip_are_those_of_before() -> None:
    """Runs of earlier versions go on to the same weights: a second flip draws after all else, and only where it is."""
    image = IMAGES[0, :, :, 0]
    moving = replace(STILL, rotation=10.0, zoom=0.1, shift=0.1, flip=True)
    rng = np.random.default_rng(5)
    augment_image(image, moving, rng)
    other = np.random.default_rng(5)
    other.uniform(size=4), other.random()
    assert rng.random() == other.random()


def test_without_augmentation_images_are_shown_as_they_are() -> None:
    recipe = replace(STILL, rotation=10.0, zoom=0.2, flip=True, flip_vertical=True).without_augmentation()
    batches = replace(make_batches(), recipe=recipe)
    known = {image.tobytes() for image in IMAGES}
    shown = [image.astype(np.uint8).tobytes() for images, _, _ in batches.of_epoch(3) for image in images]
    assert len(shown) == 8 and set(shown) <= known


def test_rotation_zoom_and_shift_stay_in_their_ranges() -> None:
    image = np.zeros((201, 201), np.uint8)
    image[100, 150] = 255  # 50 pixels right of the centre
    recipe = replace(STILL, rotation=10.0, zoom=0.2, shift=0.05)
    turns, reaches = [], []
    for seed in range(200):
        moved = augment_image(image, recipe, np.random.default_rng(seed)).astype(float)
        y, x = np.indices(moved.shape)
        at_x, at_y = (moved * x).sum() / moved.sum() - 100, (moved * y).sum() / moved.sum() - 100
        turns.append(at_y)
        reaches.append(at_x)
    assert 10 < np.max(np.abs(turns)) < 60 * np.sin(np.radians(10)) + 201 * 0.05 + 1
    assert 50 * 0.8 * 0.98 - 201 * 0.05 - 1 < np.min(reaches) < 40
    assert 60 < np.max(reaches) < 50 * 1.2 + 201 * 0.05 + 1


def test_an_epoch_shows_whole_batches_of_different_images() -> None:
    batches = make_batches()
    assert (batches.size, batches.steps) == (4, 2)
    shown = list(batches.of_epoch(0))
    assert [images.shape for images, _, _ in shown] == [(4, 24, 32, 1)] * 2
    assert shown[0][0].dtype == np.float32
    flat = {image.astype(np.uint8).tobytes(): index for index, image in enumerate(IMAGES)}
    indices = [flat[image.astype(np.uint8).tobytes()] for images, _, _ in shown for image in images]
    assert len(set(indices)) == 8
    targets = np.concatenate([targets for _, targets, _ in shown])
    weights = np.concatenate([weights for _, _, weights in shown])
    assert np.array_equal(targets.argmax(axis=1), batches.targets[indices])
    assert np.array_equal(weights, batches.weights[indices])


def test_seed_and_epoch_decide_everything() -> None:
    moving = {"rotation": 5.0, "zoom": 0.1, "flip": True}

    def draw(seed: int, epoch: int) -> bytes:
        return b"".join(images.tobytes() for images, _, _ in make_batches(seed, **moving).of_epoch(epoch))

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(1, 2), draw(1, 3), draw(2, 2)}) == 3


def test_fewer_images_than_a_batch() -> None:
    batches = make_batches(batch=64)
    assert (batches.size, batches.steps) == (10, 1)
    assert [images.shape[0] for images, _, _ in batches.of_epoch(0)] == [10]


def test_every_class_weighs_the_same() -> None:
    targets = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 2])
    weights = class_weights(targets, 3)
    assert weights.mean() == np.float32(1)
    assert np.allclose([weights[targets == index].sum() for index in range(3)], 10 / 3)


def test_a_temperature_makes_the_unlikely_weigh_more() -> None:
    answers = np.array([[0.64, 0.32, 0.04], [1.0, 0.0, 0.0]], np.float32)
    assert soften(answers, 1.0) is answers
    roots = np.array([0.8, 0.32**0.5, 0.2])
    softened = soften(answers, 2.0)
    assert softened.dtype == np.float32
    np.testing.assert_allclose(softened[0], roots / roots.sum(), rtol=1e-6)
    least = 1e-7**0.5  # no answer is impossible, as in Keras' cross-entropy
    np.testing.assert_allclose(softened[1], np.array([1, least, least]) / (1 + 2 * least), rtol=1e-5)


def test_a_teacher_gives_the_targets() -> None:
    class Teacher:
        def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
            share = images.mean(axis=(1, 2, 3)) / 255
            return np.stack([share, 1 - share, np.zeros_like(share)], axis=1)

    plain = make_batches(temperature=2.0)
    taught = TaughtBatches(**vars(plain), teacher=Teacher())
    for (images, _, weights), (same, targets, as_before) in zip(
        plain.of_epoch(0), taught.of_epoch(0), strict=True
    ):
        assert np.array_equal(images, same) and np.array_equal(weights, as_before)
        np.testing.assert_array_equal(targets, soften(Teacher().predict_on_batch(images), 2.0))


def test_a_recipe_mixes_the_images_that_it_has_moved() -> None:
    """The draws of order and movement are those of a recipe that mixes nothing."""
    moving = {"rotation": 5.0, "zoom": 0.1, "flip": True}
    plain = list(make_batches(3, **moving).of_epoch(1))
    mixed = list(make_batches(3, **moving, mixup=0.4).of_epoch(1))
    batches = make_batches(3, **moving)
    order = np.random.default_rng([3, 1]).permutation(len(IMAGES))
    for step, (images, targets, weights) in enumerate(plain):
        seeds = [(3, 1, int(index)) for index in order[step * 4 : step * 4 + 4]]
        expected = mix_batch((images, targets, weights), replace(batches.recipe, mixup=0.4), seeds)
        for one, other in zip(expected, mixed[step], strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(mixed[step][1].sum(axis=1), 1, rtol=1e-6)


class Says:
    """A network that always says the same, and notes what it is shown."""

    def __init__(self, *answer: float) -> None:
        self._answer, self.shown = np.float32(answer), list[np.ndarray]()

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        self.shown.append(images)
        return np.tile(self._answer, (len(images), 1))


def test_the_mean_answer_of_the_teachers_stands_behind_the_labels() -> None:
    teachers = Says(0.5, 0.5, 0.0), Says(0.78, 0.14, 0.08)
    mixing = make_batches(2, mixup=0.4, erasing=0.5)
    taught: Any = replace(make_batches(2, mixup=0.4, erasing=0.5, temperature=2.0), teachers=teachers)
    for (images, targets, weights), (shown, both, same) in zip(
        mixing.of_epoch(0), taught.of_epoch(0), strict=True
    ):
        np.testing.assert_array_equal(images, shown)
        np.testing.assert_array_equal(weights, same)
        np.testing.assert_array_equal(both[:, :3], targets)
        roots = np.array([0.8, 0.32**0.5, 0.2])  # of the mean 0.64, 0.32, 0.04
        np.testing.assert_allclose(both[:, 3:], np.tile(roots / roots.sum(), (4, 1)), rtol=1e-6)
    # They see what the pupil sees: erased and mixed.
    np.testing.assert_array_equal(teachers[0].shown, [images for images, _, _ in mixing.of_epoch(0)])


def test_synthetic_images_are_a_share_of_their_class_in_every_epoch() -> None:
    """Three real images of class 1 and one synthetic make a share of a quarter; another one is drawn in each epoch."""
    synthetic = np.random.default_rng(1).integers(0, 256, (5, 24, 32, 1), dtype=np.uint8)
    mixed = mix_in(make_batches(batch=11), synthetic, 1, 0.25)
    assert (mixed.made, mixed.mixed, mixed.shown, mixed.size, mixed.steps) == (5, 1, 11, 11, 1)
    flat = {image.tobytes(): index for index, image in enumerate([*IMAGES, *synthetic])}
    drawn = []
    for epoch in range(20):
        ((images, targets, weights),) = mixed.of_epoch(epoch)
        indices = sorted(flat[image.astype(np.uint8).tobytes()] for image in images)
        assert indices[:10] == list(range(10))
        drawn += indices[10:]
        assert targets.sum(axis=0).tolist() == [6, 4, 1]
        assert np.allclose((targets * weights[:, None]).sum(axis=0), 11 / 3)  # every class weighs the same
    assert set(drawn) == set(range(10, 15))
    again = [images.tobytes() for images, _, _ in mixed.of_epoch(3)]
    assert again == [images.tobytes() for images, _, _ in mixed.of_epoch(3)]


def test_of_few_synthetic_images_all_are_mixed_in_and_of_a_small_share_one() -> None:
    synthetic = np.zeros((2, 24, 32, 1), np.uint8)
    plain = make_batches(class_weights=False)
    assert mix_in(plain, synthetic, 0, 0.9).mixed == 2
    least = mix_in(plain, synthetic, 2, 0.01)
    assert (least.mixed, least.weights.tolist()) == (1, [1.0] * 12)


def test_without_synthetic_images_an_epoch_is_that_of_before() -> None:
    """Runs of earlier versions go on to the same weights."""
    batches = make_batches()
    order = np.random.default_rng([0, 4]).permutation(10)[:8]
    shown = np.concatenate([images for images, _, _ in batches.of_epoch(4)])
    assert np.array_equal(shown, IMAGES[order])
