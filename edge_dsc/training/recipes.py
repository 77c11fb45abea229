"""What a training run is asked for: recipes and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from edge_dsc.networks import NetworkChoice
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
        convolution_start: Whether convolutions without BatchNorm start with outputs of mean 0, deviation 1.
        flip: Whether half of the images are mirrored left to right.
        flip_vertical: Whether half of the images are mirrored top to bottom.
        rotation: Largest rotation, degrees, either way.
        zoom: Largest change of size, as a share, either way.
        shift: Largest move, as a share of the side, either way and in both directions.
        augmentation: Whether images are moved and mirrored at all; without, all ranges are zero.
        temperature: Of a teacher's answers, and of those that are held against them; 1 without a teacher.
        mixup: Strength of mixing whole images (:mod:`edge_dsc.training.mixing`): both ends of a Beta distribution; 0
            mixes none.
        cutmix: The same of pasting a rectangle of one image into another.
        erasing: Share of the images in which a rectangle becomes noise.
        weight_decay: Share of each kernel that is taken off it in every step, times the step's learning rate.
        distillation: Share of the loss that holds the answers against those of teachers, beside the labels.
        fixed: Whether the schedule is fixed: the last epoch's weights are kept, no image is held back to choose an
            epoch, and the validation images train.
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
    flip_vertical: bool = False
    rotation: float
    zoom: float
    shift: float = 0.0
    augmentation: bool = True
    temperature: float = 1.0
    fixed: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0
    weight_decay: float = 0.0
    distillation: float = 0.0

    def without_augmentation(self) -> Recipe:
        """Return the same recipe with images as they are."""
        return replace(
            self, flip=False, flip_vertical=False, rotation=0.0, zoom=0.0, shift=0.0, augmentation=False
        )


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
# Source: the paper, Table 1; flips "horizontal and vertical" are its text's.
_PAPER = Recipe(
    name="paper",
    epochs=50,
    batch=32,
    learning_rate=1e-4,
    cosine=False,
    class_weights=False,
    label_smoothing=0.0,
    flip_vertical=True,
    rotation=1.0,
    zoom=0.05,
)
# The paper's text gives other ranges than its table, and everything else alike.
_PAPER_TEXT = replace(_PAPER, name="paper-text", rotation=2.0, zoom=0.1)
MOST_STRENGTH = 100.0  # of mixing and of decay: far beyond any use
MOST_TEMPERATURE = 100.0
OTHER = "other"  # every network but the paper's two


def _for_others(recipe: Recipe) -> Recipe:
    """Leave out what is for the two networks' own layers: 6,272 features that are all positive, no BatchNorm."""
    return replace(recipe, learning_rate=1e-3, dense_rate=1.0, dense_start=False, convolution_start=False)


# Without BatchNorm the conventional network bears a third of the separable one's learning rate.
RECIPES: dict[str, dict[str, Recipe]] = {
    "default": {
        "dsc": _DEFAULT,
        "cnn": replace(_DEFAULT, learning_rate=1e-3),
        OTHER: _for_others(_DEFAULT),
    },
    "quick": {
        "dsc": _QUICK,
        "cnn": replace(_QUICK, learning_rate=1e-3),
        OTHER: _for_others(_QUICK),
    },
    "paper": {"dsc": _PAPER, "cnn": _PAPER, OTHER: _PAPER},
    "paper-text": {"dsc": _PAPER_TEXT, "cnn": _PAPER_TEXT, OTHER: _PAPER_TEXT},
}


@dataclass(frozen=True, kw_only=True)
class Ingredients:
    """What may be added to any recipe; nothing is by default. The names are those of :class:`Recipe`.

    Attributes:
        mixup: 0 and more; 0.2 is usual.
        cutmix: 0 and more; 1 is usual.
        erasing: 0 to 1.
        weight_decay: 0 and more, with the learning rate below 1 in sum.
        distillation: 0 to 1, above 0 with teachers alone.
        temperature: At least 1, above 1 with teachers alone.

    Raises:
        UsageError: Another value.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0
    weight_decay: float = 0.0
    distillation: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check the values."""
        ends = {"erasing": (0, 1), "distillation": (0, 1), "temperature": (1, MOST_TEMPERATURE)}
        for name, value in asdict(self).items():
            low, high = ends.get(name, (0, MOST_STRENGTH))
            if not low <= value <= high:
                raise UsageError(
                    f"--{name.replace('_', '-')} {value:g}", remedy=f"give a number from {low} to {high:g}"
                )


NO_INGREDIENTS = Ingredients()
TEACHING = {"distillation": 0.5, "temperature": 2.0}  # where teachers are named and nothing else is said


def add_ingredients(added: Mapping[str, float], *, taught: bool) -> Ingredients:
    """Return what is added to a recipe, with the usual share and temperature where teachers are named.

    Raises:
        UsageError: A value that is none, or one for teachers without any.
    """
    alone = sorted(set(TEACHING) & set(added))
    if alone and not taught:
        raise UsageError(f"--{alone[0]} is for --teacher", remedy="name a finished run, or leave it out")
    return Ingredients(**{**(TEACHING if taught else {}), **added})


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What a training run is asked for.

    Attributes:
        data: Folder of class folders.
        out: The run folder.
        architecture: As :attr:`edge_dsc.networks.NetworkChoice.architecture`.
        size: As :attr:`edge_dsc.networks.NetworkChoice.size`.
        weights: As :attr:`edge_dsc.networks.NetworkChoice.weights`.
        unfreeze: As :attr:`edge_dsc.networks.NetworkChoice.unfreeze`.
        recipe: Name of a recipe.
        epochs: Instead of the recipe's.
        augmentation: Whether the recipe may change images.
        seed: Decides the split, the first weights, the order and the augmentation.
        fold: Hold out fold K of N: (K, N), K counted from 1.
        keep_split: Keep the split that the folder comes in.
        kinds: As :func:`edge_dsc.data.discover.list_images` takes it.
        last: Keep the last epoch's weights, so that the validation images train too.
        ingredients: What is added to the recipe.
        teachers: Finished runs of other networks over the same images, whose answers are followed beside the labels.
        refit: A finished run whose recipe is trained again, on all of its images; the network is the run's own, and
            what names another way to train or to split is not given, but for teachers where it had some.
        synthetic: A folder that ``synthesize`` wrote, whose images are mixed in.
        synthetic_share: Of the images of their class in every epoch, between 0 and 1.
        resume: Go on with the unfinished run in ``out``.
        overwrite: Replace the run in ``out``.
    """

    data: Path
    out: Path
    architecture: str = "dsc"
    size: int | None = None
    weights: str | None = None
    unfreeze: int | None = None
    recipe: str = "default"
    epochs: int | None = None
    augmentation: bool = True
    seed: int = 0
    fold: tuple[int, int] | None = None
    keep_split: bool = False
    kinds: bool | None = None
    last: bool = False
    ingredients: Ingredients = NO_INGREDIENTS
    teachers: tuple[Path, ...] = ()
    refit: Path | None = None
    synthetic: Path | None = None
    synthetic_share: float = 0.3
    resume: bool = False
    overwrite: bool = False

    @property
    def network(self) -> NetworkChoice:
        """The network that is asked for."""
        return NetworkChoice(
            architecture=self.architecture, size=self.size, weights=self.weights, unfreeze=self.unfreeze
        )

    def resolve_recipe(self) -> Recipe:
        """Return the recipe with the epochs asked for, and without augmentation where that is asked for.

        Raises:
            UsageError: Unknown recipe, epochs below 1, a negative seed, a share that is none, options that exclude or
                need each other.
        """
        if self.recipe not in RECIPES:
            raise UsageError(
                f"there is no recipe {self.recipe!r}", remedy=f"choose one of {', '.join(RECIPES)}"
            )
        if self.epochs is not None and self.epochs < 1:
            raise UsageError(f"{self.epochs} epochs", remedy="train for at least 1")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"the seed {self.seed}", remedy="choose one from 0 to 4294967295")
        if not 0 < self.synthetic_share < 1:
            raise UsageError(
                f"a share of {self.synthetic_share:g} synthetic images", remedy="choose one between 0 and 1"
            )
        if self.synthetic is not None and self.refit is not None:
            raise UsageError(
                "a refit takes the images of its run, and no synthetic ones", remedy="leave --synthetic out"
            )
        if self.resume and self.overwrite:
            raise UsageError("resume and overwrite exclude each other", remedy="give one of them")
        if self.fold and self.keep_split:
            raise UsageError("--fold and --keep-split exclude each other", remedy="give one of them")
        taught = self.ingredients.distillation > 0
        if self.refit is None and taught != bool(self.teachers):
            raise UsageError(
                "a teacher needs a share of the loss, and the share a teacher",
                remedy="give --teacher RUN, with --distillation above 0",
            )
        by_network = RECIPES[self.recipe]
        recipe = replace(
            by_network.get(self.architecture, by_network[OTHER]), fixed=self.last, **asdict(self.ingredients)
        )
        if not self.augmentation:
            recipe = recipe.without_augmentation()
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
