"""A training run from a folder of images to a run folder."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from edge_dsc.data.discover import Dataset, discover
from edge_dsc.data.loading import LoadedImages, load_images
from edge_dsc.data.split import Split, split_dataset
from edge_dsc.networks import build_network
from edge_dsc.training import record as records
from edge_dsc.training.augmentation import Batches, class_weights
from edge_dsc.training.completion import RunImages, TrainResult, finish_run
from edge_dsc.training.loop import fit_model, seed_everything
from edge_dsc.training.optimization import compile_model, start_convolutions, start_dense
from edge_dsc.training.options import Recipe, ReportProgress, TrainOptions
from edge_dsc.training.state import FILE as STATE_FILE
from edge_dsc.training.state import TrainState, load_state, save_state
from engines.contract import ModelContract
from engines.errors import ArtefactError, UsageError
from engines.packages import load
from engines.runtimes import Progress

Array = Any
Model = Any


def train(
    options: TrainOptions, *, progress: ReportProgress | None = None, reading: Progress | None = None
) -> TrainResult:
    """Train a network and write its run folder.

    The folder is complete when ``training.json`` is there. Until then ``state.npz`` holds the last whole
    epoch, from which ``resume`` goes on to the same weights, bit for bit. Ctrl-C after the first epoch ends
    training early, keeps the best weights so far and completes the folder; ``state.npz`` stays for ``resume``.

    Args:
        options: What to do.
        progress: Called after every step.
        reading: Called while the images are read.

    Raises:
        UsageError: Options that cannot be met, or a run folder in use.
        BadInputError: The data cannot be used.
        ArtefactError: A state that cannot be resumed.
        EnvironmentProblem: A package is missing, or the run folder cannot be written.
        KeyboardInterrupt: Ctrl-C before the first epoch was done.
    """
    recipe = options.resolve_recipe()
    check_folder(options)
    images = _read_images(options, reading)
    state = _begin(options, recipe, images.split)
    seed_everything(options.seed)
    model = build_network(options.architecture, len(images.split.labels))
    batches = make_batches(images, recipe, options.seed)
    if recipe.convolution_start:
        start_convolutions(model, batches.pixels[:: max(1, len(batches.pixels) // 16)][:16])
    if recipe.dense_start:
        start_dense(model, options.seed)
    compile_model(model, recipe, batches.steps)
    started = time.monotonic()
    interrupted = fit_model(
        model,
        batches,
        images.pixels["validation"],
        state,
        save=lambda state: save_state(options.out / STATE_FILE, state),
        progress=progress,
    )
    seconds = time.monotonic() - started
    return finish_run(options, model, images, state, interrupted=interrupted, seconds=seconds)


def check_folder(options: TrainOptions) -> None:
    """Refuse a run folder that is in use, or one without a run to resume.

    Raises:
        UsageError: It is.
    """
    out = options.out
    has_state, has_record = (out / STATE_FILE).exists(), (out / records.FILE).exists()
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is not a folder", remedy="choose another run folder with --out")
    if options.resume and not has_state:
        what = "holds a finished run" if has_record else "holds no run"
        raise UsageError(f"{out} {what}, there is nothing to resume", remedy="train without --resume")
    if options.resume or options.overwrite:
        return
    if has_state:
        raise UsageError(
            f"{out} holds an unfinished run",
            remedy="go on with --resume, begin anew with --overwrite, or give --out",
        )
    if has_record:
        raise UsageError(
            f"{out} holds a finished run", remedy="choose another --out, or replace it with --overwrite"
        )


def _read_images(options: TrainOptions, reading: Progress | None) -> RunImages:
    """Read everything, leave out what is damaged, and split the rest."""
    found = discover(options.data)
    contract = ModelContract(labels=found.labels, architecture=options.architecture)
    loaded = load_images(found.root, found.samples, contract, progress=reading)
    split = split_dataset(replace(found, samples=loaded.samples), options.seed)
    return RunImages(split=split, pixels=pixels_by_part(loaded, split, found), skipped=loaded.skipped)


def pixels_by_part(loaded: LoadedImages, split: Split, found: Dataset) -> dict[str, tuple[Array, Array]]:
    """Return the pixels and class indices of each part of a split."""
    numpy = load("numpy")
    place = {sample.path: index for index, sample in enumerate(loaded.samples)}
    parts = {}
    for part, samples in split.parts.items():
        targets = numpy.array([found.labels.index(sample.label) for sample in samples])
        parts[part] = (loaded.pixels[[place[sample.path] for sample in samples]], targets)
    return parts


def _begin(options: TrainOptions, recipe: Recipe, split: Split) -> TrainState:
    settings = {
        "architecture": options.architecture,
        "recipe": recipe.to_dict(),
        "seed": options.seed,
        "split_sha256": split.sha256,
    }
    if not options.resume:
        return TrainState(settings=settings)
    state = load_state(options.out / STATE_FILE)
    begun = dict(state.settings)
    if begun == settings:
        return state
    if {**begun, "split_sha256": split.sha256} == settings:
        raise ArtefactError(
            f"the images in {options.data} changed since {options.out} was begun",
            remedy="restore them, or begin anew with --overwrite",
        )
    given = begun["recipe"]
    raise UsageError(
        f"{options.out} was begun with other options",
        remedy=f"resume it with --arch {begun['architecture']} --recipe {given['name']} "
        f"--epochs {given['epochs']} --seed {begun['seed']}",
    )


def make_batches(images: RunImages, recipe: Recipe, seed: int) -> Batches:
    """Return the training images as the recipe wants them drawn."""
    numpy = load("numpy")
    pixels, targets = images.pixels["train"]
    classes = len(images.split.labels)
    weights = (
        class_weights(targets, classes) if recipe.class_weights else numpy.ones(len(targets), numpy.float32)
    )
    return Batches(pixels=pixels, targets=targets, weights=weights, classes=classes, recipe=recipe, seed=seed)
