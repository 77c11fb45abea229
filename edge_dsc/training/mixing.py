"""What else a recipe may do to a batch: erase rectangles, and mix each image with another of its batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_dsc.training.recipes import Recipe

# Images [B, height, width, 1] 0..255; targets [B, C], each summing to 1, and where networks teach their answers behind
# them, [B, 2C]; weights [B].
Batch = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
# Source: Zhong, Zheng, Kang, Li and Yang, Random Erasing Data Augmentation, AAAI 2020, algorithm 1 and section 4.
ERASED_AREA = (0.02, 0.4)  # of the image
ERASED_SHAPE = (0.3, 1 / 0.3)  # height to width
_MOST_TRIES = 100  # at a rectangle that fits
# The last number of a seed, so that what is drawn for the one does not move the draws of the other.
_ERASE, _MIX = 1, 2


def mix_batch(batch: Batch, recipe: Recipe, seeds: Sequence[tuple[int, ...]]) -> Batch:
    """Erase a rectangle in some images, then mix each image with the next one of the batch, the last with the first.

    A mix of two images has a share ``s`` of the one and ``1 - s`` of the other, in its pixels and in its loss, which is
    ``s`` times that of the one, with its weight, and ``1 - s`` times that of the other, with its own. Where a recipe
    has both ways to mix, each image is mixed in one of them, by a toss.

    Args:
        batch: Of single images.
        recipe: ``erasing``, ``mixup`` and ``cutmix``; with none of them the batch comes back as it is.
        seeds: One for each image: it decides all that is drawn for that image.

    Source:
        Zhang, Cisse, Dauphin and Lopez-Paz, mixup: Beyond Empirical Risk Minimization, ICLR 2018; Yun and others,
        CutMix, ICCV 2019.
    """
    images, targets, weights = batch
    if recipe.erasing:
        images = images.copy()
        for image, seed in zip(images, seeds, strict=True):
            rng = np.random.default_rng([*seed, _ERASE])
            if rng.random() < recipe.erasing:
                erase_rectangle(image[:, :, 0], rng)
    if not recipe.mixup and not recipe.cutmix:
        return images, targets, weights
    other = np.roll(np.arange(len(images)), -1)
    mixed, shares = images.copy(), np.empty(len(images))
    for place, seed in enumerate(seeds):
        rng = np.random.default_rng([*seed, _MIX])
        cut = recipe.cutmix and (not recipe.mixup or rng.random() < 0.5)
        strength = recipe.cutmix if cut else recipe.mixup
        share = rng.beta(strength, strength)
        if cut:
            share = _paste(mixed[place], images[other[place]], share, rng)
        else:
            mixed[place] = share * images[place] + (1 - share) * images[other[place]]
        shares[place] = share
    first, second = shares * weights, (1 - shares) * weights[other]
    # The weight times the target is the sum of both images' own: so is the loss, with smoothed labels too.
    both = (first[:, None] * targets + second[:, None] * targets[other]) / (first + second)[:, None]
    return mixed, both.astype(np.float32), (first + second).astype(np.float32)


def erase_rectangle(image: NDArray[np.float32], rng: np.random.Generator) -> None:
    """Put noise of all grey levels into a rectangle of random size, shape and place.

    Args:
        image: ``[height, width]``; changed in place.
        rng: Draws of area and shape until the rectangle fits, then its place and its pixels.
    """
    height, width = image.shape
    for _ in range(_MOST_TRIES):
        area, shape = rng.uniform(*ERASED_AREA) * height * width, rng.uniform(*ERASED_SHAPE)
        tall, wide = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < tall <= height and 0 < wide <= width:
            top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
            image[top : top + tall, left : left + wide] = rng.integers(0, 256, (tall, wide))
            return


def _paste(
    image: NDArray[np.float32], other: NDArray[np.float32], share: float, rng: np.random.Generator
) -> float:
    """Put the same rectangle of another image into one, ``[height, width, 1]``; return the share that is left of it.

    Its centre is anywhere in the image, its area ``1 - share`` where it does not reach over the border.
    """
    height, width = image.shape[:2]
    side = math.sqrt(1 - share)
    middle = rng.uniform(size=2) * (height, width)
    half = np.array([height, width]) * side / 2
    (top, left), (bottom, right) = (
        np.clip(np.floor(edge + 0.5), 0, (height, width)).astype(int)
        for edge in (middle - half, middle + half)
    )
    image[top:bottom, left:right] = other[top:bottom, left:right]
    return float(1 - (bottom - top) * (right - left) / (height * width))
