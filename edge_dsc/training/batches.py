"""Random flips, rotations, zooms and moves, one draw for each (seed, epoch, image), and the batches made of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_dsc.infer.classify import calibrate_probabilities
from edge_dsc.training.mixing import Batch, mix_batch
from edge_dsc.training.recipes import Recipe

if TYPE_CHECKING:
    from keras import Model

SMALLEST_PROBABILITY = 1e-7  # as in Keras' cross-entropy: its logarithm is a number


@dataclass(frozen=True, kw_only=True, eq=False)
class Batches:
    """The training images, ready to be drawn in batches.

    Attributes:
        pixels: ``[N, height, width, 1]``, raw 0..255.
        targets: Class indices ``[N]``.
        weights: Weight of each image's loss, ``[N]``.
        classes: Number of classes.
        recipe: Batch size and augmentation.
        seed: Decides order and augmentation.
        teachers: Networks whose mean answer to each image, as it is shown, stands behind its label; softened by the
            recipe's temperature.
    """

    pixels: NDArray[np.uint8]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    classes: int
    recipe: Recipe
    seed: int
    teachers: tuple[Model, ...] = ()

    @property
    def shown(self) -> int:
        """Images that an epoch draws from."""
        return len(self.pixels)

    @property
    def size(self) -> int:
        """Images in each step."""
        return min(self.recipe.batch, self.shown)

    @property
    def steps(self) -> int:
        """Whole batches in each epoch; the remainder, other images every epoch, is left out."""
        return self.shown // self.size

    def of_epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield an epoch's batches; the next one is made while the caller uses the last.

        Args:
            epoch: Counted from 0; with the seed it decides everything.
        """
        order = np.random.default_rng([self.seed, epoch]).permutation(self.shown)
        order = self._members(epoch)[order]
        groups = [order[step * self.size : (step + 1) * self.size] for step in range(self.steps)]
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self._make, epoch, groups[0])
            for group in [*groups[1:], None]:
                batch = coming.result()
                if group is not None:
                    coming = pool.submit(self._make, epoch, group)
                yield self._taught(batch) if self.teachers else batch

    def _taught(self, batch: Batch) -> Batch:
        images, targets, weights = batch
        answers = np.mean([teacher.predict_on_batch(images) for teacher in self.teachers], axis=0)
        return images, np.concatenate([targets, soften(answers, self.recipe.temperature)], axis=1), weights

    def _members(self, epoch: int) -> NDArray[np.int64]:
        """Return the images that an epoch draws from, as indices ``[shown]``."""
        return np.arange(self.shown)

    def _make(self, epoch: int, indices: NDArray[np.int64]) -> Batch:
        shape = (len(indices), *self.pixels.shape[1:])
        images = np.empty(shape, np.float32)
        for place, index in enumerate(indices):
            rng = np.random.default_rng([self.seed, epoch, int(index)])
            image = self.pixels[index, :, :, 0]
            images[place, :, :, 0] = (
                augment_image(image, self.recipe, rng) if self.recipe.augmentation else image
            )
        one_hot = np.eye(self.classes, dtype=np.float32)[self.targets[indices]]
        seeds = [(self.seed, epoch, int(index)) for index in indices]
        return mix_batch((images, one_hot, self.weights[indices]), self.recipe, seeds)


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedBatches(Batches):
    """Real images with synthetic ones behind them, of which each epoch draws some, others every time.

    Attributes:
        made: How many of the last pixels are synthetic.
        mixed: How many of these an epoch draws.
    """

    made: int
    mixed: int

    @property
    def shown(self) -> int:
        """Images that an epoch draws from: all real ones, and some of the synthetic ones."""
        return len(self.pixels) - self.made + self.mixed

    def _members(self, epoch: int) -> NDArray[np.int64]:
        real = len(self.pixels) - self.made
        rng = np.random.default_rng([self.seed, epoch, len(self.pixels)])  # no image has that number
        drawn = rng.choice(self.made, self.mixed, replace=False)
        return np.concatenate([np.arange(real), real + drawn])


def mix_in(batches: Batches, synthetic: NDArray[np.uint8], target: int, share: float) -> MixedBatches:
    """Add synthetic images of one class, so many that they are a share of that class's images in every epoch.

    Args:
        batches: The real images.
        synthetic: ``[N, height, width, 1]``, raw 0..255; where there are too few, all of them.
        target: Index of their class.
        share: Between 0 and 1; at least one image is mixed in.
    """
    real = int((batches.targets == target).sum())
    mixed = min(len(synthetic), max(1, round(real * share / (1 - share))))
    targets = np.concatenate([batches.targets, np.full(len(synthetic), target)])
    weights = np.ones(len(targets), np.float32)
    if batches.recipe.class_weights:  # by the images that an epoch shows
        shown = class_weights(targets[: len(batches.targets) + mixed], batches.classes)
        weights = np.concatenate([shown, np.full(len(synthetic) - mixed, shown[-1])])
    all_pixels = np.concatenate([batches.pixels, synthetic])
    own = {**vars(batches), "pixels": all_pixels, "targets": targets, "weights": weights}
    return MixedBatches(**own, made=len(synthetic), mixed=mixed)


@dataclass(frozen=True, kw_only=True, eq=False)
class TaughtBatches(Batches):
    """Training images whose targets are the answers of the network that is to be followed, not their labels.

    What is made of a trained network, in INT8 or with other convolutions, shall answer as it does; labels would move it
    elsewhere, and its answers with it.
    Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, arXiv 1503.02531 (2015); for
    quantised networks Mishra and Marr, Apprentice, ICLR 2018.

    Attributes:
        teacher: The network to follow; takes the images as they are and gives probabilities.
    """

    teacher: Model

    def of_epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield an epoch's batches, see :meth:`Batches.of_epoch`, with the teacher's probabilities as targets."""
        for images, _, weights in super().of_epoch(epoch):
            answers = self.teacher.predict_on_batch(images)
            yield images, soften(answers, self.recipe.temperature), weights


def soften(probabilities: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """Return the softmax of the logits over a temperature, from the probabilities: above 1 the unlikely weigh more."""
    if temperature == 1.0:
        return probabilities
    return calibrate_probabilities(np.maximum(probabilities, SMALLEST_PROBABILITY), temperature)


def augment_image(image: NDArray[np.uint8], recipe: Recipe, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Rotate and zoom an image about its centre, move it and perhaps mirror it; borders repeat the edge.

    Args:
        image: ``[H, W]``.
        recipe: The ranges.
        rng: Five draws are taken, and a sixth where images are mirrored top to bottom.

    Returns:
        ``[H, W]``, a new array.
    """
    height, width = image.shape
    angle = rng.uniform(-recipe.rotation, recipe.rotation)
    size = 1 + rng.uniform(-recipe.zoom, recipe.zoom)
    centre = ((width - 1) / 2, (height - 1) / 2)
    matrix: NDArray[np.float64] = np.asarray(cv2.getRotationMatrix2D(centre, angle, size), np.float64)
    matrix[:, 2] += rng.uniform(-recipe.shift, recipe.shift, 2) * (width, height)
    if rng.random() < 0.5 and recipe.flip:
        matrix[0] = -matrix[0]
        matrix[0, 2] += width - 1
    if recipe.flip_vertical and rng.random() < 0.5:
        matrix[1] = -matrix[1]
        matrix[1, 2] += height - 1
    moved = cv2.warpAffine(
        image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return np.asarray(moved, np.uint8)


def class_weights(targets: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """Return each image's weight, ``[N]``: every class weighs the same in sum, the mean is 1."""
    counts = np.bincount(targets, minlength=classes)
    return (len(targets) / (classes * counts))[targets].astype(np.float32)
