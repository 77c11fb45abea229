"""``separate``: from a trained run to its separable twin, which learns to answer as the original does."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_dsc.data.split import SPLIT_FILE, load_split
from edge_dsc.evaluate.metrics import classification_metrics
from edge_dsc.networks import load_network, save_network
from edge_dsc.networks.separable import (
    Separation,
    SeparationOptions,
    Twin,
    match_outputs,
    separate_network,
)
from edge_dsc.training.batches import TaughtBatches
from edge_dsc.training.fit import compile_model, fit_model, predict, seed_everything
from edge_dsc.training.recipes import RECIPES, Recipe, ReportProgress, TrainOptions
from edge_dsc.training.run_folder import (
    MODEL_FILE,
    TrainingRecord,
    TrainState,
    load_training_record,
)
from edge_dsc.training.train import (
    Fitted,
    RunImages,
    TrainResult,
    check_folder,
    finish_run,
    make_batches,
    read_run_images,
)
from engines.errors import UsageError
from engines.files import KERAS_MODEL, require_writable
from engines.runtimes import Progress

if TYPE_CHECKING:
    from keras import Model

RECIPE_NAME = "twin"
LEARNING_RATE = 1e-3
TEMPERATURE = 2.0
EPOCH_SHARE = 5  # the twin is trained for a fifth of the original's epochs
_MATCH_IMAGES = 16  # on which the twin's channels get the original's mean and deviation


@dataclass(frozen=True, kw_only=True)
class TwinOptions:
    """What ``separate`` is asked for.

    Attributes:
        run: The trained run folder.
        out: The new run folder.
        separation: Rank, BatchNorm, which layers.
        data: Where the run's images are now; by default where they were at training.
        epochs: Passes over the training images; by default a fifth of the original's. 0 leaves the twin as it starts.
        seed: Decides order and augmentation.
        overwrite: Replace the run in ``out``.
    """

    run: Path
    out: Path
    separation: SeparationOptions = field(default_factory=SeparationOptions)
    data: Path | None = None
    epochs: int | None = None
    seed: int = 0
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class TwinResult:
    """What ``separate`` gave.

    Attributes:
        trained: The twin's run.
        separation: What was done to every convolution.
        validation: Accuracy on the validation images: of the original, of the twin before and after its fine-tuning.
    """

    trained: TrainResult
    separation: Separation
    validation: tuple[float, float, float]


def separate_run(
    options: TwinOptions, *, progress: ReportProgress | None = None, reading: Progress | None = None
) -> TwinResult:
    """Make the separable twin of a trained network, fine-tune it with the original as teacher, and write its run.

    The new folder holds the same split, so the images held back from the original are held back from the twin. Same
    run, images, options, seed and machine: same weights.

    Raises:
        UsageError: ``out`` is the run itself or in use, a name that no convolution has, a run in INT8.
        ArtefactError: ``run`` is no finished run.
        BadInputError: The network has nothing to separate, or the images of the run's split are not all there.
        EnvironmentProblem: A package is missing, or the folder cannot be written.
        KeyboardInterrupt: Ctrl-C before the first epoch was done.
    """
    parent = load_training_record(options.run)
    split = load_split(options.run / SPLIT_FILE)
    data = options.data or split.root
    settings, recipe = _settings(options, parent, data), _recipe(options, parent)
    check_folder(settings)
    original = load_network(options.run / MODEL_FILE, parent.architecture, len(parent.labels))
    twin = separate_network(original, options.separation, name=settings.architecture)
    images = read_run_images(data, split, run=options.run, reading=reading)
    require_writable(options.out / MODEL_FILE, KERAS_MODEL)  # said before an epoch is trained
    seed_everything(options.seed)
    started = time.monotonic()
    state = TrainState()
    batches = TaughtBatches(**vars(make_batches(images, recipe, options.seed)), teacher=original)
    stride = max(1, len(batches.pixels) // _MATCH_IMAGES)
    match_outputs(twin, batches.pixels[::stride][:_MATCH_IMAGES].astype(np.float32))
    before = [_validation_accuracy(model, images) for model in (original, twin.model)]
    interrupted = False
    if recipe.epochs:
        compile_model(twin.model, recipe, batches.steps)
        interrupted = fit_model(twin.model, batches, images.pixels["validation"], state, progress)
    fitted = Fitted(
        model=twin.model,
        recipe=recipe,
        state=state,
        interrupted=interrupted,
        seconds=time.monotonic() - started,
        parent_sha256=parent.model_sha256,
        separation=twin.separation,
    )
    after = _validation_accuracy(twin.model, images)
    trained = finish_run(settings, images, fitted)
    return TwinResult(trained=trained, separation=twin.separation, validation=(before[0], before[1], after))


def _settings(options: TwinOptions, parent: TrainingRecord, data: Path) -> TrainOptions:
    if os.path.realpath(options.out) == os.path.realpath(options.run):
        raise UsageError(f"{options.out} is the run to start from", remedy="give another folder with --out")
    if options.epochs is not None and options.epochs < 0:
        raise UsageError(f"{options.epochs} epochs", remedy="give 0 or more")
    return TrainOptions(
        data=data,
        out=options.out,
        architecture=_name_of_twin(parent.architecture),
        epochs=options.epochs,
        seed=options.seed,
        overwrite=options.overwrite,
    )


def _recipe(options: TwinOptions, parent: TrainingRecord) -> Recipe:
    """Return the parent's recipe, its batches and its augmentation, as a network needs it that is trained already."""
    known = {name: value for name, value in parent.recipe.items() if name in Recipe.__dataclass_fields__}
    base = Recipe(**{**asdict(RECIPES["default"]["dsc"]), **known})
    return replace(
        base,
        name=RECIPE_NAME,
        epochs=max(1, base.epochs // EPOCH_SHARE) if options.epochs is None else options.epochs,
        learning_rate=LEARNING_RATE,
        warmup=1,
        cosine=True,
        label_smoothing=0.0,
        dense_start=False,
        convolution_start=False,
        temperature=TEMPERATURE,
    )


def _validation_accuracy(model: Model, images: RunImages) -> float:
    pixels, targets = images.pixels["validation"]
    return classification_metrics(targets, predict(model, pixels), images.split.labels).accuracy
