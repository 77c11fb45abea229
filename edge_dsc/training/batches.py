"""Random flips, rotations, zooms and moves, one draw for each (seed, epoch, image), and the batches made of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from edge_dsc.training.recipes import Recipe

Array = Any


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The training images, ready to be drawn in batches.

    Attributes:
        pixels: ``uint8 [N, height, width, 1]``.
        targets: Class indices ``int [N]``.
        weights: Weight of each image's loss, ``float32 [N]``.
        classes: Number of classes.
        recipe: Batch size and augmentation.
        seed: Decides order and augmentation.
    """

    pixels: Array
    targets: Array
    weights: Array
    classes: int
    recipe: Recipe
    seed: int

    @property
    def size(self) -> int:
        """Images a step."""
        return min(self.recipe.batch, len(self.pixels))

    @property
    def steps(self) -> int:
        """Whole batches an epoch; the remainder, another one every epoch, is left out."""
        return len(self.pixels) // self.size

    def of_epoch(self, epoch: int) -> Iterator[tuple[Array, Array, Array]]:
        """Yield an epoch's batches; the next one is made while the caller uses the last.

        Args:
            epoch: Counted from 0; with the seed it decides everything.

        Yields:
            Images ``float32 [B, height, width, 1]`` 0..255, one-hot targets ``float32 [B, C]``, weights ``[B]``.
        """
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.pixels))
        groups = [order[step * self.size : (step + 1) * self.size] for step in range(self.steps)]
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self._make, epoch, groups[0])
            for group in [*groups[1:], None]:
                batch = coming.result()
                if group is not None:
                    coming = pool.submit(self._make, epoch, group)
                yield batch

    def _make(self, epoch: int, indices: Array) -> tuple[Array, Array, Array]:
        images = np.empty((len(indices), *self.pixels.shape[1:]), np.float32)
        for place, index in enumerate(indices):
            rng = np.random.default_rng([self.seed, epoch, int(index)])
            images[place, :, :, 0] = augment_image(self.pixels[index, :, :, 0], self.recipe, rng)
        one_hot = np.eye(self.classes, dtype=np.float32)[self.targets[indices]]
        return images, one_hot, self.weights[indices]


def augment_image(image: Array, recipe: Recipe, rng: Any) -> Array:
    """Rotate and zoom an image about its centre, move it and perhaps mirror it; borders repeat the edge.

    Args:
        image: ``uint8 [H, W]``.
        recipe: The ranges.
        rng: ``numpy.random.Generator``; five draws are taken.

    Returns:
        ``uint8 [H, W]``, a new array.
    """
    height, width = image.shape
    angle = rng.uniform(-recipe.rotation, recipe.rotation)
    size = 1 + rng.uniform(-recipe.zoom, recipe.zoom)
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, size)
    matrix[:, 2] += rng.uniform(-recipe.shift, recipe.shift, 2) * (width, height)
    if rng.random() < 0.5 and recipe.flip:
        matrix[0] = -matrix[0]
        matrix[0, 2] += width - 1
    return cv2.warpAffine(
        image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )


def class_weights(targets: Array, classes: int) -> Array:
    """Return each image's weight, ``float32 [N]``: every class weighs the same in sum, the mean is 1."""
    counts = np.bincount(targets, minlength=classes)
    return (len(targets) / (classes * counts))[targets].astype(np.float32)
