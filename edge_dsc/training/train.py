"""A training run from a folder of images to a complete run folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from edge_dsc.data.discover import Dataset, discover
from edge_dsc.data.loading import LoadedImages, load_images
from edge_dsc.data.split import SPLIT_FILE, Split, save_split, split_dataset
from edge_dsc.evaluate.metrics import Metrics, classification_metrics
from edge_dsc.networks import build_network, feature_extractor_parameters, save_network
from edge_dsc.page.figures import draw_confusion, draw_curves
from edge_dsc.training import run_folder as records
from edge_dsc.training.batches import Batches, class_weights
from edge_dsc.training.fit import (
    compile_model,
    fit_model,
    predict,
    seed_everything,
    start_convolutions,
    start_dense,
)
from edge_dsc.training.recipes import Recipe, ReportProgress, TrainOptions, TrainProgress
from edge_dsc.training.run_folder import STATE_FILE, TrainState, load_state, save_state
from engines.contract import ModelContract
from engines.errors import ArtefactError, UsageError
from engines.files import atomic_path, sha256_file, write_document
from engines.runtimes import Progress

Array = Any
Model = Any


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training run gave.

    Attributes:
        run: The run folder.
        record: Its record.
        metrics: By part: ``evaluation``, ``test`` and ``held_out``, both together.
        split: Which image is on which side.
    """

    run: Path
    record: records.TrainingRecord
    metrics: dict[str, Metrics]
    split: Split


@dataclass(frozen=True, kw_only=True)
class RunImages:
    """The images of a run.

    Attributes:
        split: Which image is on which side.
        pixels: Of each part: ``uint8 [N, height, width, 1]`` and class indices ``int [N]``.
        skipped: Damaged images: (path, reason).
    """

    split: Split
    pixels: dict[str, tuple[Array, Array]]
    skipped: tuple[tuple[str, str], ...]


def finish_run(
    options: TrainOptions,
    model: Model,
    images: RunImages,
    state: TrainState,
    *,
    interrupted: bool,
    seconds: float,
    deployed: Model | None = None,
    parent_sha256: str | None = None,
) -> TrainResult:
    """Measure a trained network on the images held back and write its run folder; ``training.json`` comes last.

    Args:
        options: What the run was asked for.
        model: The network with its best weights; it is the one that is measured.
        images: The split and its pixels.
        state: History and best epoch.
        interrupted: Whether the user ended it early; then ``state.npz`` stays.
        seconds: Time of training.
        deployed: What to write as ``model.keras`` instead of ``model``.
        parent_sha256: Hash of the ``model.keras`` that was trained further.
    """
    out, split = options.out, images.split
    metrics = _measure(model, images)
    save_split(split, out / SPLIT_FILE)
    with atomic_path(out / records.MODEL_FILE) as temporary:
        save_network(deployed or model, temporary)
    model_sha256 = sha256_file(out / records.MODEL_FILE)
    write_document(
        out / records.METRICS_FILE,
        records.METRICS_KIND,
        records.METRICS_SCHEMA_VERSION,
        {"model_sha256": model_sha256, **{part: figures.to_dict() for part, figures in metrics.items()}},
    )
    draw_curves(state.history, out / "curves.png", best_epoch=state.best_epoch)
    draw_confusion(
        metrics["held_out"], out / "confusion.png", title=f"{options.architecture}, evaluation and test"
    )
    record = records.TrainingRecord(
        architecture=options.architecture,
        labels=split.labels,
        recipe=state.settings["recipe"],
        seed=options.seed,
        split_sha256=split.sha256,
        model_sha256=model_sha256,
        parameters={
            "feature_extractor": feature_extractor_parameters(model),
            "trainable": sum(int(weight.shape.num_elements()) for weight in model.trainable_weights),
            "total": sum(int(weight.shape.num_elements()) for weight in model.weights),
        },
        history=state.history,
        best_epoch=state.best_epoch,
        interrupted=interrupted,
        skipped=images.skipped,
        seconds=round(seconds, 3),
        versions=records.package_versions(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        parent_sha256=parent_sha256,
    )
    records.save_training_record(out, record)
    if not interrupted:
        with contextlib.suppress(OSError):
            (out / STATE_FILE).unlink()
    return TrainResult(run=out, record=record, metrics=metrics, split=split)


def _measure(model: Model, images: RunImages) -> dict[str, Metrics]:
    labels = images.split.labels
    answers = {part: predict(model, images.pixels[part][0]) for part in ("evaluation", "test")}
    truth = {part: images.pixels[part][1] for part in answers}
    answers["held_out"] = np.concatenate([answers["evaluation"], answers["test"]])
    truth["held_out"] = np.concatenate([truth["evaluation"], truth["test"]])
    return {part: classification_metrics(truth[part], answers[part], labels) for part in answers}


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
    has_state, has_record = (out / STATE_FILE).exists(), (out / records.RECORD_FILE).exists()
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
    place = {sample.path: index for index, sample in enumerate(loaded.samples)}
    parts = {}
    for part, samples in split.parts.items():
        targets = np.array([found.labels.index(sample.label) for sample in samples])
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
    pixels, targets = images.pixels["train"]
    classes = len(images.split.labels)
    weights = class_weights(targets, classes) if recipe.class_weights else np.ones(len(targets), np.float32)
    return Batches(pixels=pixels, targets=targets, weights=weights, classes=classes, recipe=recipe, seed=seed)


def step_progress(architecture: str, progress: Progress) -> Callable[[TrainProgress], None]:
    """Return training's callback that feeds a progress bar: epoch, loss, accuracy, time left."""

    def report(state: TrainProgress) -> None:
        validation = ""
        if state.validation_accuracy is not None:
            validation = f", validation {state.validation_accuracy:.1%}"
        minutes, seconds = divmod(round(state.seconds_left), 60)
        detail = (
            f"epoch {state.epoch}/{state.epochs}, loss {state.loss:.3f}, accuracy {state.accuracy:.1%}"
            f"{validation}, {minutes}:{seconds:02} left"
        )
        done = (state.epoch - 1) * state.steps + state.step
        progress(f"training {architecture}\t{detail}", done, state.epochs * state.steps)

    return report
