"""What a training run is asked for: recipes and options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from edge_dsc.networks import ARCHITECTURES
from engines.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        name: Its name on the command line.
        epochs: Passes over the training images.
        batch: Images in each step.
        learning_rate: Adam's, at the start.
        warmup: Epochs in which the learning rate climbs to that.
        cosine: Whether the learning rate then falls to zero along half a cosine.
        dense_rate: The Dense(64) layer's share of the learning rate. It sums 6,272 features that are all
            positive, so at the full rate a step of Adam moves a unit by several units of its own size, and
            half of the units die.
        dense_start: Whether that layer starts with all units alive: kernel N(0, 0.004), bias 0.5.
        class_weights: Whether rare classes weigh more, so that all classes weigh the same in sum.
        label_smoothing: Share of the target spread over all classes.
        temperature: Of a teacher's answers, and of those that are held against them; 1 without a teacher.
        convolution_start: Whether convolutions without BatchNorm start with outputs of mean 0, deviation 1.
        flip: Whether half of the images are mirrored left to right.
        rotation: Largest rotation, degrees, either way.
        zoom: Largest change of size, as a share, either way.
        shift: Largest move, as a share of the side, either way and in both directions.
    """

    name: str
    epochs: int
    batch: int
    learning_rate: float
    warmup: int = 0
    cosine: bool
    class_weights: bool
    label_smoothing: float
    dense_rate: float = 1.0
    dense_start: bool = False
    convolution_start: bool = False
    flip: bool = True
    rotation: float
    zoom: float
    shift: float = 0.0
    temperature: float = 1.0


_DEFAULT = Recipe(
    name="default",
    epochs=90,
    batch=16,
    learning_rate=3e-3,
    warmup=1,
    cosine=True,
    class_weights=True,
    label_smoothing=0.05,
    dense_rate=0.02,
    dense_start=True,
    convolution_start=True,
    rotation=10.0,
    zoom=0.15,
    shift=0.05,
)
# For phantoms and first looks: more and smaller steps, fewer epochs.
_QUICK = replace(
    _DEFAULT,
    name="quick",
    epochs=12,
    batch=8,
    learning_rate=2e-3,
    dense_rate=0.05,
    rotation=7.0,
    zoom=0.1,
    shift=0.0,
)
# Source: the paper, Table 1. It names flips, rotation and zoom without their ranges.
_PAPER = Recipe(
    name="paper",
    epochs=50,
    batch=32,
    learning_rate=1e-4,
    cosine=False,
    class_weights=False,
    label_smoothing=0.0,
    rotation=10.0,
    zoom=0.1,
)
# Without BatchNorm the conventional network bears a third of the separable one's learning rate.
RECIPES: dict[str, dict[str, Recipe]] = {
    "default": {"dsc": _DEFAULT, "cnn": replace(_DEFAULT, learning_rate=1e-3)},
    "quick": {"dsc": _QUICK, "cnn": replace(_QUICK, learning_rate=1e-3)},
    "paper": {"dsc": _PAPER, "cnn": _PAPER},
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What a training run is asked for.

    Attributes:
        data: Folder of class folders.
        out: The run folder.
        architecture: ``dsc`` or ``cnn``.
        recipe: Name of a recipe.
        epochs: Instead of the recipe's.
        seed: Decides the split, the first weights, the order and the augmentation.
        resume: Go on with the unfinished run in ``out``.
        overwrite: Replace the run in ``out``.
    """

    data: Path
    out: Path
    architecture: str = "dsc"
    recipe: str = "default"
    epochs: int | None = None
    seed: int = 0
    resume: bool = False
    overwrite: bool = False

    def resolve_recipe(self) -> Recipe:
        """Return the recipe with the epochs asked for.

        Raises:
            UsageError: Unknown recipe or network, epochs below 1, a negative seed, resume with overwrite.
        """
        if self.architecture not in ARCHITECTURES:
            names = ", ".join(ARCHITECTURES)
            raise UsageError(f"there is no network {self.architecture!r}", remedy=f"choose one of {names}")
        if self.recipe not in RECIPES:
            raise UsageError(
                f"there is no recipe {self.recipe!r}", remedy=f"choose one of {', '.join(RECIPES)}"
            )
        if self.epochs is not None and self.epochs < 1:
            raise UsageError(f"{self.epochs} epochs", remedy="train for at least 1")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"the seed {self.seed}", remedy="choose one from 0 to 4294967295")
        if self.resume and self.overwrite:
            raise UsageError("resume and overwrite exclude each other", remedy="give one of them")
        recipe = RECIPES[self.recipe][self.architecture]
        return recipe if self.epochs is None else replace(recipe, epochs=self.epochs)


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """Where training stands; reported after every step.

    Attributes:
        epoch: Counted from 1.
        epochs: In all.
        step: Within the epoch, counted from 1.
        steps: In each epoch.
        loss: Mean over the epoch's steps so far.
        accuracy: The same, on augmented images.
        validation_accuracy: After the last whole epoch; None in the first.
        seconds_left: Estimated from the steps of this call.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    validation_accuracy: float | None
    seconds_left: float


ReportProgress = Callable[[TrainProgress], None]
